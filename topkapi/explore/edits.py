"""Changes of latents: what a latent's value becomes, and at which tokens."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkapi.errors import TopkapiError

Kind = Literal["clamp", "bound", "scale", "add", "ablate"]
Where = Literal["all", "active"] | tuple[int, ...]

LARGEST_VALUE = 1e6  # values of latents are below 1 or so; times a norm of activations this is far from overflow
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
SHAPES = {  # of what follows the latent, for each kind: words for it, and a pattern
    "clamp": ("=VALUE", rf"=({NUMBER}x?)"),
    "bound": ("=LOW:HIGH", rf"=({NUMBER}x?):({NUMBER}x?)"),
    "scale": ("=FACTOR", rf"=({NUMBER})"),
    "add": ("=VALUE", rf"=({NUMBER}x?)"),
    "ablate": ("", ""),
}
EXAMPLES = {"clamp": "17=5x or 17=-0.8", "bound": "17=0:1x", "scale": "17=2", "add": "17=0.5x", "ablate": "17"}


@dataclass(frozen=True)
class Edit:
    """What the value z of one latent becomes.

        clamp  z' = value          scale  z' = value z        ablate  z' = 0
        bound  z' = min(max(z, value), high)                  add     z' = z + value

    Values may be negative, although the autoencoder itself gives none below 0. A latent that is not among the k of a
    token has z = 0 there: clamp, bound and add make it active, scale and ablate change nothing. Edits of one latent
    follow each other in the order in which they are given.
    """

    latent: int
    kind: Kind
    value: float = 0.0
    """For bound the lower end. Ablate takes none."""
    high: float | None = None
    """Of bound alone: the upper end."""
    where: Where = "all"
    """all: every token that training would use. active: those of them where z > 0. A tuple: positions in the sequence
    from 0, the first real token, whether or not training would use what is there."""

    def __post_init__(self) -> None:
        if self.latent < 0:
            raise TopkapiError(f"latent {self.latent}: latents count from 0.")
        for number in (self.value, self.high or 0.0):
            if not abs(number) <= LARGEST_VALUE:  # NaN too
                raise TopkapiError(
                    f"latent {self.latent}: {self.kind} takes values from {-LARGEST_VALUE:g} to {LARGEST_VALUE:g}; got "
                    f"{number}. Give a few times the latent's maximum at most."
                )
        if (self.kind == "bound") != (self.high is not None):
            raise TopkapiError(
                f"latent {self.latent}: `high` goes with bound, which needs it; got {self.kind} and high={self.high}."
            )
        if self.high is not None and self.high < self.value:
            raise TopkapiError(f"latent {self.latent}: bound from {self.value} to {self.high} is empty.")
        if isinstance(self.where, tuple) and (not self.where or min(self.where) < 0):
            raise TopkapiError(
                f"latent {self.latent}: positions count from 0, the first token, and one at least must be given; got "
                f"{self.where}."
            )

    def __str__(self) -> str:
        numbers = {"ablate": "", "bound": f" {self.value:g} to {self.high:g}" if self.high is not None else ""}
        at = "" if self.where == "all" else f" where {self.where}" if self.where == "active" else f" at {self.where}"
        return f"{self.kind} latent {self.latent}{numbers.get(self.kind, f' {self.value:g}')}{at}"

    def selects(
        self, z: Float[Tensor, "b c"], position: Int[Tensor, "b c"], kept: Bool[Tensor, "b c"]
    ) -> Bool[Tensor, "b c"]:
        """The tokens that are edited; padding has position -1 and is not `kept`."""
        if isinstance(self.where, tuple):
            return torch.stack([position == t for t in self.where]).any(0)
        return kept & (z > 0) if self.where == "active" else kept

    def of(self, z: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        """What values become."""
        if self.kind == "scale":
            return self.value * z
        if self.kind == "add":
            return z + self.value
        if self.kind == "bound":
            return z.clamp(self.value, self.high)
        return torch.full_like(z, self.value if self.kind == "clamp" else 0.0)


def changes(
    edits: Sequence[Edit],
    latents: Sequence[int],
    z: Float[Tensor, "b c m"],
    position: Int[Tensor, "b c"],
    kept: Bool[Tensor, "b c"],
) -> Float[Tensor, "b c m"]:
    """z' - z of `latents`; edits of the same latent follow each other, and "active" is of the value before all."""
    edited = list(z.unbind(-1))
    for edit in edits:
        i = latents.index(edit.latent)
        here = edit.selects(z[..., i], position, kept)
        edited[i] = torch.where(here, edit.of(edited[i]), edited[i])
    return torch.stack(edited, -1) - z


def parse_edit(kind: Kind, text: str, where: Where, maximum: Callable[[int], float]) -> Edit:
    """The edit that a person wrote as LATENT, LATENT=VALUE or LATENT=LOW:HIGH.

    A value is a number, or ends in x: then it is times the latent's own maximum, which `maximum` gives.

    Raises:
        TopkapiError: it is written otherwise, or what `maximum` or `Edit` raise.
    """
    words, pattern = SHAPES[kind]
    match = re.fullmatch(rf"(\d+){pattern}", text.strip(), re.IGNORECASE)
    if match is None:
        multiples = "" if kind in ("scale", "ablate") else "; x stands for times the latent's maximum"
        raise TopkapiError(f"--{kind} {text!r}: write LATENT{words}, as in --{kind} {EXAMPLES[kind]}{multiples}.")
    latent, *numbers = match.groups()
    values = [float(number[:-1]) * maximum(int(latent)) if number[-1] in "xX" else float(number) for number in numbers]
    return Edit(int(latent), kind, *values, where=where)


def parse_where(text: str) -> Where:
    """all, active, or positions written as 3,4,5. Raises TopkapiError if it is written otherwise."""
    if text in ("all", "active"):
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise TopkapiError(f"--where {text!r}: write all, active, or positions as in 3,4,5; the first token is 0.")
    return tuple(int(position) for position in text.split(","))
