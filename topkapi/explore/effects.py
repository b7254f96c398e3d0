"""What follows from one latent at one token: how the predictions from there on change when it is set to 0."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkapi.errors import TopkapiError
from topkapi.evaluate.ablation import N_POSITIONS, effect_sparsity
from topkapi.evaluate.downstream import kl_divergence
from topkapi.explore.attribution import require_precise
from topkapi.explore.spliced import Spliced

N_TOKENS = 10  # listed up and down


class TokenEffect(NamedTuple):
    """What an ablation does to one next token."""

    token: int
    logit: float
    """Change of its logit, less the median change over the vocabulary."""
    probability: float
    """Change of its probability."""


class Effects(NamedTuple):
    """What setting a latent to 0 at one token changes, a row a position from there on."""

    value: float
    """The latent's value that was taken away."""
    loss_change: list[float | None]
    """Change of -log p(the token that follows), nats; None at the last position, where none follows."""
    kl: list[float]
    """KL(clean || ablated) of the next-token distributions, nats."""
    up: list[list[TokenEffect]]
    """The tokens whose logits rise most, falling."""
    down: list[list[TokenEffect]]
    """The tokens whose logits fall most, rising: those that the latent speaks for."""
    sparsity: float | None
    """`effect_sparsity` over the first 16 positions, or as many as there are; None where no prediction changes."""


def ablation_effects(spliced: Spliced, tokens: Int[Tensor, "1 c"], at: int, latent: int, n: int = N_TOKENS) -> Effects:
    """The effects of setting `latent` to 0 at position `at` alone, on the predictions there and later.

    Cost: a pass of two contexts, one of which is left as it is, with logits from position `at` on.

    Raises:
        TopkapiError: no such latent or position, the latent is not active there, or the language model does not compute
            in float32.
    """
    spliced.check_latent(latent)
    require_precise(spliced)
    if not 0 <= at < tokens.shape[1]:
        raise TopkapiError(f"no position {at}: the context has positions 0 to {tokens.shape[1] - 1}.")
    ae, taken = spliced.ae, []

    def replace(raw: Tensor) -> Tensor:
        x, _, norm = ae.normalise(raw[:1, at].to(ae.W_dec))
        values, indices = ae.encode(x)
        z = torch.where(indices == latent, values, 0).sum()
        if not z > 0:
            raise TopkapiError(f"latent {latent} is not active at position {at}: there is nothing to take away.")
        taken.append(float(z))
        out = raw.clone()
        out[1, at] -= (norm[0] * z * ae.W_dec[latent]).to(raw)
        return out

    with spliced.editing(()):  # none may be in force
        clean, ablated = spliced.lm.logits(tokens.expand(2, -1), replace, at)
    return _compare(clean, ablated, tokens[0, at + 1 :], *taken, n)


def _compare(
    clean: Float[Tensor, "t vocab"],
    ablated: Float[Tensor, "t vocab"],
    following: Int[Tensor, " t_minus_1"],
    z: float,
    n: int,
) -> Effects:
    before, after = clean.double().log_softmax(-1), ablated.double().log_softmax(-1)
    change = torch.where(clean.isfinite(), ablated - clean, torch.nan).double()
    change = change - change.nanmedian(-1, keepdim=True).values
    following = following.to(before.device)
    loss = [a - b for a, b in zip(_picked(before, following), _picked(after, following), strict=True)]
    share = effect_sparsity(clean[:N_POSITIONS], ablated[None, :N_POSITIONS]).item()
    up, down = (
        [_extremes(*row, n, largest) for row in zip(change, after.exp() - before.exp(), strict=True)]
        for largest in (True, False)
    )
    return Effects(
        value=z,
        loss_change=[*loss, None],
        kl=kl_divergence(before, after).clamp_min(0).tolist(),
        up=up,
        down=down,
        sparsity=None if share != share else share,
    )


def _picked(log_p: Float[Tensor, "t vocab"], following: Int[Tensor, " t_minus_1"]) -> list[float]:
    return log_p[:-1].gather(1, following[:, None])[:, 0].tolist()


def _extremes(
    change: Float[Tensor, " vocab"], probability: Float[Tensor, " vocab"], n: int, largest: bool
) -> list[TokenEffect]:
    ranked = change.nan_to_num(-torch.inf if largest else torch.inf)
    logits, tokens = ranked.topk(min(n, int(change.isfinite().sum())), largest=largest)
    return [
        TokenEffect(*row) for row in zip(tokens.tolist(), logits.tolist(), probability[tokens].tolist(), strict=True)
    ]
