"""Every kernel once on small shapes, to be run under NVIDIA's checkers of memory accesses and races.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python benchmarks/sanitize.py

Without PyTorch's cache of memory an access beyond a tensor leaves its allocation, and is seen. racecheck reports
kernels of cuBLAS as well (nvjet_...), which are not this project's.
"""

import torch

from topkapi import Autoencoder, ops
from topkapi.config import AuxKConfig, OptimConfig
from topkapi.dead import DeadCounter
from topkapi.model import Working
from topkapi.ops.normalise import normalise
from topkapi.optim import Optimizer
from topkapi.step import topk_step

SHAPES = ((100, 5_000, 48, 8), (33, 4_100, 272, 40), (7, 900, 21, 5), (9, 500, 2_064, 4))  # n, n_latents, d_model, k


def steps(n: int, n_latents: int, d_model: int, k: int, precision: str, state: str) -> None:
    """Two steps with dead latents, clipping and an average of the weights; a latent fires on every token."""
    torch.manual_seed(0)
    ae = Autoencoder(d_model=d_model, n_latents=n_latents, k=k).cuda()
    ae.latent_bias.data[3] = 10
    if state == "low_memory":
        for name in ("W_enc", "W_dec"):
            getattr(ae, name).data = getattr(ae, name).data.bfloat16()
    working = Working(ae, precision)
    optimizer = Optimizer(ae, OptimConfig(lr=1e-3, clip_norm=1.0, ema_decay=0.9, state=state), working)
    counter = DeadCounter(n_latents, "cuda")
    counter.silent_for[100:400] = 1_000_000
    raw = torch.randn(n, d_model, device="cuda").bfloat16()
    for _ in range(2):
        x = normalise(raw, working.W_enc.dtype)
        found = topk_step(ae, x, 1.0, counter.subset(500_000, n), AuxKConfig(auxk=64), working)
        optimizer.step_(ae, found.gradients, 1e-3)
        counter.count_(found.fired, n)


def operations(n: int, n_latents: int, d_model: int, k: int) -> None:
    """The public operations and their gradients, and rows that are redone one by one."""
    x, weight = torch.randn(n, d_model, device="cuda"), torch.randn(n_latents, d_model, device="cuda")
    bias, pre_bias = torch.zeros(n_latents, device="cuda"), torch.zeros(d_model, device="cuda")
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias, pre_bias)]
    values, indices = ops.encode_topk(*tensors, k)
    (ops.dense_sparse_matmul(values, indices, weight).sum() + values.sum()).backward()
    ops.matmul_at_sparse_indices(x, weight, indices).sum().backward()
    ops.encode_topk(torch.zeros_like(x), weight, bias, pre_bias, k)
    ops.implementation(x).recon_gradient(x.detach(), x.detach().bfloat16(), 0.1)  # which one process never calls


def main() -> None:
    for shape in SHAPES:
        for precision, state in (
            ("bf16", "float32"),
            ("fp8", "float32"),
            ("float32", "float32"),
            ("bf16", "low_memory"),
        ):
            steps(*shape, precision, state)
        operations(*shape)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
