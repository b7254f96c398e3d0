"""Seen to fail when: a group of runs with checkpoints takes fresh ones in; points of sweep.jsonl are trained again; the
identity of the text is not compared; a learning rate is not in the name."""

import json
import os
import signal
from dataclasses import asdict, replace

import pytest

from tests.command_line import assert_same_run, contents, one_line, train_arguments
from tests.data.tiny import make_corpus
from topkapi import checkpoint
from topkapi.cli import main
from topkapi.config import ModelConfig
from topkapi.errors import Interrupted, TopkapiError
from topkapi.evaluate import evaluate, evaluate_all
from topkapi.files import write_json
from topkapi.results import HELD_OUT
from topkapi.sweep import POINTS, SETTINGS, Point, read, read_settings, running, shared_config
from topkapi.sweep.grid import Grid
from topkapi.sweep.running import divide, print_table, sweep, training_flops
from topkapi.train import NOT_FINITE, Trainer, load_run, open_text, train

pytestmark = pytest.mark.usefixtures("one_thread")

SQUARE = Grid(n_latents=(64, 128), k=(2, 4), lr=(1e-3,))
NAMES = ["n64-k2-lr0.001-seed0", "n64-k4-lr0.001-seed0", "n128-k2-lr0.001-seed0", "n128-k4-lr0.001-seed0"]


@pytest.fixture(scope="module")
def base(tiny_config):
    """`tiny_config`, evaluated without the language model's loss."""
    return replace(tiny_config, eval=replace(tiny_config.eval, downstream_tokens=0))


@pytest.fixture(scope="module")
def swept(one_thread, base, tmp_path_factory):
    """A finished sweep of `SQUARE`, all four at a time."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    sweep(base, SQUARE, folder)
    return folder


@pytest.fixture
def trained(monkeypatch):
    """The groups that are trained from here on."""
    groups = []

    def record(configs, runs, **options):
        groups.append([run.name for run in runs])
        train(configs, runs, **options)

    monkeypatch.setattr(running, "train", record)
    return groups


@pytest.fixture
def evaluated(monkeypatch):
    """The sizes that were evaluated together from here on."""
    calls = []

    def record(aes, *arguments):
        calls.append([ae.n_latents for ae in aes])
        return evaluate_all(aes, *arguments)

    monkeypatch.setattr(running, "evaluate_all", record)
    return calls


def stop_at(monkeypatch, n_steps):
    """From here on a signal arrives in the step of an autoencoder after so many of them."""
    original, done = Trainer.step_, []

    def step_(self, x, step):
        done.append(None)
        if len(done) == n_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, x, step)

    monkeypatch.setattr(Trainer, "step_", step_)


def assert_same_sweep(ours, theirs):
    assert (ours / POINTS).read_bytes() == (theirs / POINTS).read_bytes()
    for point in read(theirs):
        assert_same_run(ours / point.name, theirs / point.name)
        assert (ours / point.name / HELD_OUT).read_bytes() == (theirs / point.name / HELD_OUT).read_bytes()


def test_each_point_is_as_if_trained_and_evaluated_alone(swept, base, tmp_path):
    points = {point.name: point for point in read(swept)}
    assert list(points) == NAMES
    text = open_text(base)
    for variant in SQUARE.variants():
        config, alone = variant.config(base), tmp_path / variant.name
        train([config], [alone])
        assert_same_run(swept / variant.name, alone)
        metrics = evaluate(load_run(alone)[0], text.language_model, text.splits.held_out, base.data, base.eval)
        point = points[variant.name]
        assert metrics.items() <= asdict(point).items()
        assert (point.n_latents, point.k, point.seed, point.lr) == (variant.n_latents, variant.k, 0, 1e-3)
        assert point.n_parameters == 2 * 64 * variant.n_latents + variant.n_latents + 64
        assert point.flops == 2000 * (2 * variant.n_latents + 8 * variant.k) * 64
        assert (point.tokens, point.d_model, point.decoder_norm) == (2000, 64, True)


def test_the_same_command_again_does_nothing(swept, base, trained, evaluated, monkeypatch, capsys):
    monkeypatch.setattr(running, "open_source", None)
    before = contents(swept)
    assert [point.name for point in sweep(base, SQUARE, swept)] == NAMES
    assert (trained, evaluated, contents(swept)) == ([], [], before)
    assert "4 in the grid, 4 measured before, 0 to do" in capsys.readouterr().err


@pytest.mark.parametrize("n_steps", [1, 27, 65])
def test_stopped_and_continued_equals_undisturbed(swept, base, tmp_path, trained, n_steps):
    folder = tmp_path / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, n_steps)
        with pytest.raises(Interrupted, match="the same command goes on from there"):
            sweep(base, SQUARE, folder, together=2)
    first = checkpoint.steps(folder / NAMES[0])
    assert sweep(base, SQUARE, folder, together=2) == read(swept)
    assert_same_sweep(folder, swept)
    if n_steps == 27:
        assert first == [10, 14]
        assert trained == [NAMES[:2], NAMES[:2], NAMES[2:]]
    elif n_steps == 65:
        assert trained == [NAMES[:2], NAMES[2:], NAMES[2:]]


def test_a_sweep_killed_while_it_evaluates_goes_on(swept, base, tmp_path, monkeypatch, trained, evaluated):
    folder = tmp_path / "sweep"

    def fail(aes, *arguments):
        if aes[0].n_latents == 128:
            raise KeyboardInterrupt
        return evaluate_all(aes, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(running, "evaluate_all", fail)
        with pytest.raises(KeyboardInterrupt):
            sweep(base, SQUARE, folder, together=2)
    assert [point.name for point in read(folder)] == NAMES[:2]
    sweep(base, SQUARE, folder, together=2)
    assert trained == [NAMES[:2], NAMES[2:]]
    assert evaluated == [[128, 128]]
    assert_same_sweep(folder, swept)


@pytest.mark.parametrize(("phase", "number"), [("checkpoints", 40), ("checkpoints", 70), ("publishing", 10)])
def test_killed_and_continued_equals_undisturbed(swept, command, fork_server, tiny_cache, tmp_path, phase, number):
    log, cache, folder = tmp_path / "log", tiny_cache.parent, tmp_path / "run"
    grid = ["--n-latents", "64", "128", "--k", "2", "4", "--lr", "1e-3", "--together", "2"]
    status = fork_server.run([*command, *grid], log, cache, kill_at=(phase, number))
    assert status == -signal.SIGKILL, log.read_text()
    assert fork_server.run([*command, *grid], log, cache) == 0, log.read_text()
    for point in read(swept):
        assert_same_run(folder / point.name, swept / point.name)
    assert (folder / POINTS).read_bytes() == (swept / POINTS).read_bytes()


def test_a_grid_that_grows_trains_what_is_new(swept, base, tmp_path, trained):
    folder = tmp_path / "sweep"
    sweep(base, Grid(n_latents=(64,), k=(4,), lr=(1e-3,)), folder)
    sweep(base, Grid(n_latents=(64, 128), k=(2,), lr=(1e-3,)), folder)
    assert len(sweep(base, SQUARE, folder)) == 4
    assert trained == [[NAMES[1]], [NAMES[0], NAMES[2]], [NAMES[3]]]
    assert_same_sweep(folder, swept)
    assert set(json.loads((folder / SETTINGS).read_text())["variants"]) == set(NAMES)


def test_what_becomes_non_finite_is_left_behind(base, tmp_path, capsys, trained):
    grid, folder = Grid(n_latents=(64,), k=(2,), lr=(1e38, 1e-3)), tmp_path / "sweep"
    assert [point.name for point in sweep(base, grid, folder)] == NAMES[:1]
    lost = "n64-k2-lr1e+38-seed0"
    assert "no longer finite" in (folder / lost / NOT_FINITE).read_text()
    assert f"warning: {lost} was left behind" in capsys.readouterr().err
    sweep(base, grid, folder)
    assert trained == [[lost, NAMES[0]]]
    assert f"warning: {lost} was left behind" in capsys.readouterr().err
    sweep(base, replace(grid, lr=(1e38, 1e37, 1e-3)), folder)  # alone in its group
    assert (folder / "n64-k2-lr1e+37-seed0" / NOT_FINITE).exists()


def test_baselines_stand_beside_topk(base, tmp_path, trained):
    grid = Grid(
        n_latents=(96,),
        k=(4,),
        seeds=(0, 1),
        decoder_norm=("on", "off"),
        sparsity=("none", "l1", "l1_decoder_norm"),
        l1_coefficient=(0.05,),
    )
    sweep(replace(base, tokens=200), grid, tmp_path / "sweep")
    found = {point.name: point for point in read(tmp_path / "sweep")}
    names = ["n96-k4", "n96-k4-free", "n96-l1-0.05", "n96-l1_decoder_norm-0.05"]
    assert set(found) == {f"{name}-seed{seed}" for name in names for seed in (0, 1)} == set(trained[0])
    point = found["n96-l1_decoder_norm-0.05-seed1"]
    assert (point.k, point.sparsity, point.decoder_norm, point.seed) == (None, "l1_decoder_norm", False, 1)
    assert found["n96-l1-0.05-seed0"].decoder_norm
    assert not found["n96-k4-free-seed0"].decoder_norm
    assert found["n96-l1-0.05-seed0"].flops == 12 * 200 * 96 * 64
    assert found["n96-k4-seed0"].normalized_mse != found["n96-k4-seed1"].normalized_mse
    states = [checkpoint.load(tmp_path / "sweep" / name, 2).meta["position"] for name in found]
    assert all(state == states[0] for state in states)


def test_groups_fit_and_share_a_step():
    steps = {"a": [], "b": [5, 10], "c": [], "d": [10, 15], "e": [20], "f": []}
    for limit, wanted in ((2, [["b", "d"], ["e"], ["a", "c"], ["f"]]), (9, [["b", "d"], ["e"], ["a", "c", "f"]])):
        assert divide(list(steps), steps.get, lambda group, most=limit: len(group) <= most) == wanted


def test_auto_divides_by_memory(base, tmp_path, trained, monkeypatch, capsys):
    size = 4 * (5 * 2 * 64 * 128)  # a quarter more than weights, moments and average
    monkeypatch.setattr(running, "_memory", lambda device: 4 * size)
    sweep(replace(base, tokens=200), Grid(n_latents=(128,), k=(1, 2, 3, 4)), tmp_path / "sweep")
    assert [len(group) for group in trained] == [2, 2]
    assert "training waits" not in capsys.readouterr().err
    monkeypatch.setattr(running, "MUCH_WRITTEN", 0)
    sweep(replace(base, tokens=1000), Grid(n_latents=(128,), k=(1,)), tmp_path / "other")
    assert "training waits while its 2 checkpoints are written" in capsys.readouterr().err


def test_a_group_that_writes_much_says_so(base):
    advice = running._of_checkpoints(
        replace(base, tokens=1900), 3_000_000_000
    )  # 19 steps, saved each fifth and at the end
    assert advice.startswith(
        "training waits while its 4 checkpoints are written, 12.0 GB in all; a --save-every above 5 "
    )
    assert running._of_checkpoints(base, 2_000_000_000) == ""
    assert running._of_checkpoints(replace(base, save_every=20), 12_000_000_000) == ""
    assert running._of_checkpoints(replace(base, async_checkpoints=True), 12_000_000_000) == ""


def test_another_corpus_is_noticed_before_training(base, tmp_path, trained):
    corpus = make_corpus(tmp_path / "corpus.jsonl", n_documents=40)
    config = replace(base, data=replace(base.data, corpora=(corpus,)), tokens=200)
    sweep(config, Grid(n_latents=(64,), k=(2,)), tmp_path / "sweep")
    make_corpus(tmp_path / "corpus.jsonl", n_documents=50)
    with pytest.raises(TopkapiError, match="swept with other activations: held_out changed since"):
        sweep(config, Grid(n_latents=(64,), k=(3,)), tmp_path / "sweep")
    assert len(trained) == 1


@pytest.fixture
def command(base, tmp_path):
    """The arguments of `topkapi sweep` with the tiny settings, without a grid."""
    config = replace(base, model=ModelConfig(n_latents=4096, k=32))
    config = replace(config, optim=replace(config.optim, lr="auto"))
    _, recipe, _, _, *options = train_arguments(config, tmp_path)
    options = options[:-2] if options[-2:-1] == ["--run"] else options
    return ["sweep", recipe, "--out", str(tmp_path / "run"), *options]


def test_the_command_prints_a_table(command, tmp_path, capsys):
    assert main([*command, "--n-latents", "128", "64", "--k", "2", "--eval.downstream-tokens", "64"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:4] == ["point", "n_latents", "k", "l1_coefficient"]
    assert [row[0] for row in rows[1:]] == ["n64-k2-seed0", "n128-k2-seed0"]
    assert all(isinstance(point.loss_recovered, float) for point in read(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--n-latents", "8", "64", "--k", "4", "9"], ["n8-k9-seed0", "at most n_latents=8; got 9"]),
        (["--k"], ["--k needs at least one value"]),
        (["--seeds", "1", "0", "1"], ["--seeds has 1 twice"]),
        (["--lr", "1e-3", "auto", "0.001"], ["--lr has 0.001 twice"]),
        (["--lr", "0"], ["OptimConfig.lr must be", "got 0.0"]),
        (["--sparsity", "l1"], ["--l1-coefficient goes with --sparsity l1"]),
        (["--l1-coefficient", "0.1"], ["--l1-coefficient goes with --sparsity l1"]),
        (["--sparsity", "l1", "--l1-coefficient", "0"], ["n4096-l1-0.0-seed0", "--loss.l1-coefficient above 0"]),
        (["--model.k", "16"], ["--model.k: a sweep decides this; give --k"]),
        (["--together", "0"], ["--together must be auto, or at least 1; got 0"]),
        (["--decoder-norm", "maybe"], ["--decoder-norm", "maybe"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_begun(command, tmp_path, capsys, options, expected):
    assert main([*command, *options]) == 2
    line = one_line(capsys.readouterr().err)
    assert [text for text in expected if text not in line] == []
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_refused(swept, base, tmp_path):
    before = contents(swept)
    with pytest.raises(TopkapiError, match=r"another sweep \(tokens: 300 against 2000; given against saved\)"):
        sweep(replace(base, tokens=300), SQUARE, swept)
    with pytest.raises(TopkapiError, match="holds something else than a sweep"):
        sweep(base, SQUARE, swept / NAMES[0])
    assert contents(swept) == before


def test_the_reader_names_what_is_wrong(swept, tmp_path):
    with pytest.raises(TopkapiError, match="holds no sweep"):
        read(tmp_path)
    (tmp_path / SETTINGS).write_text("{}")
    assert read(tmp_path) == []
    lines = (swept / POINTS).read_text().splitlines()
    assert Point(**json.loads(lines[0])) == read(str(swept))[0]
    (tmp_path / POINTS).write_text(f"{lines[0]}\n{lines[1][:-9]}\n")
    with pytest.raises(TopkapiError, match="line 2: damaged"):
        read(tmp_path)
    for name, wrong in (("k", "2"), ("n_latents", None), ("l0", True), ("sparsity", "l7"), ("name", 3), ("kl", [1.0])):
        (tmp_path / POINTS).write_text(json.dumps(json.loads(lines[0]) | {name: wrong}))
        with pytest.raises(TopkapiError, match="line 1: damaged"):
            read(tmp_path)
    (tmp_path / POINTS).write_text(json.dumps(json.loads(lines[0]) | {"k": None, "kl": None}))
    assert (read(tmp_path)[0].k, read(tmp_path)[0].kl) == (None, None)
    (tmp_path / POINTS).write_bytes(b"\xff\n")
    with pytest.raises(TopkapiError, match="line 1: damaged"):
        read(tmp_path)
    write_json(tmp_path / SETTINGS, {"shared": {}, "identity": {}})
    with pytest.raises(TopkapiError, match=r"Sweep: .*sweep.json has no variants"):
        read_settings(tmp_path)
    write_json(tmp_path / SETTINGS, {"shared": {"tokens": 0}, "identity": {}, "variants": {}})
    with pytest.raises(TopkapiError, match=r"sweep.json: TrainConfig.tokens must be at least 1; got 0"):
        shared_config(tmp_path)


def test_flops_of_topk_and_baselines(tiny_config):
    config = replace(tiny_config, tokens=150, model=ModelConfig(n_latents=10, k=3))
    assert training_flops(config, 7) == 200 * (2 * 10 * 7 + 8 * 3 * 7)


def test_a_table_of_no_points_is_empty(capsys):
    print_table([])
    assert capsys.readouterr().out.split()[0] == "point"
