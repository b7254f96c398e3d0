"""The optimiser step, a block of latents at a time: project, clip, Adam, unit norm, EMA, in that order.

On a CPU the five passes over a block of rows run while the block is in the processor's cache, and the block's gradient
is reduced just before, so that no gradient of the weights' size exists; on a GPU one block is the whole weight. With
clipping the gradient is reduced twice: its norm must be known before the first update.

Scale. The loss is normalized MSE, so gradients of W_enc and W_dec do not depend on the scale of x, and the paper's
epsilon (6.25e-10, small beside gradients averaged over a large batch) applies to them unchanged. The paper's code feeds
inputs of norm sqrt(d_model - 1); ours have norm 1. Under x -> c x the equivalent biases scale by c and their gradients
by 1 / c; with c = 1 / sqrt(d_model - 1) bias gradients are sqrt(d_model - 1) times larger here, and so is the epsilon
that they are compared with. By the same reasoning the biases' learning rate would be divided by sqrt(d_model - 1);
measured, that is never better and slower at small learning rates (docs/LOG.md), so all four parameters share one.

Source: Gao et al. 2024, appendix A.3; OpenAI's published code for the values.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from topkapi.config import OptimConfig
from topkapi.gradients import Gradients, WeightGradient
from topkapi.model import PARAMETERS, Autoencoder

BLOCK_ROWS = 1024  # 2.4 MB a tensor at d_model 576: gradient, weight, moments and average fit a 32 MB cache


@dataclass
class Moments:
    """Adam's state, and the average of the weights, for one parameter."""

    mean: Tensor
    square: Tensor
    ema: Tensor | None


class Optimizer:
    """Adam with the decoder's norm held, and an exponential moving average of the weights."""

    def __init__(self, ae: Autoencoder, config: OptimConfig) -> None:
        self.config, self.n_steps = config, 0
        self.bias_scale = math.sqrt(max(ae.d_model - 1, 1))
        self.moments = {
            name: Moments(
                torch.zeros_like(parameter, requires_grad=False),
                torch.zeros_like(parameter, requires_grad=False),
                torch.zeros_like(parameter, requires_grad=False) if config.ema_decay else None,
            )
            for name, parameter in ((name, getattr(ae, name)) for name in PARAMETERS)
        }

    @torch.no_grad()
    def step_(self, ae: Autoencoder, gradients: Gradients, lr: float) -> float | None:
        """Update `ae` in place. Returns the global gradient norm before clipping, or None without clipping."""
        self.n_steps += 1
        norm = self._norm(ae, gradients) if self.config.clip_norm else None
        scale = 1.0 if norm is None else min(1.0, self.config.clip_norm / max(norm, 1e-30))
        for start, stop in _blocks(ae):
            for name in ("W_enc", "W_dec"):
                grad = self._block(ae, name, getattr(gradients, name), start, stop)
                if scale != 1:
                    grad *= scale
                self._update_(ae, name, slice(start, stop), grad, lr, self.config.eps)
        for name in ("latent_bias", "pre_bias"):
            grad = getattr(gradients, name) * scale
            self._update_(ae, name, slice(None), grad, lr, self.config.eps * self.bias_scale)
        return norm

    def _block(
        self, ae: Autoencoder, name: str, gradient: WeightGradient, start: int, stop: int
    ) -> Float[Tensor, "rows d_model"]:
        """Rows of a weight's gradient, projected where the decoder's norm is held."""
        grad = gradient.block(start, stop)
        if name == "W_dec" and self.config.unit_norm_decoder:
            rows = ae.W_dec[start:stop]
            grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1)
        return grad

    def _norm(self, ae: Autoencoder, gradients: Gradients) -> float:
        squares = [gradients.latent_bias.pow(2).sum(), gradients.pre_bias.pow(2).sum()]
        for start, stop in _blocks(ae):
            for name in ("W_enc", "W_dec"):
                block = self._block(ae, name, getattr(gradients, name), start, stop)
                squares.append(block.pow(2).sum())
        return float(torch.stack(squares).double().sum().sqrt())

    def _update_(self, ae: Autoencoder, name: str, rows: slice, grad: Tensor, lr: float, eps: float) -> None:
        parameter, moments, config = getattr(ae, name).data[rows], self.moments[name], self.config
        step = torch.tensor(float(self.n_steps - 1), device=parameter.device)
        adam(
            [parameter],
            [grad],
            [moments.mean[rows]],
            [moments.square[rows]],
            [],
            [step],
            fused=True,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=lr,
            weight_decay=0.0,
            eps=eps,
            maximize=False,
        )
        if name == "W_dec" and config.unit_norm_decoder:
            unit_norm_(parameter)
        if moments.ema is not None:
            moments.ema[rows].lerp_(parameter, 1 - config.ema_decay)

    @torch.no_grad()
    def averaged(self, ae: Autoencoder) -> dict[str, Tensor]:
        """The weights to evaluate and publish: the bias-corrected average, or the last ones with ema_decay 0.

            average_t / (1 - ema_decay^t), decoder rows then scaled to unit norm where that norm is held

        Source: Gao et al. 2024, appendix A.5.
        """
        if not self.config.ema_decay or self.n_steps == 0:
            return {name: getattr(ae, name).detach().clone() for name in PARAMETERS}
        correction = 1 - self.config.ema_decay**self.n_steps
        weights = {name: self.moments[name].ema / correction for name in PARAMETERS}
        if self.config.unit_norm_decoder:
            unit_norm_(weights["W_dec"])
        return weights

    def state(self) -> dict[str, Tensor]:
        """The tensors a checkpoint holds, without copying them."""
        found = {}
        for name, moments in self.moments.items():
            parts = {"mean": moments.mean, "square": moments.square, "ema": moments.ema}
            found |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
        return found


def unit_norm_(rows: Float[Tensor, "n d_model"]) -> None:
    """Scale each row to unit norm, in place; a row of zeros stays."""
    rows /= rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def learning_rate(config: OptimConfig, step: int, n_steps: int) -> float:
    """The learning rate of step 0 to n_steps - 1: rise, plateau and fall, never quite 0."""
    rise = min(1.0, (step + 1) / (config.lr_warmup * n_steps)) if config.lr_warmup else 1.0
    fall = min(1.0, (n_steps - step) / (config.lr_decay * n_steps)) if config.lr_decay else 1.0
    return config.lr * rise * fall


def _blocks(ae: Autoencoder) -> list[tuple[int, int]]:
    rows = BLOCK_ROWS if ae.W_enc.device.type == "cpu" else ae.n_latents
    return [(start, min(start + rows, ae.n_latents)) for start in range(0, ae.n_latents, rows)]
