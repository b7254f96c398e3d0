"""How fast a GPU and its links are: achieved rates, not those of data sheets.

A part of a step is so many operations, bytes, sorted pairs and so on (`topkapi.scaling.step_time`); its time is the sum
of these amounts, each divided by the GPU's rate. So a GPU is one list of rates, and `topkapi.scaling.calibration` finds
them from measured parts.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from topkapi.errors import TopkapiError
from topkapi.files import write_text_atomic


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a GPU does in a second."""

    bf16_flops: float
    """In the encoder's matmul, for activations so wide that nothing else counts."""
    fp8_flops: float
    float32_flops: float
    """Of the encoder with --precision float32, whatever it screens in."""
    pre_activations: float
    """Compared with a row's bound, or sampled: what a tile of the encoder costs besides its matmul."""
    sorted_pre_activations: float
    """Read by `torch.topk`, for shapes that the encoder's kernels do not take."""
    selected: float
    """Latents selected out of the kept groups."""
    bytes: float
    """Read and written, in a large copy."""
    cached_bytes: float
    """Of gathered rows that are found in the L2 cache."""
    reduced_bytes: float
    """Of the encoder's weights, in the gradient of the biases."""
    sorted_pairs: float
    """Active latents sorted."""
    coded_parameters: float
    """Updated with 8-bit moments, besides their bytes."""
    launches: float
    """Kernels of next to no work, one after another."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Collectives among GPUs that are joined in one way."""

    gather: float
    """Bytes that a GPU receives a second in an all-gather, or sends in a reduce-scatter."""
    sum: float
    """The same in an all-reduce, which sends everything twice."""
    hop: float
    """Seconds from one GPU of a ring to the next."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU, and what joins it to others."""

    name: str
    source: str
    """Where the numbers come from."""
    memory: int
    """Bytes."""
    usable: float
    """Share of the memory that tensors may take: the rest is CUDA's, NCCL's and lost between tensors."""
    cache: int
    """Bytes of gathered rows of which half are found in the cache."""
    rates: Rates
    host: float
    """Seconds that the host needs to queue a step: no step is shorter."""
    gpus_per_node: int
    inside: Link
    """Of GPUs of one node."""
    between: Link
    """Of GPUs of different nodes: the rates are those of one GPU's network card."""
    collective: float
    """Seconds of the smallest collective, besides its hops."""
    overlap: float
    """Share that is gained of the time in which a GPU could compute and communicate at once."""

    def __post_init__(self) -> None:
        for owner in (self, self.rates, self.inside, self.between):
            for f in fields(owner):
                value = getattr(owner, f.name)
                if isinstance(value, int | float) and not 0 < value < float("inf"):
                    raise TopkapiError(f"a GPU's {f.name} must be a finite number above 0; got {value!r}.")


# Rates: fitted by `topkapi.scaling.calibration` to benchmarks/results/h200-2026-11-23-bench.json. `inside`: two GPUs,
# NVLink, 16 MiB to 1 GiB. `between`: not measured; a 400 Gb/s card for each GPU, of which nine tenths. Hops: NCCL's own
# table (src/graph/tuning.cc, ring, simple protocol). `overlap`: nine steps on 1 x 2 and 2 x 1 GPUs took
# longer than what runs alone, by 60 to 120 % of what could have travelled beside computing.
H200 = Hardware(
    name="H200",
    source="measured on one GPU and, inside a node, on two; between nodes assumed: a 400 Gb/s card for each GPU",
    memory=150_100_000_000,
    usable=0.92,
    cache=75_000_000,
    rates=Rates(
        bf16_flops=712e12,
        fp8_flops=1420e12,
        float32_flops=712e12,  # screened in bf16; not measured
        pre_activations=2.25e12,
        sorted_pre_activations=1.2e11,  # torch.topk(k=32) on bf16, 131 072 wide: 8.2 ps each
        selected=6.97e9,  # from shards, which have more to select from; alone it hardly counts
        bytes=4.233e12,
        cached_bytes=13.2e12,
        reduced_bytes=4.64e12,
        sorted_pairs=1.30e10,
        coded_parameters=9.22e11,
        launches=2.99e5,
    ),
    host=3e-3,
    gpus_per_node=8,
    inside=Link(gather=265e9, sum=330e9, hop=3.4e-6),
    between=Link(gather=45e9, sum=45e9, hop=9.6e-6),
    collective=20e-6,
    overlap=0.15,
)
# The same chip with less and slower memory: everything that is bytes is scaled by 3.35 / 4.8, the data sheets' ratio.
H100 = replace(
    H200,
    name="H100",
    source="derived from the H200: the same chip, with memory of 3.35 instead of 4.8 TB/s and 80 instead of 141 GB",
    memory=84_900_000_000,
    rates=replace(H200.rates, bytes=H200.rates.bytes * 3.35 / 4.8, reduced_bytes=H200.rates.reduced_bytes * 3.35 / 4.8),
)
PRESETS = {"h100": H100, "h200": H200}


def load(name: str) -> Hardware:
    """A preset by its name, or the GPU that a JSON file describes.

    Raises:
        TopkapiError: neither, or the file lacks something.
    """
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    path = Path(name)
    if not path.is_file():
        raise TopkapiError(
            f"--gpu {name}: neither a GPU that is known ({', '.join(PRESETS)}) nor a file. "
            "Write one with topkapi plan --measure FILE."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TopkapiError(f"--gpu {name}: not JSON ({error}). Write one with topkapi plan --measure FILE.") from None
    return _from(Hardware, values, str(path))


def left_of(hardware: Hardware, reserved: float) -> int:
    """Bytes of a GPU's memory when some GB of it are taken.

    Raises:
        TopkapiError: nothing is left, or less than nothing is taken.
    """
    left = hardware.memory - 1e9 * reserved / hardware.usable
    if not (reserved >= 0 and left >= 1):  # not a number neither
        raise TopkapiError(
            f"--reserve {reserved:g}: a {hardware.name} has {hardware.memory * hardware.usable / 1e9:.0f} GB to use; "
            "reserve less than that, and 0 or more."
        )
    return int(left)


def save(hardware: Hardware, path: Path) -> None:
    """Write a GPU's description, for `load`."""
    write_text_atomic(path, json.dumps(asdict(hardware), indent=2) + "\n")


def _from(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise TopkapiError(f"{where}: {cls.__name__} must be an object of names and numbers; got {values!r}.")
    known = {f.name: f for f in fields(cls)}
    wrong = sorted(set(known) ^ set(values))
    if wrong:
        raise TopkapiError(
            f"{where}: {cls.__name__} {'lacks' if wrong[0] in known else 'has no'} {wrong[0]}; it takes "
            f"{', '.join(known)}. Start from a file written by topkapi plan --measure FILE."
        )
    made = {}
    for name, value in values.items():
        wanted = known[name].type
        if wanted in (Rates, Link):
            made[name] = _from(wanted, value, where)
        elif isinstance(value, bool) or not isinstance(value, (int, float) if wanted in (int, float) else wanted):
            raise TopkapiError(f"{where}: {name} must be a {wanted.__name__}; got {value!r}.")
        else:
            made[name] = wanted(value)
    return cls(**made)
