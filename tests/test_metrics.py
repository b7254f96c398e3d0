"""Seen to fail when: lines after the resumed step are kept; a damaged line ends the reading; a missing logger is found
out after the run has begun; TensorBoard keeps the steps that a resumed run repeats."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from topkapi.errors import TopkapiError
from topkapi.metrics import MetricsLog
from topkapi.train import train


def write(run, steps, after_step=0, loggers=()):
    log = MetricsLog(run, loggers, {"some": "config"}, after_step=after_step)
    for step in steps:
        log.write(step=step, tokens=10 * step, mse=1 / step)
    log.sync()
    log.close()


def steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_resumed_step_give_way(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(6, 10), after_step=5)
    assert steps(tmp_path) == list(range(1, 10))


def test_a_line_cut_short_and_a_damaged_one_are_left_out(tmp_path):
    write(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes().replace(b'{"step": 2', b'\xff"step": 2') + b'{"step": 5, "ms'
    path.write_bytes(content)
    write(tmp_path, [5], after_step=5)
    assert steps(tmp_path) == [1, 3, 4, 5]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path, (), {})
    log.write(step=1, tokens=10, mse=0.5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "tokens": 10, "mse": 0.5}
    log.close()


@pytest.mark.filterwarnings("ignore")  # tensorboard's own imports
def test_tensorboard_holds_each_step_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, range(1, 5), loggers=("tensorboard",))
    write(tmp_path, range(3, 7), after_step=2, loggers=("tensorboard",))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["tokens", "mse"]
    found = [(event.step, event.value) for event in events.Scalars("mse")]
    assert found == [(step, pytest.approx(1 / step)) for step in range(1, 7)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_told_before_the_run_begins(tiny_config, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    wanted = f"--loggers {name} needs the package {name}: pip install {name}."
    with pytest.raises(TopkapiError, match=wanted):
        train([replace(tiny_config, loggers=(name,))], [tmp_path / "run"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(TopkapiError, match=wanted):
        MetricsLog(tmp_path / "run", (name,), {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_config_steps_and_an_end(tmp_path, monkeypatch, name):
    calls = []
    tracker = SimpleNamespace(
        __spec__=object(),
        init=lambda **given: calls.append(("init", given)),
        log=lambda values, step: calls.append((step, values["mse"])),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, name, tracker)
    write(tmp_path / "name", [1, 2], loggers=(name,))
    start = {"project": "topkapi", "name": "name", "config": {"some": "config"}}
    assert calls == [("init", start), (1, 1.0), (2, 0.5), "finish"]
