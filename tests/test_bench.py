"""`topkapi bench`: what it plants is there, what it counts is right, and it works where peers or a GPU are missing.

Seen to catch: dense directions with a mean, which normalisation removes; a kernel counted for the span before its own.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

import topkapi
from tests.command_line import one_line
from topkapi.bench import peer_steps
from topkapi.bench.cases import SUITES, Case
from topkapi.bench.ceilings import ceilings
from topkapi.bench.peers import PEERS
from topkapi.bench.profile import (
    BOUND_KERNEL,
    PART_OF_KERNEL,
    REST,
    SAMPLE,
    SAMPLE_KERNEL,
    SCREEN,
    SELECT,
    device_kernels,
)
from topkapi.bench.report import markdown
from topkapi.bench.timing import Timing, measure
from topkapi.bench.workload import Workload
from topkapi.cli import main
from topkapi.errors import TopkapiError

CPU = torch.device("cpu")
SMALL = Case(n_latents=512, d_model=48, k=8, batch_tokens=300, dead=0.1, dense=3)


def test_dense_latents_fire_on_a_third_of_the_tokens_and_dead_ones_never(one_thread):
    workload = Workload(SMALL, CPU)
    assert all(0.25 < density < 0.42 for density in workload.check().dense_densities)
    for _ in range(3):
        found = workload.step()
        assert not found.fired[workload.planted.dead].any()
        assert found.fired[workload.planted.dense].all()
        assert float(found.terms.auxk) > 0
    assert int(workload.counter.dead(workload.config.auxk.dead_after).sum()) == SMALL.n_dead == 51


def test_the_reference_finds_all_of_the_exact_latents(one_thread):
    assert Workload(SMALL, CPU).recall(100) == {"same_operands": 1.0, "float32": 1.0}


def test_parts_say_what_they_must_move(one_thread):
    workload = Workload(SMALL, CPU)
    parts = {part.name: part for part in workload.parts()}
    for part in parts.values():
        part.run()
        assert part.flops or part.n_bytes
    assert parts["encode and top k"].flops == 2 * 300 * 512 * 48
    assert any("AuxK" in name for name in parts)


def test_the_tiny_suite_runs_and_writes_tables(tmp_path, capsys, one_thread):
    out = tmp_path / "bench"
    options = ["--device", "cpu", "--rounds", "3", "--seconds", "0.01", "--profile"]
    assert main(["bench", "tiny", *options, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "whole step" in shown.out
    assert "Everything is in" in shown.err
    found = json.loads((out / "bench.json").read_text())
    assert [record["case"]["dense"] for record in found["cases"]] == [0, 2]
    assert all(record["step"]["ms"] > 0 and record["tokens_per_second"] > 0 for record in found["cases"])
    table = (out / "table.md").read_text()
    assert all(word in table for word in ("1,024 latents", "float32, 10 % dead", "Profile of", "of the ceiling"))
    assert (out / "bench.png").stat().st_size > 0
    assert (out / "profile.png").stat().st_size > 0


@pytest.mark.gpu
def test_a_gpu_reports_ceilings_memory_and_kernels(tmp_path):
    shape = ["--n-latents", "8192", "--d-model", "128", "--k", "16", "--batch-tokens", "2048"]
    options = ["--variants", "precision=bf16", "precision=fp8,dead=0.1,dense=4", "--profile", "--rounds", "3"]
    assert main(["bench", "tiny", *shape, *options, "--out", str(tmp_path)]) == 0
    for record in json.loads((tmp_path / "bench.json").read_text())["cases"]:
        assert {"bf16", "fp8"} <= set(record["ceilings"]["matmul"])
        assert record["peak_bytes"] > 0
        assert record["recall"]["same_operands"] > 0.99
        parts = record["profile"]["parts"]
        assert {SCREEN, SAMPLE, SELECT, "weight gradients and Adam"} <= set(parts)
        assert sum(parts.values()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "no suite 'huge'. Suites: gpu, cpu, tiny."),
        (["tiny", "--variants", "dead"], "write FIELD=VALUE"),
        (["tiny", "--variants", "dead=2"], "share in [0, 1)"),
        (["tiny", "--k", "0"], "--k must be at least 1"),
        (["tiny", "--rounds", "0"], "--rounds must be at least 1 and --seconds finite, above 0; got 0 and 2."),
        (["tiny", "--seconds", "inf"], "--rounds must be at least 1 and --seconds finite, above 0; got 20 and inf."),
        (["tiny", "--seconds", "nan"], "got 20 and nan."),
        (["tiny", "--variants", "precision=fp8"], "precision fp8"),
        (["tiny", "--dense", "9"], "--dense must be between"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    if "fp8" in arguments[-1] and torch.cuda.is_available():
        pytest.skip("a GPU has more precisions")
    assert main(["bench", *arguments]) == 2
    assert message in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", SUITES)
def test_suites_list_cases_that_can_be_made(name):
    suite = SUITES[name]()
    assert suite.case.shape
    assert suite.variants


def test_a_missing_peer_is_named_and_left_out(monkeypatch, capsys):
    for package in ("sae_lens", "sparsify", "dictionary_learning"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails as if it were not installed
    assert peer_steps.time_peers(SMALL, CPU, dict.fromkeys(PEERS, 300), rounds=3, seconds=0.1) == []
    said = capsys.readouterr().err
    assert all(f"{name} is left out" in said for name in PEERS)


def test_a_peer_gets_the_largest_batch_that_fits(monkeypatch):
    def time_one(name, case, batch, *_):
        if batch > 512:
            raise torch.cuda.OutOfMemoryError("too much")
        return {"name": name, "batch_tokens": batch}

    monkeypatch.setattr(peer_steps, "_time_peer", time_one)
    case = Case(n_latents=64, d_model=8, k=2, batch_tokens=2048)
    for limit in (2048, 512):
        records = peer_steps.time_peers(case, CPU, {"saelens": limit}, 3, 1.0)
        assert records == [{"name": "saelens", "batch_tokens": 512}]


def test_a_peer_that_never_fits_is_reported(monkeypatch):
    def time_one(*_):
        raise torch.cuda.OutOfMemoryError("too much")

    monkeypatch.setattr(peer_steps, "_time_peer", time_one)
    case = Case(n_latents=64, d_model=8, k=2, batch_tokens=512)
    (record,) = peer_steps.time_peers(case, CPU, {"saelens": 512}, 3, 1.0)
    assert record["failure"] == "out of memory"
    assert record["batch_tokens"] == 256


def test_measure_keeps_to_its_limits_and_pairs_rounds():
    calls = []
    work = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = measure(work, CPU, rounds=5, seconds=60.0)
    assert calls == ["a", "b"] * (2 + 5)
    assert len(found["a"].rounds) == len(found["b"].rounds) == 5
    slow = measure({"a": lambda: torch.randn(300, 300) @ torch.randn(300, 300)}, CPU, rounds=1000, seconds=0.0)
    assert len(slow["a"].rounds) == 3


def test_ratios_are_taken_within_rounds():
    assert Timing((2.0, 20.0, 6.0)).over(Timing((1.0, 10.0, 1.0))) == 2.0
    assert Timing((3.0, 1.0, 2.0)).ms == 2.0


def test_ceilings_are_rates():
    found = ceilings(64, 256, 32, "float32", CPU)
    assert found.flops == 2 * 64 * 256 * 32
    assert found.rate("float32") == pytest.approx(found.flops / found.matmul["float32"].ms * 1e3)
    assert found.bandwidth > 1e8


def event(cat, name, ts, dur=1.0, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def test_kernels_belong_to_the_span_that_launched_them():
    trace = [
        event("user_annotation", "forward and backward", 0.0, 10.0),
        event("user_annotation", "optimiser", 10.0, 5.0),
        event("cuda_runtime", "cudaLaunchKernel", 9.0, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 11.0, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 40.0, correlation=3),
        event("kernel", "elementwise", 20.0, 2.0, correlation=1),  # runs after its span has ended on the host
        event("kernel", "other", 23.0, 3.0, correlation=2),
        event("gpu_memset", "Memset", 42.0, 1.0, correlation=3),
    ]
    parts = [(name, part) for name, part, _ in device_kernels(trace)]
    assert parts == [
        ("elementwise", "rest of forward and backward"),
        ("other", "weight gradients and Adam"),
        ("Memset", REST),
    ]


def test_the_screening_matmul_before_the_bound_is_the_sample():
    names = [SAMPLE_KERNEL, "fill", BOUND_KERNEL, SAMPLE_KERNEL, "select_candidates", SAMPLE_KERNEL]
    trace = [event("kernel", name, float(i)) for i, name in enumerate(names)]
    assert [part for _, part, _ in device_kernels(trace)] == [SAMPLE, REST, SAMPLE, SCREEN, SELECT, SCREEN]


def test_every_kernel_that_a_part_names_exists():
    kernels = "".join(path.read_text() for path in (Path(topkapi.__file__).parent / "ops/kernels").glob("*.py"))
    assert [name for name in PART_OF_KERNEL if f"def {name}(" not in kernels] == []


def test_tables_line_up():
    lines = markdown(["what", "ms"], [["a", "1"], ["longer", "22.5"]]).splitlines()
    assert lines[1] == "| ------ | ---: |"
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("bad", [{"k": 65}, {"dead": 1.0}, {"dense": 9}, {"batch_tokens": 0}])
def test_impossible_cases_are_refused(bad):
    with pytest.raises(TopkapiError):
        Case(**{"n_latents": 64, "d_model": 32, "k": 8, "batch_tokens": 16} | bad)
