"""benchmarks/results.py takes runs site by site.

Mutations seen caught: figures of both sites' runs together; a kept figure that is named as left out as well; a missing
study that nothing tells; the verdict of one site in the column of the other; modes of activations drawn for each site;
kept figures of other runs, or a sweep before its first run, ending in a traceback.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests import scripts
from tests.figures.synthetic import write_sweep
from topkapi.figures import codes, densities, laws, modality, seeds, sources
from topkapi.recipes import demo
from topkapi.sweep.grid import Grid

SITES = ("resid_post.10", "resid_post.20")
SEEDS = ["a/n256-k8-seed0", "a/n256-k8-seed1"]


@pytest.fixture(scope="module")
def script():
    return scripts.load("benchmarks/results.py")


@pytest.fixture(scope="module")
def page(script, tmp_path_factory):
    """A page of two sweeps at two sites, and a figure of the first that was kept."""
    folder = tmp_path_factory.mktemp("results")
    for name, site in zip("ab", SITES, strict=True):
        base = demo()
        base = replace(
            base,
            language_model=replace(base.language_model, site=site),
            data=replace(base.data, corpora=("sotu", "jsonl:runs/text/news.jsonl")),
        )
        grids = [Grid(n_latents=(256,), k=(8,), seeds=(0, 1)), Grid(n_latents=(256,), k=(16, 80))][: 1 + (name == "b")]
        write_sweep(folder / name, grids, base=base, metrics=False)
    kept = {"name": "seeds", "title": "Seeds", "source": "none", "caption": "C.", "statement": "S.", "runs": SEEDS}
    (folder / "kept").mkdir()
    (folder / "kept" / "seeds.json").write_text(json.dumps(kept | {"claims": []}))
    Image.new("RGB", (8, 8)).save(folder / "kept" / "seeds.png")
    folders = [str(folder / name) for name in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        named = [f"{folder}=runs"]
        words = [*folders, "--page", str(folder / "page.md"), "--kept", str(folder / "kept"), "--as", *named]
        patch.setattr(script, "SUBJECTS", (densities, laws, codes, seeds, modality))
        patch.setattr(densities, "MOST_DETAILS", 1)
        patch.setattr(sys, "argv", ["results.py", *words])
        script.main()
    return folder / "page.md"


def test_each_site_has_its_figures_and_its_column(page):
    text = page.read_text(encoding="utf-8")
    assert "| the paper | where | resid_post.10 | resid_post.20 |" in text
    (dense,) = [line for line in text.splitlines() if line.startswith("| Solutions become dense")]
    assert dense.endswith("| **undecided** | **undecided** |")
    section = text.partition("## How dense solutions are")[2].partition("\n## ")[0]
    first, second = section.split("**resid_post.20.**")
    assert "**resid_post.10.**" in first
    assert "k 80" in second
    assert "k 80" not in first, "runs of the other site"
    pictures = {path.name for path in page.with_suffix("").iterdir()}
    assert pictures == {"resid_post.10-dense.png", "resid_post.20-dense.png", "resid_post.10-seeds.png"}


def test_modes_are_drawn_once_of_all_sites_and_the_rest_once_a_site(script, page, tmp_path, monkeypatch):
    asked = {modality: [], seeds: []}
    for subject, calls in asked.items():
        monkeypatch.setattr(
            subject, "figures", lambda runs, calls=calls: calls.append([run.name for run in runs]) or []
        )
    monkeypatch.setattr(script, "SUBJECTS", tuple(asked))
    folders = [page.parent / "a", page.parent / "b"]
    script.drawn_by_site(sources.read_folders(folders), tmp_path, [])
    assert asked[modality] == [[run.name for run in sources.read_folders(folders)]]
    assert asked[seeds] == [[run.name for run in sources.read_folders([folder])] for folder in folders]


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"seeds.json": {"name": "seeds", "runs": ["c/n1"]}}, "seeds.json is of runs that the folders have not: c/n1."),
        ({"bench.json": {"cases": []}}, "bench.json is no figure, or damaged."),
        ({"seeds.json": ["runs"]}, "seeds.json is no figure, or damaged."),
        ({"seeds.json": {"name": "seeds", "runs": []}}, "seeds.json is without its picture, seeds.png."),
        ({}, "kept has no figures, which topkapi figures writes as NAME.json."),
    ],
)
def test_kept_figures_of_other_runs_are_one_line(script, page, tmp_path, monkeypatch, capsys, kept, said):
    (tmp_path / "kept").mkdir()
    for name, content in kept.items():
        (tmp_path / "kept" / name).write_text(json.dumps(content))
    folder = str(page.parent / "a")
    line = refused(script, monkeypatch, capsys, page, folder, "--kept", str(tmp_path / "kept"))
    assert said in line
    assert line.endswith(f"or draw these where their weights are: topkapi figures {folder} --out NEW.\n")


def test_a_sweep_that_has_not_begun_is_one_line(script, page, tmp_path, monkeypatch, capsys):
    sweep = tmp_path / "new"
    sweep.mkdir()
    shutil.copy(page.parent / "a" / "sweep.json", sweep)
    line = refused(script, monkeypatch, capsys, page, str(page.parent / "a"), str(sweep))
    assert f"no run has begun in {sweep}: run that topkapi sweep again" in line


def refused(script, monkeypatch, capsys, page, *words: str) -> str:
    """What the script says before it leaves with status 2, on one line. The page keeps its pictures."""
    monkeypatch.setattr(sys, "argv", ["results.py", *words, "--page", str(page)])
    pictures = sorted(page.with_suffix("").iterdir())
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("results.py: ")
    assert said.count("\n") == 1
    assert sorted(page.with_suffix("").iterdir()) == pictures
    return said


def test_what_is_left_out_is_told_and_what_was_kept_is_not(page):
    text = page.read_text(encoding="utf-8")
    left_out = text.partition("## Left out")[2].partition("\n## ")[0].splitlines()
    assert "**resid_post.10.** S." in text
    assert not [line for line in left_out if line.startswith("- resid_post.10, latents shared by seeds")]
    assert [line for line in left_out if line.startswith("- resid_post.20, latents shared by seeds")]
    assert [line for line in left_out if line.startswith("- modes of activations: no run has a study")]
    assert [line for line in left_out if line.startswith("- resid_post.20, scaling laws")]


def test_the_commands_name_the_text_once(page):
    commands = page.read_text(encoding="utf-8").partition("## Commands")[2]
    assert "benchmarks/text.py runs/text" in commands
    assert commands.count("jsonl:runs/text/news.jsonl") == 1
    assert 'TEXT1="sotu jsonl:runs/text/news.jsonl"' in commands
    assert "topkapi figures runs/a runs/b --out figures" in commands


def test_verdicts_stand_in_the_column_of_their_site(script):
    def figure(site, verdict):
        return {"site": site, "source": "Figure 1", "claims": [{"text": "C.", "verdict": verdict}]}

    table = script.verdicts({"a": [figure("x", "agrees"), figure("y", "disagrees")], "b": [figure("", "undecided")]})
    assert table.splitlines()[2:] == [
        "| C. | Figure 1 | **agrees** | **disagrees** |",
        "| C. | Figure 1 | **undecided** | **undecided** |",
    ]
    assert script.verdicts({"a": [figure("x", "agrees")], "b": [figure("y", "agrees") | {"claims": []}]}).endswith(
        "|  |"
    )


def test_a_picture_of_any_size_becomes_small(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "LARGEST", 3_000)
    Image.effect_noise((200, 100), 90).save(tmp_path / "a.png")
    script.shrink(tmp_path / "a.png", tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size < 3_000
    with Image.open(tmp_path / "b.png") as small:
        assert small.width == pytest.approx(2 * small.height, rel=0.05)


def test_runs_are_found_by_the_names_that_several_sweeps_give_them(page):
    runs = sources.read_folders([page.parent / "a", page.parent / "b"])
    assert {run.name for run in runs} >= set(SEEDS)


def test_commands_without_kept_figures(script):
    arguments = argparse.Namespace(folders=[Path("runs/a")], kept=None)
    assert script.made_by(arguments) == ["python benchmarks/results.py runs/a"]
