"""Bytes of a step's collectives, counted by hand.

Seen to fail when: rows are not padded to a multiple of the shards.
"""

from dataclasses import replace

import pytest

from topkapi.errors import TopkapiError
from topkapi.scaling.shapes import Job, Layout, rank_of
from topkapi.scaling.volumes import Volume, by_group, volumes

JOB = Job(n_latents=1000, d_model=16, k=8, batch_tokens=60, precision="float32", auxk=5)


def payloads(job, **layout):
    return {volume.name: volume.payload for volume in volumes(job, Layout(**layout))}


def test_a_process_alone_sends_nothing():
    assert volumes(JOB, Layout()) == []


def test_shards():
    assert payloads(JOB, n_shards=4) == {
        "activations": 15 * 16 * 2,  # in bf16
        "candidates' values": 60 * 8 * 4,
        "reconstruction": 60 * 16 * 4,
        "gradient of reconstruction": 15 * 16 * 4,
        "pre_bias": 16 * 4,
        "number of dead latents": 8,
        "loss and l0": 16,
        "whether to stop": 8,
    }


def test_rows_are_padded_to_a_multiple_of_the_shards():
    found = payloads(JOB, n_shards=7)
    assert found["reconstruction"] == 63 * 16 * 4
    assert found["gradient of reconstruction"] == 9 * 16 * 4


def test_working_precision_travels_in_two_bytes_and_sums_in_four():
    job = Job(n_latents=1000, d_model=16, k=8, batch_tokens=60)
    found = payloads(job, n_shards=4)
    assert found["reconstruction"] == 60 * 16 * 4
    assert found["gradient of reconstruction"] == 15 * 16 * 2


def test_fewer_candidates_with_capacity():
    job = Job(n_latents=100_000, d_model=16, k=256, batch_tokens=60)
    assert payloads(job, n_shards=64, selection="capacity")["candidates' values"] == 60 * 10 * 4
    assert payloads(job, n_shards=64, selection="exact")["candidates' values"] == 60 * 256 * 4
    assert payloads(job, n_shards=64, selection="capacity", candidates=12)["candidates' values"] == 60 * 12 * 4


def test_replicas_exchange_rows_and_codes_or_dense_gradients():
    sparse = payloads(JOB, n_replicas=3, exchange="sparse")
    assert sparse["replicas: activations"] == 20 * 16 * 4
    assert sparse["replicas: active latents"] == 2 * 20 * 8 * 4
    assert sparse["replicas: gradients"] == 20 * 16 * 4 + 20 * 8 * 4
    assert sparse["replicas: latents that fired"] == 334
    dense = payloads(JOB, n_replicas=3, exchange="dense")
    assert dense["replicas: W_enc's gradient"] == dense["replicas: W_dec's gradient"] == 3 * 334 * 16 * 4
    assert dense["replicas: latent_bias, fired"] == 1000 * (4 + 4)


def test_owners_send_what_they_have_changed():
    for exchange in ("sparse", "dense"):
        found = payloads(JOB, n_replicas=3, exchange=exchange)
        assert found["replicas: W_enc"] == 334 * 16 * 4
        assert found["replicas: W_dec, latent_bias"] == 334 * 16 * 4 + 334 * 4
        in_bf16 = payloads(replace(JOB, precision="bf16"), n_replicas=3, exchange=exchange)
        assert in_bf16["replicas: W_enc"] == 334 * 16 * 2


def test_micro_batches_add_up_gradients_before_they_travel():
    """20 tokens of a replica are 8, 8 and 4; two shards pad neither."""
    layout = {"n_replicas": 3, "n_shards": 2, "micro_batch_tokens": 8}
    whole, parts = payloads(JOB, **layout | {"micro_batch_tokens": 0}, exchange="dense"), payloads(JOB, **layout)
    assert parts == whole
    calls = {volume.name: volume.calls for volume in volumes(JOB, Layout(**layout))}
    assert calls["candidates' values"] == calls["reconstruction"] == 3
    assert payloads(JOB, n_shards=7, micro_batch_tokens=9)["reconstruction"] == (6 * 14 + 7) * 16 * 4


def test_the_exchange_with_fewer_bytes_is_chosen():
    few, many = (Job(n_latents=1000, d_model=16, k=8, batch_tokens=n, precision="float32") for n in (60, 6000))
    assert rank_of(few, Layout(n_replicas=2)).exchange == "sparse"
    assert rank_of(many, Layout(n_replicas=2)).exchange == "dense"
    for job in (few, many):
        chosen, sparse, dense = (
            sum(volume.sent for volume in volumes(job, Layout(n_replicas=2, exchange=exchange)))
            for exchange in ("auto", "sparse", "dense")
        )
        assert chosen == min(sparse, dense)


def test_auxk_has_its_own_of_each():
    job = Job(n_latents=1000, d_model=16, k=8, batch_tokens=60, precision="float32", dead=0.1, auxk=5)
    found = payloads(job, n_shards=2, n_replicas=2)
    assert found["AuxK: candidates' values"] == 30 * 5 * 4
    assert found["AuxK: reconstruction"] == 30 * 16 * 4
    assert found["AuxK: gradients of dead rows"] == 50 * (2 * 16 + 1) * 4
    without = Job(n_latents=1000, d_model=16, k=8, batch_tokens=60, precision="float32", dead=0.1, auxk=0)
    assert not any(name.startswith("AuxK") for name in payloads(without, n_shards=2))


def test_what_a_process_sends():
    assert Volume("", "shards", 4, "gather", 100).sent == 300
    assert Volume("", "shards", 4, "scatter_sum", 100).sent == 75
    assert Volume("", "shards", 4, "sum", 100).sent == 150


def test_payloads_add_up_by_group():
    found = by_group(volumes(JOB, Layout(n_shards=2, n_replicas=2)))
    assert found["shards", "scatter_sum"] == 30 * 16 * 4
    assert found["all", "gather"] == 15 * 16 * 2 + 16 * 4 + 16


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"n_shards": 1001}, "1,000 latents do not fill 1001 shards"),
        ({"n_shards": 50, "n_replicas": 30}, "1,000 latents on 50 shards do not fill 30 replicas"),
        ({"n_replicas": 7}, "60 tokens cannot be divided among 7 replicas"),
    ],
)
def test_layouts_that_cannot_be(layout, said):
    with pytest.raises(TopkapiError, match=said):
        rank_of(JOB, Layout(**layout))
