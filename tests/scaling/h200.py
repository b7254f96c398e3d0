"""Steps and parts as measured on one NVIDIA H200, from benchmarks/results/h200-2026-11-23-bench.json."""

from topkapi.scaling.calibration import STEP, Measured
from topkapi.scaling.shapes import Job
from topkapi.scaling.step_time import AUXK, BIASES, DECODE, ENCODE, NORMALISE, SORT, UPDATE

COPY = 4.255e12  # bytes a second

# latents, d_model, tokens, precision, state, dead; then milliseconds: step, normalise, encode, decode, sort, biases,
# update, AuxK; then peak bytes. k is 32. The fourth has eight latents that fire on a third of the tokens.
TABLE = [
    (
        (131072, 768, 65536, "bf16", "float32", 0.0),
        [26.907, 0.0571, 22.223, 0.6912, 0.2072, 0.1132, 2.4179],
        5127087616,
    ),
    (
        (131072, 768, 65536, "fp8", "float32", 0.0),
        [19.488, 0.0549, 14.8236, 0.6893, 0.201, 0.1117, 2.4107],
        4965885440,
    ),
    (
        (131072, 768, 65536, "bf16", "float32", 0.05),
        [33.581, 0.0584, 22.4485, 0.6863, 0.2087, 0.1132, 2.5439, 6.4598],
        5129243648,
    ),
    (
        (131072, 768, 65536, "bf16", "float32", 0.0),
        [27.35, 0.0568, 22.3723, 0.6361, 0.2072, 0.1493, 2.5142],
        5127111680,
    ),
    (
        (32768, 768, 65536, "bf16", "float32", 0.0),
        [8.879, 0.0536, 5.8226, 0.5277, 0.1842, 0.0757, 1.3444],
        2205099008,
    ),
    (
        (131072, 4096, 16384, "bf16", "float32", 0.0),
        [35.975, 0.0697, 26.4626, 1.0454, 0.1155, 0.3131, 8.3439],
        15946285056,
    ),
    (
        (131072, 4096, 16384, "bf16", "low_memory", 0.0),
        [33.978, 0.0703, 26.1259, 1.0434, 0.11, 0.3086, 6.3054],
        5210963968,
    ),
    (
        (131072, 4096, 16384, "fp8", "float32", 0.0),
        [26.221, 0.0706, 15.8787, 1.0434, 0.11, 0.308, 8.2742],
        16468808192,
    ),
]
# Two GPUs of a node over NCCL, microseconds: kind, bytes handed in for 1, 16, 128 and 1024 MiB.
COLLECTIVES = {
    "sum": (1, {1: 30, 16: 76, 128: 466, 1024: 3260}),
    "gather": (1, {1: 27, 16: 90, 128: 549, 1024: 3860}),
    "scatter_sum": (2, {1: 31, 16: 93, 128: 584, 1024: 3910}),  # the sizes are of what comes out, half of what goes in
}
# Steps on two GPUs, as benchmarks/scaling.py prints them: d_model 768, k 32, 65 536 tokens a GPU.
# Replicas, shards, exchange, latents, precision; milliseconds and peak GiB.
ON_TWO = [
    (1, 2, "auto", 131072, "bf16", 28.87, 3.33),
    (1, 2, "auto", 524288, "bf16", 99.91, 7.41),
    (1, 2, "auto", 131072, "fp8", 22.26, 3.90),
    (2, 1, "sparse", 131072, "bf16", 27.48, 3.77),
    (2, 1, "dense", 131072, "bf16", 28.30, 3.77),
    (2, 1, "sparse", 524288, "bf16", 100.71, 7.65),
    (2, 1, "dense", 524288, "bf16", 106.07, 10.94),
    (2, 1, "sparse", 131072, "fp8", 19.91, 3.62),
    (2, 1, "dense", 131072, "fp8", 20.68, 3.62),
]
PARTS = (STEP, NORMALISE, ENCODE, DECODE, SORT, BIASES, UPDATE, AUXK)


def jobs():
    """Each measured job, without averaged weights, with its times and peak bytes."""
    names = ("n_latents", "d_model", "batch_tokens", "precision", "state", "dead")
    for case, times, peak in TABLE:
        yield Job(**dict(zip(names, case, strict=True)), k=32, ema=False), times, peak


MEASURED = [Measured(job, part, ms / 1e3) for job, times, _ in jobs() for part, ms in zip(PARTS, times, strict=False)]
