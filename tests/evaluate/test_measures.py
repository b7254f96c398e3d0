"""Every metric of `topkapi eval --all` on a stand-in: scale, gaps and budgets.

Mutations seen caught: thresholds calibrated on the half that they are measured on; activations normalised as by another
autoencoder; a simulated value that is not scaled; gaps of a dead autoencoder as zeros; a ReLU autoencoder's k taken;
thresholds calibrated on the first tokens alone.
"""

import json
import math

import numpy as np
import pytest
import torch

from tests.evaluate.stand_ins import D_MODEL, RunningMeanModel, random_autoencoder, random_model, token_file
from topkapi.config import DataConfig, EvalConfig
from topkapi.errors import TopkapiError
from topkapi.evaluate import evaluate_all, labelled, measures, spread_contexts
from topkapi.evaluate.control import channels
from topkapi.evaluate.measures import MEASURES, Subject, measure
from topkapi.evaluate.n2g import Explanation
from topkapi.evaluate.progressive import calibrate_thresholds, jump_relu_recovery
from topkapi.evaluate.refinement import refinement
from topkapi.evaluate.table import remarks, rows
from topkapi.evaluate.tasks import Task
from topkapi.model import Autoencoder, Normalised

CONTEXT, WORDS = 8, 30
CONFIG = DataConfig(context=CONTEXT, shuffle_tokens=CONTEXT)
SETTINGS = EvalConfig(tokens=400, downstream_tokens=160)


class Tokenizer:
    """A word is the number that it is written as."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [WORDS - 1] if text in (" _", "_") else [int(word) for word in text.split()]


class StdNormalised(Autoencoder):
    """An autoencoder of x divided by its standard deviation over d_model, as OpenAI's published ones are."""

    @staticmethod
    def normalise(raw):
        mean, std = raw.mean(-1, keepdim=True), raw.std(-1, keepdim=True)
        return Normalised((raw - mean) / std, mean, std)


def converted(ae: Autoencoder) -> StdNormalised:
    """The same autoencoder for activations that are sqrt(d_model - 1) times as long."""
    sizes = {"d_model": ae.d_model, "n_latents": ae.n_latents, "k": ae.k, "activation": ae.activation}
    out, scale = StdNormalised(**sizes), math.sqrt(ae.d_model - 1)
    with torch.no_grad():
        for name, parameter in ae.named_parameters():
            getattr(out, name).copy_(parameter * (scale if name.endswith("bias") else 1))
    return out


@pytest.fixture(autouse=True)
def few_latents(monkeypatch):
    monkeypatch.setattr(measures, "FEWEST_LATENTS", 6)


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    """Two tasks on the same texts, and one whose package is missing."""
    random = np.random.default_rng(0)
    texts = [" ".join(map(str, random.integers(1, WORDS, random.integers(2, 12)))) for _ in range(80)]
    labels = {"odd": [int(t.split()[-1]) % 2 == 1 for t in texts], "seven": ["7" in t for t in texts]}

    def task(name):
        if name == "elsewhere":
            raise TopkapiError("The package elsewhere is not installed: pip install elsewhere")
        return Task(texts, torch.tensor(labels[name]))

    monkeypatch.setattr(labelled, "task", task)
    monkeypatch.setattr(labelled, "TASKS", dict.fromkeys(["odd", "seven", "elsewhere"]))


def language_model() -> RunningMeanModel:
    lm = random_model(vocabulary=WORDS)
    lm.tokenizer, lm.name = Tokenizer(), "stand-in"
    return lm


def subject(ae: Autoencoder, n_tokens: int = 1000, settings: EvalConfig = SETTINGS) -> Subject:
    tokens = np.random.default_rng(1).integers(0, WORDS - 1, n_tokens)  # the last is the padding token
    return Subject(ae, language_model(), token_file(tokens), CONFIG, settings)


def everything(it: Subject) -> dict:
    found = {name: measure(name, it) for name in MEASURES}
    (base,) = evaluate_all([it.ae], it.lm, it.token_file, it.data, it.settings)
    return {**base.metrics, "intervals": base.intervals, **found}


def numbers(value, path=()):
    if isinstance(value, dict):
        return {key: it for name in value for key, it in numbers(value[name], (*path, name)).items()}
    if isinstance(value, list | tuple):
        return {key: it for i, each in enumerate(value) for key, it in numbers(each, (*path, i)).items()}
    return {path: value}


@pytest.mark.parametrize("seed", range(2))
def test_metrics_do_not_depend_on_the_scale_of_normalisation(seed):
    """Rounding aside: 1e-4 of each number, as a pattern or a rank might turn on the last bit."""
    ae = random_autoencoder(n_latents=40, k=3, seed=seed)
    ours, theirs = everything(subject(ae)), everything(subject(converted(ae)))
    scaled = [threshold / math.sqrt(D_MODEL - 1) for threshold in theirs["threshold"]["threshold"]]
    theirs["threshold"]["threshold"] = scaled
    ours, theirs = numbers(ours), numbers(theirs)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 300
    for path, value in ours.items():
        if isinstance(value, float):
            assert theirs[path] == pytest.approx(value, rel=1e-4, abs=1e-6), path
        else:
            assert theirs[path] == value, path


def test_results_are_strict_json_and_a_table():
    found = everything(subject(random_autoencoder(n_latents=40, k=3)))
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    named = {row.name: row for row in rows(found)}
    assert all(len(row.name) <= 28 and len(row.value) <= 10 and len(row.interval) <= 20 for row in named.values())
    assert float(named["normalized_mse, k'=12"].value) == pytest.approx(
        found["progressive"]["normalized_mse"][-1], abs=1e-4
    )
    assert named["probe loss"].unit == "nats, 2 of 3 tasks"
    assert remarks(found) == [
        "probe tasks left out, elsewhere: The package elsewhere is not installed: pip install elsewhere"
    ]


def test_curves_and_refinement_are_those_of_their_functions():
    it = subject(random_autoencoder(n_latents=40, k=3))
    ids = spread_contexts(it.token_file, CONTEXT, 400)
    first, second = (it.token_file.context_tokens(ids[half::2], CONTEXT) for half in (0, 1))
    keep = [tokens != 0 for tokens in (first, second)]
    for mask in keep:
        mask[:, 0] = False
    x = [it.ae.normalise(it.lm.embedding[tokens[mask]]).x for tokens, mask in zip((first, second), keep, strict=True)]
    found = measure("threshold", it)
    thresholds = calibrate_thresholds(it.ae, x[0], found["k"])
    assert found["threshold"] == pytest.approx(list(thresholds), rel=1e-5)
    wanted = jump_relu_recovery(it.ae, x[1], thresholds)
    assert found["normalized_mse"] == pytest.approx([mse.value for mse in wanted.normalized_mse], rel=1e-5)
    assert found["l0"] == pytest.approx(list(wanted.l0))
    progressive = measure("progressive", it)
    assert progressive["k"] == sorted({*range(1, 13)})
    assert progressive["n_tokens"] == len(x[1])
    whole = measure("refinement", it)
    assert whole["mean_ratio"]["value"] == pytest.approx(refinement(it.ae, torch.cat(x)).mean_ratio.value, rel=1e-5)
    assert whole["mean_ratio"]["n"] == len(ids)


def test_thresholds_are_calibrated_on_text_from_all_over_the_first_half(monkeypatch):
    """A token file holds its corpora one after another: the first tokens are of one alone."""
    given = []
    monkeypatch.setattr(measures, "CALIBRATION_TOKENS", 50)
    monkeypatch.setattr(measures, "calibrate_thresholds", lambda ae, x, ks: given.append(x) or [0.1] * len(ks))
    it = subject(random_autoencoder(n_latents=40, k=3))
    measure("threshold", it)
    raw = it.halves[0].raw
    assert 25 < len(given[0]) <= 50 < len(raw)
    x = it.ae.normalise(raw[[0, -1 - (len(raw) - 1) % math.ceil(len(raw) / 50)]].float()).x
    assert torch.allclose(given[0][[0, -1]], x)


@pytest.mark.parametrize(
    ("change", "gaps"),
    [
        ("dead", dict.fromkeys(MEASURES)),
        ("not finite", dict.fromkeys(MEASURES, "weights are not finite")),
        ("relu", dict.fromkeys(["progressive", "threshold"], "a ReLU autoencoder has no k")),
        ("k is 1", {}),
        (
            "one context",
            dict.fromkeys(["refinement", "progressive", "threshold", "n2g", "n2g_loss"], "do not make two halves"),
        ),
        ("nothing kept", dict.fromkeys(set(MEASURES) - {"probes"}, "")),
        (
            "no downstream tokens",
            {"ablation_sparsity": "set --downstream-tokens above 0", "n2g_loss": "raise --downstream-tokens"},
        ),
    ],
)
def test_what_cannot_be_had_is_an_error_that_says_why(change, gaps):
    kind = "relu" if change == "relu" else "topk"
    ae = random_autoencoder(n_latents=40, k=1 if change == "k is 1" else 3, activation=kind)
    it = subject(ae, n_tokens=CONTEXT if change == "one context" else 1000)
    with torch.no_grad():
        if change == "dead":
            ae.latent_bias.fill_(-100)
        elif change == "not finite":
            ae.W_enc[3, 2] = torch.nan
        elif change == "nothing kept":
            it.token_file = token_file(np.zeros(1000))
        elif change == "no downstream tokens":
            it.settings = EvalConfig(tokens=400, downstream_tokens=0)
    failed = {}
    for name in MEASURES:
        try:
            found = measure(name, it)
        except TopkapiError as error:
            failed[name] = str(error)
            continue
        if name == "probes" and change == "dead":
            (failed[name],) = {line for line in remarks({name: found}) if line.startswith("probes, mean: no latent")}
            assert found["mean"]["value"] is None
            continue
        values = [value for path, value in numbers(found).items() if path[-1] == "value"]
        assert values or name in ("progressive", "threshold")
        assert all(value is not None and math.isfinite(value) for value in values)
    assert failed.keys() == gaps.keys()
    for name, wanted in gaps.items():
        assert (wanted or "") in failed[name]
        assert "\n" not in failed[name]
    if change == "k is 1":
        assert measure("progressive", it)["k"] == [1, 2, 3, 4]


def test_a_mistake_of_ours_is_not_taken_for_a_gap(monkeypatch):
    monkeypatch.setitem(MEASURES, "n2g", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure("n2g", subject(random_autoencoder()))


def test_texts_of_one_token_are_left_out_by_name(monkeypatch):
    texts = ["3", "4"] * 10
    monkeypatch.setattr(labelled, "task", lambda _: Task(texts, torch.tensor([True, False] * 10)))
    monkeypatch.setattr(labelled, "TASKS", {"short": None})
    with pytest.raises(TopkapiError, match="no token of the 20 texts of short is kept: they are one token long"):
        measure("probes", subject(random_autoencoder()))


def test_a_task_with_a_single_text_of_a_class_is_left_out(monkeypatch):
    labels = {"even": [True, False] * 10, "one": [True] + [False] * 19}
    texts = ["3 4 5", "4 5"] * 10
    monkeypatch.setattr(labelled, "task", lambda name: Task(texts, torch.tensor(labels[name])))
    monkeypatch.setattr(labelled, "TASKS", dict.fromkeys(labels))
    found = measure("probes", subject(random_autoencoder(n_latents=40, k=3)))
    assert set(found["tasks"]) == {"even"}
    assert "two examples of each class" in found["left_out"]["one"]


def test_tasks_of_the_same_texts_draw_them_together(monkeypatch):
    """Two names of one task: the mean is known as well as that of one of them, and not as that of two."""
    ab, c = ["3 4 5", "4 5", "4 6", "5 6 6"] * 10, ["6 5", "7 5 4"] * 10
    tasks = {"a": Task(ab, torch.arange(40) % 2 == 0), "b": Task(ab, torch.arange(40) % 2 == 0)}
    tasks["c"] = Task(c, torch.arange(20) % 3 == 0)
    monkeypatch.setattr(labelled, "task", tasks.get)
    ae = random_autoencoder(n_latents=40, k=3)
    found = {}
    for names in ("ab", "abc"):
        monkeypatch.setattr(labelled, "TASKS", dict.fromkeys(names))
        found[names] = measure("probes", subject(ae))
    one = found["ab"]["tasks"]["a"]
    assert {name: one[name] for name in found["ab"]["mean"]} == found["ab"]["mean"]
    assert found["abc"]["mean"]["n"] == one["n"] + found["abc"]["tasks"]["c"]["n"]


def test_texts_are_drawn_by_class_in_their_shares():
    labels = torch.zeros(1000, 2, dtype=torch.bool)
    labels[:300, 0], labels[:3, 1] = True, True
    drawn = labelled._draw(labels, 100, 0)
    assert len(set(drawn.tolist())) == len(drawn)
    counts = labels[drawn].unique(dim=0, return_counts=True)[1].tolist()
    assert counts == [70, 30, 3]  # the last are all there are
    assert sorted(labelled._draw(labels, 2000, 0).tolist()) == list(range(1000))


@pytest.mark.parametrize("strength", [1, 3])
def test_latents_that_are_explained_completely_cost_what_splicing_costs(monkeypatch, strength):
    """Each word is a latent of its own, with one value: simulated activations are the real ones once scaled."""
    explain = measures.explain

    def too_strong(*arguments, **options):
        found = explain(*arguments, **options)
        patterns = [pattern._replace(activation=strength * pattern.activation) for pattern in found.patterns]
        return Explanation(patterns, found.n_examples)

    monkeypatch.setattr(measures, "explain", too_strong)
    lm = language_model()
    x = Autoencoder.normalise(lm.embedding).x
    ae = Autoencoder(d_model=D_MODEL, n_latents=WORDS, k=1)
    with torch.no_grad():
        ae.W_enc.copy_(x)
        ae.W_dec.copy_(0.8 * x)
    it = subject(ae, 4000, EvalConfig(tokens=4000, downstream_tokens=400))
    found = measure("n2g_loss", it)
    assert found["ce_simulated"]["value"] == pytest.approx(found["ce_spliced"]["value"], abs=1e-5)
    assert found["ce_simulated"]["value"] != pytest.approx(found["ce_clean"]["value"], abs=1e-3)
    assert found["n_latents"] == WORDS - 2  # the special token's never fires where it counts
    assert found["ce_simulated"]["n"] == 50


def test_channels_reconstruct_everything():
    ae, raw = channels(D_MODEL), torch.randn(9, D_MODEL)
    torch.testing.assert_close(ae(raw), raw)
    values, _ = ae.encode(ae.normalise(raw).x)
    assert ((values > 0).sum(1) == D_MODEL).all()
