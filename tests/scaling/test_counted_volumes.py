"""The planner's bytes are those of real steps of two and four processes over gloo.

Seen to fail when: codes travel with a fourth tensor; the rows of the last micro-batch are not padded;
moments are kept for the whole shard.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scaling.counted import AUXK, CASES, HELD, N_DEAD, SIZES
from topkapi.scaling.memory import weights_and_state
from topkapi.scaling.shapes import Job, Layout, rank_of
from topkapi.scaling.volumes import ACTIVATIONS, STOP, volumes

ROOT = Path(__file__).parents[2]
# Plain PyTorch, unlike the kernels, selects in the dtype of the weights: a value has 2 bytes instead of 4.
OF_BF16_ON_A_CPU = {
    "candidates' values": 1 / 2,
    "AuxK: candidates' values": 1 / 2,
    "replicas: active latents": 6 / 8,
}


@pytest.fixture(scope="module")
def steps():
    """What the steps of all cases handed in."""
    run = [sys.executable, "-m", "tests.scaling.counted"]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def planned(case):
    """Job and layout of a case."""
    replicas, shards = case["mesh"]
    dead = N_DEAD / SIZES["n_latents"] if case["dead"] else 0.0
    job = Job(**SIZES, precision=case["precision"], dead=dead + 1e-9, auxk=AUXK, ema=False)
    layout = Layout(
        n_replicas=replicas,
        n_shards=shards,
        selection=case["selection"],
        exchange=case["exchange"],
        micro_batch_tokens=case["micro"],
    )
    return job, layout


def expected(case):
    """Payloads by group and kind, without what is no part of `topk_step` and the optimiser."""
    job, layout = planned(case)
    sums = {}
    for volume in volumes(job, layout):
        if volume.name in (ACTIVATIONS, STOP):
            continue
        shorter = OF_BF16_ON_A_CPU.get(volume.name, 1) if case["precision"] == "bf16" else 1
        key = f"{volume.group} {volume.kind}"
        sums[key] = sums.get(key, 0) + round(volume.payload * shorter)
    if case["dead"] and layout.n_shards > 1:
        sums["shards sum"] += 8  # the counter looks at what was written to it from outside
    return sums


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i].values())))
def test_bytes_of_a_step(i, steps):
    assert {name: size for name, size in steps[i].items() if name != HELD} == expected(CASES[i])


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i].values())))
def test_weights_and_state_that_a_process_holds(i, steps):
    """But for the latent by which the parts of replicas differ."""
    job, layout = planned(CASES[i])
    rank = rank_of(job, layout)
    assert sum(weights_and_state(job, rank.latents, rank.owned_latents).values()) == pytest.approx(
        steps[i][HELD], rel=0.04
    )
