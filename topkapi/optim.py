"""The optimiser step: project, clip, Adam, unit norm, average and the working copy, in that order.

The weights' gradients stay in parts until their rows are updated, so that none of the weights' size exists: a block of
rows at a time on a CPU, while the block is in the processor's cache, and a row at a time in one kernel on a GPU
(`update_rows_` of the implementation). With clipping the gradients are reduced twice: their norm must be known before
the first update. Nothing waits for the device.

Low memory. `OptimConfig.state` "low_memory" keeps weights in bf16 and Adam's state of them in 8 bits, rounded at random
so that small changes count on average (`topkapi.ops.low_memory`). Biases stay float32, and so does the average: with
`ema_decay` above 0 it takes another 4 bytes a parameter.

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

from topkapi.config import OptimConfig
from topkapi.errors import TopkapiError
from topkapi.gradients import Gradients, WeightGradient
from topkapi.model import PARAMETERS, Autoencoder, Working
from topkapi.ops import AdamStep, RowGradient, RowState, implementation
from topkapi.ops.reference import adam_, unit_norm_
from topkapi.parallel import ALONE, Mesh

WEIGHTS = ("W_enc", "W_dec")
BIASES = ("latent_bias", "pre_bias")


@dataclass
class Moments:
    """Adam's state, and the average of the weights, for one parameter."""

    mean: Tensor
    square: Tensor
    ema: Tensor | None
    mean_scale: Tensor | None = None
    """Scales a row of `mean` and `square` where these are of 8 bits."""
    square_scale: Tensor | None = None


class Optimizer:
    """Adam with the decoder's norm held, and an exponential moving average of the weights.

    Keeps the working weights up to date, those of `Working(ae)` if none are given. Low-memory state asks for bf16
    weights, and computes with them. On a mesh it updates the latents that this process owns and begins to send them to
    the other replicas, the encoder's while the decoder's are updated; the gradient norm is that of all latents.

    Raises:
        TopkapiError: low-memory state of weights that are not bf16.
    """

    def __init__(
        self, ae: Autoencoder, config: OptimConfig, working: Working | None = None, mesh: Mesh = ALONE
    ) -> None:
        self.config, self.n_steps, self.mesh = config, 0, mesh
        self.first_latent = mesh.owned(ae.n_latents).start
        self.bias_scale = math.sqrt(max(ae.d_model - 1, 1))
        self.working = working or Working(ae, mesh=mesh)
        self.moments = {name: self._moments(name, getattr(ae, name).detach()) for name in PARAMETERS}

    def _moments(self, name: str, parameter: Tensor) -> Moments:
        ema = None
        if self.config.ema_decay:
            ema = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        if name in BIASES or self.config.state == "float32":
            return Moments(torch.zeros_like(parameter), torch.zeros_like(parameter), ema)
        if parameter.dtype != torch.bfloat16:
            raise TopkapiError(
                f"low-memory optimiser state goes with bfloat16 weights; {name} is {parameter.dtype}. Convert it first "
                f"(ae.{name}.data = ae.{name}.data.bfloat16()), or take --optim.state float32."
            )
        codes = [torch.zeros_like(parameter, dtype=dtype) for dtype in (torch.int8, torch.uint8)]
        scales = [torch.zeros(len(parameter), device=parameter.device) for _ in codes]
        return Moments(*codes, ema, *scales)

    @torch.no_grad()
    def step_(self, ae: Autoencoder, gradients: Gradients, lr: float) -> Float[Tensor, ""] | None:
        """Update `ae` in place. Returns the global gradient norm before clipping, or None without clipping."""
        self.n_steps += 1
        config, norm, scale = self.config, None, None
        rows = {name: _row_gradient(getattr(gradients, name)) for name in WEIGHTS}
        if config.clip_norm:
            norm = self._norm(ae, gradients, rows)
            scale = (config.clip_norm / norm.clamp_min(1e-30)).clamp_max(1)
        for name in WEIGHTS:
            weight = getattr(ae, name).detach()
            implementation(weight).update_rows_(self._state(name, weight), rows[name], self._adam_step(name, lr), scale)
            self.working.send(name)
        for name in BIASES:
            parameter, moments, grad = getattr(ae, name).detach(), self.moments[name], getattr(gradients, name)
            grad = grad if scale is None else grad * scale
            adam_(parameter, grad.to(parameter.dtype), moments.mean, moments.square, self._adam_step(name, lr))
            if moments.ema is not None:
                moments.ema.lerp_(parameter, 1 - config.ema_decay)
        self.working.send("latent_bias")
        return norm

    def _adam_step(self, name: str, lr: float) -> AdamStep:
        config = self.config
        return AdamStep(
            lr=lr,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps * (self.bias_scale if name in BIASES else 1),
            ema_decay=config.ema_decay,
            n_steps=self.n_steps,
            unit_norm=self._is_projected(name),
            seed=PARAMETERS.index(name),
            first_latent=self.first_latent,
        )

    def _is_projected(self, name: str) -> bool:
        return name == "W_dec" and self.config.unit_norm_decoder

    def _state(self, name: str, weight: Tensor) -> RowState:
        working = getattr(self.working, name)[self.working.own]
        is_copy = working.data_ptr() != weight.data_ptr()
        return RowState(weight, **vars(self.moments[name]), working=working if is_copy else None)

    def _norm(self, ae: Autoencoder, gradients: Gradients, rows: dict[str, RowGradient]) -> Float[Tensor, ""]:
        squares = [gradients.latent_bias.double().pow(2).sum()]
        for name in WEIGHTS:
            weight = getattr(ae, name).detach()
            squares.append(implementation(weight).gradient_squares(rows[name], weight, self._is_projected(name)))
        of_latents = self.mesh.ordered_sum(torch.stack(squares).sum(), "all")
        return (of_latents + gradients.pre_bias.double().pow(2).sum()).sqrt()

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
            found |= {f"{name}.{part}": tensor for part, tensor in vars(moments).items() if tensor is not None}
        return found


def learning_rate(config: OptimConfig, step: int, n_steps: int) -> float:
    """The learning rate of step 0 to n_steps - 1: rise, plateau and fall, never quite 0."""
    rise = min(1.0, (step + 1) / (config.lr_warmup * n_steps)) if config.lr_warmup else 1.0
    fall = min(1.0, (n_steps - step) / (config.lr_decay * n_steps)) if config.lr_decay else 1.0
    return config.lr * rise * fall


def _row_gradient(gradient: WeightGradient) -> RowGradient:
    """A weight's gradient as `update_rows_` takes it, nothing of its size made."""
    if gradient.sparse is None:
        return RowGradient(subset_rows=gradient.dense)
    sparse = gradient.sparse
    return RowGradient(sparse.values, sparse.order, sparse.rows, gradient.subset_rows, gradient.position)
