"""topkapi eval, study, find, steer, view, export and figures: what looks at finished runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from topkapi.cli.parsing import parse, require_run_first, run_and_options
from topkapi.config import EvalConfig, StudyConfig
from topkapi.console import say
from topkapi.errors import TopkapiError
from topkapi.files import require_writable
from topkapi.plotting import require_matplotlib

Metric = Literal[
    "compute_equivalent", "refinement", "progressive", "threshold", "ablation_sparsity", "n2g", "n2g_loss", "probes"
]


@dataclass(kw_only=True)
class EvalOptions:
    """Measure a run on held-out text, into RUN/eval.json: reconstruction and the language model's loss, and what else
    is asked for. What was measured before with the same settings is kept."""

    config: Annotated[EvalConfig, tyro.conf.arg(name="")]

    all: bool = False
    """All metrics but n2g_loss, which takes an explanation of every latent: several times the work."""

    metrics: tuple[Metric, ...] = ()
    """These metrics beside reconstruction and loss; docs/metrics.md defines each of them."""

    reference: str = ""
    """For compute_equivalent: file with a line of compute and loss in nats for each of two or more language models of
    one family."""

    fresh: bool = False
    """Measure anew what eval.json holds already."""


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
class FiguresOptions:
    """Draw figures of runs and sweeps for a paper, each as PNG and SVG, its data as CSV and its numbers as JSON. What
    the folders do not allow is left out, with a line that says what would supply it."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of topkapi train and --out folders of topkapi sweep; a sweep may be unfinished."""

    out: Path = Path("runs/figures")
    """Folder that receives them."""

    report: str = ""
    """File that receives all of it as one HTML page."""


def eval_command(arguments: Sequence[str]) -> None:
    """topkapi eval RUN [--all] [--metrics NAME ...] [--tokens N]: measure a run on held-out text."""
    if not arguments or {"-h", "--help"} & set(arguments):
        parse(EvalOptions, "topkapi eval RUN", ["--help"], EvalOptions(config=EvalConfig()))
    name, *options = arguments
    require_run_first("eval", name)
    from topkapi.evaluation import Asked, evaluate_run, print_table
    from topkapi.train import saved_config

    run = Path(name)
    default = EvalOptions(config=saved_config(run).eval)
    command = parse(EvalOptions, f"topkapi eval {run}", options, default)
    metrics = {*command.metrics, *(set(get_args(Metric)) - {"n2g_loss"} if command.all else ())}
    if command.reference:
        metrics.add("compute_equivalent")
    reference = Path(command.reference) if command.reference else None
    print_table(evaluate_run(run, command.config, Asked(frozenset(metrics), reference, command.fresh)))


def study_command(arguments: Sequence[str]) -> None:
    """topkapi study RUN --tokens N [--out FOLDER]: the complete sparse code of held-out text, into RUN/study."""
    run, command = run_and_options("study", arguments, StudyOptions, "out")
    from topkapi.demo import peak_memory
    from topkapi.parallel import open_mesh
    from topkapi.scaling.quantities import bytes_text
    from topkapi.study import write_study
    from topkapi.study.layout import STUDY, bytes_of, read_header
    from topkapi.train import device_type, load_run, open_text, warn_if_changed

    started, (ae, config) = time.monotonic(), load_run(run)
    with open_mesh(1, device_type(config)) as mesh:
        mesh = mesh.apart()  # whose collectives wait as long as rank 0 takes to write
        mesh.on_first(lambda: (command.out / STUDY).exists() or require_writable("--out", command.out, is_folder=True))
        text = mesh.first_before_others(lambda: open_text(config))
        warn_if_changed(run, ae, text.language_model)
        token_file = getattr(text.splits, command.config.split)
        write_study(run, ae, text.language_model, token_file, config.data, command.config, command.out, mesh)
    size = sum(map(bytes_of, read_header(command.out)["files"].values()))
    say(
        f"study: {command.out}, {bytes_text(size)}, in {(time.monotonic() - started) / 60:.1f} minutes with at most "
        f"{bytes_text(peak_memory())} of memory. Read it: topkapi.study.open({str(command.out)!r})"
    )


def find_command(arguments: Sequence[str]) -> None:
    """topkapi find RUN --prompt TEXT --positive " he" --negative " she": the latents behind a prediction."""
    run, options = run_and_options("find", arguments, FindOptions)
    require_writable("--json", options.json)
    from topkapi.explore.finding import find_in_run

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
    run, options = run_and_options("steer", arguments, SteerOptions)
    require_writable("--json", options.json)
    from topkapi.explore.writing import Sampling, pattern_of, steer_run

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
    run, command = run_and_options("view", arguments, ViewOptions, "study")
    try:
        from topkapi.viewer.serve import view
    except ModuleNotFoundError as error:
        raise TopkapiError(f"the viewer needs more packages ({error}): pip install 'topkapi[viewer]'.") from None

    view(run, command.study, command.host, command.port, command.model, command.open)


def export_command(arguments: Sequence[str]) -> None:
    """topkapi export RUN OUT [--examples N]: the same page as files, for any static host, into the folder OUT."""
    words = [*arguments]
    is_named = len(words) > 1 and not any(word.startswith("-") for word in words[:2])
    out = words.pop(1) if is_named else ""
    run, command = run_and_options("export", words, ExportOptions, "study")
    if not out:
        raise TopkapiError("name the folder to write after the run, as in topkapi export runs/demo site.")
    if command.examples < 1:
        raise TopkapiError(f"--examples must be 1 or more; got {command.examples}.")
    require_writable("OUT", out, is_folder=True)
    try:
        from topkapi.viewer.export import export
        from topkapi.viewer.serve import open_for
    except ModuleNotFoundError as error:
        raise TopkapiError(f"the viewer needs more packages ({error}): pip install 'topkapi[viewer]'.") from None

    export(run, open_for(run, command.study), Path(out), command.examples, command.votes)


def figures_command(arguments: Sequence[str]) -> None:
    """topkapi figures RUN_OR_SWEEP ... [--out FOLDER] [--report out.html]: pictures for a paper, with their data."""
    command = parse(FiguresOptions, "topkapi figures", arguments or ["--help"])
    if "" in command.folders:  # which Path takes for the current one
        raise TopkapiError("a folder is empty: give run folders and --out folders of sweeps, or . for the current one.")
    require_matplotlib()
    require_writable("--out", command.out, is_folder=True)
    require_writable("--report", command.report)
    from topkapi.figures import draw

    draw([Path(folder) for folder in command.folders], command.out, Path(command.report) if command.report else None)
