"""The demo ends with what `topkapi view` shows, and leaves a study that is there alone.

Seen to fail when: the study is written anew, with other tokens, into a folder that has one.
"""

from dataclasses import replace

import topkapi.study
from topkapi.cli import main
from topkapi.config import StudyConfig
from topkapi.demo import demo
from topkapi.study import write_study
from topkapi.train import load_run, open_text


def test_a_demo_can_be_viewed(tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("topkapi.demo.draw_run", lambda run, *_: run / "report.png")
    config = replace(tiny_config, data=replace(tiny_config.data, held_out=0.5, source="live"), tokens=300)
    run = tmp_path / "demo"
    demo(config, run)
    assert f"topkapi view {run}" in capsys.readouterr().err
    study = topkapi.study.open(run / "study")
    study.require_run()
    assert study.n_fired.sum() > 0
    ae, config = load_run(run)
    text = open_text(config)
    other = tmp_path / "other"
    write_study(run, ae, text.language_model, text.splits.held_out, config.data, StudyConfig(tokens=64), other)
    (run / "study").rename(tmp_path / "away")
    other.rename(run / "study")
    demo(config, run)
    assert topkapi.study.open(run / "study").identity["n_contexts"] == 4
    assert main(["view", str(run), "--port", "99999"]) == 2
