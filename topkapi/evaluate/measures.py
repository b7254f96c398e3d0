"""The metrics beyond `evaluate`'s, each one function of a `Subject`, as values for eval.json.

They share one harvest of held-out activations, of at most 65 536 of `EvalConfig.tokens` tokens. Every other context of
it is the first half, on which thresholds are calibrated and examples are drawn; the rest is the second, on which the
result counts. docs/metrics.md defines each of them.

An estimate is a dict of value, low, high (95 %) and n, the number of contexts, latents or texts drawn anew.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Int64
from torch import Tensor

from topkapi.config import DataConfig, EvalConfig
from topkapi.console import progress
from topkapi.data.activations import kept_positions
from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile
from topkapi.errors import TopkapiError
from topkapi.evaluate import HARVEST_TOKENS, harvested, spread_contexts
from topkapi.evaluate.ablation import N_POSITIONS, ablation_sparsity, in_float32
from topkapi.evaluate.control import channels
from topkapi.evaluate.downstream import downstream_losses
from topkapi.evaluate.labelled import probe_tasks
from topkapi.evaluate.n2g import activation_of, explain, over_latents, padding_token_of, score
from topkapi.evaluate.progressive import Recovery, calibrate_thresholds, jump_relu_recovery, progressive_recovery
from topkapi.evaluate.refinement import BIN, refinement
from topkapi.evaluate.sampling import chunks
from topkapi.model import Autoencoder, relu_latents
from topkapi.statistics.intervals import Estimate

MOST_TOKENS = 65_536  # kept in memory as bf16
CALIBRATION_TOKENS = 8_192  # thresholds need no more, and their ranks are sorted
CURVE_POINTS = 24  # of k' from 1 to 4 k
TOKENS_PER_LATENT = 1_024  # N2G explains a latent for so many tokens, and at least FEWEST_LATENTS
FEWEST_LATENTS = 16
TOKENS_PER_TEXT = 64  # probes read a text of each source of labels for so many tokens, and at least FEWEST_TEXTS
FEWEST_TEXTS, MOST_TEXTS = 256, 4_096
ABLATED_SHARE = 1 / 4  # of the contexts of downstream_tokens: there latents are ablated, in FEWEST_ABLATED at least
FEWEST_ABLATED = 8
CHANNELS = 16  # ablated at each drawn token, for comparison

Json = dict[str, Any]


class Half(NamedTuple):
    """Every other context of the harvested ones."""

    tokens: Int64[Tensor, "b context"]
    """All tokens of its contexts."""
    keep: Bool[Tensor, "b context"]
    """Those that were harvested."""
    raw: BFloat16[Tensor, "n d_model"]
    """Activations of the latter, in order."""
    contexts: Int64[Tensor, " n"]
    """The row of `tokens` that each belongs to."""


@dataclass(eq=False)
class Subject:
    """An autoencoder, and the text and budget that it is measured with."""

    ae: Autoencoder
    lm: LanguageModel
    token_file: TokenFile
    data: DataConfig
    settings: EvalConfig
    seed: int = 0

    @cached_property
    def context_ids(self) -> Int64[np.ndarray, " contexts"]:
        """The contexts that are harvested."""
        return spread_contexts(self.token_file, self.data.context, min(self.settings.tokens, MOST_TOKENS))

    @cached_property
    def halves(self) -> tuple[Half, Half]:
        """The harvested activations. Raises TopkapiError if one half of the contexts holds no token that is kept."""
        context, ids = self.data.context, self.context_ids
        blocks = list(harvested("activations", self.lm, self.token_file, ids, self.data))
        if len(ids) < 2:
            raise TopkapiError(
                f"{len(ids)} contexts of {context} held-out tokens do not make two halves: raise --tokens, or hold "
                "more text out."
            )
        raw = torch.cat([block.x for block in blocks])
        positions = torch.cat([block.positions for block in blocks]).cpu()
        rank = torch.searchsorted(torch.from_numpy(ids), positions // context)
        halves = []
        for half in (0, 1):
            tokens = self.token_file.context_tokens(ids[half::2], context)
            mine = rank % 2 == half
            row, column = rank[mine] // 2, positions[mine] % context
            keep = torch.zeros_like(tokens, dtype=torch.bool)
            keep[row, column] = True
            if not len(row):
                raise TopkapiError("no token of half of the held-out text is kept: raise --tokens.")
            halves.append(Half(tokens, keep, raw[mine.to(raw.device)], row))
        return halves[0], halves[1]

    def normalised(self, raw: Tensor, what: str) -> Iterator[Float[Tensor, "n d_model"]]:
        """Blocks of activations as the autoencoder sees them, under a meter."""
        with progress(what, len(raw)) as meter:
            for part in raw.split(HARVEST_TOKENS):
                yield self.ae.normalise(part.to(self.ae.W_dec.device, torch.float32)).x
                meter.advance(len(part))


def as_json(it: Estimate) -> Json:
    """The estimate as a dict; the reason only where there is one."""
    return {name: value for name, value in it._asdict().items() if name != "reason" or value}


def refinement_of(subject: Subject) -> Json:
    """Shrinkage: the values of active latents against the best ones for the same latents, on both halves."""
    raw = torch.cat([half.raw for half in subject.halves])
    first = len(subject.halves[0].tokens)
    contexts = torch.cat([subject.halves[0].contexts, first + subject.halves[1].contexts])
    found = refinement(subject.ae, subject.normalised(raw, "refinement"), subject.seed, contexts)
    if found.reason:
        raise TopkapiError(f"{found.reason}.")
    names = ("normalized_mse", "normalized_mse_refined", "mean_ratio", "total_ratio")
    return {
        **{name: as_json(getattr(found, name)) for name in names},
        **{name: getattr(found, name) for name in ("n_tokens", "n_active", "n_unsolved")},
        "histogram": {"bin_width": BIN, "counts": found.histogram.tolist()},
    }


def progressive_of(subject: Subject) -> Json:
    """Normalized MSE by the number k' of latents that each token takes, on the second half."""
    ks, half = _curve_points(subject.ae), subject.halves[1]
    x = subject.normalised(half.raw, "progressive recovery")
    found = progressive_recovery(subject.ae, x, ks[-1], subject.seed, half.contexts)
    return {"k": ks, "trained_k": subject.ae.k, **_curve(found, [k - 1 for k in ks])}


def threshold_of(subject: Subject) -> Json:
    """Normalized MSE and L0 with a threshold instead of TopK, calibrated on the first half, measured on the second."""
    ae, (first, half) = subject.ae, subject.halves
    ks = _curve_points(ae)
    spread = first.raw[:: math.ceil(len(first.raw) / CALIBRATION_TOKENS)]  # the first ones are of one corpus alone
    sample = torch.cat(list(subject.normalised(spread, "calibration")))
    positive = sum(
        int((relu_latents(part - ae.pre_bias, ae.W_enc, ae.latent_bias) > 0).sum()) for part in chunks(ae, sample)
    )
    ks = [k for k in ks if k * len(sample) < positive]
    if not ks:
        raise TopkapiError("fewer than one pre-activation per token is above 0.")
    thresholds = calibrate_thresholds(ae, sample, ks)
    x = subject.normalised(half.raw, "recovery by threshold")
    found = jump_relu_recovery(ae, x, thresholds, subject.seed, half.contexts)
    return {"k": ks, "trained_k": ae.k, "threshold": list(thresholds), **_curve(found, range(len(ks)))}


def _curve_points(ae: Autoencoder) -> list[int]:
    """k' from 1 to 4 k, about evenly spaced by ratio, k and its halves and doubles among them."""
    if ae.activation == "relu":
        raise TopkapiError("a ReLU autoencoder has no k: every latent above 0 takes part.")
    most = min(4 * ae.k, ae.n_latents)
    spaced = np.geomspace(1, most, CURVE_POINTS).round().astype(int).tolist()
    wanted = {*spaced, *(ae.k * 2**i for i in (0, 1)), *(ae.k // 2**i for i in range(1, 9))}
    return sorted(k for k in wanted if 1 <= k <= most)


def _curve(found: Recovery, points: Sequence[int]) -> Json:
    if found.normalized_mse is None or found.l0 is None:
        raise TopkapiError(f"{found.reason}.")
    of_points = [found.normalized_mse[i] for i in points]
    return {
        "l0": [found.l0[i] for i in points],
        "normalized_mse": [it.value for it in of_points],
        "low": [it.low for it in of_points],
        "high": [it.high for it in of_points],
        "n_tokens": found.n_tokens,
    }


def ablation_sparsity_of(subject: Subject) -> Json:
    """The share of the next words' logits that ablating a latent changes, and the same for channels."""
    data, n = subject.data, subject.settings.downstream_tokens
    if not n:
        raise TopkapiError(
            "latents are ablated in whole passes of the language model: set --downstream-tokens above 0."
        )
    n_tokens = max(FEWEST_ABLATED * data.context, int(n * ABLATED_SHARE))
    ids = spread_contexts(subject.token_file, data.context, n_tokens)
    n_positions = min(N_POSITIONS, max(1, data.context // 2))
    rest = (subject.lm, subject.token_file, ids, data, n_positions, subject.seed)
    with in_float32(subject.lm):
        found = ablation_sparsity(subject.ae, *rest)
        if not len(found.tokens):
            raise TopkapiError(f"no latent is active at a token drawn from each of {len(ids)} contexts.")
        control = ablation_sparsity(channels(subject.ae.d_model, subject.ae.W_dec.device), *rest, CHANNELS)
    return {
        "over_tokens": as_json(found.over_tokens(subject.seed)),
        "over_latents": as_json(found.over_latents(subject.seed)),
        "channels": as_json(control.over_tokens(subject.seed)),
        "n_ablations": len(found.latents),
        "n_skipped": found.n_skipped,
        "n_positions": n_positions,
    }


def probes_of(subject: Subject) -> Json:
    """Probe loss over the labelled tasks of the packages that are installed, and that of channels."""
    n_texts = min(MOST_TEXTS, max(FEWEST_TEXTS, subject.settings.tokens // TOKENS_PER_TEXT))
    found = probe_tasks(subject.ae, subject.lm, subject.data, n_texts, subject.seed)
    return {
        "mean": as_json(found.latents.mean),
        "channels": as_json(found.channels.mean),
        "prior": float(np.mean([probe.prior_loss for probe in found.probes.values()])),
        "tasks": {
            name: {
                **as_json(found.latents.tasks[name]),
                "channels": as_json(found.channels.tasks[name]),
                "prior": probe.prior_loss,
                "latent": probe.latent,
                "n_train": probe.n_train,
            }
            for name, probe in found.probes.items()
        },
        "left_out": found.left_out,
    }


def n2g_of(subject: Subject) -> Json:
    """Precision, recall and F1 of N2G explanations of latents drawn from those that fire on the first half."""
    first, second = subject.halves
    firings = _Firings(subject, first), _Firings(subject, second)
    alive = np.flatnonzero(firings[0].counts.numpy())
    if not len(alive):
        raise TopkapiError("no latent fires on any of the tokens.")
    padding = padding_token_of(subject.lm)
    n = min(len(alive), max(FEWEST_LATENTS, subject.settings.tokens // TOKENS_PER_LATENT))
    drawn = np.sort(np.random.default_rng(subject.seed).choice(alive, n, replace=False)).tolist()
    scores = []
    with progress("N2G", n, unit="latents") as meter:
        for latent in drawn:
            ask = activation_of(subject.ae, subject.lm, latent)
            explanation = explain(first.tokens, firings[0].of(latent), ask, padding, seed=subject.seed)
            scores.append(score(explanation, second.tokens, firings[1].of(latent), second.keep))
            meter.advance(1)
    means = {name: as_json(it) for name, it in over_latents(scores, subject.seed).items()}
    return {**means, "n_latents": n, "n_alive": len(alive), "n_tokens": int(second.keep.sum())}


def n2g_loss_of(subject: Subject) -> Json:
    """The language model's loss with every latent simulated from its N2G explanation.

    Explanations and scales are from the first half: a latent's simulated value is s E[s a] / E[s^2], s what its
    patterns predict and a what it is. Contexts of the second half, of `downstream_tokens` at most, are spliced.
    """
    (first, second), data, ae = subject.halves, subject.data, subject.ae
    wanted = subject.settings.downstream_tokens // data.context
    if not wanted:
        raise TopkapiError(f"it needs a context of {data.context} tokens or more: raise --downstream-tokens.")
    ids = subject.context_ids[1::2]
    ids = ids[np.arange(min(wanted, len(ids))) * len(ids) // min(wanted, len(ids))]
    tokens = subject.token_file.context_tokens(ids, data.context)
    firings, padding = _Firings(subject, first), padding_token_of(subject.lm)
    alive = firings.counts.nonzero()[:, 0].tolist()
    if not alive:
        raise TopkapiError("no latent fires on any of the tokens.")
    recon = ae.pre_bias.detach().cpu().expand(*tokens.shape, -1).clone()
    with progress("N2G of every latent", len(alive), unit="latents") as meter:
        for latent in alive:
            active, ask = firings.of(latent), activation_of(ae, subject.lm, latent)
            explanation = explain(first.tokens, active, ask, padding, seed=subject.seed)
            predicted = explanation.predict(first.tokens) * first.keep
            if predicted.any():
                scale = (predicted * active).sum() / predicted.square().sum()
                recon += (scale * explanation.predict(tokens))[..., None] * ae.W_dec[latent].detach().cpu()
            meter.advance(1)
    rows = iter(recon[kept_positions(tokens, data, subject.lm.special_ids)].split(1))

    def simulated(raw: Tensor) -> Tensor:
        _, mean, norm = ae.normalise(raw)
        return ae.denormalise(torch.cat([next(rows) for _ in raw]).to(raw.device), mean, norm)

    mean = torch.cat([first.raw, second.raw]).double().mean(0)
    splices = (simulated, ae)
    found, whole = downstream_losses(splices, subject.lm, subject.token_file, ids, data, mean)
    estimates = {name: as_json(it) for name, it in found.estimates().items()}
    estimates["ce_simulated"] = estimates.pop("ce_spliced")
    return estimates | {"ce_spliced": as_json(whole.estimates()["ce_spliced"]), "n_latents": len(alive)}


class _Firings:
    """Where latents fire in one half, by latent."""

    def __init__(self, subject: Subject, half: Half) -> None:
        self.shape, ae = half.keep.shape, subject.ae
        places = half.keep.flatten().nonzero()[:, 0]
        found, start = [], 0
        for chunk in chunks(ae, subject.normalised(half.raw, "encoding")):
            values, indices = ae.encode(chunk)
            active = values > 0
            rows = places[start : start + len(chunk), None].expand(indices.shape)
            found.append((indices[active].cpu().long(), rows[active.cpu()], values[active].float().cpu()))
            start += len(chunk)
        latents, places, values = map(torch.cat, zip(*found, strict=True))
        order = latents.argsort(stable=True)
        self.places, self.values = places[order], values[order]
        self.counts = torch.bincount(latents, minlength=ae.n_latents)
        self.ends = self.counts.cumsum(0)

    def of(self, latent: int) -> Float[Tensor, "b context"]:
        """The latent's activations; 0 where a token is left out."""
        end, out = int(self.ends[latent]), torch.zeros(self.shape)
        own = slice(end - int(self.counts[latent]), end)
        out.view(-1)[self.places[own]] = self.values[own]
        return out


MEASURES: dict[str, Callable[[Subject], Json]] = {
    "refinement": refinement_of,
    "progressive": progressive_of,
    "threshold": threshold_of,
    "ablation_sparsity": ablation_sparsity_of,
    "n2g": n2g_of,
    "n2g_loss": n2g_loss_of,
    "probes": probes_of,
}


def measure(name: str, subject: Subject) -> Json:
    """The metric `name` of MEASURES.

    Raises:
        TopkapiError: it cannot be had, and why.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in subject.ae.parameters()):
        raise TopkapiError("the autoencoder's weights are not finite.")
    with torch.no_grad():
        return MEASURES[name](subject)
