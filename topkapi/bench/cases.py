"""What `topkapi bench` times: cases, and suites of them for a GPU and for a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from topkapi.errors import TopkapiError


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training step: its shape, the precision it computes in, and what makes it harder."""

    n_latents: int = 131_072
    """Dictionary size."""

    d_model: int = 768
    """Width of an activation."""

    k: int = 32
    """Active latents a token."""

    batch_tokens: int = 65_536
    """Tokens in one step."""

    precision: Literal["auto", "float32", "bf16", "fp8"] = "auto"
    """As --precision of topkapi train: auto is bf16 on cuda and float32 on cpu."""

    state: Literal["float32", "low_memory"] = "float32"
    """As --optim.state of topkapi train."""

    dead: float = 0.0
    """Share of the latents that are dead, so that AuxK has them to train."""

    dense: int = 0
    """Latents that fire on a third of all tokens each: their gradients are sums over a third of the batch."""

    def __post_init__(self) -> None:
        for name in ("n_latents", "d_model", "k", "batch_tokens"):
            if getattr(self, name) < 1:
                raise TopkapiError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}.")
        if self.k > self.n_latents:
            raise TopkapiError(f"--k must be at most --n-latents {self.n_latents}; got {self.k}.")
        if not 0 <= self.dead < 1:
            raise TopkapiError(f"--dead is a share in [0, 1); got {self.dead:g}.")
        if not 0 <= self.dense <= min(self.k, self.d_model - 1):
            raise TopkapiError(
                f"--dense must be between 0 and both k={self.k} and d_model - 1 = {self.d_model - 1}, as a token may "
                f"have all of them active, in directions of their own; got {self.dense}."
            )
        if self.dense + self.n_dead + self.k > self.n_latents:
            raise TopkapiError(f"--dead {self.dead:g} and --dense {self.dense} leave fewer than k={self.k} latents.")

    @property
    def n_dead(self) -> int:
        """Latents that are dead."""
        return int(self.dead * self.n_latents)

    @property
    def shape(self) -> str:
        """The sizes in words."""
        return f"{self.n_latents:,} latents, d_model {self.d_model:,}, k {self.k}, {self.batch_tokens:,} tokens"

    @property
    def conditions(self) -> str:
        """What is not size, in words: `bf16, 5 % dead`."""
        words = [self.precision]
        words += ["low-memory state"] if self.state == "low_memory" else []
        words += [f"{100 * self.dead:g} % dead"] if self.dead else []
        words += [f"{self.dense} dense latents"] if self.dense else []
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A case and the variants of it that are timed too, each written FIELD=VALUE and joined by commas."""

    case: Case
    variants: tuple[str, ...]


def gpu() -> Suite:
    """131 072 latents on activations as wide as GPT-2 small's, 65 536 tokens: for a GPU of 24 GB and more."""
    return Suite(
        case=Case(),
        variants=(
            "precision=bf16",
            "precision=fp8",
            "precision=bf16,dead=0.05",
            "precision=bf16,dense=8",
            "precision=bf16,n_latents=32768",
            "precision=bf16,d_model=4096,batch_tokens=16384",
        ),
    )


def cpu() -> Suite:
    """16 384 latents, 2 048 tokens: a minute or two on two cores."""
    case = Case(n_latents=16_384, d_model=576, batch_tokens=2_048)
    return Suite(case=case, variants=("precision=auto", "dead=0.05", "dense=8"))


def tiny() -> Suite:
    """1 024 latents, 256 tokens: seconds anywhere, to see that everything runs."""
    case = Case(n_latents=1_024, d_model=64, k=8, batch_tokens=256)
    return Suite(case=case, variants=("precision=auto", "dead=0.1,dense=2"))


SUITES: dict[str, Callable[[], Suite]] = {"gpu": gpu, "cpu": cpu, "tiny": tiny}
