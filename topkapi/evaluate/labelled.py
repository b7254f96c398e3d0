"""Probe loss of an autoencoder on the labelled tasks of installed packages, beside that of single channels.

1. Tasks are read (`topkapi.evaluate.tasks`); those whose package is missing are left out, by name.
2. Of each source of texts, which several tasks may share, some are drawn at random, the classes in their shares.
3. The language model reads each text from its beginning, up to one context of it; positions that training leaves out
   are left out. Each latent's largest value over a text is its activation on it.
4. `probe_task` fits on one half of the texts and tests on the other, for latents and for channels.

The ridge is 1 / n_train, that of a unit normal prior of the standardised weight: with a few hundred texts the best of
4 096 latents is otherwise sure of itself and wrong. Measured on 400 text messages (SmolLM2's layer 10): test loss 0.67
nats with a ridge of 1e-6, 0.09 with 1 / n_train, 0.39 for the classes' shares; it makes no difference to movie reviews,
whose best latents fire on many texts.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from topkapi.config import DataConfig
from topkapi.console import progress
from topkapi.data.activations import kept_positions
from topkapi.data.language_model import LanguageModel
from topkapi.errors import TopkapiError
from topkapi.evaluate.control import channels
from topkapi.evaluate.probes import ProbeLoss, TaskProbe, encode_examples, probe_loss, probe_task
from topkapi.evaluate.tasks import TASKS, Task, task
from topkapi.model import Autoencoder

FEWEST = 20  # texts of each class, where there are so many


@dataclass(frozen=True)
class TaskProbes:
    """Probes of all tasks that could be read."""

    probes: dict[str, TaskProbe]
    """Of the latents."""
    latents: ProbeLoss
    channels: ProbeLoss
    left_out: dict[str, str]
    """Tasks that could not be measured, and why."""


def probe_tasks(ae: Autoencoder, lm: LanguageModel, config: DataConfig, n_texts: int, seed: int = 0) -> TaskProbes:
    """Probe losses, from `n_texts` texts of each source. Cost: a pass up to the site over them, encoding, and probes.

    Raises:
        TopkapiError: no task can be measured.
    """
    tasks, left_out = _installed(TASKS)
    of_latents: dict[str, TaskProbe] = {}
    of_channels: dict[str, TaskProbe] = {}
    sources: dict[str, str] = {}
    control = channels(ae.d_model, ae.W_dec.device)
    for group in _sources(tasks):
        texts = tasks[group[0]].texts
        labels = torch.stack([tasks[name].labels for name in group], 1)
        drawn = _draw(labels, n_texts, seed)
        try:
            order, blocks = _activations(ae, lm, [texts[i] for i in drawn], config, group)
            codes = [encode_examples(of, blocks, len(drawn)) for of in (ae, control)]
        except TopkapiError as error:
            left_out |= dict.fromkeys(group, str(error))
            continue
        for name, of_task in zip(group, labels[drawn[order]].T, strict=True):
            try:
                found, baseline = (
                    probe_task(code, of_task.contiguous(), seed=seed, ridge=2 / len(drawn)) for code in codes
                )
            except TopkapiError as error:
                left_out[name] = str(error)
                continue
            of_latents[name], of_channels[name], sources[name] = found, baseline, group[0]
    if not of_latents:
        raise TopkapiError(f"no labelled texts: {'; '.join(dict.fromkeys(left_out.values()))}.")
    latents, baselines = (probe_loss(of, sources, seed) for of in (of_latents, of_channels))
    return TaskProbes(of_latents, latents, baselines, left_out)


def _installed(names: Iterable[str]) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks that can be read, and why the others cannot."""
    found, left_out = {}, {}
    for name in names:
        try:
            found[name] = task(name)
        except TopkapiError as error:
            left_out[name] = str(error)
    return found, left_out


def has_changed(found: Mapping[str, Any]) -> bool:
    """Whether a task that a section of eval.json left out can be read now, or cannot for another reason."""
    _, left_out = _installed(found.get("left_out", {}))
    return left_out != found.get("left_out", {})


def _sources(tasks: dict[str, Task]) -> list[list[str]]:
    """Names of tasks, those of the same texts together."""
    groups: list[list[str]] = []
    for name, it in tasks.items():
        if groups and tasks[groups[-1][0]].texts == it.texts:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _draw(labels: Int[Tensor, "texts tasks"] | Tensor, n_texts: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Numbers of texts drawn from each class in its share, but at least FEWEST of it where there are so many."""
    _, classes = labels.unique(dim=0, return_inverse=True)
    rng, share = np.random.default_rng(seed), min(1.0, n_texts / len(labels))
    drawn = []
    for number in range(int(classes.max()) + 1):
        members = np.flatnonzero(classes.numpy() == number)
        drawn.append(rng.permutation(members)[: max(FEWEST, round(share * len(members)))])
    return np.concatenate(drawn)


def _activations(
    ae: Autoencoder, lm: LanguageModel, texts: list[str], config: DataConfig, group: list[str]
) -> tuple[Int64[np.ndarray, " n"], list[tuple[Tensor, Tensor]]]:
    """The texts' order by length, and their normalised activations with the number in it of the text of each row."""
    encoded = [lm.tokenizer.encode(text, add_special_tokens=False)[: config.context] for text in texts]
    order = np.argsort([len(ids) for ids in encoded], kind="stable")
    ids = [encoded[i] for i in order]
    with progress(f"texts of {group[0]}", len(ids), unit="texts") as meter:
        blocks = list(_blocks(ae, lm, ids, config, meter.advance))
    if not sum(len(x) for x, _ in blocks):
        raise TopkapiError(f"no token of the {len(texts)} texts of {group[0]} is kept: they are one token long.")
    return order, blocks


def _blocks(
    ae: Autoencoder, lm: LanguageModel, texts: list[list[int]], config: DataConfig, advance: object
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(texts), lm.batch_contexts):
        batch = texts[start : start + lm.batch_contexts]
        longest = max(1, *map(len, batch)) if batch else 1
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])  # causal: what follows is not seen
        lengths = torch.tensor([len(ids) for ids in batch])
        keep = kept_positions(tokens, config, lm.special_ids) & (torch.arange(longest) < lengths[:, None])
        raw = lm.activations(tokens)
        rows = raw[keep.to(raw.device)].to(ae.W_dec.device, torch.float32)
        yield ae.normalise(rows).x, start + keep.nonzero()[:, 0]
        advance(len(batch))
