"""Dead latents are counted in tokens, whatever the batch size.

Seen to catch: `>` instead of `>=`; counting batches.
"""

import torch

from topkapi.dead import DeadCounter


def test_counts_tokens_and_resets_what_fired() -> None:
    counter = DeadCounter(3)
    fired = torch.tensor([True, False, False])
    counter.count_(fired, 10)
    counter.count_(torch.tensor([False, True, False]), 7)
    assert counter.silent_for.tolist() == [7, 0, 17]
    assert counter.dead(17).tolist() == [False, False, True]
    assert counter.dead(18).tolist() == [False, False, False]


def test_batch_size_does_not_matter() -> None:
    one, many = DeadCounter(2), DeadCounter(2)
    never = torch.zeros(2, dtype=torch.bool)
    one.count_(never, 12)
    for _ in range(4):
        many.count_(never, 3)
    assert torch.equal(one.silent_for, many.silent_for)
