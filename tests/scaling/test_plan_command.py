"""`topkapi plan` prints what it must, and explains in one line what it cannot use."""

import json
from dataclasses import asdict

import pytest

from tests.command_line import one_line
from topkapi.cli import main
from topkapi.scaling.hardware import H200, load, save
from topkapi.scaling.quantities import bytes_text, count_text, ms_text, parse_size, share_text

SMALL = ["plan", "--n-latents", "131k", "--d-model", "768", "--k", "32", "--gpus", "8"]


def test_a_plan_on_the_screen_in_a_file_and_in_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    more = ["--dead", "0.05", "--json", str(found), "--picture", str(picture)]
    assert main([*SMALL, *more]) == 0
    text = capsys.readouterr().out
    for said in ("131,072 latents", "replicas x shards", "encode and top k", "AuxK", "Selection:", "What limits it",
                 "tokens a day", "--parallel.shards", "A model, not a measurement"):  # fmt: skip
        assert said in text
    plans = json.loads(found.read_text())["plans"]
    assert {one["replicas"] * one["shards"] for one in plans} == {8}
    for one in plans:
        exposed = sum(part["seconds"] - part["hidden_seconds"] for part in one["step"]["parts"])
        assert one["step"]["seconds"] == pytest.approx(max(exposed, one["step"]["host_seconds"]))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_nodes_times_gpus_per_node(capsys):
    assert main([*SMALL[:-2], "--nodes", "2", "--gpus-per-node", "4", "--gpu", "h100"]) == 0
    assert "8 H100" in capsys.readouterr().out


def test_reserved_memory_is_not_planned_with(capsys):
    assert main([*SMALL, "--reserve", "100"]) == 0
    assert "of 35 GiB to use" in capsys.readouterr().out


def test_flags_say_the_micro_batch_where_the_whole_batch_does_not_fit(capsys):
    options = [*SMALL, "--shards", "2", "--batch-tokens", "8M", "--reserve", "120"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "--parallel.shards 2 --parallel.micro-batch-tokens 1048576\n" in text
    assert "In 2 micro-batches of 1,048,576 tokens a GPU" in text
    assert main([*options[:-2], "--reserve", "0"]) == 0
    assert "micro-batch" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--n-latents", "16X"], "--n-latents '16X' is not a size: write a whole number of at least 1, as in 131072"),
        (["--gpus", "-3"], "--gpus"),
        (["--gpus", "1.5"], "--gpus '1.5' is not a size"),
        (["--k", "1M"], "--k must be at most --n-latents 131,072; got 1,048,576"),
        (["--dead", "1.5"], "--dead is the share of latents that are dead, in [0, 1); got 1.5"),
        (["--gpu", "b300"], "neither a GPU that is known (h100, h200) nor a file"),
        (["--state", "low_memory", "--precision", "float32"], "set --precision bf16 or fp8"),
        (["--shards", "5"], "--shards 5 does not divide --gpus 8: take 1, 2, 4, 8"),
        (["--reserve", "500"], "has 138 GB to use"),
        (["--reserve", "nan"], "--reserve nan: a H200 has 138 GB to use"),
        (["--bench", "x.json"], "--bench goes with --measure"),
        (
            ["--measure", "gpu.json", "--bench", "/no/such.json"],
            "--bench /no/such.json: No such file or",
        ),
        (["--gpus", "1", "--n-latents", "16M", "--d-model", "12288"], "1 H200 are too few"),
        (["--candidates", "0"], "--candidates '0' is not a size"),
        (["--capacity", "0"], "--capacity must be a finite number above 0; got 0"),
        (["--candidates", "9", "--selection", "exact"], "--candidates 9 goes with --selection capacity"),
        (["--precision", "int4"], "--precision"),
    ],
)
def test_mistakes_are_explained_in_one_line(options, said, capsys):
    assert main([*SMALL, *options]) == 2
    assert said in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "no JSON object. Give the bench.json"),
        ('{"cases": [{"case": {}}]}', "it lacks 'n_latents'"),
        ('{"about": {}, "cases": []}', "has no finished case"),
    ],
)
def test_a_file_that_is_no_bench_is_one_line(tmp_path, capsys, content, said):
    (tmp_path / "bench.json").write_text(content)
    assert main(["plan", "--measure", str(tmp_path / "gpu.json"), "--bench", str(tmp_path / "bench.json")]) == 2
    assert said in one_line(capsys.readouterr().err)
    assert not (tmp_path / "gpu.json").exists()


def test_a_file_describes_a_gpu(tmp_path, capsys):
    path = tmp_path / "mine.json"
    save(H200, path)
    assert load(str(path)) == H200
    described = asdict(H200)
    for change, said in [
        ({"name": 3}, "name must be a str; got 3"),
        ({"memory": "much"}, "memory must be a int; got 'much'"),
        ({"usable": 0}, "usable must be a finite number above 0; got 0"),
        ({"colour": "red"}, "Hardware has no colour"),
        ({"rates": {}}, "Rates lacks bf16_flops"),
        ({"inside": 5}, "Link must be an object"),
    ]:
        path.write_text(json.dumps(described | change))
        assert main([*SMALL, "--gpu", str(path)]) == 2
        assert said in one_line(capsys.readouterr().err)
    path.write_text("{")
    assert main([*SMALL, "--gpu", str(path)]) == 2
    assert "not JSON" in one_line(capsys.readouterr().err)


def test_measuring_writes_a_description_that_can_be_planned_with(tmp_path, capsys, one_thread):
    path = tmp_path / "here.json"
    assert main(["plan", "--measure", str(path)]) == 0
    assert load(str(path)).rates.bytes > 1e8
    assert main([*SMALL, "--gpu", str(path)]) == 0
    again = tmp_path / "again.json"
    assert main(["plan", "--measure", str(again), "--bench", str(tmp_path / "here-bench" / "bench.json")]) == 0
    assert load(str(again)) == load(str(path))
    capsys.readouterr()
    assert main(["plan", "--measure", str(again), "--bench", str(path)]) == 2
    assert "no bench.json" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "size"),
    [("131072", 131_072), ("131_072", 131_072), ("131,072", 131_072), ("131k", 2**17), ("128k", 2**17), ("16M", 2**24),
     ("16Mi", 2**24), ("100k", 100_000), ("1.5M", 1_500_000), ("12288", 12_288), ("7", 7), ("1M", 2**20)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text, "--n-latents") == size


def test_numbers_in_words():
    assert count_text(2**24) == "16.8 M"
    assert count_text(131_072) == "131 k"
    assert bytes_text(6.4424e9) == "6.44 GB"
    assert bytes_text(12) == "12 B"
    assert ms_text(0.2304) == "230"
    assert ms_text(0.00912) == "9.12"
    assert (share_text(0.0), share_text(3.6e-4), share_text(1e-6)) == ("0", "0.036 %", "< 0.001 %")
