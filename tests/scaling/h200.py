"""Steps and parts as measured on one NVIDIA H200, from benchmarks/results/h200-2026-11-23-bench.json."""

from topkapi.scaling.calibration import STEP, Measured
from topkapi.scaling.shapes import Job
from topkapi.scaling.step_time import AUXK, BIASES, DECODE, ENCODE, NORMALISE, SORT, UPDATE

COPY = 4.26e12  # bytes a second

# latents, d_model, tokens, precision, state, dead; then milliseconds: step, normalise, encode, decode, sort, biases,
# update, AuxK; then peak bytes. k is 32. The fourth has eight latents that fire on a third of the tokens.
TABLE = [
    (
        (131072, 768, 65536, "bf16", "float32", 0.0),
        [28.625, 0.0586, 23.7274, 0.6937, 0.2098, 0.1687, 2.5036],
        4728350208,
    ),
    ((131072, 768, 65536, "fp8", "float32", 0.0), [20.172, 0.056, 15.7301, 0.6927, 0.2071, 0.1658, 2.4947],
     4965606912),
    (
        (131072, 768, 65536, "bf16", "float32", 0.05),
        [35.479, 0.0589, 24.012, 0.6889, 0.2098, 0.169, 2.5679, 6.6659],
        4730506240,
    ),
    (
        (131072, 768, 65536, "bf16", "float32", 0.0),
        [28.483, 0.0587, 23.6449, 0.6429, 0.2085, 0.1728, 2.5834],
        4728374272,
    ),
    ((32768, 768, 65536, "bf16", "float32", 0.0), [9.75, 0.0558, 6.5677, 0.5528, 0.1914, 0.1206, 1.4069],
     1806361600),
    (
        (131072, 4096, 16384, "bf16", "float32", 0.0),
        [39.219, 0.0718, 27.909, 1.0487, 0.1141, 0.4971, 9.4042],
        15846600704,
    ),
    (
        (131072, 4096, 16384, "bf16", "low_memory", 0.0),
        [37.909, 0.0707, 27.601, 1.0441, 0.1096, 0.4852, 8.0989],
        5111279616,
    ),
    (
        (131072, 4096, 16384, "fp8", "float32", 0.0),
        [28.347, 0.0706, 17.1743, 1.0431, 0.1079, 0.489, 9.2405],
        16468738560,
    ),
]  # fmt: skip
# Two GPUs of a node over NCCL, microseconds: kind, bytes handed in for 1, 16, 128 and 1024 MiB.
COLLECTIVES = {
    "sum": (1, {1: 30, 16: 76, 128: 466, 1024: 3260}),
    "gather": (1, {1: 27, 16: 90, 128: 549, 1024: 3860}),
    "scatter_sum": (2, {1: 31, 16: 93, 128: 584, 1024: 3910}),  # the sizes are of what comes out, half of what goes in
}
PARTS = (STEP, NORMALISE, ENCODE, DECODE, SORT, BIASES, UPDATE, AUXK)


def jobs():
    """Each measured job, without averaged weights, with its times and peak bytes."""
    names = ("n_latents", "d_model", "batch_tokens", "precision", "state", "dead")
    for case, times, peak in TABLE:
        yield Job(**dict(zip(names, case, strict=True)), k=32, ema=False), times, peak


MEASURED = [Measured(job, part, ms / 1e3) for job, times, _ in jobs() for part, ms in zip(PARTS, times, strict=False)]
