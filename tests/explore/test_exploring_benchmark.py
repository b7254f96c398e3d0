"""benchmarks/exploring.py: its tables, and a prompt in which no latent is active.

Mutations seen caught: the table without the difference to no edit, or with that to controls in its place; the strongest
of no latents asked for.
"""

import json

import pytest

import topkapi.explore
from tests import scripts

COMMITTED = scripts.ROOT / "benchmarks" / "results" / "h200-2026-11-23-exploring.json"


@pytest.fixture(scope="module")
def script():
    return scripts.load("benchmarks/exploring.py")


def test_committed_tables_are_those_of_the_committed_counts(script):
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    text = COMMITTED.with_suffix(".md").read_text(encoding="utf-8")
    steering = script.steering_table([one for row in found for one in row["steering"]])
    assert script.table(found) in text
    assert steering in text
    last = steering.splitlines()[-1]  # 0 of 50 against 24 of 50 without an edit
    assert last.endswith("| -0.04 (-0.14 to +0.03) | -0.48 (-0.61 to -0.33) |")


def test_a_prompt_without_an_active_latent_has_its_row_and_its_panel(script, run, tmp_path):
    found = script.found_in(topkapi.explore.open(run), script.Case("short", "T", (" the",), (" a",)), 3)
    assert found["latents"] == found["measured"] == []
    row = script.table([found]).splitlines()[-1]
    assert row == f"| short | {found['metric']:+.2f} | no latent is active | undefined |"
    script.draw([found], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").exists()
