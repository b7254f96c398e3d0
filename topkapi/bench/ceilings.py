"""What this device can do at best, measured in the same run: a large copy, and the encoder's matmul by the library.

No way to train a TopK autoencoder that scores all latents is faster than that matmul, so a step is reported as a
multiple of it. Parts that compute little are held against the copy, in bytes read and written a second.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from topkapi.bench.timing import Timing, measure

OUTPUT_BYTES = 2**31  # of pre-activations written at a time; all of a large batch's would not fit
FP8_MAX = 448.0
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """Times and rates that the parts of a step are compared with."""

    copy: Timing
    copy_bytes: int
    matmul: dict[str, Timing]
    """Of the encoder's shape, by precision; fp8 only where the device has it."""
    flops: int

    @property
    def bandwidth(self) -> float:
        """Bytes read plus bytes written a second, in a copy."""
        return self.copy_bytes / self.copy.ms * 1e3

    def rate(self, precision: str) -> float:
        """Floating-point operations a second, in the encoder's matmul."""
        return self.flops / self.matmul[precision].ms * 1e3


def copy_work(device: torch.device) -> tuple[Callable[[], object], int]:
    """A large device copy, and the bytes it reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**26
    source, target = torch.zeros(2, size, dtype=torch.int8, device=device)
    source.random_(-128, 127)
    return lambda: target.copy_(source), 2 * size


def matmul_work(
    n: int, n_latents: int, d_model: int, device: torch.device, precision: str
) -> Callable[[], object] | None:
    """The encoder's matmul on random operands, its output written in chunks over the same memory; None without fp8."""
    out_dtype = torch.float32 if precision == "float32" else torch.bfloat16
    rows = max(1, min(n, OUTPUT_BYTES // (n_latents * out_dtype.itemsize)))
    x, W = torch.randn(n, d_model, device=device), torch.randn(n_latents, d_model, device=device)
    if precision == "fp8":
        return _fp8_matmul(x, W, rows)
    x, W = x.to(DTYPES[precision]), W.to(DTYPES[precision])
    out = torch.empty(rows, n_latents, dtype=out_dtype, device=device)

    def run() -> None:
        for part in x.split(rows):
            torch.mm(part, W.T, out=out[: len(part)])

    return run


def _fp8_matmul(x: Tensor, W: Tensor, rows: int) -> Callable[[], object] | None:
    one = torch.ones((), device=x.device)
    x, W = (t.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn) for t in (x, W))

    def run() -> None:
        for part in x.split(rows):
            torch._scaled_mm(part, W.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        run()
    except (RuntimeError, ValueError):  # the device has no fp8 matmul, or not at this shape
        return None
    return run


def ceilings(n: int, n_latents: int, d_model: int, precision: str, device: torch.device) -> Ceilings:
    """Measure the copy, and the encoder's matmul in `precision` and, on a GPU, in bf16 and fp8."""
    limits = {"rounds": 7, "seconds": 1.0}
    copy, copy_bytes = copy_work(device)
    copied = measure({"copy": copy}, device, **limits)["copy"]
    del copy
    matmul = {}
    for name in dict.fromkeys((precision, *(("bf16", "fp8") if device.type == "cuda" else ()))):
        work = matmul_work(n, n_latents, d_model, device, name)
        if work is not None:
            matmul[name] = measure({name: work}, device, **limits)[name]
        del work
    return Ceilings(copied, copy_bytes, matmul, 2 * n * n_latents * d_model)
