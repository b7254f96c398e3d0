"""Steps and parts as measured on one NVIDIA H200, from benchmarks/results/h200-2026-11-23-bench.json."""

from topkapi.scaling.calibration import STEP, Measured
from topkapi.scaling.shapes import Job
from topkapi.scaling.step_time import AUXK, BIASES, DECODE, ENCODE, NORMALISE, SORT, UPDATE

COPY = 4.234e12  # bytes a second

# latents, d_model, tokens, precision, state, dead; then milliseconds: step, normalise, encode, decode, sort, biases,
# update, AuxK; then peak bytes. k is 32. The fourth has eight latents that fire on a third of the tokens.
TABLE = [
    (
        (131072, 768, 65536, "bf16", "float32", 0.0),
        [26.593, 0.0569, 21.9626, 0.6827, 0.2051, 0.0989, 2.4034],
        5261305344,
    ),
    (
        (131072, 768, 65536, "fp8", "float32", 0.0),
        [19.053, 0.0563, 15.0219, 0.6819, 0.2017, 0.099, 2.4],
        5100103168,
    ),
    (
        (131072, 768, 65536, "bf16", "float32", 0.05),
        [33.238, 0.0572, 21.7489, 0.6772, 0.2041, 0.0987, 2.5409, 6.3394],
        5263514112,
    ),
    (
        (131072, 768, 65536, "bf16", "float32", 0.0),
        [26.938, 0.0574, 22.1983, 0.6329, 0.2064, 0.2496, 2.5496],
        5261329408,
    ),
    (
        (32768, 768, 65536, "bf16", "float32", 0.0),
        [8.681, 0.0552, 5.8126, 0.5463, 0.1892, 0.07, 1.3511],
        2239702016,
    ),
    (
        (131072, 4096, 16384, "bf16", "float32", 0.0),
        [35.697, 0.0708, 25.2861, 1.0253, 0.1071, 0.3014, 8.3022],
        15979839488,
    ),
    (
        (131072, 4096, 16384, "bf16", "low_memory", 0.0),
        [33.708, 0.0708, 24.7196, 1.0244, 0.1037, 0.3009, 6.1954],
        5244780544,
    ),
    (
        (131072, 4096, 16384, "fp8", "float32", 0.0),
        [26.049, 0.0708, 15.0689, 1.0223, 0.1022, 0.3016, 8.3037],
        16502362624,
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


MEASURED = [
    Measured(job, part, ms / 1e3)
    for number, (job, times, _) in enumerate(jobs())
    for part, ms in zip(PARTS, times, strict=False)
    if (number, part) != (3, BIASES)  # 0.25 ms: long segments of the dense latents, which a plan knows nothing of
]
