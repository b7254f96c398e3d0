"""A training step to be timed: an autoencoder, its optimiser and inputs for one case, and the step piece by piece.

Inputs are random rows: every latent's pre-activation is then normal, and which latents fire is as even as it can be.
What real runs have besides is planted: latents that are dead (encoder rows a tenth as long as the others', so that they
are never among the k largest while AuxK finds positive values among them), and latents that fire on a third of the
tokens (orthonormal directions that are added to a random third of the inputs each). Both are scattered over the
latents. The learning rate is so small that all this stays as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkapi.auxk import DENSE_AUXK_BELOW, NEVER
from topkapi.bench.cases import Case
from topkapi.config import AuxKConfig, ModelConfig, OptimConfig, TrainConfig
from topkapi.dead import DeadCounter
from topkapi.gradients import DeadSubset
from topkapi.loss import mse_scale
from topkapi.model import Autoencoder, Working
from topkapi.ops import reference
from topkapi.ops.auxk import DeadWeights, auxk_gradients
from topkapi.ops.dispatch import implementation
from topkapi.ops.normalise import centre, normalise
from topkapi.optim import Optimizer
from topkapi.step import Step, topk_step

LR = 1e-7
QUIET = 0.1  # of the length of other encoder rows: what dead latents have, the peers' too (topkapi/bench/peers.py)
ROTATED = 3  # batches that steps take in turn, so that none finds its input in a cache
Span = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Part:
    """A piece of a step, and the least that any implementation of it must do."""

    name: str
    run: Callable[[], object]
    n_bytes: int = 0
    """Read and written, gathered rows counted each time."""
    flops: int = 0
    """In dense matrix products."""
    precision: str = ""
    """Of those products, where it is not the case's."""


@dataclass(frozen=True)
class Checked:
    """What one encoded batch shows."""

    dense_densities: list[float]
    """Fraction of the tokens on which each planted dense latent fires."""
    redone: tuple[float, float] | None
    """Fraction of the tokens that the kernel encoded a second time, and one by one; None for plain PyTorch."""


class Planted:
    """Random inputs for a case, and which of its latents are dense and which dead."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(seed)
        order = torch.randperm(case.n_latents, generator=self.generator, device=device)
        self.dense: Int[Tensor, " dense"] = order[: case.dense]
        self.dead: Int[Tensor, " dead"] = order[case.dense : case.dense + case.n_dead].sort().values
        directions = self._normal(case.d_model, case.dense)
        directions -= directions.mean(0)  # normalisation removes an activation's mean: the directions must not have one
        self.directions: Float[Tensor, "dense d_model"] = directions.T
        if case.dense:
            self.directions = torch.linalg.qr(directions).Q.T.contiguous()

    def raw(self) -> Float[Tensor, "n d_model"]:
        """A new batch of activations as a language model would give them, float32.

        A latent has a standard normal pre-activation, whose k-th largest among n_latents is near `edge`. A dense one
        gets 2 more than that where it is active, after the mean, a third of what is added, went into pre_bias.
        """
        case = self.case
        raw = self._normal(case.batch_tokens, case.d_model)
        if case.dense == 0:
            return raw
        edge = float(torch.special.ndtri(torch.tensor(1 - case.k / case.n_latents, dtype=torch.float64)))
        active = torch.rand(case.batch_tokens, case.dense, generator=self.generator, device=self.device) < 1 / 3
        raw -= raw @ self.directions.T @ self.directions
        return raw.addmm_(active.to(raw.dtype), self.directions, alpha=1.5 * (edge + 2))

    def plant_(self, ae: Autoencoder, sample: Float[Tensor, "n d_model"]) -> None:
        """Initialise `ae` on a sample of normalised activations, with the dense and dead latents in place."""
        for weight in (ae.W_enc.data, ae.W_dec.data):
            weight[self.dense] = self.directions.to(weight.dtype)
        ae.initialise_(sample)
        ae.W_enc.data[self.dead] *= QUIET

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


def _no_span(_: str) -> AbstractContextManager:
    return nullcontext()


class Workload:
    """Topkapi's training step for one case, as `topkapi.train` takes it, without EMA (no peer has it)."""

    span: Span = staticmethod(_no_span)
    """Entered around each part of a step, with its name: a profiler puts its own here."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.planted, self.device = Planted(case, device), device
        self.config = TrainConfig(
            model=ModelConfig(n_latents=case.n_latents, k=case.k),
            auxk=AuxKConfig(),
            optim=OptimConfig(lr=LR, ema_decay=0.0, state=case.state),
            batch_tokens=case.batch_tokens,
            precision=case.precision,
        ).resolved(case.d_model, device.type)
        self.case = replace(case, precision=self.config.precision)
        self.raw = [self._batch()]
        sample = Autoencoder.normalise(self.raw[0][:4096].float()).x
        ae = Autoencoder(d_model=case.d_model, n_latents=case.n_latents, k=case.k)
        if case.state == "low_memory":
            for name in ("W_enc", "W_dec"):  # before the device holds them, as in training
                getattr(ae, name).data = getattr(ae, name).data.bfloat16()
        self.ae = ae.to(device)
        self.planted.plant_(self.ae, sample)
        self.scale = mse_scale(sample)
        self.working = Working(self.ae, self.config.precision)
        self.optimizer = Optimizer(self.ae, self.config.optim, self.working)
        self.counter = DeadCounter(case.n_latents, device)
        self.counter.silent_for[self.planted.dead] = 2**40
        self.n_steps = 0

    def rotate_(self) -> None:
        """Make the further batches that steps take in turn; before, there is one, as memory is measured with one."""
        self.raw += [self._batch() for _ in range(ROTATED - len(self.raw))]

    def step(self) -> Step:
        """A whole step: normalisation, forward, AuxK, backward, Adam, dead counters."""
        raw = self.raw[self.n_steps % len(self.raw)]
        self.n_steps += 1
        with self.span("normalise"):
            x = self.normalise(raw)
        with self.span("forward and backward"):
            found = topk_step(self.ae, x, self.scale, self._subset(), self.config.auxk, self.working)
        with self.span("optimiser"):
            self.optimizer.step_(self.ae, found.gradients, LR)
        with self.span("dead counters"):
            self.counter.count_(found.fired, len(x))
        return found

    def normalise(self, raw: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Activations as the step takes them."""
        return normalise(raw, self.working.W_enc.dtype)

    def _subset(self) -> DeadSubset:
        return self.counter.subset(self.config.auxk.dead_after, self.case.batch_tokens)

    def _batch(self) -> Float[Tensor, "n d_model"]:
        raw = self.planted.raw()
        return raw.to(torch.bfloat16) if self.config.precision != "float32" else raw

    @torch.no_grad()
    def parts(self) -> Iterator[Part]:
        """The pieces that a step spends its time in, each on the inputs that it has in a step."""
        case, ae, working = self.case, self.ae, self.working
        raw, n, d = self.raw[0], case.batch_tokens, case.d_model
        size = working.W_dec.element_size()
        batch, pairs, weights = n * d * size, n * case.k, case.n_latents * d
        x = self.normalise(raw)
        ops = implementation(x)
        centred = centre(x, ae.pre_bias.detach(), x.dtype)
        values, indices = self.encode(centred)
        scale = 2 * self.scale / (n * d)
        decoded = ops.decode_step(values, indices, working.W_dec, centred, scale)
        order = ops.order_by_latent(indices, case.n_latents)
        gradients = topk_step(ae, x, self.scale, self._subset(), self.config.auxk, working).gradients

        def bias_gradients() -> None:
            ops.bias_gradients(decoded.grad_values, order, working.W_enc)
            ops.fired(values, order)

        yield Part("normalise", lambda: self.normalise(raw), n_bytes=n * d * raw.element_size() + batch)
        yield Part("encode and top k", lambda: self.encode(centred), flops=2 * n * weights)
        yield Part(
            "decode, error, latent gradient",
            lambda: ops.decode_step(values, indices, working.W_dec, centred, scale),
            n_bytes=pairs * d * size + 2 * batch + 16 * pairs,
        )
        yield Part("sort by latent", lambda: ops.order_by_latent(indices, case.n_latents), n_bytes=16 * pairs)
        yield Part("bias gradients, latents that fired", bias_gradients, n_bytes=weights * size + 24 * pairs)
        yield Part(
            "weight gradients and Adam",
            lambda: self.optimizer.step_(ae, gradients, LR),
            n_bytes=2 * pairs * d * size + 2 * weights * self._state_bytes(),
        )
        if case.n_dead:
            yield self._auxk_part(centred, decoded.grad_recon, 1 / scale)

    def _auxk_part(
        self, centred: Float[Tensor, "n d_model"], grad_recon: Float[Tensor, "n d_model"], inverse_scale: float
    ) -> Part:
        """AuxK of the dead latents: five dense products, or one where the others are sparse."""
        n_dead, subset = len(self.planted.dead), self._subset()
        dead = subset.latents.clamp(max=self.case.n_latents - 1)  # padded as in a step
        bias = torch.where(subset.dead, self.ae.latent_bias.detach()[dead], NEVER)
        k = min(self.config.auxk.auxk, n_dead)
        weights = DeadWeights(self.working.W_enc[dead], self.working.W_dec[dead], bias, k=k)
        factor = torch.tensor(1e-6, device=self.device)
        dense = len(dead) <= DENSE_AUXK_BELOW[self.device.type] * weights.k
        product = 2 * centred.numel() * n_dead
        return Part(
            f"AuxK, {n_dead:,} dead latents",
            lambda: auxk_gradients(weights, centred, grad_recon, inverse_scale, factor, dense=dense),
            flops=(5 if dense else 1) * product,
            precision="" if centred.dtype == torch.float32 else "bf16",
        )

    def encode(self, centred: Float[Tensor, "n d_model"]) -> tuple[Tensor, Tensor]:
        """Values and indices of activations whose pre_bias is subtracted already."""
        bias, working = self.ae.latent_bias.detach(), self.working
        return implementation(centred).encode_topk(centred, working.W_enc, bias, None, self.case.k, working.screening)

    def _state_bytes(self) -> int:
        """Bytes a parameter that an update reads and writes: weight, two moments and the working copy."""
        if self.case.state == "low_memory":
            return 2 * (2 + 1 + 1)
        return 2 * (4 + 4 + 4) + (2 if self.working.W_dec.dtype == torch.bfloat16 else 0)

    @torch.no_grad()
    def recall(self, tokens: int) -> dict[str, float]:
        """Share of the exact k latents that `encode_topk` finds, on the first tokens of a batch.

        same_operands: exact means float32 arithmetic on the weights and activations as the step holds them.
        float32: exact means float32 weights and activations, never rounded to the working precision.
        """
        raw, ae = self.raw[0][:tokens].float(), self.ae
        x = Autoencoder.normalise(raw).x - ae.pre_bias.detach()
        centred = x.to(self.working.W_enc.dtype)
        _, found = self.encode(centred)
        shares = {}
        for name, inputs, weight in (
            ("same_operands", centred.float(), self.working.W_enc.float()),
            ("float32", x, ae.W_enc.detach().float()),
        ):
            zero = torch.zeros_like(inputs[0])
            values, exact = reference.encode_topk(inputs, weight, ae.latent_bias.detach().float(), zero, self.case.k)
            hit = (exact[:, :, None] == found[:, None, :]).any(2) & (values > 0)
            shares[name] = float(hit.sum() / (values > 0).sum().clamp_min(1))
        return shares

    @torch.no_grad()
    def check(self) -> Checked:
        """Encode a batch and look at what came out."""
        centred = centre(self.normalise(self.raw[0]), self.ae.pre_bias.detach(), self.working.W_enc.dtype)
        values, indices = self.encode(centred)
        counts = torch.bincount(indices[values > 0], minlength=self.case.n_latents)
        densities = (counts[self.planted.dense] / len(values)).tolist()
        if not centred.is_cuda:
            return Checked(densities, None)
        counters = import_module("topkapi.ops.kernels.encode_topk").redone.counters
        n_redone, n_single = [sum(int(counter[i]) for counter in counters) for i in (0, 1)]
        return Checked(densities, (n_redone / len(values), n_single / len(values)))
