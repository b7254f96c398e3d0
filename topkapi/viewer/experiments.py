"""What the language model is asked for: a prompt's latents, what they caused, what an ablation and an edit change.

Each function takes numbers that are checked already, and returns the work for `topkapi.viewer.worker`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from topkapi.explore import Edit, Spliced, ablation_effects, attribute, measure, rank_correlation, sample
from topkapi.explore.effects import TokenEffect
from topkapi.explore.prompts import continuation
from topkapi.explore.proportions import rate
from topkapi.study import Study
from topkapi.viewer.labels import Labels
from topkapi.viewer.patterns import Pattern
from topkapi.viewer.texts import Texts
from topkapi.viewer.worker import Report, Work

N_NEXT = 10  # next tokens shown
AFTER_ABLATION = 32  # tokens on which its effects are shown
MOST_ACTIVE = 256  # latents shown of a token; a ReLU autoencoder may have thousands


@dataclass(frozen=True)
class Experiments:
    """Makes work for a study's autoencoder in its language model."""

    study: Study
    texts: Texts
    labels: Labels

    def prompt(self, ids: Sequence[int]) -> Work:
        """The active latents of each token of a prompt, how much of it they explain, and what comes next."""

        def work(spliced: Spliced, report: Report) -> dict[str, Any]:
            tokens = torch.tensor([list(ids)])
            report(0, 2, "encoding")
            code = spliced.code(tokens)
            report(1, 2, "predicting")
            p, order = spliced.lm.logits(tokens)[0, -1].double().softmax(-1).topk(N_NEXT)
            rows = zip(ids, self.texts.each(ids), strict=True)
            found = [
                {
                    "id": token,
                    "text": text,
                    "position": position,
                    "kept": bool(code.kept[0, position]),
                    "error": float(code.error[0, position]),
                    "norm": float(code.norm[0, position]),
                    "n_active": int((code.values[0, position] > 0).sum()),
                    "active": _active(code.values[0, position], code.indices[0, position]),
                }
                for position, (token, text) in enumerate(rows)
            ]
            following = zip(order.tolist(), p.tolist(), strict=True)
            return {
                "tokens": found,
                "next": [{"id": i, "text": self._next(ids, i), "p": share} for i, share in following],
            }

        return work

    def attribution(
        self, ids: Sequence[int], positive: Sequence[int], negative: Sequence[int], top: int, verify: int, steps: int
    ) -> Work:
        """What latents contributed to a difference of logits, and for the first ones what ablating them changes."""

        def work(spliced: Spliced, report: Report) -> dict[str, Any]:
            tokens = torch.tensor([list(ids)])
            found = attribute(spliced, tokens, positive, negative, steps, _counted(report, 1 + steps, "attributing"))
            latents = found.latents[:top].tolist()
            progress = _counted(report, min(verify, len(latents)), "ablating")
            measured = measure(spliced, tokens, latents[:verify], positive, negative, progress).tolist()
            known = measured + [None] * (len(latents) - len(measured))
            rows = [
                {
                    "latent": latent,
                    "attribution": float(found.total[row]),
                    "measured": known[row],
                    "by_position": found.at[row],
                    "values": found.values[row],
                    "label": self.labels.all().get(latent),
                }
                for row, latent in enumerate(latents)
            ]
            correlation = rank_correlation(found.total[: len(measured)].tolist(), measured)
            between = None if correlation is None else correlation._asdict()
            return {"metric": found.metric, "rows": rows, "rank_correlation": between}

        return work

    def ablation(self, latent: int, row: int) -> Work:
        """What setting a latent to 0 at one token of the study changes, there and at the tokens after it.

        As many as AFTER_ABLATION of them, as far as its context reaches.
        """
        number, at, _, document = self.study.place(row)
        begin, context = number * self.study.context, self.study.context
        ids = self.study.arrays["tokens"][begin : begin + min(context, at + 1 + AFTER_ABLATION)].tolist()

        def work(spliced: Spliced, report: Report) -> dict[str, Any]:
            report(0, 1, "ablating")
            found = ablation_effects(spliced, torch.tensor([ids]), at, latent)
            parts = zip(found.loss_change, found.kl, found.up, found.down, strict=True)
            return {
                "tokens": self.texts.each(ids),
                "at": at,
                "document": document,
                "value": found.value,
                "positions": [
                    {"loss_change": loss, "kl": kl, "up": self._effects(up), "down": self._effects(down)}
                    for loss, kl, up, down in parts
                ],
                "sparsity": found.sparsity,
            }

        return work

    def steer(
        self,
        ids: Sequence[int],
        edits: Sequence[Edit],
        n_samples: int,
        n_tokens: int,
        temperature: float,
        seed: int,
        pattern: Pattern | None,
    ) -> Work:
        """Texts that go on from a prompt with and without edits, and how often a pattern occurs in them."""

        def work(spliced: Spliced, report: Report) -> dict[str, Any]:
            progress = _counted(report, 2 * n_samples * n_tokens, "writing")
            prompt = torch.tensor([list(ids)])
            found = sample(spliced, prompt, edits, n_samples, n_tokens, temperature, seed, progress)
            sides = {
                "clean": [row[:n].tolist() for row, n in zip(found.clean, found.clean_lengths, strict=True)],
                "steered": [row[:n].tolist() for row, n in zip(found.steered, found.steered_lengths, strict=True)],
            }
            samples = [
                {side: self._continued(ids, rows[i]) for side, rows in sides.items()}
                | {"kl": found.kl[i, : found.steered_lengths[i]], "first_difference": found.first_difference(i)}
                for i in range(n_samples)
            ]
            counts = None
            if pattern:
                report(0, 1, "counting")
                whole = {side: [continuation(spliced.lm, row) for row in rows] for side, rows in sides.items()}
                counts = {side: rate(pattern.count(written), n_samples)._asdict() for side, written in whole.items()}
            return {"prompt": self.texts.each(ids), "samples": samples, "counts": counts, "mean_kl": found.mean_kl}

        return work

    def _next(self, ids: Sequence[int], token: int) -> str:
        return self._continued(ids, [token])[0]

    def _continued(self, ids: Sequence[int], more: Sequence[int]) -> list[str]:
        """The texts of tokens behind others."""
        before = list(ids[-4:])
        return self.texts.each([*before, *more])[len(before) :]

    def _effects(self, effects: Sequence[TokenEffect]) -> list[dict[str, Any]]:
        return [{"text": self.texts.alone(e.token), "logit": e.logit, "probability": e.probability} for e in effects]


def _active(values: torch.Tensor, indices: torch.Tensor) -> list[list[float | int]]:
    """The latents with a value > 0 and their values, falling."""
    falling, order = values.sort(descending=True, stable=True)
    n = min(int((falling > 0).sum()), MOST_ACTIVE)
    return [list(pair) for pair in zip(indices[order[:n]].tolist(), falling[:n].tolist(), strict=True)]


def _counted(report: Report, total: int, what: str) -> Callable[[int], None]:
    """Adds up what it hears, and reports the sum."""
    done = 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        report(done, total, what)

    return advance
