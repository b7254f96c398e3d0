"""What latents are found to do on prompts that were written before any was looked at, and whether they steer.

    python benchmarks/exploring.py RUN --out FOLDER [--samples 64 --controls 10]

For each case: attributions of the active latents to the difference of two sets of next tokens, the ablation effect of
the strongest ones beside it, and the rank correlation. Cases with `steers`: the latent whose ablation costs the
positive tokens most is held at `multiple` times its maximum while a second prompt is continued, and samples in which a
pattern occurs are counted, against no edit and against latents as active. RUN needs a study, for maxima and controls.
Writes exploring.json, a table (exploring.md) and a picture (exploring.png).
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import topkapi.explore
import topkapi.study
from topkapi.console import progress, say
from topkapi.explore import Edit, attribute, experiment, matched_controls, measure, rank_correlation
from topkapi.explore.prompts import single_token
from topkapi.explore.spliced import Spliced
from topkapi.plotting import pyplot
from topkapi.study import Study


@dataclass(frozen=True)
class Steering:
    """A prompt to be continued, what is counted in continuations, and the value of the latent over its maximum."""

    prompt: str
    pattern: str
    multiple: float


@dataclass(frozen=True)
class Case:
    """Next tokens to tell apart."""

    name: str
    prompt: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    steers: Steering | None = None


FEMALE = r"\b([Ss]he|[Hh]ers?|[Hh]erself|woman|women|girl|mother|daughter|sister)\b"
CASES = (
    Case(
        "gender",
        "My sister called yesterday. I was glad to hear that",
        (" she",),
        (" he",),
        Steering("The doctor opened the door and", FEMALE, 2.0),
    ),
    Case("number agreement", "The keys to the old cabinet", (" are", " were"), (" is", " was")),
    Case(
        "closing quotes",
        'The old man looked at me and said, "You should never have come here',
        ('."', ',"', '!"'),
        (".", ",", "!"),
        Steering("He turned to her and told her that", r'["\u201c\u201d]', 2.0),
    ),
    Case(
        "sentiment",
        "I loved every minute of this film. The acting was",
        (" wonderful", " great", " excellent"),
        (" terrible", " bad", " awful"),
        Steering(
            "We went to the new restaurant last night, and the food was",
            r"\b(wonderful|great|excellent|delicious|amazing|perfect|good|best|lovely)\b",
            2.0,
        ),
    ),
    Case(
        "language",
        "Je suis allé au marché et j'ai acheté",
        (" un", " des", " du"),
        (" a", " some", " the"),
        Steering("The children went to the", r"\b(le|la|les|des|une|est|dans|pour|avec|qui)\b", 2.0),
    ),
    Case(
        "coarse language",
        "He hit his thumb with the hammer and shouted: what the",
        (" hell", " devil"),
        (" reason", " result"),
        Steering(
            "I can't believe he did that again. What the",
            r"\b(hell|heck|damn\w*|fuck\w*|shit\w*|crap|bloody|ass|bastard)\b",
            -2.0,
        ),
    ),
    Case("repetition broken", "red green blue red green blue red green", (" blue",), (" red", " green")),
    Case("induction", "Mr Dursley met Mrs Potter. Then Mr Dursley said to Mrs", (" Potter",), (" D", " Smith")),
    Case(
        "tense", "Yesterday, before the rain began, she", (" went", " walked", " took"), (" goes", " walks", " takes")
    ),
    Case("a fact", "The capital of France is the city of", (" Paris",), (" London", " Rome")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--study", type=Path)
    parser.add_argument("--verify", type=int, default=20, help="latents ablated in each case")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--controls", type=int, default=10)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    spliced, study = topkapi.explore.open(arguments.run), topkapi.study.open(arguments.study or arguments.run / "study")
    found = [found_in(spliced, case, arguments.verify) for case in CASES]
    for case, row in zip(CASES, found, strict=True):
        if case.steers:
            row["steering"] = steered(spliced, study, case, row, arguments)
    (arguments.out / "exploring.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "exploring.md").write_text(table(found), encoding="utf-8")
    draw(found, arguments.out / "exploring.png")
    print(table(found))


def found_in(spliced: Spliced, case: Case, verify: int) -> dict:
    """Attributions of one case beside measured effects, for the latents of the largest attributions."""
    tokens = spliced.tokens(case.prompt)
    positive, negative = ([single_token(spliced.lm, text) for text in side] for side in (case.positive, case.negative))
    attribution = attribute(spliced, tokens, positive, negative)
    latents, predicted = attribution.latents[:verify].tolist(), attribution.total[:verify].tolist()
    with progress(case.name, len(latents), unit="latents") as meter:
        measured = measure(spliced, tokens, latents, positive, negative, meter.advance).tolist()
    correlation = rank_correlation(predicted, measured)
    return {
        "name": case.name,
        "prompt": case.prompt,
        "positive": case.positive,
        "negative": case.negative,
        "metric": attribution.metric,
        "active": len(attribution.latents),
        "latents": latents,
        "predicted": predicted,
        "measured": measured,
        "rank_correlation": correlation and correlation._asdict(),
    }


def steered(spliced: Spliced, study: Study, case: Case, row: dict, arguments: argparse.Namespace) -> dict | None:
    """Counts with the case's latent held at a multiple of its maximum; None where it never fired in the study."""
    fired = [i for i in np.argsort(row["measured"])[::-1] if study.n_fired[row["latents"][i]]]
    if not fired:
        say(f"{case.name}: none of the latents fired in the study.")
        return None
    latent = row["latents"][fired[0]]
    edits = [Edit(latent, "clamp", case.steers.multiple * study.latent(latent).maximum)]
    controls = matched_controls(study, edits, arguments.controls)
    written = (2 + arguments.controls) * arguments.samples * arguments.tokens
    with progress(f"steering: {case.name}", written) as meter:
        counted = experiment(
            spliced,
            spliced.tokens(case.steers.prompt),
            edits,
            controls,
            re.compile(case.steers.pattern),
            arguments.samples,
            arguments.tokens,
            on_token=meter.advance,
        )
    rates = {name: getattr(counted, name)._asdict() for name in ("clean", "steered", "controls")}
    against = {name: getattr(counted, name)._asdict() for name in ("steered_less_controls", "steered_less_clean")}
    return {"latent": latent, **vars(case.steers), "value": edits[0].value, **rates, **against}


def table(found: list[dict]) -> str:
    """Markdown: a row a case, and a row an experiment."""
    lines = [
        "| case | metric | strongest by ablation | rank correlation of attribution and ablation |",
        "|---|---|---|---|",
    ]
    for row in found:
        best = int(np.argmax(np.abs(row["measured"])))
        r = row["rank_correlation"]
        shown = "undefined" if r is None else f"{r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f}), n={r['n']}"
        effect = f"{row['latents'][best]}: {row['measured'][best]:+.2f}, predicted {row['predicted'][best]:+.2f}"
        lines.append(f"| {row['name']} | {row['metric']:+.2f} | {effect} | {shown} |")
    lines += [
        "",
        "| steered | latent at | no edit | edit | latents as active | edit less these |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        if s := row.get("steering"):
            rates = " | ".join(f"{s[n]['n']} of {s[n]['of']}" for n in ("clean", "steered", "controls"))
            d = s["steered_less_controls"]
            lines.append(
                f"| {row['name']} | {s['latent']} at {s['multiple']:g}x | {rates} "
                f"| {d['value']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}) |"
            )
    return "\n".join(lines) + "\n"


def draw(found: list[dict], path: Path) -> None:
    """Predicted against measured effects, a panel a case."""
    plt = pyplot()
    figure, panels = plt.subplots(2, 5, figsize=(15, 6.2), layout="constrained")
    for panel, row in zip(panels.flat, found, strict=True):
        ends = [min(*row["predicted"], *row["measured"]), max(*row["predicted"], *row["measured"])]
        panel.plot(ends, ends, color="0.7", linewidth=1)
        panel.scatter(row["predicted"], row["measured"], s=18)
        r = row["rank_correlation"]
        panel.set_title(f"{row['name']}: {'undefined' if r is None else format(r['value'], '.2f')}", fontsize=10)
        panel.grid(alpha=0.3)
    figure.supxlabel("attribution (activation x gradient), logits")
    figure.supylabel("effect of ablation, logits")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
