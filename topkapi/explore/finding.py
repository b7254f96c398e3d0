"""`topkapi find`: the latents behind a prediction, each with what was predicted of it and what was measured."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from topkapi import study
from topkapi.console import progress, say
from topkapi.errors import TopkapiError, command_line
from topkapi.evaluate.contexts import AFTER, BEFORE, decode_around
from topkapi.explore.attribution import RankCorrelation, attribute, measure, rank_correlation
from topkapi.explore.prompts import single_token, texts
from topkapi.explore.spliced import Spliced, open_run
from topkapi.files import write_text_atomic
from topkapi.study import Study

CONTEXTS = 2  # shown of each latent
PLACES = 3  # tokens of the prompt that are named for each latent
LEFT, RIGHT = 40, 20  # characters of a context on each side of the firing token, so that it stays on one line


@dataclass(frozen=True)
class Context:
    """Text in which a latent fired strongly."""

    before: str
    token: str
    after: str
    value: float


@dataclass(frozen=True)
class FoundLatent:
    """One row of what `topkapi find` found."""

    latent: int
    attribution: float
    """By how much the metric falls when it is ablated, as estimated."""
    measured: float | None
    """The same, measured; None where it was not."""
    by_position: list[float]
    values: list[float]
    contexts: list[Context]


@dataclass(frozen=True)
class Found:
    """What `topkapi find` found."""

    prompt: str
    tokens: list[str]
    positive: list[str]
    negative: list[str]
    metric: float
    """Mean logit of the positive tokens less that of the negative ones."""
    steps: int
    n_active: int
    """Latents that are active somewhere in the prompt."""
    latents: list[FoundLatent]
    rank_correlation: RankCorrelation | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        correlation = None if self.rank_correlation is None else self.rank_correlation._asdict()
        return asdict(self) | {"rank_correlation": correlation}


def find_in_run(
    run: Path,
    prompt: str,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    top: int,
    verify: int,
    steps: int,
    study_folder: str,
    json_file: str,
) -> Found:
    """Find, print, and write to `json_file` where one is named."""
    say(f"loading {run} and its language model ...")
    spliced = open_run(run)
    opened = study_of(run, study_folder, spliced)
    found = find(spliced, prompt, positive, negative, top=top, verify=verify, steps=steps, study=opened)
    show(found, opened is not None)
    if opened is None:
        say(f"For the contexts in which each latent fires: {study_line(run)}, then find again.")
    if json_file:
        write_text_atomic(Path(json_file), json.dumps({"run": str(run)} | found.as_dict(), indent=2) + "\n")
        say(f"everything: {json_file}")
    return found


def find(
    spliced: Spliced,
    prompt: str,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    top: int = 20,
    verify: int = 10,
    steps: int = 0,
    study: Study | None = None,
) -> Found:
    """The `top` latents of largest attribution, the first `verify` of them also ablated, with contexts from a study.

    With `verify` above `top`, the `top` of largest measured effect among those that were ablated: the gradient is small
    where the language model is sure, and a latent that makes it so can have a small attribution.

    Raises:
        TopkapiError: as `encode`, `single_token`, `attribute` and `measure` do, or `top` < 1 or `verify` < 0.
    """
    if top < 1 or verify < 0 or steps < 0:
        raise TopkapiError(f"find needs --top 1, --verify 0, --steps 0 at least; got {top}, {verify} and {steps}.")
    tokens = spliced.tokens(prompt)
    up, down = ([single_token(spliced.lm, text) for text in side] for side in (positive, negative))
    with progress("attribution", 1 + steps, unit="passes") as meter:
        attribution = attribute(spliced, tokens, up, down, steps, meter.advance)
    if not len(attribution.latents):
        raise TopkapiError(
            f"no latent is active in {prompt!r}: training leaves out the first position and special tokens, and it has "
            "nothing else. Put text before it."
        )
    verified = attribution.latents[:verify].tolist()
    with progress("ablation", len(verified), unit="latents") as meter:
        measured = measure(spliced, tokens, verified, up, down, meter.advance).tolist()
    shown = range(min(top, len(attribution.latents)))
    if verify > top:
        shown = sorted(range(len(measured)), key=lambda i: -abs(measured[i]))[:top]
    rows = [
        FoundLatent(
            latent=(latent := int(attribution.latents[i])),
            attribution=float(attribution.total[i]),
            measured=measured[i] if i < len(measured) else None,
            by_position=attribution.at[i].tolist(),
            values=attribution.values[i].tolist(),
            contexts=[] if study is None else contexts(study, spliced, latent),
        )
        for i in shown
    ]
    return Found(
        prompt=prompt,
        tokens=texts(spliced.lm, tokens[0].tolist()),
        positive=list(positive),
        negative=list(negative),
        metric=attribution.metric,
        steps=steps,
        n_active=len(attribution.latents),
        latents=rows,
        rank_correlation=rank_correlation(attribution.total[: len(measured)], measured),
    )


def study_of(run: Path, folder: str, spliced: Spliced) -> Study | None:
    """The study in `folder`, or in RUN/study if none is named and one is there.

    Raises:
        TopkapiError: it is of another autoencoder or language model, or there is none in a folder that was named.
    """
    if not folder and not (run / "study" / "study.json").exists():
        return None
    found = study.open(folder or run / "study", run)
    found.require_run()
    if spliced.lm.fingerprint != found.identity["language_model"]:
        raise TopkapiError(
            f"study {found.folder} was made with another language model than the {spliced.lm.name} that is here now: "
            "its weights or config differ. Study again, or restore the language model."
        )
    return found


def study_line(run: Path) -> str:
    """The command that makes the study of a run which its commands look for."""
    return command_line("study", run, "--tokens", 100_000)


def contexts(study: Study, spliced: Spliced, latent: int, n: int = CONTEXTS) -> list[Context]:
    """The contexts in which a latent fired most strongly, a few tokens on each side."""
    found = []
    for example in study.latent(latent).top(n):
        first = max(0, example.at - BEFORE)
        ids = example.tokens[first : example.at + AFTER + 1]
        found.append(Context(*decode_around(spliced.lm.tokenizer, ids, example.at - first), example.value))
    return found


def show(found: Found, has_contexts: bool) -> None:
    """Print it on stdout."""
    out = stdout()
    ups, downs = (" ".join(map(repr, side)) for side in (found.positive, found.negative))
    out.print(f"{found.prompt!r}: the logit of {ups} less that of {downs} is {found.metric:+.3f}.", markup=False)
    how = f"{found.steps} steps of integrated gradients" if found.steps else "activation times gradient"
    out.print(
        f"{found.n_active} latents are active. By how much it falls without each, estimated ({how}) and measured:\n",
        markup=False,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("latent", "estimated", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where in the prompt", overflow="fold", max_width=42)
    if has_contexts:
        table.add_column("fires on", no_wrap=True)
    for row in found.latents:
        numbers = [str(row.latent), f"{row.attribution:+.3f}", "" if row.measured is None else f"{row.measured:+.3f}"]
        lines = [Text("\n").join(_line(context) for context in row.contexts)] if has_contexts else []
        table.add_row(*numbers, Text(_places(found.tokens, row.by_position)), *lines)
    out.print(table)
    if found.rank_correlation is None:
        out.print("\nNo rank correlation of estimated and measured: it takes 4 latents whose effects differ.")
    else:
        value, low, high, n = found.rank_correlation
        out.print(
            f"\nRank correlation of estimated and measured, {n} latents: {value:.2f} (95 % {low:.2f} to {high:.2f}).",
            markup=False,
        )


def stdout() -> Console:
    """For results: as wide as the terminal, 140 columns where there is none."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=140)


def _places(tokens: list[str], by_position: list[float]) -> str:
    order = sorted(range(len(tokens)), key=lambda t: -abs(by_position[t]))[:PLACES]
    return ", ".join(f"{tokens[t]!r} at {t} {by_position[t]:+.3f}" for t in order if by_position[t])


def _line(context: Context) -> Text:
    return Text.assemble(context.before[-LEFT:], (f"[[{context.token}]]", "bold"), context.after[:RIGHT])
