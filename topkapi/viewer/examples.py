"""Firings of a latent with the text around them, in the four ways in which the page shows them."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from topkapi.study.latent import Example, Latent
from topkapi.viewer.texts import Texts

Kind = Literal["top", "random", "quantile", "near"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUPS = 5  # of kind quantile


@dataclass(frozen=True)
class Choice:
    """Which firings are wanted."""

    kind: Kind = "top"
    n: int = 10
    """In all; of kind quantile, in each of the groups."""
    seed: int = 0
    low: float = -math.inf
    high: float = math.inf
    """Only firings with low <= value < high."""


def choose(latent: Latent, choice: Choice, texts: Texts) -> dict[str, Any]:
    """Groups of examples with a title each, and how many firings lie between low and high."""
    latent = latent.between(choice.low, choice.high)
    n, seed = choice.n, choice.seed
    if choice.kind == "top":
        groups = {"Strongest": latent.top(n)}
    elif choice.kind == "random":
        groups = {"Drawn at random": latent.random(n, seed)}
    elif choice.kind == "near":
        groups = {"Weakest": latent.near_misses(n)}
    else:
        shares = latent.by_quantile(GROUPS, n, seed)
        groups = {_share(number): examples for number, examples in enumerate(shares)}
    found = [
        {"title": title, "examples": [_shown(one, texts) for one in examples]} for title, examples in groups.items()
    ]
    return {"groups": found, "n_matching": len(latent.chosen)}


def _share(number: int) -> str:
    """The title of a quantile's group, the strongest first."""
    return f"{100 - 100 * (number + 1) // GROUPS} to {100 - 100 * number // GROUPS} % of firings by value"


def _shown(example: Example, texts: Texts) -> dict[str, Any]:
    return example._asdict() | {"tokens": texts.each(example.tokens)}
