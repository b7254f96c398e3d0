"""`topkapi steer`: text written with latents changed, beside the same text without, or counts of a pattern in both."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from topkapi.console import progress, say
from topkapi.errors import TopkapiError
from topkapi.evaluate.contexts import visible
from topkapi.explore.controls import matched_controls
from topkapi.explore.edits import Edit, Kind, parse_edit, parse_where
from topkapi.explore.finding import stdout, study_line, study_of
from topkapi.explore.prompts import continuation, encode
from topkapi.explore.proportions import Difference, Rate
from topkapi.explore.spliced import Spliced, open_run
from topkapi.explore.steering import Experiment, Samples, experiment, sample
from topkapi.files import write_text_atomic
from topkapi.study import Study

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How text is drawn."""

    n_samples: int
    n_tokens: int
    temperature: float
    seed: int


def steer_run(
    run: Path,
    prompt: str,
    edits: Mapping[Kind, Sequence[str]],
    where: str,
    sampling: Sampling,
    *,
    pattern: re.Pattern[str] | None,
    n_controls: int,
    study_folder: str,
    json_file: str,
) -> None:
    """Steer, print, and write to `json_file` where one is named; with a pattern count it instead."""
    if not any(edits.values()):
        raise TopkapiError(
            "nothing to steer with: give --clamp LATENT=VALUE, --ablate LATENT, --scale, --add or --bound."
        )
    if sampling.seed < 0:
        raise TopkapiError(f"--seed must be 0 or more; got {sampling.seed}.")
    if pattern is not None and n_controls < 1:
        raise TopkapiError(f"--controls must be 1 or more, to compare with; got {n_controls}.")
    say(f"loading {run} and its language model ...")
    spliced = open_run(run)
    opened = study_of(run, study_folder, spliced)
    parsed = parse_edits(spliced, opened, run, edits, where)
    tokens = encode(spliced.lm, prompt, sampling.n_tokens)
    last = tokens.shape[1] + sampling.n_tokens - 2  # nothing is read behind the last new token
    if isinstance(place := parsed[0].where, tuple) and max(place) > last:
        raise TopkapiError(
            f"--where {where}: with {tokens.shape[1]} tokens of prompt and {sampling.n_tokens} new ones positions are "
            f"0 to {last}."
        )
    about = {"run": str(run), "prompt": prompt, "edits": [str(edit) for edit in parsed], "sampling": vars(sampling)}
    if pattern is None:
        result = _samples(spliced, tokens, parsed, sampling)
    else:
        if opened is None:
            raise TopkapiError(
                f"controls are latents as active as the edited ones, which a study says, and {run} has none: "
                f"{study_line(run)}."
            )
        result = _count(spliced, tokens, parsed, opened, pattern, n_controls, sampling)
    if json_file:
        write_text_atomic(Path(json_file), json.dumps(about | result, indent=2) + "\n")
        say(f"everything: {json_file}")


def parse_edits(
    spliced: Spliced, study: Study | None, run: Path, edits: Mapping[Kind, Sequence[str]], where: str
) -> list[Edit]:
    """The edits that were written on the command line, one a latent, as options of several kinds have no order.

    Raises:
        TopkapiError: one is malformed, names no latent, or needs a maximum that no study tells; two are of one latent.
    """

    def maximum(latent: int) -> float:
        spliced.check_latent(latent)
        if study is None:
            raise TopkapiError(
                f"a multiple of latent {latent}'s maximum needs a study, and {run} has none: {study_line(run)}, "
                "or --study FOLDER, or give a number without x."
            )
        if (known := study.latent(latent).maximum) is None:
            raise TopkapiError(
                f"latent {latent} never fired in the {study.n_tokens:,} tokens of {study.folder}, so it has no maximum "
                "there: study more tokens, or give a number without x."
            )
        return known

    place = parse_where(where)
    parsed = [parse_edit(kind, text, place, maximum) for kind, written in edits.items() for text in written]
    spliced.check(parsed)
    for latent in {edit.latent for edit in parsed}:
        if len(same := [edit for edit in parsed if edit.latent == latent]) > 1:
            raise TopkapiError(
                f"latent {latent} is given {len(same)} edits, {' and '.join(map(str, same))}, and options have no "
                "order: give it one. From Python, edits of one latent follow each other in the order of their list."
            )
    return parsed


def pattern_of(regex: str, words_file: str) -> re.Pattern[str] | None:
    """What to count: a regular expression, or the words of a file, one a line, in any case; None if neither is named.

    Raises:
        TopkapiError: both are named, the expression is none, or the file cannot be read or is empty.
    """
    if regex and words_file:
        raise TopkapiError("--count and --words are two ways to say what to count: give one.")
    if words_file:
        try:
            lines = Path(words_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TopkapiError(f"--words {words_file}: cannot be read as text ({error}).") from None
        words = [re.escape(line.strip()) for line in lines if line.strip()]
        if not words:
            raise TopkapiError(f"--words {words_file}: no words; write one a line.")
        return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
    try:
        return re.compile(regex) if regex else None
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise TopkapiError(f"--count {regex!r} is no regular expression: {error}.") from None


def _samples(spliced: Spliced, tokens: Any, edits: Sequence[Edit], sampling: Sampling) -> dict[str, Any]:
    with progress("writing", 2 * sampling.n_samples * sampling.n_tokens) as meter:
        found = sample(spliced, tokens, edits, **vars(sampling), on_token=meter.advance)
    out, highest = stdout(), float(found.kl.max())
    out.print(f"{', '.join(map(str, edits))}. Both columns of a row have the same random numbers.\n", markup=False)
    table = Table("as it is", f"steered, and KL a token up to {highest:.2g} nats", box=None, padding=(0, 3, 1, 0))
    rows = []
    for i in range(sampling.n_samples):
        clean, steered = _texts(spliced, found, i)
        kl = found.kl[i, : found.steered_lengths[i]].tolist()
        bars = "".join(BARS[min(7, int(8 * value / highest))] if highest else BARS[0] for value in kl)
        table.add_row(Text(visible(clean)), Text.assemble(visible(steered), "\n", (bars, "dim")))
        rows.append({"clean": clean, "steered": steered, "kl": kl, "first_difference": found.first_difference(i)})
    out.print(table)
    out.print(f"mean KL(steered || as it is): {found.mean_kl:.4f} nats a token", markup=False)
    return {"samples": rows, "mean_kl": found.mean_kl}


def _texts(spliced: Spliced, found: Samples, i: int) -> tuple[str, str]:
    clean = continuation(spliced.lm, found.clean[i, : found.clean_lengths[i]].tolist())
    return clean, continuation(spliced.lm, found.steered[i, : found.steered_lengths[i]].tolist())


def _count(
    spliced: Spliced,
    tokens: Any,
    edits: Sequence[Edit],
    study: Study,
    pattern: re.Pattern[str],
    n_controls: int,
    sampling: Sampling,
) -> dict[str, Any]:
    controls = matched_controls(study, edits, n_controls, sampling.seed)
    with progress("writing", (2 + n_controls) * sampling.n_samples * sampling.n_tokens) as meter:
        found = experiment(spliced, tokens, edits, controls, pattern, **vars(sampling), on_token=meter.advance)
    out = stdout()
    out.print(f"{', '.join(map(str, edits))}. Continuations in which {pattern.pattern!r} occurs:\n", markup=False)
    table = Table("", "samples", "with it", "rate", "95 %", box=None, padding=(0, 3, 0, 0))
    named = {"as it is": found.clean, "steered": found.steered, f"{n_controls} other latents": found.controls}
    for name, rate in named.items():
        table.add_row(name, str(rate.of), str(rate.n), f"{rate.value:.1%}", f"{rate.low:.1%} to {rate.high:.1%}")
    out.print(table)
    out.print("\n" + verdict("other latents", found.steered_less_controls), markup=False)
    out.print(verdict("as it is", found.steered_less_clean), markup=False)
    return as_dict(found, pattern.pattern)


def verdict(than: str, found: Difference) -> str:
    """One line: the difference, its interval, and whether it excludes zero."""
    says = "which excludes 0: the edit changes it" if found.excludes_zero else "which includes 0: no effect is shown"
    return f"steered less {than}: {found.value:+.1%} (95 % {found.low:+.1%} to {found.high:+.1%}), {says}."


def as_dict(found: Experiment, pattern: str) -> dict[str, Any]:
    """An experiment for JSON."""

    def of(rate: Rate) -> dict[str, Any]:
        return rate._asdict() | {"value": rate.value}

    def between(one: Difference) -> dict[str, Any]:
        return one._asdict() | {"excludes_zero": one.excludes_zero}

    return {
        "pattern": pattern,
        "clean": of(found.clean),
        "steered": of(found.steered),
        "controls": of(found.controls),
        "each_control": [
            {"latents": latents, **of(rate)}
            for latents, rate in zip(found.control_latents, found.each_control, strict=True)
        ],
        "steered_less_controls": between(found.steered_less_controls),
        "steered_less_clean": between(found.steered_less_clean),
    }
