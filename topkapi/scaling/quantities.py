"""Sizes, bytes and times as people write and read them."""

import math
import re

from topkapi.errors import TopkapiError

FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
NEAR = 0.05  # 1M is 4.9 % less than 2^20, which is what it means as a number of latents
GIB = 2**30


def parse_size(text: str, what: str) -> int:
    """The number that 131072, 131_072, 131k or 16M means.

    A number with k, M or B that is within 5 % of a power of two is that power: 16M is 16 777 216.

    Raises:
        TopkapiError: it is no number, or below 1.
    """
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*(k|m|g|b|ki|mi|gi)?", text.strip().lower())
    number = float(re.sub("[_,]", "", found[1])) * FACTORS[found[2] or ""] if found else 0.0
    if not found or not 1 <= number < 2**62 or number != int(number):
        raise TopkapiError(
            f"{what} {text!r} is not a size: write a whole number of at least 1, as in 131072, 131k or 16M."
        )
    if found[2]:
        power = 2 ** round(math.log2(number))
        if abs(number / power - 1) < NEAR:
            return power
    return int(number)


def count_text(n: int | float) -> str:
    """16.8 M for 16 777 216, 49 B for billions."""
    return _scaled(n, ("T", "B", "M", "k"))


def bytes_text(n: int | float) -> str:
    """Bytes with a unit: 6.44 GB."""
    scaled = _scaled(n, ("T", "G", "M", "k"))
    return f"{scaled}B" if scaled[-1].isalpha() else f"{scaled} B"


def _scaled(n: int | float, letters: tuple[str, str, str, str]) -> str:
    for factor, letter in zip((1e12, 1e9, 1e6, 1e3), letters, strict=True):
        if n >= factor:
            digits = max(0, 2 - math.floor(math.log10(n / factor)))
            return f"{n / factor:.{digits}f} {letter}"
    return f"{n:.3g}"


def ms_text(seconds: int | float) -> str:
    """Milliseconds with the digits that matter."""
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def share_text(share: float) -> str:
    """A share in per cent: 0, below 0.001 %, or two digits."""
    if share == 0:
        return "0"
    return "< 0.001 %" if share < 1e-5 else f"{100 * share:.2g} %"
