"""The same measures on a transformers model, against hooks and losses written with transformers alone."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.data.tiny import make_corpus, make_language_model
from topkapi.config import DataConfig, EvalConfig, LanguageModelConfig
from topkapi.data.activations import harvest
from topkapi.data.language_model import LanguageModel
from topkapi.data.tokens import TokenFile, tokenize
from topkapi.evaluate import evaluate
from topkapi.evaluate.ablation import ablation_sparsity
from topkapi.evaluate.contexts import decode_around, examples, strongest_contexts
from topkapi.evaluate.n2g import activation_of, latent_activations
from topkapi.model import Autoencoder

CONTEXT = 16
ALL = EvalConfig(tokens=10**6, downstream_tokens=10**6)


class Held(NamedTuple):
    lm: LanguageModel
    file: TokenFile
    config: DataConfig


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def held(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    name = str(make_language_model(folder / "lm", request.param))
    lm = LanguageModel.load(LanguageModelConfig(name=name, site="resid_post.0", batch_contexts=16), torch.device("cpu"))
    corpus = make_corpus(folder / "corpus.jsonl", 15)
    config = DataConfig(corpora=(corpus,), context=CONTEXT, held_out=0.3, shuffle_tokens=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        return Held(lm, tokenize(config, lm.tokenizer, name).held_out, config)


def spliced_by_transformers(held, ae):
    """(clean, spliced) cross-entropy by a hook on the first layer and an explicit loop."""
    tokens = held.file.context_tokens(np.arange(held.file.n_contexts(CONTEXT)), CONTEXT)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    keep &= tokens != held.lm.tokenizer.eos_token_id
    layers = getattr(held.lm.model.base_model, "layers", None) or held.lm.model.base_model.h

    def splice(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(keep[..., None], ae(hidden), hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    results = []
    for hook in (None, splice):
        handle = layers[0].register_forward_hook(hook) if hook else None
        with torch.no_grad():
            logits = held.lm.model(tokens).logits
        if handle:
            handle.remove()
        counted = keep[:, :-1]
        results.append(cross_entropy(logits[:, :-1][counted], tokens[:, 1:][counted]).item())
    return results


def test_splicing_equals_a_hook_written_by_hand(held):
    ae = Autoencoder(d_model=64, n_latents=128, k=4)
    found = evaluate(ae, held.lm, held.file, held.config, ALL)
    wanted = spliced_by_transformers(held, ae)
    assert [found["ce_clean"], found["ce_spliced"]] == pytest.approx(wanted, rel=1e-5)
    assert found["kl"] > 0


def test_identity_autoencoder_changes_nothing(held):
    ae = Autoencoder(d_model=64, n_latents=128, k=64)
    both = torch.cat([torch.eye(64), -torch.eye(64)])
    ae.load_state_dict(ae.state_dict() | {"W_enc": both, "W_dec": both})
    found = evaluate(ae, held.lm, held.file, held.config, ALL)
    assert found["normalized_mse"] < 1e-10
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], abs=1e-5)
    assert found["kl"] == pytest.approx(0, abs=1e-5)


def test_strongest_positions_point_at_the_tokens_that_fired(held):
    ae = Autoencoder(d_model=64, n_latents=128, k=4)
    block, _ = harvest(held.lm, held.file, np.arange(held.file.n_contexts(CONTEXT)), held.config)
    found = strongest_contexts(ae, [block], CONTEXT)
    latent = int(found.n_fired.argmax())
    value, position = found.values[latent, 0], found.positions[latent, 0]
    x = ae.normalise(block.x[block.positions == position].float()).x
    assert (x @ ae.W_enc[latent]).item() == pytest.approx(value.item(), rel=1e-5)
    first = examples(found, latent, held.file, held.lm.tokenizer)[0]
    assert first.token == held.lm.tokenizer.decode([int(held.file.tokens[position])])


def ablated_by_transformers(held, ae, window, at, n_positions):
    """{latent: sparsity} by a hook on the first layer for each latent active at position `at`."""
    layers = getattr(held.lm.model.base_model, "layers", None) or held.lm.model.base_model.h
    held_at, part = [], None

    def hook(_module, _inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        held_at.append(hidden[0, at].clone())
        if part is not None:
            hidden[0, at] -= part
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layers[0].register_forward_hook(hook)
    with torch.no_grad():
        clean = held.lm.model(window[None]).logits[0, at : at + n_positions]
        x, _, norm = ae.normalise(held_at[0][None])
        values, indices = ae.encode(x)
        sparsity = {}
        for value, latent in zip(values[0], indices[0].tolist(), strict=True):
            if value > 0:
                part = norm[0] * value * ae.W_dec[latent]
                effect = (held.lm.model(window[None]).logits[0, at : at + n_positions] - clean).double()
                effect -= effect.median(1, keepdim=True).values
                sparsity[latent] = (effect.abs().sum().square() / effect.square().sum() / effect.numel()).item()
    handle.remove()
    return sparsity


def test_ablations_equal_a_hook_written_by_hand(held):
    ae = Autoencoder(d_model=64, n_latents=128, k=4)
    found = ablation_sparsity(ae, held.lm, held.file, np.arange(6), held.config, n_positions=5)
    assert len(np.unique(found.tokens)) == 6
    for token in np.unique(found.tokens):
        window, at = divmod(int(token), CONTEXT)
        here = found.tokens == token
        got = dict(zip(found.latents[here].tolist(), found.sparsity[here].tolist(), strict=True))
        tokens = held.file.context_tokens(np.array([window]), CONTEXT)[0]
        assert got == pytest.approx(ablated_by_transformers(held, ae, tokens, at, 5), rel=1e-3)


def test_a_text_has_the_activation_that_its_tokens_have_in_a_whole_context(held):
    ae = Autoencoder(d_model=64, n_latents=128, k=4)
    tokens = held.file.context_tokens(np.arange(4), CONTEXT)
    whole = latent_activations(ae, held.lm, tokens, range(128))
    latent = int((whole > 0).sum((0, 1)).argmax())
    firings = (whole[..., latent] > 0).nonzero().tolist()
    ends = [*firings[:4], *firings[-4:], [0, 1], [3, CONTEXT - 2]]
    answer = activation_of(ae, held.lm, latent)([tokens[row, : n + 1].tolist() for row, n in ends])
    torch.testing.assert_close(answer, torch.stack([whole[row, n, latent] for row, n in ends]), rtol=1e-4, atol=1e-5)
    assert (answer > 0).any()


def test_byte_level_tokens_join_to_the_text(held):
    text = "The quiet café 日本 opens 🎉"
    ids = held.lm.tokenizer(text)["input_ids"]
    for at in range(len(ids)):
        assert "".join(decode_around(held.lm.tokenizer, ids, at)) == text
