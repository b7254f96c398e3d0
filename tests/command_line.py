"""The command line as tests use it: a config as options, and what a run folder holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from topkapi import checkpoint
from topkapi.config import TrainConfig, to_dict
from topkapi.recipes import demo


def train_arguments(config: TrainConfig, run: Path, *more: str) -> list[str]:
    """`topkapi` arguments that train `config` in `run`: the recipe demo with every field that differs from it."""
    return ["train", "demo", "--run", str(run), *_options(to_dict(config), to_dict(demo())), *more]


def _options(values: dict[str, Any], base: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        option = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            found += _options(value, base[name], f"{option}.")
        elif isinstance(value, bool) and value != base[name]:
            found.append(f"--{option}" if value else f"--{prefix}no-{name.replace('_', '-')}")
        elif value != base[name]:
            found += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return found


def one_line(stderr: str) -> str:
    """The one line of an error, checked to be the last and the only one besides lines of progress."""
    lines = stderr.splitlines()
    assert len([line for line in lines if line.startswith("topkapi: ")]) == 1, stderr
    assert all(line.startswith(("Tokenizing", "Caching", "train", "resuming")) for line in lines[:-1]), stderr
    assert "Traceback" not in stderr
    return lines[-1]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock, by its path in it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two finished runs end alike, bit for bit: weights, moments, averages, dead counters, data position, metrics."""
    assert checkpoint.steps(ours)[-1] == checkpoint.steps(theirs)[-1]
    mine, other = (checkpoint.load(run, checkpoint.steps(run)[-1]) for run in (ours, theirs))
    ours_read, theirs_read = mine.read(), other.read()
    assert ours_read.keys() == theirs_read.keys()
    for name, tensor in ours_read.items():
        assert torch.equal(tensor, theirs_read[name]), name
    assert mine.meta == other.meta
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert metrics(ours) == metrics(theirs)


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without the one number that is of the clock."""
    import json

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def assert_close_run(ours: Path, theirs: Path) -> None:
    """Two finished runs end alike but for the rounding of sums in another order, as on another mesh."""
    mine, other = (checkpoint.load(run, checkpoint.steps(run)[-1]) for run in (ours, theirs))
    ours_read, theirs_read = mine.read(), other.read()
    assert ours_read.keys() == theirs_read.keys()
    assert torch.equal(ours_read["silent_for"], theirs_read["silent_for"])
    for name, tensor in ours_read.items():
        torch.testing.assert_close(tensor, theirs_read[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert mine.meta["position"] == other.meta["position"]
    assert load_file(ours / "model.safetensors").keys() == load_file(theirs / "model.safetensors").keys()
    for name, tensor in load_file(ours / "model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(theirs / "model.safetensors")[name], rtol=1e-3, atol=1e-5)
    assert len(metrics(ours)) == len(metrics(theirs))
    for line, wanted in zip(metrics(ours), metrics(theirs), strict=True):
        assert line == pytest.approx(wanted, rel=1e-3, abs=1e-6)
