"""Effects of one latent at one token against two forward passes, taken apart by hand.

Mutations seen caught: the latent ablated at every position; KL the other way round; the change of loss with the wrong
sign; the mean taken off instead of the median.
"""

import numpy as np
import pytest
import torch

from topkapi.errors import TopkapiError
from topkapi.evaluate.ablation import effect_sparsity
from topkapi.explore import Edit, ablation_effects

TOKENS = torch.arange(40, 60)[None] * 7 % 500 + 5
AT = 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_effects_equal_those_of_an_edit(make, family):
    spliced = make(family)
    latent = int(spliced.code(TOKENS).indices[0, AT, 1])
    found = ablation_effects(spliced, TOKENS, AT, latent, n=4)
    clean = spliced.lm.logits(TOKENS)[0, AT:]
    ablated = spliced.logits(TOKENS, [Edit(latent, "ablate", where=(AT,))])[0, AT:]
    p, q = clean.softmax(-1), ablated.softmax(-1)
    np.testing.assert_allclose(found.kl, (p * (p / q).log()).sum(-1), rtol=1e-6, atol=1e-12)
    following = TOKENS[0, AT + 1 :]
    loss = [float(p[t, i].log() - q[t, i].log()) for t, i in enumerate(following)]
    np.testing.assert_allclose(found.loss_change[:-1], loss, rtol=1e-6, atol=1e-12)
    assert found.loss_change[-1] is None
    assert len(found.kl) == len(found.up) == len(found.down) == len(found.loss_change) == TOKENS.shape[1] - AT
    change = ablated - clean
    change = change - change.median(-1, keepdim=True).values
    for t, (up, down) in enumerate(zip(found.up, found.down, strict=True)):
        order = change[t].argsort()
        assert [one.token for one in down] == order[:4].tolist()
        assert [one.token for one in up] == order.flip(0)[:4].tolist()
        for one in (*up, *down):
            assert one.logit == pytest.approx(float(change[t, one.token]), abs=1e-9)
            assert one.probability == pytest.approx(float((q - p)[t, one.token]), abs=1e-9)
    assert found.sparsity == pytest.approx(float(effect_sparsity(clean[:16], ablated[None, :16])))
    assert found.value == pytest.approx(float(spliced.code(TOKENS).values[0, AT, 1]))


def test_the_last_position_has_effects_but_no_loss(make):
    spliced = make()
    last = TOKENS.shape[1] - 1
    found = ablation_effects(spliced, TOKENS, last, int(spliced.code(TOKENS).indices[0, last, 0]))
    assert found.loss_change == [None]
    assert found.kl[0] > 0


def test_mistakes_are_named(make):
    spliced = make()
    idle = next(i for i in range(96) if i not in spliced.code(TOKENS).indices[0, AT])
    with pytest.raises(TopkapiError, match=f"latent {idle} is not active at position {AT}"):
        ablation_effects(spliced, TOKENS, AT, idle)
    with pytest.raises(TopkapiError, match="no position 20: the context has positions 0 to 19"):
        ablation_effects(spliced, TOKENS, 20, idle)
    with pytest.raises(TopkapiError, match="no latent 96"):
        ablation_effects(spliced, TOKENS, AT, 96)
