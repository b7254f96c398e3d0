"""The autoencoders that a grid asks for: every combination of its values, each with a name and a config."""

from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import product
from typing import Any, Literal

from topkapi.config import LossConfig, TrainConfig
from topkapi.errors import TopkapiError

Sparsity = Literal["none", "l1", "l1_decoder_norm"]

# Settings of a config that a grid decides, and its option for each.
DECIDED = {
    "model.n_latents": "--n-latents",
    "model.k": "--k",
    "model.seed": "--seeds",
    "model.activation": "--sparsity",
    "loss.sparsity": "--sparsity",
    "loss.l1_coefficient": "--l1-coefficient",
    "optim.lr": "--lr",
    "optim.unit_norm_decoder": "--decoder-norm",
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What distinguishes an autoencoder from the others of its sweep."""

    n_latents: int
    k: int | None
    """None for the ReLU baselines."""
    sparsity: Sparsity
    l1_coefficient: float
    lr: float | Literal["auto"]
    decoder_norm: bool
    seed: int

    @property
    def name(self) -> str:
        """Such as n2048-k16-seed0, n2048-k16-lr0.001-free-seed0 or n2048-l1-0.03-seed0.

        It depends on this variant alone, so that it stays when the grid grows.
        """
        parts = [f"n{self.n_latents}"]
        parts.append(f"k{self.k}" if self.sparsity == "none" else f"{self.sparsity}-{self.l1_coefficient!r}")
        parts += [f"lr{self.lr!r}"] if self.lr != "auto" else []
        parts += ["free"] if self.sparsity == "none" and not self.decoder_norm else []
        return "-".join([*parts, f"seed{self.seed}"])

    def config(self, base: TrainConfig) -> TrainConfig:
        """`base` with this variant's settings. Raises TopkapiError, with the name, for what a config refuses."""
        is_topk = self.sparsity == "none"
        k = self.k if self.k is not None else min(base.model.k, self.n_latents)  # not read
        try:
            return replace(
                base,
                model=replace(
                    base.model,
                    n_latents=self.n_latents,
                    k=k,
                    seed=self.seed,
                    activation="topk" if is_topk else "relu",
                ),
                loss=LossConfig(sparsity=self.sparsity, l1_coefficient=self.l1_coefficient),
                optim=replace(base.optim, lr=self.lr, unit_norm_decoder=self.decoder_norm),
            )
        except TopkapiError as error:
            raise TopkapiError(f"{self.name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values to combine. TopK: n_latents x k x decoder_norm x lr x seeds; baselines: n_latents x l1_coefficient x lr x
    seeds, for each penalty among sparsity."""

    n_latents: tuple[int, ...]
    """Dictionary sizes."""

    k: tuple[int, ...]
    """Latents active per token; of TopK alone."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial decoder directions; the order of the data is the same for all."""

    lr: tuple[float | Literal["auto"], ...] = ("auto",)
    """Learning rates; auto as --optim.lr of topkapi train."""

    decoder_norm: tuple[Literal["on", "off"], ...] = ("on",)
    """Whether decoder rows are kept at unit norm; of TopK alone: l1 goes with unit norm, l1_decoder_norm without."""

    sparsity: tuple[Sparsity, ...] = ("none",)
    """none: TopK. l1, l1_decoder_norm: the ReLU baselines with that penalty."""

    l1_coefficient: tuple[float, ...] = ()
    """Weights of the penalty; of the baselines alone."""

    def __post_init__(self) -> None:
        for field in fields(self):
            option, given = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
            if not given and field.name != "l1_coefficient":
                raise TopkapiError(f"{option} needs at least one value.")
            if twice := [value for value, count in Counter(given).items() if count > 1]:
                raise TopkapiError(f"{option} has {twice[0]} twice; give each value once.")
        if (set(self.sparsity) != {"none"}) != bool(self.l1_coefficient):
            raise TopkapiError(
                "--l1-coefficient goes with --sparsity l1 or l1_decoder_norm, and they with it; got "
                f"--sparsity {' '.join(self.sparsity)} and {len(self.l1_coefficient)} coefficients."
            )

    @classmethod
    def of(cls, config: TrainConfig) -> "Grid":
        """The grid of one TopK autoencoder, that of `config`."""
        return cls(
            n_latents=(config.model.n_latents,),
            k=(config.model.k,),
            seeds=(config.model.seed,),
            lr=(config.optim.lr,),
            decoder_norm=("on" if config.optim.unit_norm_decoder else "off",),
        )

    def variants(self) -> list[Variant]:
        """Every combination."""
        found = []
        for n_latents, sparsity in product(self.n_latents, self.sparsity):
            if sparsity == "none":
                choices = [(k, 0.0, norm == "on") for k, norm in product(self.k, self.decoder_norm)]
            else:
                choices = [(None, float(weight), sparsity == "l1") for weight in self.l1_coefficient]
            found += [
                Variant(
                    n_latents=n_latents,
                    k=k,
                    sparsity=sparsity,
                    l1_coefficient=weight,
                    lr=lr,
                    decoder_norm=norm,
                    seed=seed,
                )
                for (k, weight, norm), lr, seed in product(choices, self.lr, self.seeds)
            ]
        return found


def require_undecided(config: TrainConfig, recipe: TrainConfig) -> None:
    """Raise TopkapiError where `config` has changed a setting of the recipe that a grid decides."""
    for path, option in DECIDED.items():
        ours, theirs = (reduce(getattr, path.split("."), it) for it in (config, recipe))
        if ours != theirs:
            raise TopkapiError(f"--{path.replace('_', '-')}: a sweep decides this; give {option} instead.")


def shared(config: TrainConfig) -> TrainConfig:
    """The settings that all autoencoders of a sweep have in common: those that a grid decides are set to defaults."""
    plain, values = TrainConfig(), {}
    for path in DECIDED:
        part, name = path.split(".")
        values.setdefault(part, {})[name] = reduce(getattr, path.split("."), plain)
    changed: dict[str, Any] = {part: replace(getattr(config, part), **some) for part, some in values.items()}
    return replace(config, **changed)
