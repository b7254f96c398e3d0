"""The tour in examples/ runs, on a tiny run with a study and without."""

import shutil

from tests import scripts


def test_the_tour_runs(run, tmp_path, capsys):
    tour = scripts.load("examples/explore.py")
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("study", "checkpoints"))
    for folder in (run, bare):
        tour.explore(folder, "The old river finds the quiet garden. Every captain", " the", " a")
        shown = capsys.readouterr().out
        assert "measured" in shown
        assert "steered:" in shown
        assert "without the first three: 'The old river" in shown
