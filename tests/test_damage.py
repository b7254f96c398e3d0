"""Two hundred damaged files: each is noticed, or the checkpoint before it is used, or the content is still right.

A file of a run or of the cache is cut short or has a bit flipped; whoever reads it must give what was written or a
TopkapiError. Seen to fail when: checksums of tensors or JSON are not compared; a cached block is trusted.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from topkapi import checkpoint
from topkapi.data.activations import Block, CachedBlocks, LiveBlocks
from topkapi.data.tokens import TokenFile
from topkapi.errors import TopkapiError
from topkapi.model import PARAMETERS, Autoencoder
from topkapi.train import open_source, train

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Made:
    """A finished run, the cache it used, and what is in them."""

    run: Path
    tokens: Path
    cache: Path
    live: LiveBlocks
    blocks: list[Block]
    checkpoints: dict[int, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def made(one_thread, tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        train([tiny_config], [run])
        source = open_source(tiny_config)
        live = LiveBlocks(source.language_model, source.splits.train, tiny_config.data)
        saved = {step: checkpoint.load(run, step).read() for step in checkpoint.steps(run)}
        (tokens,) = (folder / "topkapi" / "tokens").glob("[!.]*")
        yield Made(run, tokens, source.blocks.folder, live, [live[i] for i in range(len(live))], saved)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def read_checkpoint(made, path):
    """The newest sound checkpoint has the content it had; the one before the newest is used only by saying so."""
    (found,) = checkpoint.load_newest([made.run])
    assert same(found.read(), made.checkpoints[found.step])
    return "unharmed" if found.step == max(made.checkpoints) else "fell back"


def read_cache(made, path):
    """Every block as it was computed; then the cache is built again, which mends a block."""
    try:
        _assert_blocks(made, CachedBlocks.open(made.cache, made.live.identity))
        return "unharmed"
    except TopkapiError:
        if path.name == "manifest.json":
            raise
        _assert_blocks(made, CachedBlocks.build(made.live, made.cache))
        return "mended"


def _assert_blocks(made, blocks):
    assert len(blocks) == len(made.blocks)
    for i, block in enumerate(made.blocks):
        assert torch.equal(blocks[i].x, block.x)
        assert torch.equal(blocks[i].positions, block.positions)


def read_tokens(made, path):
    found = TokenFile.open(path.parent)
    assert found.fingerprint == made.live.identity["tokens"]
    assert np.array_equal(found.tokens, made.live.token_file.tokens)
    assert np.array_equal(found.offsets, made.live.token_file.offsets)
    return "unharmed"


def read_published(made, path):
    ae = Autoencoder.from_pretrained(made.run)
    averaged = made.checkpoints[max(made.checkpoints)]
    assert torch.equal(ae.state_dict()["latent_bias"], averaged["latent_bias.ema"] / (1 - 0.9**20))
    assert ae.k == 4
    assert set(ae.state_dict()) == set(PARAMETERS)
    return "unharmed"


def targets(made):
    """(file, how it is read)."""
    newest = made.run / "checkpoints" / "step-00000020"
    blocks = sorted(made.cache.glob("block-*.safetensors"))
    return [
        *[(newest / name, read_checkpoint) for name in ("__0_0.distcp", ".metadata", "manifest.json")] * 2,
        *[(blocks[i], read_cache) for i in (0, -1)],
        (made.cache / "manifest.json", read_cache),
        *[(made.tokens / "train" / name, read_tokens) for name in ("tokens.bin", "offsets.bin", "tokens.json")],
        *[(made.run / name, read_published) for name in ("model.safetensors", "config.json")] * 2,
    ]


def damage(path, random):
    """Cut the file short, or flip one of its bits."""
    content = bytearray(path.read_bytes())
    if random.random() < 0.5:
        del content[random.integers(len(content)) :]
    else:
        content[random.integers(len(content))] ^= 1 << random.integers(8)
    path.unlink()  # a new file: the old one may be mapped into memory
    path.write_bytes(content)


def attempt(read, made, path):
    """What comes of reading a damaged file, and the message if it is refused. Any other exception fails the test."""
    try:
        return read(made, path), ""
    except TopkapiError as error:
        return "refused", str(error)


def test_two_hundred_damages_are_noticed(made, capsys):
    outcomes, files = Counter(), targets(made)
    for i in range(200):
        random = np.random.default_rng([2026, i])
        path, read = files[i % len(files)]
        original = path.read_bytes()
        damage(path, random)
        outcome, message = attempt(read, made, path)
        assert "\n" not in message
        assert outcome != "refused" or str(path) in message
        said = capsys.readouterr().err
        if outcome == "fell back":
            assert "Falling back to the checkpoint before it." in said
            aside = path.parent.with_name(f"{path.parent.name}.damaged")
            aside.rename(path.parent)
        path.unlink(missing_ok=True)
        path.write_bytes(original)
        outcomes[read.__name__, outcome] += 1
    assert outcomes.total() == 200
    assert sum(n for (_, outcome), n in outcomes.items() if outcome == "unharmed") < 10  # a final newline, say


@pytest.mark.parametrize("read", [read_checkpoint, read_cache, read_tokens, read_published])
def test_a_missing_file_is_noticed(made, read, tmp_path):
    for path, how in dict(targets(made)).items():
        if how is not read:
            continue
        path.rename(tmp_path / "moved")
        outcome, message = attempt(how, made, path)
        assert outcome in ("fell back", "mended", "refused")
        assert "\n" not in message
        aside = path.parent.with_name(f"{path.parent.name}.damaged")
        if aside.exists():
            aside.rename(path.parent)
        (tmp_path / "moved").replace(path)
