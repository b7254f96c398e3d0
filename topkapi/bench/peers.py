"""Three other projects' TopK autoencoders behind one small interface, to be trained side by side.

| name               | package, version studied    | their object that trains                    |
| ------------------ | --------------------------- | ------------------------------------------- |
| saelens            | sae-lens 6.54.12            | SAETrainer.step on a TopKTrainingSAE        |
| sparsify           | eai-sparsify 1.3.3          | Trainer's coder and optimiser; loop in step |
| sparsify-adam      | eai-sparsify 1.3.3          | the same with its optimizer="adam"          |
| dictionarylearning | dictionary-learning 0.1.0   | TopKTrainer.update                          |

Each adapter builds the project's own objects from the project's own defaults, changing only what
`PeerConfig` gives, and `settings` says what resulted. Activations go in as they come from the
language model; whatever scaling the project applies happens inside, and is undone by `reconstruct`.
Logging, checkpoints and evaluation are left out for all of them: they are not the training step.
Checked on CPU against their own entry points (SAETrainer.fit, trainSAE, Trainer.fit) given the same
batches, seed and options, AuxK in play: after 120 steps the weights were the same bit for bit, and
for sparsify's schedule-free average to 4e-9.

Two choices are ours, for all of them, and both help them:

1. `normalize` is on: sae-lens and dictionary-learning leave it off in their signatures and turn it
   on in their published examples, because their learning rates assume it.
2. Where their default is a warm-up of 1,000 steps it is at most a tenth of the run, so that a short
   run is not spent warming up (dictionary-learning refuses a warm-up as long as the run).

Called by `topkapi bench --peers` and by the benchmark of quality:

    peers = make_peers(["saelens", "sparsify"], PeerConfig(d_model=576, ..., sample=x))
"""

import importlib
import importlib.util
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from topkapi.console import say
from topkapi.errors import TopkapiError

# Imported by the peers' modules, used by none of their training steps: streaming text, logging to
# a web site, and hooking a language model.
UNUSED = (
    "datasets",
    "datasets.arrow_dataset",
    "datasets.fingerprint",
    "datasets.load",
    "nnsight",
    "wandb",
)
QUIET = 0.1  # of a latent's usual pre-activation: never among the k largest, and positive half of the time


@dataclass(frozen=True, kw_only=True, eq=False)
class PeerConfig:
    """What every peer is told. None means that project's documented default, throughout."""

    d_model: int
    n_latents: int
    k: int
    device: torch.device

    total_steps: int
    """Steps of the whole run; schedules that end read it."""

    batch_tokens: int
    """Rows of every x given to `step`."""

    sample: Tensor
    """Activations, (rows, d_model), from which sae-lens and dictionary-learning take their scale.
    They read 1,000 and 101 batches when left alone; here they read this."""

    lr: float | None = None
    """Peak of the project's own schedule. sae-lens: constant. dictionary-learning: warm-up, then
    constant. sparsify: constant (schedule-free). sparsify-adam: warm-up, then linear to zero."""

    auxk_coefficient: float | None = None
    """Weight of the project's AuxK loss, whose scales differ. Defaults: sae-lens 1 (unnormalised),
    dictionary-learning 1/32 (over the residual's variance), sparsify 0, off (over x's variance)."""

    dead_after_tokens: int | None = None
    """Tokens of silence after which a latent is dead. Defaults: sae-lens 1,000 steps of any size,
    the others 10,000,000."""

    normalize: bool = True
    """Use the project's option that divides activations by one number measured beforehand."""

    bf16: bool = True
    """Use the project's bfloat16 autocast option on CUDA; it has no effect on CPU. Off by default
    in sae-lens and dictionary-learning. sparsify's forward autocasts on CUDA whatever this says."""

    seed: int = 0

    @property
    def autocast(self) -> bool:
        """Whether `bf16` has an effect."""
        return self.bf16 and self.device.type == "cuda"

    @property
    def warmup_steps(self) -> int:
        """The two projects' default warm-up of 1,000 steps, at most a tenth of the run."""
        return min(1000, self.total_steps // 10)

    def batches(self) -> list[Tensor]:
        """The sample as the projects expect data: batches of the training size."""
        return list(self.sample.to(self.device, torch.float32).split(self.batch_tokens))


class Peer(ABC):
    """One autoencoder in training, by another project's code."""

    name: ClassVar[str]
    package: ClassVar[str]  # on PyPI
    studied: ClassVar[str]  # version whose source the adapter was written against
    settings: dict[str, Any]  # what it trains with, for the record

    @abstractmethod
    def __init__(self, config: PeerConfig) -> None:
        """Build their objects. ImportError if their package is missing."""

    @abstractmethod
    def step(self, x: Tensor) -> None:
        """Take one whole training step on raw activations `x`, (batch_tokens, d_model) float32.

        Forward, AuxK, backward, gradient projection or clipping, optimiser, schedule, decoder norm
        and dead counters, whichever of these the project has.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices, (n, k), by their inference path, for raw `x`.

        sae-lens gives dense latents, whose k largest are then taken here: do not time this.
        """

    @abstractmethod
    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruction of raw `x`, on the scale of `x`, by their inference path."""

    @abstractmethod
    def decoder(self) -> Tensor:
        """Decoder rows, (n_latents, d_model), as their inference path has them."""

    @abstractmethod
    def dead(self) -> Tensor:
        """Mask, (n_latents,), of the latents that their trainer counts as dead now."""

    @abstractmethod
    def silence(self, latents: Tensor) -> None:
        """Make these latents dead, to time a step that has dead latents.

        Scales their encoder rows by QUIET and sets their counters beyond the limit. AuxK still finds
        positive pre-activations among them, as it does in real runs. They stay dead as long as the
        learning rate is so small that nothing changes.
        """

    @property
    def version(self) -> str:
        return version(self.package)


def make_peers(names: Sequence[str], config: PeerConfig) -> list[Peer]:
    """The peers called `names` (keys of PEERS) whose packages are here, ready to train.

    A missing package gives one line saying how to install it, and its peer is left out.
    """
    unknown = sorted(set(names) - set(PEERS))
    if unknown:
        raise TopkapiError(f"no peer is called {', '.join(unknown)}; there are {', '.join(PEERS)}.")
    peers = []
    for name in names:
        kind = PEERS[name]
        try:
            peer = kind(config)
        except ImportError as error:
            say(f"{name} is left out ({error}): pip install {kind.package}=={kind.studied}")
            continue
        if peer.version != kind.studied:
            say(f"{name}: the adapter was written for {kind.studied}, this is {peer.version}")
        peers.append(peer)
    return peers


class SaeLens(Peer):
    """SAELens: SAETrainer.step, which calls TopKTrainingSAE.training_forward_pass.

    Defaults kept (sae_lens/config.py SAETrainerConfig; sae_lens/saes/topk_sae.py and sae.py):
    Adam(0.9, 0.999), lr 3e-4, lr_scheduler_name="constant", no warm-up, no decay; gradient norm
    clipped at 1; loss = squared error summed over d_model + aux_loss_coefficient 1 x unnormalised
    AuxK with d_model // 2 dead latents, scaled down if fewer are dead; a latent is dead after
    dead_feature_window = 1,000 steps without firing; decoder rows start at norm
    decoder_init_norm = 0.1 and are never renormalised, since rescale_acts_by_decoder_norm=True
    selects and decodes as though they were unit; encoder = decoder transposed; b_dec = 0, with
    apply_b_dec_to_input=True. `normalize` is normalize_activations="expected_average_only_in"
    (default "none"): mean norm of the input becomes sqrt(d_model). `bf16` is autocast.
    use_sparse_activations stays False, compile_sae too.

    Left out of SAETrainer.fit: resetting the sparsity statistics it logs, every 2,000 steps.
    """

    name = "saelens"
    package = "sae-lens"
    studied = "6.54.12"

    def __init__(self, config: PeerConfig) -> None:
        with import_without(*UNUSED):
            settings = importlib.import_module("sae_lens.config")
            training = importlib.import_module("sae_lens.training.sae_trainer")
            topk = importlib.import_module("sae_lens.saes.topk_sae")
        self.k, device = config.k, str(config.device)
        sae = topk.TopKTrainingSAEConfig(
            d_in=config.d_model,
            d_sae=config.n_latents,
            k=config.k,
            device=device,
            normalize_activations="expected_average_only_in" if config.normalize else "none",
            **_given(aux_loss_coefficient=config.auxk_coefficient),
        )
        window = config.dead_after_tokens and math.ceil(config.dead_after_tokens / config.batch_tokens)
        trainer = settings.SAETrainerConfig(
            total_training_samples=config.total_steps * config.batch_tokens,
            train_batch_size_samples=config.batch_tokens,
            device=device,
            autocast=config.autocast,
            **_given(lr=config.lr, dead_feature_window=window),
        )
        trainer.lr_end = trainer.lr / 10  # as their LanguageModelSAERunnerConfig fills it in
        with _seeded(config), _silently():
            self.sae = topk.TopKTrainingSAE(sae).to(config.device)
            self.trainer = training.SAETrainer(trainer, self.sae, iter(()))
            if config.normalize:
                batches = config.batches()
                self.trainer.activation_scaler.estimate_scaling_factor(config.d_model, iter(batches), len(batches))
        self.settings = {
            "lr": trainer.lr,
            "schedule": "constant",
            "optimizer": "Adam",
            "auxk_coefficient": sae.aux_loss_coefficient,
            "dead_after_steps": trainer.dead_feature_window,
            "input_scale": self.trainer.activation_scaler.scaling_factor,
            "autocast": trainer.autocast,
        }

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = self.sae.encode(self.trainer.activation_scaler(x)).topk(self.k)
        return values, indices

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        scaler = self.trainer.activation_scaler
        return scaler.unscale(self.sae.decode(self.sae.encode(scaler(x))))

    def decoder(self) -> Tensor:
        return self.sae.W_dec.detach()

    def dead(self) -> Tensor:
        return self.trainer.dead_neurons

    def silence(self, latents: Tensor) -> None:
        self.sae.W_enc.data[:, latents] *= QUIET
        window = self.trainer.cfg.dead_feature_window
        self.trainer.n_forward_passes_since_fired[latents] = window + 1


class DictionaryLearning(Peer):
    """dictionary_learning: TopKTrainer.update, called as training.trainSAE calls it.

    Defaults kept (dictionary_learning/trainers/top_k.py): Adam(0.9, 0.999),
    lr = 2e-4 / sqrt(n_latents / 2^14), linear warm-up of warmup_steps = 1,000 (shortened here, see
    the module), then constant (decay_start=None); gradient component parallel to the decoder
    columns removed, then gradient norm clipped at 1; decoder columns unit after every step; loss =
    squared error summed over d_model + auxk_alpha 1/32 x AuxK over the variance of the residual,
    with d_model // 2 dead latents; dead_feature_threshold = 10,000,000 tokens (an index that fills
    up the top k with a zero counts as fired); encoder = decoder transposed; b_dec = geometric
    median of the first batch. `normalize` is trainSAE's normalize_activations (default False):
    mean squared norm of the input becomes 1. `bf16` is trainSAE's autocast_dtype (default float32),
    which also casts the batch. The inference threshold they track from step 1,000 is not used:
    their encode uses it only if asked.

    Part of their update: loss.item() at each step, which waits for the device.
    """

    name = "dictionarylearning"
    package = "dictionary-learning"
    studied = "0.1.0"

    def __init__(self, config: PeerConfig) -> None:
        with import_without(*UNUSED):
            top_k = importlib.import_module("dictionary_learning.trainers.top_k")
            training = importlib.import_module("dictionary_learning.training")
        self.n_steps = 0
        self.autocast = config.autocast
        self.dtype = torch.bfloat16 if config.autocast else torch.float32
        with _seeded(config), _silently():
            self.trainer = top_k.TopKTrainer(
                steps=config.total_steps,
                activation_dim=config.d_model,
                dict_size=config.n_latents,
                k=config.k,
                layer=0,  # the layer and the model's name are recorded, not used
                lm_name="",
                lr=config.lr,
                warmup_steps=config.warmup_steps,
                seed=config.seed,
                device=str(config.device),
                **_given(auxk_alpha=config.auxk_coefficient),
            )
            batches = config.batches()
            self.norm_factor = training.get_norm_factor(batches, steps=100) if config.normalize else 1.0
        if config.dead_after_tokens is not None:
            self.trainer.dead_feature_threshold = config.dead_after_tokens
        self.settings = {
            "lr": self.trainer.lr,
            "schedule": f"{config.warmup_steps} steps of warm-up, then constant",
            "optimizer": "Adam",
            "auxk_coefficient": self.trainer.auxk_alpha,
            "dead_after_tokens": self.trainer.dead_feature_threshold,
            "input_scale": 1 / self.norm_factor,
            "autocast": config.autocast,
        }

    def step(self, x: Tensor) -> None:
        x = x.to(self.dtype) / self.norm_factor
        with torch.autocast("cuda", self.dtype) if self.autocast else nullcontext():
            self.trainer.update(self.n_steps, x)
        self.n_steps += 1

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Their final scale_biases(norm_factor) does to the biases what these two factors do to x.
        _, values, indices, _ = self.trainer.ae.encode(x / self.norm_factor, return_topk=True)
        return values * self.norm_factor, indices

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x / self.norm_factor) * self.norm_factor

    def decoder(self) -> Tensor:
        return self.trainer.ae.decoder.weight.detach().T

    def dead(self) -> Tensor:
        return self.trainer.num_tokens_since_fired >= self.trainer.dead_feature_threshold

    def silence(self, latents: Tensor) -> None:
        self.trainer.ae.encoder.weight.data[latents] *= QUIET
        self.trainer.num_tokens_since_fired[latents] = self.trainer.dead_feature_threshold + 1


class Sparsify(Peer):
    """EleutherAI sparsify: its Trainer's SparseCoder, optimiser and schedule; the loop is here.

    Trainer.fit trains inside a hook on a Hugging Face model, so Trainer is built on a stand-in of
    one identity layer, and `step` calls its parts in the order of fit (sparsify/trainer.py) for
    loss_fn="fvu", grad_acc_steps = micro_acc_steps = 1, no multi_topk and no k decay: b_dec = mean
    of the first batch, once; decoder rows made unit; SparseCoder.forward; backward of
    fvu + auxk_alpha x auxk_loss; parallel gradient removed; optimiser; schedule; counters.

    Defaults kept (sparsify/config.py TrainConfig): optimizer="signum", which is
    ScheduleFreeWrapper(SignSGD, momentum=0.95) with constant lr = 5e-3 / sqrt(n_latents / 2^14);
    auxk_alpha = 0, AuxK off; if on, over x's variance, with d_model // 2 dead latents, scaled down
    if fewer are dead; dead_feature_threshold = 10,000,000 tokens (an index that fills up the top k
    with a zero counts as fired); no clipping; no input scaling (the loss is relative to the
    variance, and `normalize` has no effect). float32 matmuls have precision "high" during a step;
    fit sets that for the process. Forward in bfloat16 on CUDA whenever the device supports it.

    Inference uses the schedule-free average, as their checkpoints do (optimizer.eval()). Decoder
    rows are made unit before a step, not after, so there they are only nearly unit.
    Left out of fit: copying activations for the tokens not excluded, and reading the loss back to
    the host at each step for the log.
    """

    name = "sparsify"
    package = "eai-sparsify"
    studied = "1.3.3"
    optimizer: ClassVar[str] = "signum"

    def __init__(self, config: PeerConfig) -> None:
        with import_without(*UNUSED), _silently():
            sparsify = importlib.import_module("sparsify")
            coder = importlib.import_module("sparsify.sparse_coder")
            utils = importlib.import_module("sparsify.utils")
        # With Triton installed they decode with it on any device; on CPU that cannot run.
        on_cpu = config.device.type == "cpu"
        coder.decoder_impl = utils.eager_decode if on_cpu else utils.decoder_impl
        self.config = sparsify.TrainConfig(
            sparsify.SparseCoderConfig(num_latents=config.n_latents, k=config.k),
            batch_size=1,
            optimizer=self.optimizer,
            lr=config.lr,
            lr_warmup_steps=config.warmup_steps,
            hookpoints=["site"],
            init_seeds=[config.seed],
            log_to_wandb=False,
            **_given(
                auxk_alpha=config.auxk_coefficient,
                dead_feature_threshold=config.dead_after_tokens,
            ),
        )
        model = _IdentityModel(config.d_model, config.device)
        with _seeded(config), _silently():
            self.trainer = sparsify.Trainer(self.config, range(config.total_steps), model)
        self.coder = self.trainer.saes["site"]
        self.silent_for = self.trainer.num_tokens_since_fired["site"]
        group = self.trainer.optimizers[0].param_groups[0]
        warmup = f"{config.warmup_steps} steps of warm-up, then linear to 0"
        self.settings = {
            "lr": group.get("initial_lr", group["lr"]),  # a schedule keeps the peak apart
            "schedule": warmup if self.trainer.lr_schedulers else "constant, schedule-free average",
            "optimizer": self.optimizer,
            "auxk_coefficient": self.config.auxk_alpha,
            "dead_after_tokens": self.config.dead_feature_threshold,
            "input_scale": None,
            "autocast": not on_cpu,
        }

    def step(self, x: Tensor) -> None:
        coder, trainer = self.coder, self.trainer
        if trainer.global_step == 0:
            coder.b_dec.data = x.mean(0)
        with _matmul_precision("high"):
            coder.set_decoder_norm_to_unit_norm()
            out = coder(
                x,
                dead_mask=self.dead() if self.config.auxk_alpha > 0 else None,
                total_variance=(x - x.mean(0)).pow(2).sum(),
            )
            (out.fvu + self.config.auxk_alpha * out.auxk_loss).backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            for optimizer in trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for schedule in trainer.lr_schedulers:
                schedule.step()
        fired = torch.zeros_like(self.silent_for, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        self.silent_for += len(x)
        self.silent_for[fired] = 0
        trainer.global_step += 1

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self._averaged():
            values, indices, _ = self.coder.encode(x)
        return values, indices

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        with self._averaged():
            values, indices, _ = self.coder.encode(x)
            return self.coder.decode(values, indices)

    def decoder(self) -> Tensor:
        with self._averaged():
            return self.coder.W_dec.detach().clone()

    def dead(self) -> Tensor:
        return self.silent_for > self.config.dead_feature_threshold

    def silence(self, latents: Tensor) -> None:
        self.coder.encoder.weight.data[latents] *= QUIET
        self.silent_for[latents] = self.config.dead_feature_threshold + 1

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Swap in the weights that their checkpoints hold, and back: exact to rounding."""
        averaging = [o for o in self.trainer.optimizers if not isinstance(o, torch.optim.Optimizer)]
        for optimizer in averaging:
            optimizer.eval()
        yield
        for optimizer in averaging:
            optimizer.train()


class SparsifyAdam(Sparsify):
    """The same with optimizer="adam", nearest to the paper's.

    Adam(0.9, 0.999), lr = 2e-4 / sqrt(n_latents / 2^14), linear warm-up of lr_warmup_steps = 1,000
    (shortened here, see the module), then linear decay to zero at the end of the run. Their Trainer
    takes bitsandbytes' 8-bit Adam if that is installed, and torch's otherwise.
    """

    name = "sparsify-adam"
    optimizer = "adam"


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (SaeLens, Sparsify, SparsifyAdam, DictionaryLearning)}


@contextmanager
def import_without(*names: str) -> Iterator[None]:
    """While imports run, give an empty module for each of these that is not installed.

    The peers' packages import large things that a training step never touches (UNUSED). Where one
    is installed it is imported as usual. Where it is missing, the module given instead has a class
    under any name, which raises ImportError once it is used; and code that asks whether it is
    installed is still told that it is not. Afterwards no trace is left in sys.modules.
    """
    find_spec = importlib.util.find_spec
    missing = [n for n in names if find_spec(n.partition(".")[0]) is None]
    sys.modules.update({name: _EmptyModule(name) for name in missing})
    importlib.util.find_spec = lambda name, package=None: None if name in missing else find_spec(name, package)
    try:
        yield
    finally:
        importlib.util.find_spec = find_spec
        for name in missing:
            del sys.modules[name]


class _EmptyModule(ModuleType):
    """Stands in for a module that is imported but not used."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        missing = f"{self.__name__}.{name}"

        def refuse(*_: object, **__: object) -> NoReturn:
            raise ImportError(f"{missing} is needed after all, and not installed")

        return type(name, (), {"__init__": refuse})


class _IdentityModel(nn.Module):
    """What sparsify's Trainer reads of a language model: one hook point, d_model wide."""

    def __init__(self, d_model: int, device: torch.device) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.device = device
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"x": torch.zeros(1, d_model)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None, so that the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _seeded(config: PeerConfig) -> Iterator[None]:
    """Fix torch's random state inside, and leave it outside as it was."""
    with torch.random.fork_rng([config.device] if config.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        yield


@contextmanager
def _silently() -> Iterator[None]:
    """Swallow what the peers print while they are built."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
