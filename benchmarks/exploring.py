"""What latents are found to do on prompts that were written before any was looked at, and whether they steer.

    python benchmarks/exploring.py RUN --out FOLDER [--samples 100 --tokens 30 --controls 10]

For each case: attributions of the active latents to the difference of two sets of next tokens, the ablation effect of
the strongest ones beside it, and the rank correlation. Cases with `steers`: the latent whose ablation costs the
positive tokens most is held at multiples of its maximum while another prompt is continued, and samples in which a
pattern occurs are counted, against no edit and against latents as active held at the same values. RUN needs a study,
for maxima, controls and contexts. Cost: 3 doses x (2 + controls) x samples x tokens written for each of seven prompts,
756 000 tokens by default.

Writes exploring.json, tables and texts (exploring.md), and pictures of attributions and ablations (exploring.png) and
of rates by dose (exploring-steering.png).
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import topkapi.explore
import topkapi.study
from topkapi.console import progress, say
from topkapi.explore import Edit, attribute, experiment, matched_controls, measure, rank_correlation, sample
from topkapi.explore.finding import contexts
from topkapi.explore.prompts import continuation, single_token, texts
from topkapi.explore.spliced import Spliced
from topkapi.plotting import pyplot
from topkapi.study import Study

DOSES = (0.25, 0.5, 1.0)  # times a case's multiple
N_TEXTS = 4  # samples that are written down, clean and steered, at the largest dose
N_CONTEXTS, N_VOTES = 6, 10  # of a steered latent: where it fires most strongly, and tokens that it votes for
RATES = ("clean", "steered", "controls")
LESS = ("steered_less_controls", "steered_less_clean")
NONE_ACTIVE = "no latent is active"


@dataclass(frozen=True)
class Steering:
    """A prompt to be continued, what is counted in continuations, and the largest value of the latent over its maximum.

    Its sign is the direction in which the pattern should become more frequent (+) or less (-).
    """

    prompt: str
    pattern: str
    multiple: float
    name: str = ""
    """What sets it apart from others of the case."""


@dataclass(frozen=True)
class Case:
    """Next tokens to tell apart."""

    name: str
    prompt: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    steers: tuple[Steering, ...] = ()


FEMALE = r"\b([Ss]he|[Hh]ers?|[Hh]erself|woman|women|girl|mother|daughter|sister)\b"
PRAISE = r"\b(wonderful|great|excellent|delicious|amazing|perfect|good|best|lovely)\b"
COARSE = r"\b(hell|heck|damn\w*|fuck\w*|shit\w*|crap|bloody|ass|bastard)\b"
CASES = (
    Case(
        "gender",
        "My sister called yesterday. I was glad to hear that",
        (" she",),
        (" he",),
        (Steering("The doctor opened the door and", FEMALE, 2.0),),
    ),
    Case("number agreement", "The keys to the old cabinet", (" are", " were"), (" is", " was")),
    Case(
        "closing quotes",
        'The old man looked at me and said, "You should never have come here',
        ('."', ',"', '!"'),
        (".", ",", "!"),
        (Steering("He turned to her and told her that", r'["\u201c\u201d]', 2.0),),
    ),
    Case(
        "sentiment",
        "I loved every minute of this film. The acting was",
        (" wonderful", " great", " excellent"),
        (" terrible", " bad", " awful"),
        (Steering("We went to the new restaurant last night, and the food was", PRAISE, 2.0),),
    ),
    Case(
        "language",
        "Je suis allé au marché et j'ai acheté",
        (" un", " des", " du"),
        (" a", " some", " the"),
        (Steering("The children went to the", r"\b(le|la|les|des|une|est|dans|pour|avec|qui)\b", 2.0),),
    ),
    Case(
        "coarse language",
        "He hit his thumb with the hammer and shouted: what the",
        (" hell", " devil"),
        (" reason", " result"),
        (Steering("I can't believe he did that again. What the", COARSE, -2.0),),
    ),
    Case("repetition broken", "red green blue red green blue red green", (" blue",), (" red", " green")),
    Case("induction", "Mr Dursley met Mrs Potter. Then Mr Dursley said to Mrs", (" Potter",), (" D", " Smith")),
    Case(
        "tense", "Yesterday, before the rain began, she", (" went", " walked", " took"), (" goes", " walks", " takes")
    ),
    Case("a fact", "The capital of France is the city of", (" Paris",), (" London", " Rome")),
    # Gao et al. 2024, appendix E.2: a negative value reduces profanity, but not where it is copied from the prompt
    Case(
        "profanity",
        "What the fuck is wrong with you? Get your damn hands off me, you piece of",
        (" sh",),  # the first of the two tokens of " shit"
        (" paper", " equipment", " furniture"),
        (
            Steering("He kicked the broken engine as hard as he could and shouted: what the", COARSE, -2.0, "invited"),
            Steering("The damn car, the damn road, the damn rain, the", COARSE, -2.0, "copied"),
        ),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--study", type=Path)
    parser.add_argument("--verify", type=int, default=20, help="latents ablated in each case")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--controls", type=int, default=10)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    spliced = topkapi.explore.open(arguments.run)
    study = topkapi.study.open(arguments.study or arguments.run / "study", arguments.run)
    found = [found_in(spliced, case, arguments.verify) for case in CASES]
    for case, row in zip(CASES, found, strict=True):
        row["steering"] = [steered(spliced, study, steering, row, arguments) for steering in case.steers]
    experiments = [one for row in found for one in row["steering"] if one]
    (arguments.out / "exploring.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables = f"{table(found)}\n{steering_table(experiments)}"
    (arguments.out / "exploring.md").write_text(f"{tables}\n{texts_of(experiments)}", encoding="utf-8")
    draw(found, arguments.out / "exploring.png")
    if experiments:
        draw_steering(experiments, arguments.out / "exploring-steering.png")
    print(tables)


def found_in(spliced: Spliced, case: Case, verify: int) -> dict:
    """Attributions of one case beside measured effects, for the latents of the largest attributions."""
    tokens = spliced.tokens(case.prompt)
    positive, negative = ([single_token(spliced.lm, text) for text in side] for side in (case.positive, case.negative))
    attribution = attribute(spliced, tokens, positive, negative)
    latents, predicted = attribution.latents[:verify].tolist(), attribution.total[:verify].tolist()
    with progress(case.name, len(latents), unit="latents") as meter:
        measured = measure(spliced, tokens, latents, positive, negative, meter.advance).tolist()
    correlation = rank_correlation(predicted, measured)
    return {key: value for key, value in vars(case).items() if key != "steers"} | {
        "metric": attribution.metric,
        "active": len(attribution.latents),
        "latents": latents,
        "predicted": predicted,
        "measured": measured,
        "rank_correlation": correlation and correlation._asdict(),
    }


def steered(
    spliced: Spliced, study: Study, steering: Steering, row: dict, arguments: argparse.Namespace
) -> dict | None:
    """Counts with the case's latent held at each dose, what it is, and the first texts at the largest dose.

    None where none of the latents fired in the study.
    """
    fired = [i for i in np.argsort(row["measured"])[::-1] if study.n_fired[row["latents"][i]]]
    name = row["name"] + (f", {steering.name}" if steering.name else "")
    if not fired:
        say(f"{name}: none of the latents fired in the study.")
        return None
    latent, n, n_tokens = row["latents"][fired[0]], arguments.samples, arguments.tokens
    prompt, pattern, doses = spliced.tokens(steering.prompt), re.compile(steering.pattern), []
    with progress(f"steering: {name}", len(DOSES) * (2 + arguments.controls) * n * n_tokens) as meter:
        for multiple in (dose * steering.multiple for dose in DOSES):
            edits = [Edit(latent, "clamp", multiple * study.latent(latent).maximum)]
            controls = matched_controls(study, edits, arguments.controls)
            found = experiment(spliced, prompt, edits, controls, pattern, n, n_tokens, on_token=meter.advance)
            numbers = {of: getattr(found, of)._asdict() | {"value": getattr(found, of).value} for of in (*RATES, *LESS)}
            each = [rate.n for rate in found.each_control]
            doses.append({"multiple": multiple, "value": edits[0].value, "each_control": each} | numbers)
    pairs = sample(spliced, prompt, edits, N_TEXTS, n_tokens)  # the first of those counted
    sides = {"clean": pairs.clean, "steered": pairs.steered}
    written = {side: [continuation(spliced.lm, row) for row in rows.tolist()] for side, rows in sides.items()}
    latent_is = about(spliced, study, latent)
    return vars(steering) | latent_is | {"name": name, "doses": doses, "kl": pairs.mean_kl, "samples": written}


def about(spliced: Spliced, study: Study, latent: int) -> dict:
    """What the study and the decoder say of a latent."""
    known, votes = study.latent(latent), study.votes(latent, spliced.lm, N_VOTES)
    return {
        "latent": latent,
        "density": known.density,
        "maximum": known.maximum,
        "contexts": [vars(context) for context in contexts(study, spliced, latent, N_CONTEXTS)],
        "votes": texts(spliced.lm, [vote.token for vote in votes.up]),
        "votes_against": texts(spliced.lm, [vote.token for vote in votes.down]),
    }


def table(found: list[dict]) -> str:
    """Markdown: a row a case."""
    lines = ["| case | metric | strongest by ablation | rank correlation with attribution |", "|---|---|---|---|"]
    for row in found:
        r = row["rank_correlation"]
        shown = "undefined" if r is None else f"{r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f}), n={r['n']}"
        effect = NONE_ACTIVE
        if row["latents"]:
            best = int(np.argmax(np.abs(row["measured"])))
            effect = f"{row['latents'][best]}: {row['measured'][best]:+.2f}, predicted {row['predicted'][best]:+.2f}"
        lines.append(f"| {row['name']} | {row['metric']:+.2f} | {effect} | {shown} |")
    return "\n".join(lines) + "\n"


def steering_table(experiments: list[dict]) -> str:
    """Markdown: a row a dose."""
    columns = ("steered", "latent at", "no edit", "edit", "controls", "edit less controls", "edit less no edit")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in experiments:
        for dose in one["doses"]:
            rates = " | ".join(f"{dose[n]['n']} of {dose[n]['of']}" for n in RATES)
            less = " | ".join(
                f"{dose[than]['value']:+.2f} ({dose[than]['low']:+.2f} to {dose[than]['high']:+.2f})" for than in LESS
            )
            lines.append(f"| {one['name']} | {one['latent']} at {dose['multiple']:g}x | {rates} | {less} |")
    return "\n".join(lines) + "\n"


def texts_of(experiments: list[dict]) -> str:
    """Markdown: what each steered latent fires on and votes for, and texts with and without the edit."""
    lines = []
    for one in experiments:
        pairs = zip(one["samples"]["clean"], one["samples"]["steered"], strict=True)
        lines += [
            f"## {one['name']}: latent {one['latent']}, density {one['density']:.2%}, maximum {one['maximum']:.2f}\n",
            *(f"    {c['value']:.2f}  {c['before'][-60:]}[[{c['token']}]]{c['after'][:30]}" for c in one["contexts"]),
            f"\nVotes for {', '.join(map(repr, one['votes']))}",
            f"and against {', '.join(map(repr, one['votes_against']))}.\n",
            f"{one['prompt']!r} goes on, as it is and at {one['multiple']:g}x (KL {one['kl']:.2f} nats a token):\n",
            *(f"    {clean!r}\n    -> {changed!r}" for clean, changed in pairs),
            "",
        ]
    return "\n".join(lines)


def draw(found: list[dict], path: Path) -> None:
    """Predicted against measured effects, a panel a case."""
    figure, panels = grid(len(found), "attribution (activation x gradient), logits", "effect of ablation, logits")
    for panel, row in zip(panels, found, strict=True):
        if row["latents"]:
            both = [*row["predicted"], *row["measured"]]
            panel.plot([min(both), max(both)], [min(both), max(both)], color="0.7", linewidth=1)
            panel.scatter(row["predicted"], row["measured"], s=18)
        else:
            panel.text(0.5, 0.5, NONE_ACTIVE, transform=panel.transAxes, ha="center")
        r = row["rank_correlation"]
        panel.set_title(f"{row['name']}: {'undefined' if r is None else format(r['value'], '.2f')}", fontsize=10)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_steering(experiments: list[dict], path: Path) -> None:
    """Share of samples with the pattern by dose, steered and with controls, a panel an experiment; 0 is no edit."""
    figure, panels = grid(len(experiments), "value over the latent's maximum; 0: no edit", "share of samples, 95 %")
    for panel, one in zip(panels, experiments, strict=True):
        at = [0.0, *(dose["multiple"] for dose in one["doses"])]
        for of, color in (("controls", "tab:gray"), ("steered", "tab:red")):
            rates = [one["doses"][0]["clean"], *(dose[of] for dose in one["doses"])]
            value, low, high = ([rate[key] for rate in rates] for key in ("value", "low", "high"))
            panel.fill_between(at, low, high, color=color, alpha=0.25, linewidth=0)
            panel.plot(at, value, marker="o", color=color, label="edited" if of == "steered" else "latents as active")
        panel.set_title(f"{one['name']}: {one['latent']}", fontsize=10)
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def grid(n: int, x: str, y: str) -> tuple[Any, list[Any]]:
    """A figure of n panels, four at most beside each other, with the names of their axes."""
    columns, rows = min(n, 4), -(-n // 4)
    size = (3.4 * columns, 3.1 * rows)
    figure, panels = pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.supxlabel(x)
    figure.supylabel(y)
    for panel in panels.flat[n:]:
        panel.axis("off")
    return figure, list(panels.flat[:n])


if __name__ == "__main__":
    main()
