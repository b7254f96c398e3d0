"""Edits in the language model, against the equation by hand, in float64.

Mutations seen caught: the reconstruction put in place of the activation; the change not scaled back to raw; positions
counted from the padding; positions counted anew in each step of generation; padding edited; dropped positions edited;
"active" of the edited value; another thread's forward edited.
"""

import threading

import pytest
import torch

from tests.explore.conftest import FAMILIES, SITES, random_autoencoder
from topkapi.data.language_model import LanguageModel
from topkapi.errors import TopkapiError
from topkapi.explore import Edit, Spliced

TOKENS = torch.arange(40, 64).reshape(2, 12) * 7 % 500 + 5
MIXED = list(zip(FAMILIES * 2, SITES[:3] + SITES[1:], strict=True))
KINDS = {
    "clamp": (Edit(0, "clamp", -1.5), lambda z: torch.full_like(z, -1.5)),
    "bound": (Edit(0, "bound", 0.1, 0.2), lambda z: z.clamp(0.1, 0.2)),
    "scale": (Edit(0, "scale", -2.0), lambda z: -2 * z),
    "add": (Edit(0, "add", 0.7), lambda z: z + 0.7),
    "ablate": (Edit(0, "ablate"), torch.zeros_like),
}


def active(spliced, tokens, at=4, rank=0):
    """The latent of that rank among those active at position `at` of the first context."""
    return int(spliced.code(tokens).indices[0, at, rank])


def dense(spliced, tokens):
    """z of all latents, (b, c, n_latents)."""
    code = spliced.code(tokens)
    shape = (*tokens.shape, spliced.ae.n_latents)
    return torch.zeros(shape, dtype=code.values.dtype).scatter_(2, code.indices, code.values)


def close(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_edits_nothing_changes(make, family, site):
    spliced = make(family, site)
    model, clean = spliced.lm.model, spliced.lm.logits(TOKENS)
    assert torch.equal(spliced.logits(TOKENS), clean)
    plain = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    idle = Edit(active(spliced, TOKENS), "scale", 1.0)
    with spliced.editing([idle]):
        assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0), plain)
    assert torch.equal(spliced.logits(TOKENS, [idle]), clean), "an edit that changes no value adds exactly nothing"


def test_generate_takes_edits(make):
    spliced = make()
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(spliced.generate(TOKENS, **how), spliced.lm.model.generate(TOKENS, **how))
    with spliced.editing([Edit(5, "clamp", 30.0)]):
        pushed = spliced.lm.model.generate(TOKENS, **how)
    assert torch.equal(spliced.generate(TOKENS, [Edit(5, "clamp", 30.0)], **how), pushed)


@pytest.mark.parametrize(("family", "site"), MIXED)
def test_ablation_subtracts_the_latents_part(make, family, site):
    spliced = make(family, site)
    i, code, z = active(spliced, TOKENS), spliced.code(TOKENS), dense(spliced, TOKENS)
    part = (code.norm * z[..., i] * code.kept)[..., None] * spliced.ae.W_dec[i].detach()
    wanted = spliced.lm.logits(TOKENS, lambda raw: raw - part)
    assert (wanted - spliced.lm.logits(TOKENS)).abs().max() > 1e-3
    close(spliced.logits(TOKENS, [Edit(i, "ablate")]), wanted)


def test_clamping_to_the_natural_value_is_the_identity(make):
    spliced = make()
    z, clean = dense(spliced, TOKENS), spliced.lm.logits(TOKENS)
    i = active(spliced, TOKENS)
    natural = [Edit(i, "clamp", float(z[0, t, i]), where=(t,)) for t in range(1, 12)]
    assert torch.equal(spliced.logits(TOKENS[:1], natural), spliced.lm.logits(TOKENS[:1]))
    assert not torch.equal(spliced.logits(TOKENS, natural)[1], clean[1]), "of the other context they are not natural"


@pytest.mark.parametrize("where", ["all", "active", (0, 3, 9), (4,)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_follows_its_equation(make, kind, where):
    spliced = make("gpt2", "mlp_out.0")
    edit, of = KINDS[kind]
    i, code, z = active(spliced, TOKENS), spliced.code(TOKENS), dense(spliced, TOKENS)
    z = z[..., i]
    here = {"all": code.kept, "active": code.kept & (z > 0)}.get(where)
    if here is None:
        here = torch.zeros_like(code.kept)
        here[:, list(where)] = True
    change = torch.where(here, of(z) - z, 0) * code.norm
    wanted = spliced.lm.logits(TOKENS, lambda raw: raw + change[..., None] * spliced.ae.W_dec[i].detach())
    close(spliced.logits(TOKENS, [Edit(i, kind, edit.value, edit.high, where)]), wanted)


def test_edits_of_one_latent_follow_each_other_and_of_several_add_up(make):
    spliced = make()
    i, j = (active(spliced, TOKENS, rank=rank) for rank in (0, 1))
    both = spliced.logits(TOKENS, [Edit(i, "scale", 2.0), Edit(i, "add", 1.0), Edit(j, "ablate")])
    code, z = spliced.code(TOKENS), dense(spliced, TOKENS)
    W_dec = spliced.ae.W_dec.detach()
    change = (z[..., i] + 1)[..., None] * W_dec[i] - z[..., j, None] * W_dec[j]
    close(both, spliced.lm.logits(TOKENS, lambda raw: raw + (code.norm * code.kept)[..., None] * change))


def test_active_means_before_any_edit(make):
    spliced = make()
    i = active(spliced, TOKENS)
    edits = [Edit(i, "add", 1.0), Edit(i, "add", 1.0, where="active")]
    code, z = spliced.code(TOKENS), dense(spliced, TOKENS)[..., i]
    change = (1.0 + (z > 0)) * code.kept * code.norm
    W_dec = spliced.ae.W_dec.detach()
    close(spliced.logits(TOKENS, edits), spliced.lm.logits(TOKENS, lambda raw: raw + change[..., None] * W_dec[i]))


def test_what_training_drops_is_left_alone_unless_it_is_chosen(make):
    spliced = make()
    end = spliced.lm.tokenizer.eos_token_id
    spliced.lm.special_ids = {end, 3}
    spliced = Spliced(spliced.lm, spliced.ae)
    tokens = TOKENS.clone()
    tokens[:, 5], tokens[:, 7] = end, 3
    kept = spliced.code(tokens).kept
    assert kept.tolist() == [[t not in (0, 5, 7) for t in range(12)]] * 2
    held = Edit(3, "clamp", 4.0)
    seen = []
    with spliced.editing([held]):
        handle = spliced.lm.model.model.layers[0].register_forward_hook(lambda m, i, out: seen.append(out))
        spliced.lm.logits(tokens)
        handle.remove()
    assert seen
    clean = spliced.lm.activations(tokens)
    changed = ((seen[0] if torch.is_tensor(seen[0]) else seen[0][0]) - clean).abs().sum(-1) > 0
    assert torch.equal(changed, kept)
    chosen = spliced.logits(tokens, [Edit(3, "clamp", 4.0, where=(0,))])
    assert not torch.allclose(chosen, spliced.lm.logits(tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batches_equal_single_prompts(make, family):
    spliced = make(family)
    model, end = spliced.lm.model, spliced.lm.tokenizer.eos_token_id
    prompts = [TOKENS[0, :7], TOKENS[1, :4], TOKENS[0, 2:12]]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=end) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()
    edits = [Edit(5, "clamp", 3.0), Edit(9, "clamp", -3.0, where=(0, 2, 11))]
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": end, "output_logits": True}
    how |= {"return_dict_in_generate": True, "min_new_tokens": 6}
    with spliced.editing(edits):
        together = model.generate(ids, attention_mask=mask, **how)
        alone = [model.generate(p[None], attention_mask=torch.ones(1, len(p)), **how) for p in prompts]
    for i, one in enumerate(alone):
        assert together.sequences[i, width:].tolist() == one.sequences[0, len(prompts[i]) :].tolist()
        for ours, theirs in zip(together.logits, one.logits, strict=True):
            close(ours[i], theirs[0])
    with spliced.editing([]):
        plain = model.generate(ids, attention_mask=mask, **how)
    assert (plain.logits[0] - together.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["all", (0, 1, 2, 3)])
def test_padding_is_never_edited(make, where):
    spliced = make()
    mask = torch.ones_like(TOKENS)
    mask[0, :4], mask[1, 9:] = 0, 0  # on the left, and on the right
    seen = []
    for edits in ([], [Edit(3, "clamp", 4.0, where=where)]):
        with spliced.editing(edits):
            handle = spliced.lm.model.model.layers[0].register_forward_hook(lambda m, i, out: seen.append(out))
            spliced.lm.model(TOKENS, attention_mask=mask)
            handle.remove()
    changed = (seen[1] - seen[0]).abs().sum(-1) > 0
    position = torch.arange(12) - torch.tensor([[4], [0]])
    wanted = (mask == 1) & ((position > 0) if where == "all" else (position <= 3))
    assert torch.equal(changed, wanted)


@pytest.mark.parametrize(("family", "site"), MIXED)
def test_cached_generation_equals_recomputation(make, family, site):
    spliced = make(family, site)
    prompt = TOKENS[:, :5]
    edits = [Edit(5, "clamp", 3.0, where=(2, 6, 7)), Edit(9, "add", -2.0), Edit(11, "scale", 3.0, where="active")]
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    with spliced.editing(edits):
        made = spliced.lm.model.generate(prompt, output_logits=True, **how)
    whole = spliced.logits(made.sequences, edits)
    for step, logits in enumerate(made.logits):
        torch.testing.assert_close(logits, whole[:, 4 + step].float(), rtol=1e-6, atol=1e-6)  # generate rounds them
    clean = spliced.lm.logits(made.sequences)
    assert (clean - whole).abs().amax((0, 2))[1:].min() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_without_a_mask_counts_on(make, family):
    spliced = make(family)
    edits = [Edit(5, "clamp", 3.0, where=(1, 6, 9))]
    with spliced.editing(edits):
        _, cache = spliced.lm.next_logits(TOKENS[:, :4])
        parts = [spliced.lm.next_logits(TOKENS[:, 4:9], cache)[0]]
        parts.append(spliced.lm.next_logits(TOKENS[:, 9:10], cache)[0])
    whole = spliced.logits(TOKENS[:, :10], edits)
    close(torch.stack(parts, 1), whole[:, [8, 9]])


def test_relu_autoencoders_can_be_edited(make):
    spliced = make(activation="relu")
    code = spliced.code(TOKENS)
    i = int(code.values[0, 4].argmax())
    part = (code.norm * code.values[..., i] * code.kept)[..., None] * spliced.ae.W_dec[i].detach()
    wanted = spliced.lm.logits(TOKENS, lambda raw: raw - part)
    close(spliced.logits(TOKENS, [Edit(i, "ablate")]), wanted)


def test_code_says_what_the_autoencoder_explains(make):
    spliced = make()
    code, raw = spliced.code(TOKENS), spliced.lm.activations(TOKENS)
    recon = spliced.ae(raw).detach()
    centred = raw - raw.mean(-1, keepdim=True)
    close(code.error, (raw - recon).square().sum(-1) / centred.square().sum(-1))
    close(code.norm, centred.norm(dim=-1))


def test_a_model_in_bf16_is_rounded_once(folders):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    lm = LanguageModel.wrap(model, AutoTokenizer.from_pretrained(folders["llama"]), site="resid_post.0")
    spliced = Spliced(lm, random_autoencoder().float())
    assert torch.equal(spliced.logits(TOKENS, [Edit(3, "scale", 1.0)]), lm.logits(TOKENS))
    assert not torch.equal(spliced.logits(TOKENS, [Edit(3, "clamp", 5.0)]), lm.logits(TOKENS))


def test_other_threads_see_no_edits_and_wait(make):
    spliced = make()
    lm, clean, found = spliced.lm, spliced.lm.logits(TOKENS), {}
    held = [Edit(3, "clamp", 5.0)]
    wanted = spliced.logits(TOKENS, held)
    assert not torch.equal(wanted, clean)

    def direct():
        found["direct"] = lm.model(TOKENS).logits

    def waiting():
        found["waiting"] = lm.logits(TOKENS)

    def waiting_to_edit():
        found["edited"] = spliced.logits(TOKENS, held)

    threads = [threading.Thread(target=work) for work in (direct, waiting, waiting_to_edit)]
    with spliced.editing(held):
        for thread in threads:
            thread.start()
        threads[0].join()
        assert not {"waiting", "edited"} & found.keys()
        assert torch.equal(lm.logits(TOKENS), wanted)
    for thread in threads[1:]:
        thread.join()
    assert torch.equal(found["direct"], clean)
    assert torch.equal(found["waiting"], clean)
    assert torch.equal(found["edited"], wanted)


def test_gradients_pass_the_edit_as_a_constant(make):
    spliced = make()
    embedded = spliced.lm.model.get_input_embeddings()(TOKENS[:1]).detach().requires_grad_()
    with spliced.editing([Edit(3, "clamp", 5.0, where=(4,))]):
        logits = spliced.lm.model(inputs_embeds=embedded).logits
    assert torch.equal(logits, spliced.logits(TOKENS[:1], [Edit(3, "clamp", 5.0, where=(4,))]))
    logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_a_loaded_model_and_a_wrapped_one_are_the_same(folders, models):
    from topkapi.config import LanguageModelConfig

    config = LanguageModelConfig(name=str(folders["gpt2"]), site="resid_post.0")
    loaded = LanguageModel.load(config, torch.device("cpu"))
    wrapped = LanguageModel.wrap(*models["gpt2"], site="resid_post.0")
    assert wrapped.fingerprint == loaded.fingerprint
    assert wrapped.name == str(folders["gpt2"])
    assert not wrapped.model.training


def test_an_error_leaves_no_hook_and_mistakes_are_named(make):
    spliced = make()
    with pytest.raises(RuntimeError, match="ours"), spliced.editing([Edit(3, "ablate")]):
        raise RuntimeError("ours")
    assert torch.equal(spliced.logits(TOKENS), spliced.lm.logits(TOKENS))
    with pytest.raises(TopkapiError, match="no latent 96: the autoencoder has latents 0 to 95"):
        spliced.logits(TOKENS, [Edit(96, "ablate")])
    with spliced.editing([Edit(3, "ablate")]), pytest.raises(TopkapiError, match="in force here already"):
        spliced.code(TOKENS)
    spliced.ae.site = "resid_pre.0"
    with pytest.raises(TopkapiError, match=r"trained at resid_pre\.0"):
        Spliced(spliced.lm, spliced.ae)
    spliced.lm.d_model = 65
    with pytest.raises(TopkapiError, match="width 64"):
        Spliced(spliced.lm, spliced.ae)
