"""Streams, copies and memory of the pipeline on a CUDA device. Run: pytest -m gpu tests/data/test_pipeline_gpu.py

To be seen to fail when: a buffer is gathered into while a step still reads it; the training stream does not wait for
the gathering; a block is freed before its rows are gathered; `.item()`, `nonzero` or a mask comes into the loop.
"""

import threading
import warnings
from dataclasses import replace

import pytest
import torch

from tests.command_line import assert_same_run, metrics
from tests.data.test_batches import Numbered
from tests.test_train import train_until
from topkapi.config import LanguageModelConfig
from topkapi.data.activations import Block, CachedBlocks, LiveBlocks
from topkapi.data.batches import ShuffledBatches
from topkapi.data.language_model import LanguageModel
from topkapi.data.pipeline import BatchesAhead, open_batches
from topkapi.errors import TopkapiError
from topkapi.train import Trainer, train

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
A_WHILE = 3_000_000  # clock cycles, some 2 ms


@pytest.fixture(scope="module")
def gpu_lm(llama):
    return LanguageModel.load(LanguageModelConfig(name=str(llama), site="resid_post.0", batch_contexts=4), CUDA)


@pytest.fixture
def gpu_live(gpu_lm, splits, config):
    return LiveBlocks(gpu_lm, splits.train, config)


@pytest.mark.parametrize("source", ["live", "cache"])
@pytest.mark.parametrize("slow", ["nothing", "training", "gathering"])
@pytest.mark.parametrize("batch_tokens", [100, 1000])
def test_batches_are_those_made_one_after_another(gpu_live, tmp_path, source, slow, batch_tokens, monkeypatch):
    blocks = gpu_live if source == "live" else CachedBlocks.build(gpu_live, tmp_path)
    plain = ShuffledBatches(blocks, batch_tokens, 0)
    expected = [next(plain).cpu() for _ in range(40)]
    ahead = open_batches(blocks, batch_tokens, 0, CUDA)
    assert isinstance(ahead, BatchesAhead)
    assert torch.equal(ahead.sample(200).cpu(), plain.sample(200).cpu())
    if slow == "gathering":
        original = torch.index_select

        def index_select(*args, **named):
            torch.cuda._sleep(A_WHILE)
            return original(*args, **named)

        monkeypatch.setattr(torch, "index_select", index_select)
    found = []
    for _ in range(40):
        x = next(ahead)
        if slow == "training":
            torch.cuda._sleep(A_WHILE)
        found.append(x.clone())
    ahead.close()
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours.cpu(), theirs), f"batch {step}"


class OnDevice(Numbered):
    """Large blocks made on the device when they are read; they tell if their memory is used too early."""

    d_model = 512

    def __getitem__(self, i):
        self.reads.append(i)
        rows = torch.arange(sum(self.sizes[:i]), sum(self.sizes[: i + 1]), device=CUDA)
        x = (rows % 251).bfloat16()[:, None].expand(-1, self.d_model).contiguous()
        return Block(x, rows)


def test_memory_holds_two_blocks_and_two_batches():
    rows, batch = 65_536, 16_384
    blocks = OnDevice(*[rows] * 6)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ahead = BatchesAhead(blocks, batch, 0, CUDA)
    seen, wrong = torch.zeros(256, device=CUDA), torch.zeros((), dtype=torch.bool, device=CUDA)
    one = torch.ones(batch, device=CUDA)
    for _ in range(2 * 6 * rows // batch):
        x = next(ahead)
        torch.cuda._sleep(A_WHILE)
        wrong |= (x != x[:, :1]).any()
        seen.index_add_(0, x[:, 0].long(), one)
    ahead.close()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    assert not wrong
    assert torch.equal(seen.cpu().long(), 2 * torch.bincount(torch.arange(6 * rows) % 251, minlength=256))
    assert 2 * 64 + 2 * 16 < peak < 2 * 64 + 2 * 16 + 32, "MiB; a block has 64"


def test_an_activation_that_is_not_finite_is_told_in_the_loop(gpu_live, gpu_lm, monkeypatch):
    original = gpu_lm.activations
    passes = []

    def activations(tokens):
        passes.append(len(tokens))
        x = original(tokens)
        return x * float("nan") if len(passes) > 12 else x

    monkeypatch.setattr(gpu_lm, "activations", activations)
    ahead = BatchesAhead(gpu_live, 100, 0, CUDA)
    with pytest.raises(TopkapiError, match="not finite at resid_post"):
        [next(ahead) for _ in range(40)]
    ahead.close()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # PyTorch's own
def test_a_compiled_model_gives_the_same_bits_in_any_batch(gpu_lm, splits):
    tokens = splits.train.context_tokens(torch.arange(4), 16)
    plain = gpu_lm.activations(tokens)
    try:
        gpu_lm.compile_(16)
        assert gpu_lm._compiled, "not compiled"
        whole = gpu_lm.activations(tokens)
        torch.testing.assert_close(whole, plain, rtol=0.05, atol=0.05)
        assert torch.equal(gpu_lm.activations(tokens[:3]), whole[:3])
    finally:
        gpu_lm._compiled = []


@pytest.mark.parametrize("source", ["live", "cache"])
@pytest.mark.parametrize("precision", ["auto", "fp8", "float32"])
def test_stopped_and_resumed_equals_undisturbed(tiny_config, tmp_path, source, precision):
    config = replace(tiny_config, device="cuda", precision=precision, data=replace(tiny_config.data, source=source))
    train([config], [tmp_path / "whole"])
    for stop in (7, 13):
        train_until([config], [tmp_path / "run"], stop, resume=True)
    train([config], [tmp_path / "run"], resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    errors = [line["normalized_mse"] for line in metrics(tmp_path / "whole")]
    assert errors[-1] < errors[0]
    assert max(line["auxk"] for line in metrics(tmp_path / "whole")) > 0, "no latent died: AuxK is not covered"


def test_low_memory_state_resumes_exactly(tiny_config, tmp_path):
    config = replace(tiny_config, device="cuda", optim=replace(tiny_config.optim, state="low_memory"))
    train([config], [tmp_path / "whole"])
    train_until([config], [tmp_path / "run"], 9)
    train([config], [tmp_path / "run"], resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def quiet_config(config, source):
    """Logs and saves at the end only."""
    data = replace(config.data, source=source)
    return replace(config, device="cuda", data=data, log_every=1000, save_every=1000)


def watch(monkeypatch, mode, first, last):
    """PyTorch reports synchronisation as `mode` says from the beginning of step `first` to that of step `last`."""
    original = Trainer.step_

    def step_(self, x, done):
        if done in (first, last):
            torch.cuda.set_sync_debug_mode(mode if done == first else "default")
        original(self, x, done)

    monkeypatch.setattr(Trainer, "step_", step_)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_the_loop_never_waits_for_the_device(tiny_config, tmp_path, monkeypatch, clip_norm):
    config = quiet_config(tiny_config, "cache")
    config = replace(config, optim=replace(config.optim, clip_norm=clip_norm))
    watch(monkeypatch, "error", 8, 19)  # earlier, kernels are still compiled
    try:
        train([config], [tmp_path / "run"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_loop_never_waits_while_activations_are_computed(tiny_config, tmp_path, monkeypatch):
    """Transformers waits for the device in each forward pass; that must be in the harvest's thread."""
    threads = []

    def showwarning(message, *_args, **_named):
        if "synchronizing CUDA operation" in str(message):
            threads.append(threading.current_thread().name)

    watch(monkeypatch, "warn", 8, 19)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", showwarning)
        try:
            train([quiet_config(tiny_config, "live")], [tmp_path / "run"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert "MainThread" not in threads
