"""The training loop: one stream of activations, one autoencoder or several beside each other.

Each autoencoder has a run folder of its own and is trained exactly as it would be alone: it shares nothing with its
neighbours but the batches. A run that is stopped, by a signal or by losing power, goes on from its last checkpoint
and ends with the same weights, bit for bit on CPU.

Several processes (`topkapi.parallel`) run this loop in step: each has its shard of every autoencoder and its replica's
rows of every batch. Rank 0 alone locks and writes the run folders and speaks; checkpoints are written by all. They stop
after the same step, whichever of them a signal reached first.

On a CUDA device the loop only hands out work: batches come from `topkapi.data.pipeline`, and nothing waits for the
device but a line of metrics and a checkpoint.
"""

import importlib.util
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from topkapi import checkpoint, published
from topkapi.config import TrainConfig, absent, cache_folder, differences, from_file, to_dict
from topkapi.console import console, progress, say
from topkapi.data.activations import CachedBlocks, LiveBlocks
from topkapi.data.batches import ShuffledBatches, part_of_batch
from topkapi.data.language_model import LanguageModel
from topkapi.data.pipeline import open_batches
from topkapi.data.tokens import Splits, require_apart, tokenize
from topkapi.dead import DeadCounter
from topkapi.errors import Interrupted, TopkapiError, command_line
from topkapi.files import lock, remove_leftovers, require_shape, sha256_json, write_text_atomic
from topkapi.launch import launched
from topkapi.loss import LossTerms, mse_scale
from topkapi.metrics import MetricsLog, NoLog, require
from topkapi.model import OF_LATENTS, PARAMETERS, Autoencoder, Working
from topkapi.ops.normalise import normalise
from topkapi.optim import Optimizer, learning_rate
from topkapi.parallel import ALONE, Mesh, device_of, open_mesh
from topkapi.results import METRICS
from topkapi.step import relu_step, topk_step

WEIGHTS = ("W_enc", "W_dec")
WITHOUT_LATENTS = "pre_bias"  # the parameter that is the same on every shard
FINGERPRINT = "language_model_fingerprint"  # in a published autoencoder's summary
META = {"tokens": int, "position": {"*": int}, "n_steps": int, "scale": float, "metrics": dict, "source": dict}
"""Of a checkpoint's manifest: what `Trainer.snapshot` puts beside the tensors."""
NOT_FINITE = "not_finite.txt"  # in the folder of a run that was left behind: why
SECOND_SIGNAL_AFTER = 2.0  # seconds: a launcher and a terminal may both pass on what was one
MOST_LOST = 0.01  # share of the k largest latents that shards may lose without a warning: ten times what is planned
SAMPLE_TOKENS = 32_768  # for the geometric median, the encoder's scale and the loss's constant


class NotFinite(TopkapiError):
    """Loss or weights of an autoencoder are no longer finite."""


@dataclass
class Text:
    """A run's language model and its tokens."""

    language_model: LanguageModel
    splits: Splits


@dataclass
class Source(Text):
    """Where a run's activations come from."""

    blocks: LiveBlocks | CachedBlocks


@dataclass(frozen=True)
class _Measured:
    """Numbers of the last step, or without one of the parameters alone."""

    metrics: dict[str, float]
    is_finite: bool


class _Last(NamedTuple):
    """What is kept of a step; not the gradients, which would fill memory."""

    terms: LossTerms
    l0: Tensor
    lost: Tensor | None


class Trainer:
    """One autoencoder in training: parameters, optimiser, dead counter, log and run folder."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        source: Source,
        sample: Float[Tensor, "n d_model"] | None,
        mesh: Mesh = ALONE,
    ) -> None:
        """Starts from a sample of raw activations; without one, `load_` must follow. The config is a resolved one."""
        self.config, self.run, self.mesh = config, run, mesh
        self.source_identity = source.blocks.identity
        model, language_model = config.model, source.language_model
        ae = Autoencoder(
            d_model=language_model.d_model,
            n_latents=model.n_latents,
            k=model.k,
            activation=model.activation,
            language_model=config.language_model.name,
            site=config.language_model.site,
            seed=model.seed,
            latents=mesh.owned(model.n_latents),
            training=to_dict(config),
        )
        if config.optim.state == "low_memory":
            for name in WEIGHTS:  # before the device holds them: float32 would not fit where this is needed
                getattr(ae, name).data = getattr(ae, name).data.bfloat16()
        self.ae = ae.to(language_model.device)
        if sample is not None:
            x = normalise(sample.to(language_model.device), torch.float32)
            self.ae.initialise_(x, model.encoder_scale, mesh)
            self.scale = mesh.on_first(lambda: mse_scale(x))
        self.working = Working(self.ae, config.precision, mesh)
        self.optimizer = Optimizer(self.ae, config.optim, self.working, mesh)
        self.dead = DeadCounter(len(self.working.latent_bias), language_model.device, mesh)
        self.latest: dict[str, float] = {}
        self.has_warned_of_loss = False
        self._last: _Last | None = None
        self._measured: _Measured | None = None

    def step_(self, x: Float[Tensor, "n d_model"], step: int) -> None:
        """Train on one batch of normalised activations."""
        config, n_tokens = self.config, len(x) * self.mesh.n_replicas
        if config.model.activation == "topk":
            subset = self.dead.subset(config.auxk.dead_after, n_tokens)
            given = (subset, config.auxk, self.working, self.mesh, config.parallel)
            found = topk_step(self.ae, x, self.scale, *given, count_lost=_is_logged(config, step + 1))
        else:
            found = relu_step(self.ae, x, self.scale, config.loss, self.working, self.mesh)
        self.optimizer.step_(self.ae, found.gradients, learning_rate(config.optim, step, config.n_steps))
        self.dead.count_(found.fired, n_tokens)
        self._last, self._measured = _Last(found.terms, found.l0, found.lost), None

    @property
    def dtype(self) -> torch.dtype:
        """What a step reads its activations in."""
        return self.working.W_enc.dtype

    def metrics(self) -> dict[str, float]:
        """The last step's numbers, under the names of metrics.jsonl; those of the checkpoint before the first step."""
        if self._last is not None:
            self.latest = self._measure().metrics
        return self.latest

    def _measure(self) -> _Measured:
        """What is known of the last step, brought from the device at once and kept until the next step."""
        if self._measured is None:
            named, sums = {}, [getattr(self.ae, name).detach().sum() for name in PARAMETERS]
            if self._last is not None:
                last = self._last
                named = {**vars(last.terms), "l0": last.l0} | ({} if last.lost is None else {"lost": last.lost})
                sums.append(last.terms.total())
            n_dead = self.dead.dead(self.config.auxk.dead_after).sum() / self.mesh.n_replicas  # which count the same
            of_all = self.mesh.ordered_sum(torch.stack([value.detach().double() for value in (n_dead, *sums)]), "all")
            found = (*named.values(), of_all[0] / self.config.model.n_latents, of_all.isfinite().all())
            *numbers, dead, finite = torch.stack([value.detach().double() for value in found]).tolist()
            named = dict(zip(named, numbers, strict=True)) | ({"dead_fraction": dead} if named else {})
            self._measured = _Measured(named, bool(finite))
        return self._measured

    def check_finite(self, step: int, saver: checkpoint.Saver) -> None:
        """Raise NotFinite before a broken state is logged as progress or saved over a good one; on all processes."""
        if not self._measure().is_finite:
            saver.wait()  # for the checkpoint that may still be on its way
            saved = checkpoint.steps(self.run)
            kept = f"the checkpoint of step {saved[-1]} is sound" if saved else "no checkpoint was written yet"
            error = NotFinite(
                f"{self.run}: loss or weights are no longer finite at step {step} (learning rate "
                f"{self.config.optim.lr:.3g}); {kept}. Train again in another --run with a lower --optim.lr or with "
                "--optim.clip-norm 1."
            )
            error.is_common = True
            raise error

    def snapshot(self, step: int, tokens: int, position: dict[str, int]) -> checkpoint.Snapshot:
        """What a checkpoint holds after this step: the tensors themselves and no copies. Call `check_finite` before."""
        meta = {"tokens": tokens, "position": position, "n_steps": self.optimizer.n_steps, "scale": self.scale}
        meta |= {"metrics": self.metrics(), "source": self.source_identity}
        return checkpoint.Snapshot(self.run, step, self._state(), meta)

    def _state(self) -> checkpoint.State:
        """The tensors of a checkpoint, themselves and no copies."""
        tensors = {name: getattr(self.ae, name).detach() for name in PARAMETERS}
        n_latents = self.config.model.n_latents
        state: dict[str, Tensor | checkpoint.Rows] = {
            name: tensor if name.split(".")[0] == WITHOUT_LATENTS else checkpoint.Rows(tensor, n_latents)
            for name, tensor in (tensors | self.optimizer.state()).items()
        }
        return state | {"silent_for": checkpoint.Rows(self.dead.silent_for, n_latents, of_shard=True)}

    @torch.no_grad()
    def load_(self, saved: checkpoint.Checkpoint) -> None:
        """Go back to a checkpoint. Raises TopkapiError if it was trained on other activations."""
        remedy = f"Delete {saved.folder}: --resume then takes the checkpoint before it."
        require_shape(saved.meta, META, saved.folder / checkpoint.MANIFEST, "checkpoint", remedy)
        theirs = saved.meta["source"]
        if changed := [name for name, value in self.source_identity.items() if theirs.get(name) != value]:
            raise TopkapiError(
                f"{self.run} was trained on other activations: {', '.join(changed)} changed since. Restore the "
                "language model and the corpus as they were, or train again with another --run."
            )
        self.working.finish(*OF_LATENTS)  # rows that travel must not change: they may come back as they were
        saved.read_into(self._state(), self.mesh)
        self.dead.silent_for.add_(0)  # so that the counter notices that it was written to
        self.working.read(self.ae)
        self.optimizer.n_steps, self.scale = saved.meta["n_steps"], saved.meta["scale"]
        self.latest, self._last, self._measured = saved.meta["metrics"], None, None

    def publish(self, tokens: int) -> None:
        """Write the finished autoencoder, with the averaged weights where there are any, to the run folder."""
        self.working.finish(*OF_LATENTS)
        self.ae.summary = {
            "tokens": tokens,
            "steps": self.optimizer.n_steps,
            FINGERPRINT: self.source_identity["language_model"],
            "last_batch": self.metrics(),
        }
        weights = {name: self._on_first(name, tensor) for name, tensor in self.optimizer.averaged(self.ae).items()}

        def write() -> None:
            write_text_atomic(self.run / published.CARD, str(self.ae.generate_model_card()))
            published.write_published(self.run, weights, self.ae.description())  # config.json last: "finished"

        self.mesh.on_first(write)

    def _on_first(self, name: str, tensor: Tensor) -> Tensor | None:
        """The whole of a parameter, as it is published, on the CPU of rank 0."""
        if name != WITHOUT_LATENTS:
            tensor = self.mesh.rows_on_first(tensor, self.config.model.n_latents)
        return None if tensor is None else tensor.cpu().float()


def train(
    configs: Sequence[TrainConfig], runs: Sequence[Path], resume: bool = False, source: Source | None = None
) -> None:
    """Train an autoencoder for each config, side by side on one stream of activations, each in its run folder.

    Configs may differ in model, loss, auxk and optim; the rest must agree. With `resume` the runs go on from the
    newest checkpoint that all of them have; where all are finished nothing is done. One that is no longer finite
    is left behind at its last checkpoint, with a line in RUN/not_finite.txt, and the others go on. A `source` that
    is open already, of one process, serves several calls.

    Raises:
        NotFinite: of one or more; the others are finished.
        TopkapiError: a run exists already (without resume), a folder has files that would be written over, a config
            differs from the one saved, bad input.
        Interrupted: SIGINT or SIGTERM came; checkpoints are written.
    """
    _check_agreement(configs, runs)
    for config in configs:
        config.resolved(1, device_type(config))  # what the device cannot do is said before a language model is loaded
    require(configs[0].loggers)
    with open_mesh(configs[0].parallel.shards, device_type(configs[0])) as mesh, ExitStack() as stack:
        mesh = mesh.apart()  # checkpoints and stopping wait as long as it takes
        if mesh.on_first(lambda: _hold(configs, runs, resume, mesh, stack)):
            say(f"{', '.join(map(str, runs))}: finished before, nothing left to do.")
            return
        stop = stack.enter_context(_signals(mesh))
        with stop.waiting():  # nothing of the runs changes while the source is opened
            source = source or open_source(configs[0], mesh)
            device = source.language_model.device
            configs = [config.resolved(source.language_model.d_model, device.type) for config in configs]
            batches = open_batches(source.blocks, configs[0].batch_tokens, configs[0].data.seed, device, mesh)
            stack.push(lambda _, error, __: _let_go(batches, error, mesh))
            saved = checkpoint.load_newest(runs, mesh) if resume else None
            sample = batches.sample(SAMPLE_TOKENS) if saved is None else None
        trainers = [Trainer(config, run, source, sample, mesh) for config, run in zip(configs, runs, strict=True)]
        step, position = _start(trainers, batches, saved)
        saver = checkpoint.Saver(configs[0].keep_checkpoints, configs[0].async_checkpoints, mesh)
        stack.push(lambda _, error, __: _let_go(saver, error, mesh))
        _loop(trainers, batches, step, position, stop, saver)
        for trainer in trainers:
            trainer.publish(configs[0].n_steps * configs[0].batch_tokens)
        if lost := [str(run) for run in runs if run not in [trainer.run for trainer in trainers]]:
            raise NotFinite(f"{', '.join(lost)} did not finish, see above; the others did.")


def _hold(configs: Sequence[TrainConfig], runs: Sequence[Path], resume: bool, mesh: Mesh, stack: ExitStack) -> bool:
    """On rank 0: refuse what cannot be, and lock the run folders for as long as the stack lasts.

    Returns whether all runs are finished already.
    """
    for config, run in zip(configs, runs, strict=True):
        _check_mesh(config, mesh)
        stack.enter_context(_locked(run))
        _check_run(config, run, resume)
    if resume and not any((run / published.CONFIG).exists() for run in runs):
        say(f"{', '.join(map(str, runs))}: nothing to resume there; starting.")
    return resume and all(map(is_finished, runs))


def _let_go(used: ShuffledBatches | checkpoint.Saver, error: BaseException | None, mesh: Mesh) -> None:
    """Close what has a thread; together with the other processes unless one of them has failed."""
    if mesh.n_ranks == 1 or error is None or getattr(error, "is_common", False):
        used.close()
    else:
        used.abandon()


def _start(
    trainers: list[Trainer], batches: ShuffledBatches, saved: list[checkpoint.Checkpoint] | None
) -> tuple[int, dict[str, int]]:
    """Write config.json, or go back to a checkpoint; the steps done and the place in the data."""
    if saved is None:
        for trainer in trainers:
            _warn_of_idle_auxk(trainer.config)
            description = trainer.ae.description()
            trainer.mesh.on_first(lambda run=trainer.run, it=description: published.write_config(run, it))
        return 0, batches.state()
    for trainer, found in zip(trainers, saved, strict=True):
        trainer.load_(found)
    batches.load_state(saved[0].meta["position"])
    say(f"resuming at step {saved[0].step} ({saved[0].meta['tokens']:,} tokens done).")
    return saved[0].step, saved[0].meta["position"]


def _loop(
    trainers: list[Trainer],
    batches: ShuffledBatches,
    step: int,
    position: dict[str, int],
    stop: "_Stop",
    saver: checkpoint.Saver,
) -> None:
    config = trainers[0].config
    logs = [_open_log(trainer, step) for trainer in trainers]
    total = config.n_steps * config.batch_tokens
    try:
        with progress("train", total, done=step * config.batch_tokens) as meter:
            started, first = time.monotonic(), step
            while step < config.n_steps:
                with stop.waiting(in_step=True):  # nothing of the state changes while data is awaited
                    raw = next(batches)
                x = {dtype: normalise(raw, dtype) for dtype in {trainer.dtype for trainer in trainers}}
                for trainer in trainers:
                    trainer.step_(x[trainer.dtype], step)
                step, position = step + 1, batches.state()
                tokens = step * config.batch_tokens
                shown = {}
                if _is_logged(config, step):
                    _drop_broken(trainers, logs, step, saver)  # waits for the device: the rate is of work done
                    rate = (step - first) * config.batch_tokens / (time.monotonic() - started)
                    shown = _log(trainers, logs, step, tokens, rate)
                meter.advance(config.batch_tokens, **shown)
                if step % config.save_every == 0 or step == config.n_steps:
                    _save(trainers, logs, step, position, saver)
                stop.check()
        saver.wait()
    except Interrupted as request:
        if step:
            _save(trainers, logs, step, position, saver)
            saver.wait()
        names = ", ".join(str(trainer.run) for trainer in trainers)
        how = (
            command_line("train", trainers[0].run, "--resume")
            if len(trainers) == 1
            else "the same command with --resume"
        )
        state = f"{names} saved at step {step} of {config.n_steps}; continue with {how}" if step else "no step was done"
        stopped = Interrupted(request.signal_number, state)
        stopped.is_common = True
        raise stopped from None
    finally:
        for log in logs:
            log.close()


def _is_logged(config: TrainConfig, step: int) -> bool:
    """Whether a line of metrics is due after so many steps."""
    return step % config.log_every == 0 or step == config.n_steps


def _open_log(trainer: Trainer, step: int) -> MetricsLog | NoLog:
    if trainer.mesh.rank > 0:
        return NoLog()
    return MetricsLog(trainer.run, trainer.config.loggers, to_dict(trainer.config), after_step=step)


def _save(
    trainers: list[Trainer],
    logs: list[MetricsLog | NoLog],
    step: int,
    position: dict[str, int],
    saver: checkpoint.Saver,
) -> None:
    """Checkpoint all runs that are not broken."""
    _drop_broken(trainers, logs, step, saver)
    for log in logs:
        log.sync()
    saver.save([trainer.snapshot(step, step * trainer.config.batch_tokens, position) for trainer in trainers])


def _warn_of_idle_auxk(config: TrainConfig) -> None:
    if config.model.activation == "topk" and config.auxk.auxk and config.auxk.dead_after >= config.tokens:
        say(
            f"warning: no latent can be dead within {config.tokens:,} tokens, as --auxk.dead-after is "
            f"{config.auxk.dead_after:,}: AuxK will do nothing. Lower it to revive latents."
        )


def _drop_broken(trainers: list[Trainer], logs: list[MetricsLog | NoLog], step: int, saver: checkpoint.Saver) -> None:
    """Take autoencoders that are no longer finite out of both lists, and say so; raises if none would be left."""
    for trainer, log in list(zip(trainers, logs, strict=True)):
        try:
            trainer.check_finite(step, saver)
        except NotFinite as error:
            line = f"{error}\n"
            trainer.mesh.on_first(lambda run=trainer.run, it=line: write_text_atomic(run / NOT_FINITE, it))
            if len(trainers) == 1:
                raise
            say(f"warning: {error} The others go on without it.")
            log.close()
            trainers.remove(trainer)
            logs.remove(log)


def _log(
    trainers: list[Trainer], logs: list[MetricsLog | NoLog], step: int, tokens: int, rate: float
) -> dict[str, float]:
    """Write a line of metrics for each autoencoder; what to show of the first."""
    for trainer, log in zip(trainers, logs, strict=True):
        lr = learning_rate(trainer.config.optim, step - 1, trainer.config.n_steps)
        log.write(step=step, tokens=tokens, **trainer.metrics(), lr=lr, tokens_per_second=round(rate, 1))
        _warn_of_loss(trainer)
    first = trainers[0].metrics()
    return {name: first[name] for name in ("normalized_mse", "l0", "dead_fraction")}


def _warn_of_loss(trainer: Trainer) -> None:
    """Say once if selection by capacity loses much more than it would with latents spread over shards at random."""
    lost = trainer.metrics().get("lost", 0.0)
    if lost > MOST_LOST and not trainer.has_warned_of_loss:
        trainer.has_warned_of_loss = True
        say(
            f"warning: {lost:.1%} of the k largest latents are lost in selection: some shards have more of them than "
            "they put forward. Raise --parallel.capacity or --parallel.candidates, or set --parallel.selection exact."
        )


def device_type(config: TrainConfig) -> str:
    """cpu or cuda, whichever a config asks for here.

    Raises:
        TopkapiError: cuda where there is none.
    """
    is_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not is_cuda:
        raise TopkapiError("--device cuda: no CUDA device here. Leave --device auto, or install a CUDA build of torch.")
    return config.device if config.device != "auto" else ("cuda" if is_cuda else "cpu")


def open_text(config: TrainConfig) -> Text:
    """Language model and tokens of a run; converts and tokenizes what is not in the cache yet."""
    device = device_of(device_type(config))
    if importlib.util.find_spec("transformers") is None:
        raise TopkapiError("language models need the package transformers: pip install 'topkapi[lm]'.")
    language_model = LanguageModel.load(config.language_model, device)
    return Text(language_model, tokenize(config.data, language_model.tokenizer, config.language_model.name))


def open_source(config: TrainConfig, mesh: Mesh = ALONE) -> Source:
    """Language model, tokens and activation blocks of a run; fills the activation cache where one is asked for.

    All processes of a mesh call it; what one can do for all of them is done by rank 0 while the others wait.
    """
    text = mesh.first_before_others(lambda: open_text(config))
    live = LiveBlocks(text.language_model, text.splits.train, config.data, mesh.apart())
    if config.data.source == "live":
        live.prepare()
        return Source(text.language_model, text.splits, live)
    folder = cache_folder() / "activations" / sha256_json(live.identity)[:16]
    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(lock(folder, lambda: say(f"waiting for another process that fills {folder} ...")))
            remove_leftovers(folder)

        mesh.on_first(hold)
        return Source(text.language_model, text.splits, CachedBlocks.build(live, folder))


def load_run(run: Path) -> tuple[Autoencoder, TrainConfig]:
    """The finished autoencoder of a run folder, and the config that made it."""
    published.require_run(run)
    ae = Autoencoder.from_pretrained(run)
    return ae, _config_of(run, ae.training_config)


def warn_if_changed(run: Path, ae: Autoencoder, language_model: LanguageModel) -> None:
    """Say so where a language model is not the one that a run was trained on; older runs do not know which it was.

    Raises:
        TopkapiError: its activations have another width.
    """
    if language_model.d_model != ae.d_model:
        raise TopkapiError(
            f"{run} explains activations of d_model={ae.d_model}, and those of {language_model.name} have "
            f"{language_model.d_model}: it is not the language model that the run was trained on. Restore that one."
        )
    if ae.summary.get(FINGERPRINT) not in (None, language_model.fingerprint):
        say(
            f"warning: {language_model.name} is not the language model that {run} was trained on: its weights or "
            "config have changed since. Results are of the one that is here now, unless you restore the other."
        )


def saved_config(run: Path) -> TrainConfig:
    """The config that a run folder was started with."""
    published.require_run(run)
    return _config_of(run, published.read_config(run).get("training"))


def _config_of(run: Path, values: dict[str, Any] | None) -> TrainConfig:
    """The config that a run's files hold; older ones may lack fields of this version."""
    if values is None:
        raise TopkapiError(f"{run} was not trained by Topkapi: its config.json holds no training settings.")
    if names := absent(TrainConfig, values):
        _say_once(
            f"{run}: saved by an older version, without {', '.join(names)}; defaults, which do as it did, are used."
        )
    return from_file(TrainConfig, values, run / published.CONFIG)


@cache  # a command reads a run's config more than once
def _say_once(text: str) -> None:
    say(text)


def is_finished(run: Path) -> bool:
    """Whether a run folder holds its trained autoencoder, whole."""
    try:
        published.read_published(run)
    except TopkapiError:
        return False
    return True


def _check_agreement(configs: Sequence[TrainConfig], runs: Sequence[Path]) -> None:
    if len({run.absolute() for run in runs}) < len(runs):
        raise TopkapiError(f"each autoencoder needs a folder of its own; got {', '.join(map(str, runs))}.")
    own = ("model", "loss", "auxk", "optim")
    first = configs[0]
    for config in configs[1:]:
        if lines := differences(replace(config, **{name: getattr(first, name) for name in own}), first):
            raise TopkapiError(
                f"autoencoders trained side by side share everything but {', '.join(own)}; these differ: "
                f"{'; '.join(lines)}."
            )


def _check_mesh(config: TrainConfig, mesh: Mesh) -> None:
    """Refuse what several processes cannot do together."""
    for rank in range(mesh.n_ranks):
        mesh.owned(config.model.n_latents, rank)
    part_of_batch(config.batch_tokens, mesh)


def _check_run(config: TrainConfig, run: Path, resume: bool) -> None:
    """Refuse to write over a run, to resume one with other settings, or to begin one of a text that is there twice."""
    exists = (run / published.CONFIG).exists()
    if exists and not resume:
        raise TopkapiError(f"{run} holds a run already. Continue it with --resume, or name another folder with --run.")
    if not exists:
        if checkpoint.steps(run):
            raise TopkapiError(f"{run} has checkpoints but no {published.CONFIG}; restore it, or name another --run.")
        if theirs := [name for name in (published.CARD, published.WEIGHTS, METRICS) if (run / name).exists()]:
            raise TopkapiError(
                f"{run} holds something else than a run, and training would write over its {', '.join(theirs)}. Name "
                "another folder with --run."
            )
        require_apart(config.data.corpora)
        return
    saved = saved_config(run)
    d_model = published.read_config(run)["autoencoder"]["d_model"]
    ours = replace(  # any mesh may go on, and checkpoints are the same however they are written
        config.resolved(d_model, device_type(config)),
        parallel=saved.parallel,
        async_checkpoints=saved.async_checkpoints,
    )
    if lines := differences(ours, saved):
        raise TopkapiError(
            f"{run} was started with other settings ({'; '.join(lines)}; given against saved). Resume it as it was: "
            f"{command_line('train', run, '--resume')}."
        )


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process, and clear away what a killed one left half-written."""

    def busy() -> None:
        raise TopkapiError(f"another process is training in {run}; wait for it, or name another --run.")

    with lock(run, busy):
        remove_leftovers(run)
        remove_leftovers(run / "checkpoints")
        yield


class _Stop:
    """Turns SIGINT and SIGTERM into `Interrupted`, at a moment when the state is whole.

    Several processes must stop after the same step, and a signal reaches each at another moment. So after each step
    they begin to exchange what they have heard, and read it after the next one, when it has long arrived.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.signal_number = 0
        self.is_waiting = False
        self._heard: Callable[[], Tensor] | None = None

    def handle(self, signal_number: int, _: FrameType | None) -> None:
        self.signal_number = signal_number
        if self.is_waiting:
            self.is_waiting = False
            raise Interrupted(signal_number)

    def check(self) -> None:
        """After a step; every process calls it."""
        number = self.signal_number
        if self.mesh.n_ranks > 1:
            before, self._heard = self._heard, self.mesh.max_later(torch.tensor(self.signal_number))
            number = int(before()) if before is not None else 0
        if number:
            raise Interrupted(number)

    @contextmanager
    def waiting(self, in_step: bool = False) -> Iterator[None]:
        """Within the block a signal raises at once, but not in a step that other processes do too."""
        if in_step and self.mesh.n_ranks > 1:
            yield
            return
        self.is_waiting = True
        try:
            if self.signal_number:
                raise Interrupted(self.signal_number)
            yield
        finally:
            self.is_waiting = False


@contextmanager
def _signals(mesh: Mesh) -> Iterator[_Stop]:
    """Handle SIGINT and SIGTERM for a while; the old handlers come back after.

    Not where one of several processes fails: its launcher sends it a SIGTERM while it finds out what to say.
    """
    stop = _Stop(mesh)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    old: dict[int, Any] = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    is_ending = False
    try:
        with _second_signal_ends() if launched() else nullcontext():
            yield stop
    except BaseException:
        is_ending = launched()
        raise
    finally:
        for number, handler in old.items() if not is_ending else ():
            signal.signal(number, handler)


@contextmanager
def _second_signal_ends() -> Iterator[None]:
    """A second signal, some time after the first, ends this process at once, wherever it is.

    Python hands signals to the main thread, which may wait in a collective for a process that will not come; the
    interpreter writes each signal's number to a socket as well, and a thread reads those.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    old = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        first = 0.0
        while data := reading.recv(1):
            if data[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            first = first or time.monotonic()
            if time.monotonic() - first > SECOND_SIGNAL_AFTER:
                if not console.quiet:
                    os.write(2, b"topkapi: stopped by a second signal; the last checkpoint is whole.\n")
                os._exit(128 + data[0])

    listener = threading.Thread(target=listen, name="topkapi-signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        writing.close()
        listener.join()
        reading.close()
