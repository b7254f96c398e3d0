"""The command `topkapi`: one function a subcommand, options generated from the dataclasses of `topkapi.config`."""

import errno
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import topkapi
from topkapi.bench.cases import SUITES, Case
from topkapi.config import EvalConfig, StudyConfig, TrainConfig
from topkapi.console import console, say
from topkapi.errors import TopkapiError
from topkapi.figures import require_matplotlib
from topkapi.files import write_text_atomic
from topkapi.parallel import launched, speaks
from topkapi.published import CONFIG
from topkapi.recipes import RECIPES
from topkapi.scaling.quantities import parse_size
from topkapi.sweep.grid import Grid, require_undecided

Flat = Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(kw_only=True)
class Train:
    """Train an autoencoder, or several side by side on one stream of activations."""

    config: Flat

    run: Path
    """Folder that receives config.json, metrics.jsonl, checkpoints and the finished autoencoder."""

    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""

    variants: tuple[str, ...] = ()
    """Train one autoencoder for each, in RUN/VARIANT: fields joined by commas, as in
    model.k=16 model.k=64,model.seed=1. They share the activations and differ in model, loss, auxk and optim."""


@dataclass(kw_only=True)
class Sweep:
    """Train and evaluate an autoencoder for each point of a grid, on one stream of activations. The same command again
    goes on where it was stopped, and one with more values adds to what is there."""

    grid: Annotated[Grid, tyro.conf.arg(name="")]

    config: Flat

    out: Path
    """Folder that receives sweep.jsonl, a line a point, sweep.json, and a run folder for each point."""

    together: int | Literal["auto"] = "auto"
    """Autoencoders trained at a time; auto: as many as have weights and state in half of the device's memory."""


@dataclass(kw_only=True)
class Demo:
    """Train on a real language model from installed packages, evaluate, and show what latents fire on."""

    config: Flat = field(default_factory=RECIPES["demo"])

    run: Path = Path("runs/demo")
    """Folder of the run; a finished or interrupted demo there is continued."""


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
class StudyOptions:
    """Write the complete sparse code of text, by token and by latent. One that was interrupted goes on."""

    config: Annotated[StudyConfig, tyro.conf.arg(name="")]

    out: Path
    """Folder that receives it."""


@dataclass(kw_only=True)
class FindOptions:
    """Find the latents that made the language model prefer one next token over another, and measure what each does."""

    prompt: str
    """Text whose continuation is in question."""

    positive: tuple[str, ...]
    """Next tokens to explain, each of them one token, its space included: " he"."""

    negative: tuple[str, ...]
    """Next tokens that they are compared with."""

    top: int = 20
    """Latents shown."""

    verify: int = 10
    """Latents of largest estimate that are ablated to measure it; with more than --top, those of the largest measured
    effect are shown."""

    steps: int = 0
    """Steps of integrated gradients; 0: the gradient of the prompt as it is, activation times gradient."""

    study: str = ""
    """Folder of a study, for the contexts in which latents fire; RUN/study if there is one."""

    json: str = ""
    """File that receives all of it."""


@dataclass(kw_only=True)
class SteerOptions:
    """Write text with latents changed, beside what the same random numbers give without; or count a pattern in it.

    Values may be multiples of the latent's maximum in the study: 5x, -2x."""

    prompt: str
    """Text to be continued."""

    clamp: tuple[str, ...] = ()
    """LATENT=VALUE: hold a latent at a value, which may be negative."""

    ablate: tuple[str, ...] = ()
    """LATENT: hold it at 0."""

    scale: tuple[str, ...] = ()
    """LATENT=FACTOR: multiply its value."""

    add: tuple[str, ...] = ()
    """LATENT=VALUE: add to its value."""

    bound: tuple[str, ...] = ()
    """LATENT=LOW:HIGH: keep its value between two."""

    where: str = "all"
    """all tokens, active (where the latent fires by itself), or positions such as 3,4,5, from 0, the first token."""

    samples: int = 4
    """Continuations of each kind."""

    tokens: int = 40
    """Tokens of a continuation."""

    temperature: float = 1.0
    """Above 0; smaller is more predictable."""

    seed: int = 0
    """Of the random numbers, which steered and other text share."""

    count: str = ""
    """Regular expression: count the continuations in which it occurs, with an interval, and show none."""

    words: str = ""
    """File of words, one a line: count the continuations in which any of them occurs."""

    controls: int = 10
    """With --count or --words: other latents, as active, that are edited in the same way for comparison."""

    study: str = ""
    """Folder of a study; RUN/study if there is one."""

    json: str = ""
    """File that receives all of it."""


@dataclass(kw_only=True)
class ViewOptions:
    """Look at a run in a browser: its latents, what they fire on and what they do."""

    study: Path
    """Folder of the study that is shown."""

    host: str = "127.0.0.1"
    """Address or name to listen on. Whoever reaches it may look, label and compute: there are no passwords."""

    port: int = 8000
    """Port to listen on; 0: any that is free."""

    model: bool = True
    """Load the language model, for prompts, ablations and steering."""

    open: bool = False
    """Open a browser."""


@dataclass(kw_only=True)
class ExportOptions:
    """Write the page of a run as files, with all that needs no language model at hand, into the folder OUT."""

    study: Path
    """Folder of the study that is shown."""

    examples: int = 5
    """Examples of each kind for each latent."""

    votes: bool = True
    """Write the tokens that latents vote for, which takes the language model to be loaded."""


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


def train_command(arguments: Sequence[str]) -> None:
    """topkapi train RECIPE_OR_RUN [--field value ...]: train an autoencoder, or several side by side."""
    from topkapi.train import saved_config, train

    if not arguments or arguments[0] in ("-h", "--help"):
        print(_train_help())
        return
    name, *options = arguments
    if name in RECIPES:
        default = Train(config=RECIPES[name](), run=Path("runs") / name)
    elif (Path(name) / CONFIG).exists():
        default = Train(config=saved_config(Path(name)), run=Path(name))
    else:
        raise TopkapiError(
            f"no recipe or run {name!r}. Recipes: {', '.join(RECIPES)}; a run is a folder with {CONFIG}."
        )
    command = _parse(Train, f"topkapi train {name}", options, default)
    configs, runs = [command.config], [command.run]
    if command.variants:
        configs = [_variant(command.config, text) for text in command.variants]
        runs = [command.run / text for text in command.variants]
    train(configs, runs, resume=command.resume)
    say(f"finished: {', '.join(map(str, runs))}. Evaluate: topkapi eval {runs[0]}")


def sweep_command(arguments: Sequence[str]) -> None:
    """topkapi sweep RECIPE --out FOLDER --n-latents N ... --k K ...: train and evaluate a grid, into FOLDER."""
    from topkapi.sweep.running import print_table, sweep

    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        name, options = "demo", ["--help"]
    if name not in RECIPES:
        raise TopkapiError(f"no recipe {name!r}. Recipes: {', '.join(RECIPES)}.")
    recipe = RECIPES[name]()
    recipe = replace(recipe, eval=replace(recipe.eval, downstream_tokens=0))  # several times the work: when asked for
    default = Sweep(config=recipe, grid=Grid.of(recipe), out=Path("runs") / f"sweep-{name}")
    command = _parse(Sweep, f"topkapi sweep {name}", options, default)
    require_undecided(command.config, recipe)
    print_table(sweep(command.config, command.grid, command.out, command.together))


def eval_command(arguments: Sequence[str]) -> None:
    """topkapi eval RUN [--tokens N] [--downstream-tokens N]: measure a run on held-out text, into RUN/eval.json."""
    from topkapi.demo import evaluate_run, print_table
    from topkapi.train import saved_config

    if not arguments or {"-h", "--help"} & set(arguments):
        _parse(EvalConfig, "topkapi eval RUN", ["--help"])
    name, *options = arguments
    run = Path(name)
    print_table(evaluate_run(run, _parse(EvalConfig, f"topkapi eval {run}", options, saved_config(run).eval)))


def study_command(arguments: Sequence[str]) -> None:
    """topkapi study RUN --tokens N [--out FOLDER]: the complete sparse code of held-out text, into RUN/study."""
    from topkapi.study import write_study
    from topkapi.train import load_run, open_text

    run, command = _run_and_options("study", arguments, StudyOptions, "out")
    ae, config = load_run(run)
    text = open_text(config)
    token_file = getattr(text.splits, command.config.split)
    write_study(run, ae, text.language_model, token_file, config.data, command.config, command.out)
    say(f"study: {command.out}. Read it: topkapi.study.open({str(command.out)!r})")


def find_command(arguments: Sequence[str]) -> None:
    """topkapi find RUN --prompt TEXT --positive " he" --negative " she": the latents behind a prediction."""
    from topkapi.explore.finding import find_in_run

    run, options = _run_and_options("find", arguments, FindOptions)
    find_in_run(
        run,
        options.prompt,
        options.positive,
        options.negative,
        top=options.top,
        verify=options.verify,
        steps=options.steps,
        study_folder=options.study,
        json_file=options.json,
    )


def steer_command(arguments: Sequence[str]) -> None:
    """topkapi steer RUN --prompt TEXT --clamp LATENT=5x [--count REGEX]: text with latents changed, beside without."""
    from topkapi.explore.writing import Sampling, pattern_of, steer_run

    run, options = _run_and_options("steer", arguments, SteerOptions)
    kinds = ("clamp", "bound", "scale", "add", "ablate")
    steer_run(
        run,
        options.prompt,
        {kind: getattr(options, kind) for kind in kinds},
        options.where,
        Sampling(
            n_samples=options.samples, n_tokens=options.tokens, temperature=options.temperature, seed=options.seed
        ),
        pattern=pattern_of(options.count, options.words),
        n_controls=options.controls,
        study_folder=options.study,
        json_file=options.json,
    )


def view_command(arguments: Sequence[str]) -> None:
    """topkapi view RUN [--study FOLDER] [--port 8000]: look at a run's latents in a browser."""
    try:
        from topkapi.viewer.serve import view
    except ModuleNotFoundError as error:
        raise TopkapiError(f"the viewer needs more packages ({error}): pip install 'topkapi[viewer]'.") from None

    run, command = _run_and_options("view", arguments, ViewOptions, "study")
    view(run, command.study, command.host, command.port, command.model, command.open)


def export_command(arguments: Sequence[str]) -> None:
    """topkapi export RUN OUT [--examples N]: the same page as files, for any static host, into the folder OUT."""
    try:
        from topkapi.viewer.export import export
        from topkapi.viewer.serve import open_for
    except ModuleNotFoundError as error:
        raise TopkapiError(f"the viewer needs more packages ({error}): pip install 'topkapi[viewer]'.") from None

    words = [*arguments]
    is_named = len(words) > 1 and not any(word.startswith("-") for word in words[:2])
    out = words.pop(1) if is_named else ""
    run, command = _run_and_options("export", words, ExportOptions, "study")
    if not out:
        raise TopkapiError("name the folder to write after the run, as in topkapi export runs/demo site.")
    if command.examples < 1:
        raise TopkapiError(f"--examples must be 1 or more; got {command.examples}.")
    export(run, open_for(run, command.study), Path(out), command.examples, command.votes)


def _run_and_options(command: str, arguments: Sequence[str], options: type, folder: str = "") -> tuple[Path, Any]:
    """RUN, which comes first, and the options after it; the option of a `folder`, if not given, is RUN/study."""
    if not arguments or {"-h", "--help"} & set(arguments):
        _parse(options, f"topkapi {command} RUN", ["--help"])
    run, *rest = arguments
    if run.startswith("-"):
        raise TopkapiError(f"topkapi {command} needs a run first, as in topkapi {command} runs/demo ...; got {run!r}.")
    if folder and not any(word.split("=")[0] == f"--{folder}" for word in rest):
        rest += [f"--{folder}", str(Path(run) / "study")]
    return Path(run), _parse(options, f"topkapi {command} {run}", rest)


def demo_command(arguments: Sequence[str]) -> None:
    """topkapi demo [--field value ...]: train, evaluate and show a small one on a real language model."""
    from topkapi.demo import demo

    command = _parse(Demo, "topkapi demo", arguments)
    demo(command.config, command.run)


def bench_command(arguments: Sequence[str]) -> None:
    """topkapi bench [gpu|cpu|tiny] [--option value ...]: time a training step, its parts and other projects' steps."""
    import torch

    from topkapi.bench import BenchOptions, bench

    on_cuda = torch.cuda.is_available()
    name, options = ("gpu" if on_cuda else "cpu"), arguments
    if arguments and not arguments[0].startswith("-"):
        name, *options = arguments
    if name not in SUITES:
        raise TopkapiError(f"no suite {name!r}. Suites: {', '.join(SUITES)}.")
    suite = SUITES[name]()
    command = _parse(Bench, f"topkapi bench {name}", options, Bench(case=suite.case, variants=suite.variants))
    device = ("cuda" if on_cuda else "cpu") if command.device == "auto" else command.device
    if device == "cuda" and not on_cuda:
        raise TopkapiError("--device cuda: no CUDA device here. Leave --device auto, or install a CUDA build of torch.")
    bench(
        [_variant(command.case, text, f"bench {name}") for text in command.variants] or [command.case],
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
    command = _parse(PlanOptions, "topkapi plan", arguments)
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
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TopkapiError(f"--bench {bench_json}: not JSON ({error}). Give the bench.json of topkapi bench.") from None
    save(described(measured, H200), path)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo_command,
    "train": train_command,
    "sweep": sweep_command,
    "eval": eval_command,
    "study": study_command,
    "find": find_command,
    "steer": steer_command,
    "view": view_command,
    "export": export_command,
    "bench": bench_command,
    "plan": plan_command,
}
TOGETHER = ("train", "plan")  # run in several processes; plan for --measure
SPEAKING_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 2 for a mistake that one line explains, 128 + n after signal n.

    Of several processes that were launched together one speaks; one that ends badly leaves at once, as its threads
    may wait for another process for ever.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not launched():
        return _run(arguments)
    console.quiet = not speaks()
    try:
        status = _run(arguments)
    except Exception:
        status = 1
        if not console.quiet:
            traceback.print_exc()
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        if console.quiet:  # a launcher ends all when the first one ends, and rank 0 may not have spoken yet
            time.sleep(SPEAKING_SECONDS)
        os._exit(status)
    return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(topkapi.__version__)
        return 0
    name, *rest = arguments
    from torch import OutOfMemoryError

    from topkapi.train import Interrupted

    try:
        if name not in COMMANDS:
            raise TopkapiError(f"no command {name!r}. Commands: {', '.join(COMMANDS)}.")
        if launched() and name not in TOGETHER:
            raise TopkapiError(
                f"topkapi {name} runs in one process: start it without torchrun, which is for {' and '.join(TOGETHER)}."
            )
        COMMANDS[name](rest)
    except TopkapiError as error:
        say(f"topkapi: {_where(error)}{error}")
        return 2
    except OutOfMemoryError as error:
        advice = "Lower --batch-tokens, or see docs/performance.md for what takes less."
        say(f"topkapi: {_where(error)}out of GPU memory. {advice}")
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        return 128 + signal.SIGPIPE
    except OSError as error:
        say(f"topkapi: {_where(error)}{_explain(error)}")
        return 2
    except Interrupted as request:
        say(f"topkapi: {request}")
        return 128 + request.signal_number
    except KeyboardInterrupt:
        say("topkapi: stopped.")
        return 130
    return 0


def _where(error: BaseException) -> str:
    """The process that failed, where several were launched and it is one's own fault."""
    return "".join(f"{note}: " for note in getattr(error, "__notes__", ()))


def _parse(
    cls: type, program: str, arguments: Sequence[str], default: Any = tyro.MISSING_NONPROP, more: tuple = ()
) -> Any:
    """The dataclass that the options describe; a mistake in them is a TopkapiError of one line, not tyro's box."""
    markers = (tyro.conf.AvoidSubcommands, *more)
    boxed = io.StringIO()
    try:
        with redirect_stderr(boxed):
            return tyro.cli(cls, prog=program, args=list(arguments), default=default, config=markers)
    except SystemExit as end:
        if not end.code:
            raise
        raise TopkapiError(f"{_unboxed(boxed.getvalue())} See {program} --help.") from None


def _unboxed(box: str) -> str:
    """The sentence inside one of tyro's error boxes, which have a title above and a pointer to the help below it."""
    lines = [re.sub("[│╭╰╮╯─]", "", line).strip() for line in box.splitlines()]
    title, *body = [line for line in lines if line.strip("-")] or ["Bad options"]
    end = next((i for i, line in enumerate(body) if line.startswith("For full helptext")), len(body))
    return f"{' '.join(body[:end]) or title}".rstrip(".") + "."


def _variant(config: Any, text: str, command: str = "train RECIPE") -> Any:
    """`config` with the fields of a text such as model.k=16,model.seed=1."""
    parts = [part.partition("=") for part in text.split(",")]
    if "/" in text or not all(name and equals for name, equals, _ in parts):
        example = "model.k=16,model.seed=1" if isinstance(config, TrainConfig) else "precision=fp8,dead=0.05"
        raise TopkapiError(f"--variants {text!r}: write FIELD=VALUE, joined by commas, as in {example}.")
    options = [option for name, _, value in parts for option in (f"--{name}", value)]
    try:
        return _parse(type(config), f"topkapi {command}", options, config, (tyro.conf.FlagConversionOff,))
    except TopkapiError as error:
        raise TopkapiError(f"--variants {text!r}: {error}") from None


def _explain(error: OSError) -> str:
    """One line for what the operating system refused."""
    where = f" {error.filename}" if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "Free some space or choose another folder" if full else "Choose another folder, or mend this one"
    return f"the system refused{where}: {error.strerror or error}. {advice}; what was saved before is untouched."


def _help() -> str:
    lines = [f"topkapi {topkapi.__version__}: {topkapi.__doc__.splitlines()[0]}", ""]
    for function in COMMANDS.values():
        lines.append(f"  {function.__doc__.rstrip('.')}")
    return "\n".join([*lines, "", "Options of each: topkapi COMMAND --help, topkapi train RECIPE --help."])


def _train_help() -> str:
    rows = [f"  {name:12} {recipe.__doc__}" for name, recipe in RECIPES.items()]
    return "\n".join(["topkapi train RECIPE_OR_RUN [--field value ...]", "", "Recipes:", *rows])
