"""The model of a step against what was measured on one H200, and the rates that are fitted to such measurements.

Seen to fail when: the encoder's kernels cost nothing besides the matmul; gathered rows are never found in the cache;
what travels beside computing costs nothing.
"""

from dataclasses import asdict, replace
from statistics import median

import pytest

from tests.scaling.h200 import COLLECTIVES, COPY, MEASURED, ON_TWO, jobs
from topkapi.errors import TopkapiError
from topkapi.scaling.calibration import Measured, errors, fit, measured_in
from topkapi.scaling.hardware import H100, H200, Rates
from topkapi.scaling.memory import NEXT_BATCH, memory, total
from topkapi.scaling.shapes import Job, Layout
from topkapi.scaling.step_time import ENCODE, NORMALISE, Path, collective_seconds, step_time
from topkapi.scaling.volumes import ACTIVATIONS, Volume


def off(found):
    return [abs(error.relative) for error in found]


def test_the_preset_explains_every_measured_step_and_part():
    found = off(errors(MEASURED, H200))
    assert len(found) == 63
    assert median(found) < 0.03
    assert max(found) < 0.2  # sorting, 0.1 ms


def test_memory_is_what_was_measured():
    for job, _, peak in jobs():
        held = memory(job, Layout())
        assert total(held) - held[NEXT_BATCH] == pytest.approx(peak, rel=0.03)  # the benchmark makes no batch ahead


def test_the_largest_dictionary_is_extrapolated():
    """16 M latents on one H200, which no rate was fitted to: 455.4 ms and 98.2 GiB measured."""
    job = Job(n_latents=2**24, d_model=768, k=64, batch_tokens=8192, state="low_memory", ema=False)
    assert step_time(job, Layout(), H200).seconds == pytest.approx(0.4554, rel=0.05)
    assert total(memory(job, Layout())) == pytest.approx(98.2 * 2**30, rel=0.01)


def test_collectives_of_two_gpus_are_those_measured():
    for kind, (times, measured) in COLLECTIVES.items():
        for mebibytes, microseconds in measured.items():
            volume = Volume("", "shards", 2, kind, times * mebibytes * 2**20)
            assert 1e6 * collective_seconds(volume, Path(2, 1), H200) == pytest.approx(microseconds, rel=0.15)


@pytest.mark.parametrize(("replicas", "shards", "exchange", "n_latents", "precision", "ms", "gib"), ON_TWO)
def test_steps_on_two_gpus_are_those_measured(replicas, shards, exchange, n_latents, precision, ms, gib):
    job = Job(n_latents=n_latents, d_model=768, k=32, batch_tokens=131_072, precision=precision, ema=False)
    layout = Layout(n_replicas=replicas, n_shards=shards, exchange=exchange)
    exposed = sum(part.exposed for part in step_time(job, layout, H200).parts if part.name != ACTIVATIONS)
    assert 1e3 * exposed == pytest.approx(ms, rel=0.03)  # no batch was made ahead
    held = memory(job, layout)
    assert (total(held) - held[NEXT_BATCH]) / 2**30 == pytest.approx(gib, rel=0.08)


def test_fitting_finds_the_preset_again_from_the_measurements():
    slow = replace(H200, rates=Rates(**{name: rate / 3 for name, rate in asdict(H200.rates).items()}))
    for known in (H200, H100, slow):
        fitted = fit(MEASURED, known, COPY)
        found = off(errors(MEASURED, fitted))
        assert median(found) < 0.05
        assert max(found) < 0.25
        assert fitted.rates.bytes == pytest.approx(COPY)


def test_fitting_finds_the_rates_that_made_the_times():
    there = replace(H200, rates=replace(H200.rates, bf16_flops=3e14, sorted_pairs=1e10, launches=1e5))
    made = [
        Measured(row.job, row.part, error.predicted)
        for row, error in zip(MEASURED, errors(MEASURED, there), strict=True)
    ]
    assert max(off(errors(made, fit(made, H200, COPY)))) < 0.05


def test_a_few_measurements_are_enough():
    row = next(row for row in MEASURED if row.part == ENCODE)
    fitted = fit([row], H200, COPY)
    assert errors([row], fitted)[0].relative == pytest.approx(0, abs=0.02)


def test_what_is_no_bench_json_is_refused():
    with pytest.raises(TopkapiError, match="this is no bench"):
        measured_in({"cases": [{"case": {}}]})
    strange = Measured(MEASURED[0].job, "polish", 1.0)
    with pytest.raises(TopkapiError, match=f"no part 'polish'; it has {NORMALISE}"):
        fit([strange], H200, COPY)
