"""Steps and parts as measured on one NVIDIA H200, from benchmarks/results/h200-2026-11-23-bench.json."""

from topkapi.scaling.calibration import STEP, Measured
from topkapi.scaling.shapes import Job
from topkapi.scaling.step_time import AUXK, BIASES, DECODE, ENCODE, NORMALISE, SORT, UPDATE

COPY = 4.233e12  # bytes a second

# latents, d_model, tokens, precision, state, dead; then milliseconds: step, normalise, encode, decode, sort, biases,
# update, AuxK; then peak bytes. k is 32. The fourth has eight latents that fire on a third of the tokens.
TABLE = [
    (
        (131072, 768, 65536, "bf16", "float32", 0.0),
        [26.811, 0.0576, 22.1228, 0.6827, 0.2076, 0.0993, 2.4339],
        5261305344,
    ),
    (
        (131072, 768, 65536, "fp8", "float32", 0.0),
        [19.185, 0.0565, 14.8461, 0.6808, 0.2023, 0.0988, 2.4278],
        5100103168,
    ),
    (
        (131072, 768, 65536, "bf16", "float32", 0.05),
        [33.715, 0.0583, 22.531, 0.6785, 0.2127, 0.1005, 2.47, 6.5236],
        5263514112,
    ),
    (
        (131072, 768, 65536, "bf16", "float32", 0.0),
        [27.044, 0.057, 22.154, 0.6335, 0.2058, 0.2504, 2.5091],
        5261329408,
    ),
    (
        (32768, 768, 65536, "bf16", "float32", 0.0),
        [8.691, 0.0546, 5.6483, 0.5357, 0.192, 0.0704, 1.3134],
        2239702016,
    ),
    (
        (131072, 4096, 16384, "bf16", "float32", 0.0),
        [35.959, 0.0714, 26.5725, 1.0271, 0.1146, 0.3043, 8.4037],
        15979839488,
    ),
    (
        (131072, 4096, 16384, "bf16", "low_memory", 0.0),
        [32.796, 0.0712, 26.1845, 1.0284, 0.1137, 0.3036, 4.8494],
        5244780544,
    ),
    (
        (131072, 4096, 16384, "fp8", "float32", 0.0),
        [25.86, 0.0708, 15.4673, 1.0263, 0.1082, 0.3018, 8.2978],
        16502362624,
    ),
    (
        (131072, 4096, 16384, "fp8", "low_memory", 0.0),
        [22.675, 0.0705, 15.42, 1.0233, 0.1071, 0.3005, 4.6448],
        5767041536,
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
