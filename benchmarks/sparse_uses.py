"""The five sparse products of a training step: Topkapi's kernels against the straightforward ones, in one run.

    python benchmarks/sparse_uses.py --out benchmarks/results/sparse-uses
    python benchmarks/sparse_uses.py --dense 8            # eight latents that are active on a third of the tokens

The uses are those of Gao et al. 2024, appendix D.2: decoder forward, decoder gradient, latent gradient, encoder
gradient and pre-bias gradient. Each is first compared with float64 arithmetic on some rows, then timed: medians of
rounds in which both ways are timed in turn, from caches swept clean. "GB" is what a use must read and write, gathered
rows each time; "of copy" is its rate over that of a large device copy. The baseline is benchmarks/openai_style.py. A
training step fuses several of the five into other kernels (`topkapi bench` times those). Without a GPU the kernels run
in Triton's interpreter on a tiny shape: a check, whose times say nothing.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

import openai_style
from torch import Tensor

from topkapi.bench.ceilings import copy_work
from topkapi.bench.report import markdown
from topkapi.bench.timing import Timing, measure
from topkapi.ops import kernels


@dataclass(frozen=True)
class Use:
    """One sparse product, both ways, and what it must read and write."""

    name: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    """In float64, of the first rows of the result."""
    n_bytes: int


@dataclass(frozen=True)
class Operands:
    """A random sparse code and what it is multiplied with."""

    values: Tensor
    indices: Tensor
    W_enc: Tensor
    W_dec: Tensor
    x: Tensor
    grad: Tensor

    @classmethod
    def random(cls, options: argparse.Namespace, device: torch.device) -> "Operands":
        """Distinct latents a token, some of them active on a third of the tokens each."""
        n, k, n_latents, d_model = options.batch_tokens, options.k, options.n_latents, options.d_model
        torch.manual_seed(0)
        stride = torch.randint(1, max(n_latents // k, 2), (n, 1), device=device)
        first = torch.randint(n_latents, (n, 1), device=device)
        indices = (first + stride * torch.arange(k, device=device)) % n_latents
        for latent in range(options.dense):  # k latents of a token stay distinct but for rare repetitions
            third = torch.rand(n, device=device) < 1 / 3
            indices[third, latent] = latent
        values = torch.rand(n, k, device=device) + 0.1

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(getattr(torch, options.dtype))

        weights = normal(n_latents, d_model), normal(n_latents, d_model)
        return cls(values, indices, *weights, normal(n, d_model), normal(n, d_model))


def uses(o: Operands) -> list[Use]:
    """The five uses; the sort that three of them need is one of its own."""
    (n, k), (n_latents, d), size = o.indices.shape, o.W_dec.shape, o.W_dec.element_size()
    latents, pairs = openai_style.sorted_pairs(o.indices)
    order = kernels.order_by_latent(o.indices, n_latents)
    gathered, code, rows, grads = n * k * d * size, 12 * n * k, n * d * size, 4 * n_latents * d
    transposed = gathered + code + grads

    def ours_transposed(rows_: Tensor) -> Callable[[], Tensor]:
        return lambda: kernels.transposed_dense_sparse_matmul(o.values, order, rows_, 0, n_latents)

    def theirs_transposed(rows_: Tensor) -> Callable[[], Tensor]:
        return lambda: openai_style.transposed_dense_sparse_matmul(o.values, latents, pairs, rows_, n_latents)

    def ours_pre_bias() -> Tensor:
        return -kernels.bias_gradients(o.values, order, o.W_enc)[1]

    return [
        Use("decoder forward", lambda: kernels.dense_sparse_matmul(o.values, o.indices, o.W_dec),
            lambda: openai_style.dense_sparse_matmul(o.values, o.indices, o.W_dec),
            lambda: exact_forward(o), gathered + code + rows),
        Use("decoder gradient", ours_transposed(o.grad), theirs_transposed(o.grad),
            lambda: exact_transposed(o, o.grad), transposed),
        Use("latent gradient", lambda: kernels.matmul_at_sparse_indices(o.grad, o.W_dec, o.indices),
            lambda: openai_style.matmul_at_sparse_indices(o.grad, o.W_dec, o.indices),
            lambda: exact_dots(o), gathered + code + rows),
        Use("encoder gradient", ours_transposed(o.x), theirs_transposed(o.x),
            lambda: exact_transposed(o, o.x), transposed),
        Use("pre-bias gradient", ours_pre_bias, lambda: openai_style.pre_bias_gradient(o.values, o.indices, o.W_enc),
            lambda: exact_pre_bias(o), code + n_latents * d * size),
        Use("sort by latent", lambda: kernels.order_by_latent(o.indices, n_latents).offsets,
            lambda: openai_style.sorted_pairs(o.indices)[0], lambda: torch.empty(0), 16 * n * k),
    ]  # fmt: skip


CHECKED = 64  # rows


def exact_forward(o: Operands) -> Tensor:
    rows = o.W_dec[o.indices[:CHECKED]].double()
    return (o.values[:CHECKED, :, None].double() * rows).sum(1)


def exact_dots(o: Operands) -> Tensor:
    return (o.grad[:CHECKED, None].double() * o.W_dec[o.indices[:CHECKED]].double()).sum(2)


def exact_transposed(o: Operands, rows: Tensor) -> Tensor:
    checked = range(min(CHECKED, len(o.W_dec)))
    weights = torch.stack([torch.where(o.indices == latent, o.values, 0).sum(1) for latent in checked])
    return weights.double() @ rows.double()


def exact_pre_bias(o: Operands) -> Tensor:
    sums = torch.zeros(len(o.W_enc), dtype=torch.float64, device=o.x.device)
    sums.index_add_(0, o.indices.flatten(), o.values.flatten().double())
    return -torch.cat([part_sums[None] @ part.double() for part_sums, part in
                       zip(sums.split(8192), o.W_enc.split(8192), strict=True)]).sum(0)  # fmt: skip


def errors(use: Use) -> tuple[float, float]:
    """Relative error of both ways: |result - exact| / |exact|."""
    exact = use.exact()
    if exact.numel() == 0:
        return 0.0, 0.0
    found = [(run()[: len(exact)].double() - exact).norm() / exact.norm() for run in (use.ours, use.theirs)]
    return float(found[0]), float(found[1])


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-latents", type=int, default=131_072 if on_cuda else 200)
    parser.add_argument("--d-model", type=int, default=768 if on_cuda else 33)
    parser.add_argument("--k", type=int, default=32 if on_cuda else 4)
    parser.add_argument("--batch-tokens", type=int, default=65_536 if on_cuda else 96)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--dense", type=int, default=0, help="latents that are active on a third of the tokens")
    parser.add_argument("--rounds", type=int, default=20 if on_cuda else 3)
    parser.add_argument("--out", type=Path, default=Path("runs/sparse-uses"), help="writes OUT.md and OUT.json")
    options = parser.parse_args()
    device = torch.device("cuda" if on_cuda else "cpu")
    copy, copy_bytes = copy_work(device)
    bandwidth = copy_bytes / measure({"copy": copy}, device, rounds=10, seconds=1)["copy"].ms * 1e3
    rows, records = [], []
    for use in uses(Operands.random(options, device)):
        wrong = errors(use)
        work = {"ours": use.ours, "theirs": use.theirs}
        found: dict[str, Timing] = measure(work, device, rounds=options.rounds, seconds=2, cold=True)
        ours, theirs = found["ours"], found["theirs"]
        shares = [use.n_bytes / t.ms * 1e3 / bandwidth for t in (ours, theirs)]
        rows.append([
            use.name, f"{ours.ms:.3f}", f"{theirs.ms:.3f}", f"{theirs.over(ours):.2f}", f"{use.n_bytes / 1e9:.3f}",
            f"{100 * shares[0]:.0f} %", f"{100 * shares[1]:.0f} %", f"{wrong[0]:.1e}", f"{wrong[1]:.1e}",
        ])  # fmt: skip
        timings = {"ours": ours.to_dict(), "baseline": theirs.to_dict()}
        records.append({"use": use.name, "bytes": use.n_bytes, "errors": wrong, **timings})
    head = ["use", "Topkapi ms", "baseline ms", "baseline / Topkapi", "GB", "of copy", "baseline's", "error",
            "baseline's error"]  # fmt: skip
    name = torch.cuda.get_device_name() if on_cuda else "Triton's interpreter: times say nothing"
    shape = {key: value for key, value in vars(options).items() if key != "out"}
    about = f"{name}; torch {torch.__version__}; copy {bandwidth / 1e12:.2f} TB/s; {shape}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = f"{about}\n\n{markdown(head, rows)}\n"
    options.out.with_suffix(".md").write_text(text)
    options.out.with_suffix(".json").write_text(
        json.dumps({"about": about, "options": shape, "uses": records}, indent=1)
    )
    print(text)


if __name__ == "__main__":
    main()
