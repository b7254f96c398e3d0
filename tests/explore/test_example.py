"""The tour in examples/ runs, on a tiny run with a study and without."""

import importlib.util
import shutil
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "explore.py"


def test_the_tour_runs(run, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("tour", SCRIPT)
    tour = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tour)
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("study", "checkpoints"))
    for folder in (run, bare):
        tour.explore(folder, "The old river finds the quiet garden. Every captain", " the", " a")
        shown = capsys.readouterr().out
        assert "measured" in shown
        assert "steered:" in shown
        assert "without the first three: 'The old river" in shown
