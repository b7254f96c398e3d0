"""topkapi bench and plan: what a machine can do, and many."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from topkapi.bench.cases import SUITES, Case
from topkapi.cli.parsing import parse, variant
from topkapi.console import say
from topkapi.errors import TopkapiError
from topkapi.files import require_writable, write_text_atomic
from topkapi.launch import launched, speaks
from topkapi.plotting import require_matplotlib
from topkapi.scaling.quantities import parse_size


@dataclass(kw_only=True)
class Bench:
    """Time a training step and its parts on this machine, against what the machine can do at best."""

    case: Annotated[Case, tyro.conf.arg(name="")]

    variants: tuple[str, ...]
    """Time one case for each: fields joined by commas, as in precision=fp8 or dead=0.05,dense=8; the other fields are
    as given by the options beside. Named without any: one case, of these options alone."""

    rounds: int = 20
    """Times that everything is timed at most."""

    seconds: float = 2.0
    """Time spent on one measurement at most, three rounds aside."""

    peers: bool = False
    """Time the steps of other projects too, those whose packages are installed."""

    peer_names: tuple[Literal["saelens", "sparsify", "sparsify-adam", "dictionarylearning"], ...] = (
        "saelens",
        "sparsify",
        "dictionarylearning",
    )
    """Which, with --peers. sparsify has its default optimiser, a signed gradient, and sparsify-adam Adam."""

    profile: bool = False
    """See with a profiler where the time of each case's step goes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""

    out: Path = Path("runs/bench")
    """Folder that receives table.md, bench.json and pictures."""


@dataclass(kw_only=True)
class PlanOptions:
    """Plan training on many GPUs: the fastest mesh, its memory and its step's time by part, from a model of both.

    Sizes may be written 131072, 131k or 16M."""

    n_latents: str = "131072"
    """Dictionary size, all shards together."""

    d_model: str = "768"
    """Width of an activation."""

    k: str = "32"
    """Active latents a token."""

    batch_tokens: str = "131072"
    """Tokens of a step, all replicas together."""

    gpus: str = ""
    """GPUs in all; --nodes times --gpus-per-node if not given."""

    nodes: str = "1"
    """Nodes, where --gpus is not given."""

    gpus_per_node: str = ""
    """GPUs of a node; those of --gpu if not given."""

    gpu: str = "h200"
    """h100, h200, or a JSON file that describes a GPU."""

    reserve: float = 0.0
    """GB of each GPU's memory that is left to the language model and to blocks of activations."""

    precision: Literal["float32", "bf16", "fp8"] = "bf16"
    """As --precision of topkapi train."""

    state: Literal["float32", "low_memory"] = "float32"
    """As --optim.state of topkapi train."""

    ema: bool = True
    """Whether averaged weights are kept (--optim.ema-decay above 0)."""

    dead: float = 0.0
    """Share of the latents that are dead, so that AuxK has them to train; the paper's largest run had 0.07."""

    auxk: str = "auto"
    """Dead latents asked to explain the residual, as --auxk.auxk."""

    selection: Literal["auto", "exact", "capacity"] = "auto"
    """How shards choose the k largest (--parallel.selection); auto: exact unless capacity is faster."""

    capacity: float = 2.0
    """With selection capacity, candidates a shard beyond its fair share of k (--parallel.capacity)."""

    candidates: str = ""
    """With selection capacity, candidates a shard; chosen if not given."""

    exchange: Literal["auto", "sparse", "dense"] = "auto"
    """What replicas exchange (--parallel.exchange); auto: what is faster."""

    shards: str = ""
    """Shards that the mesh must have; any number if not given."""

    json: str = ""
    """File that receives all plans and their numbers."""

    picture: str = ""
    """File that receives a picture (.png) of the step's time against the number of shards."""

    measure: str = ""
    """Measure the GPU at hand, write FILE for --gpu, and plan nothing. Under torchrun its links too."""

    bench: str = ""
    """With --measure: take this bench.json instead of measuring."""


def bench_command(arguments: Sequence[str]) -> None:
    """topkapi bench [gpu|cpu|tiny] [--option value ...]: time a training step, its parts and other projects' steps."""
    import torch

    from topkapi.bench.running import BenchOptions, bench

    on_cuda = torch.cuda.is_available()
    name, options = ("gpu" if on_cuda else "cpu"), arguments
    if arguments and not arguments[0].startswith("-"):
        name, *options = arguments
    if name not in SUITES:
        raise TopkapiError(f"no suite {name!r}. Suites: {', '.join(SUITES)}.")
    suite = SUITES[name]()
    command = parse(Bench, f"topkapi bench {name}", options, Bench(case=suite.case, variants=suite.variants))
    device = ("cuda" if on_cuda else "cpu") if command.device == "auto" else command.device
    if device == "cuda" and not on_cuda:
        raise TopkapiError("--device cuda: no CUDA device here. Leave --device auto, or install a CUDA build of torch.")
    if command.rounds < 1 or not 0 < command.seconds < math.inf:
        raise TopkapiError(
            f"--rounds must be at least 1 and --seconds finite, above 0; got {command.rounds} and {command.seconds:g}."
        )
    require_writable("--out", command.out, is_folder=True)
    bench(
        [variant(command.case, text, f"bench {name}") for text in command.variants] or [command.case],
        BenchOptions(
            device=torch.device(device),
            rounds=command.rounds,
            seconds=command.seconds,
            peers=command.peer_names if command.peers else (),
            profile=command.profile,
            out=command.out,
        ),
    )


def plan_command(arguments: Sequence[str]) -> None:
    """topkapi plan --n-latents 16M --d-model 12288 --k 256 --gpus 512: the best mesh, its memory and its speed."""
    command = parse(PlanOptions, "topkapi plan", arguments)
    for option in ("measure", "json", "picture") if speaks() else ():  # of several processes one writes
        require_writable(f"--{option}", getattr(command, option))
    if command.measure:
        _measure_gpu(Path(command.measure), command.bench)
        return
    if command.bench:
        raise TopkapiError("--bench goes with --measure FILE, which it makes from a bench.json.")
    if launched():
        raise TopkapiError(
            "a plan is made in one process: start topkapi plan without torchrun, which is for --measure."
        )
    from topkapi.scaling import hardware, report
    from topkapi.scaling.planner import for_picture, plans

    gpu = hardware.load(command.gpu)
    if command.gpus_per_node:
        gpu = replace(gpu, gpus_per_node=parse_size(command.gpus_per_node, "--gpus-per-node"))
    gpu = replace(gpu, memory=hardware.left_of(gpu, command.reserve))
    job, search = _job(command), _search(command, gpu.gpus_per_node)
    if command.picture:
        require_matplotlib()
    found = plans(job, gpu, search)
    sys.stdout.write(report.text(found))
    if command.json:
        write_text_atomic(Path(command.json), json.dumps(report.as_dict(found), indent=2) + "\n")
        say(f"all plans: {command.json}")
    if command.picture:
        from topkapi.scaling.picture import draw

        draw(for_picture(job, gpu, search), found[0], Path(command.picture))
        say(f"picture: {command.picture}")


def _job(command: PlanOptions) -> Any:
    from topkapi.scaling.shapes import Job

    return Job(
        n_latents=parse_size(command.n_latents, "--n-latents"),
        d_model=parse_size(command.d_model, "--d-model"),
        k=parse_size(command.k, "--k"),
        batch_tokens=parse_size(command.batch_tokens, "--batch-tokens"),
        precision=command.precision,
        state=command.state,
        ema=command.ema,
        dead=command.dead,
        auxk=-1 if command.auxk == "auto" else 0 if command.auxk == "0" else parse_size(command.auxk, "--auxk"),
    )


def _search(command: PlanOptions, gpus_per_node: int) -> Any:
    from topkapi.scaling.planner import Search

    nodes = parse_size(command.nodes, "--nodes")
    return Search(
        n_gpus=parse_size(command.gpus, "--gpus") if command.gpus else nodes * gpus_per_node,
        selection=command.selection,
        capacity=command.capacity,
        candidates=parse_size(command.candidates, "--candidates") if command.candidates else 0,
        exchange=command.exchange,
        shards=parse_size(command.shards, "--shards") if command.shards else 0,
    )


def _measure_gpu(path: Path, bench_json: str) -> None:
    import torch

    from topkapi.bench.calibrate import calibrate, described
    from topkapi.scaling.hardware import H200, save

    if not bench_json:
        calibrate(path, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    try:
        measured = json.loads(Path(bench_json).read_text(encoding="utf-8"))
    except OSError as error:
        raise TopkapiError(f"--bench {bench_json}: {error.strerror}. Give the bench.json of topkapi bench.") from None
    except ValueError as error:
        raise TopkapiError(f"--bench {bench_json}: not JSON ({error}). Give the bench.json of topkapi bench.") from None
    if not isinstance(measured, dict):
        raise TopkapiError(f"--bench {bench_json}: no JSON object. Give the bench.json of topkapi bench.")
    save(described(measured, H200), path)
