"""Seen to fail when: a piped line is a bar; markup in a message is interpreted; the rate counts what was done before
a resume."""

import pytest
from rich.console import Console

from topkapi import console


def test_piped_lines_are_plain(capsys):
    long = "word " * 60
    console.say(f"[bold]{long}[/bold] /path/[0]: 3,000")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"[bold]{long}[/bold] /path/[0]: 3,000\n"


def test_piped_progress_is_a_line_at_times_and_one_at_the_end(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4)).__next__
    monkeypatch.setattr(console.time, "monotonic", lambda: float(clock()))
    with console.progress("train", 1000, done=500) as meter:
        for _ in range(5):
            meter.advance(100, mse=0.123456, l0=31.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("train: 1,000/1,000 tokens")
    assert lines[-1].endswith("0 s left  mse 0.1235  l0 31")
    assert 1 < len(lines) < 5
    assert all("\r" not in line and "\x1b" not in line and line == line.rstrip() for line in lines)
    rate = float(lines[0].split("tokens  ")[1].split(" ")[0])
    assert rate < 100 / 4, "tokens done before count as done now"


def test_nothing_done_says_nothing(capsys):
    with console.progress("train", 10, done=10):
        pass
    assert capsys.readouterr().err == ""


def test_an_error_inside_still_shows_how_far_it_came(capsys):
    def fail():
        with console.progress("Caching", 10, unit="blocks") as meter:
            meter.advance(3)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert capsys.readouterr().err.startswith("Caching: 3/10 blocks")


def test_a_terminal_gets_a_bar(monkeypatch, tmp_path):
    with (tmp_path / "screen").open("w") as screen:
        monkeypatch.setattr(console, "console", Console(file=screen, force_terminal=True, width=120))
        with console.progress("train", 1000) as meter:
            meter.advance(250, mse=0.5)
            meter.advance(250)
    shown = (tmp_path / "screen").read_text()
    assert "500/1,000 tokens" in shown
    assert "mse 0.5" in shown
