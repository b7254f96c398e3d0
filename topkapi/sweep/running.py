"""Training and evaluating the variants of a grid, in FOLDER/NAME each.

1. What FOLDER/sweep.jsonl holds is done; of the other variants those that are trained are evaluated first.
2. The rest is divided into groups that fit into memory; runs that have checkpoints go on beside those that have one of
   the same step.
3. Each group is trained side by side by `topkapi.train.train` and evaluated together at once. The language model is
   loaded once.

Nothing else is remembered: whatever was interrupted is found in the run folders.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

import topkapi
from topkapi import checkpoint
from topkapi.config import TrainConfig, differences, to_dict
from topkapi.console import say
from topkapi.data.tokens import require_apart
from topkapi.errors import Interrupted, TopkapiError
from topkapi.evaluate import evaluate_all
from topkapi.files import lock, remove_leftovers, write_json, write_text_atomic
from topkapi.metrics import require
from topkapi.model import Autoencoder
from topkapi.published import CONFIG, WEIGHTS
from topkapi.scaling.memory import total, weights_and_state
from topkapi.scaling.quantities import bytes_text, count_text
from topkapi.scaling.shapes import Job
from topkapi.sweep import POINTS, SETTINGS, Point, ordered, read, read_settings, shared_config
from topkapi.sweep.grid import Grid, Variant, shared
from topkapi.train import (
    NOT_FINITE,
    NotFinite,
    Source,
    device_type,
    is_finished,
    load_run,
    open_source,
    train,
)

MUCH_WRITTEN = 10e9  # bytes of checkpoints: some fifteen seconds of waiting, see docs/sweep.md
SHARE_OF_MEMORY = 0.5  # for weights and state; the rest is for a step, blocks of activations and the language model


def sweep(base: TrainConfig, grid: Grid, folder: Path, together: int | Literal["auto"] = "auto") -> list[Point]:
    """Train and evaluate what of the grid is not there yet; all points that the folder then has.

    `together` autoencoders are trained at a time, by default as many as have their weights and state in half of the
    device's memory. One that becomes non-finite is left behind with a line, and is not tried again.

    Raises:
        TopkapiError: a combination is impossible, the folder holds something else, bad input.
        Interrupted: SIGINT or SIGTERM came while training; checkpoints are written.
    """
    variants = {variant.name: variant for variant in grid.variants()}
    configs = {name: variant.config(base) for name, variant in variants.items()}
    for config in configs.values():
        config.resolved(1, device_type(config))  # what the device cannot do is said before anything is begun
    if together != "auto" and together < 1:
        raise TopkapiError(f"--together must be auto, or at least 1; got {together}.")
    require(base.loggers)

    def busy() -> None:
        raise TopkapiError(f"another process sweeps in {folder}; wait for it, or name another --out.")

    _require_ours(folder, base)
    with lock(folder, busy):
        remove_leftovers(folder)
        measured = {point.name for point in read(folder)} if (folder / SETTINGS).exists() else set()
        left = [name for name in variants if name not in measured and not _is_left_behind(folder / name)]
        n_before = len(measured & set(variants))
        say(f"sweep: {len(variants)} in the grid, {n_before} measured before, {len(left)} to do.")
        if left:
            source = open_source(base)
            _write_settings(folder, base, variants, source)
            _train_and_measure(folder, {name: configs[name] for name in left}, source, together)
        for name in variants:
            if _is_left_behind(folder / name):
                why = (folder / name / NOT_FINITE).read_text(encoding="utf-8").strip()
                say(f"warning: {name} was left behind: {why}")
        return read(folder)


def training_flops(config: TrainConfig, d_model: int) -> float:
    """Floating-point operations of training the autoencoder, the language model's not counted.

        TopK      tokens (2 n_latents d_model + 8 k d_model)     encoder; decoder and three gradients, which are sparse
        baselines tokens 12 n_latents d_model                    six dense products

    A multiplication and an addition count as two. AuxK, which depends on how many latents are dead, and what does not
    grow with the tokens, Adam's step, are left out.
    """
    n_tokens, model = config.n_steps * config.batch_tokens, config.model
    if model.activation == "relu":
        return 12.0 * n_tokens * model.n_latents * d_model
    return n_tokens * (2.0 * model.n_latents + 8.0 * model.k) * d_model


def divide(
    names: Sequence[str], steps: Callable[[str], list[int]], fits: Callable[[list[str]], bool]
) -> list[list[str]]:
    """Groups to train side by side: begun runs first, with those that have a checkpoint of the same step.

    Each run goes into the first group that takes it; one that fits nowhere is alone.
    """
    found: list[tuple[list[str], set[int]]] = []
    for name in sorted(names, key=lambda name: not steps(name)):
        own = set(steps(name))
        for group, common in found:
            if (own & common or not (own or common)) and fits([*group, name]):
                group.append(name)
                common &= own
                break
        else:
            found.append(([name], own))
    return [group for group, _ in found]


def print_table(points: list[Point]) -> None:
    """Print the points on stdout, sorted by n_latents and k."""
    has_downstream = any(point.ce_spliced is not None for point in points)
    downstream = ("ce_spliced", "kl", "loss_recovered") if has_downstream else ()
    columns = ("n_latents", "k", "l1_coefficient", "lr", "seed", "normalized_mse", "l0", "dead_fraction", *downstream)
    table = Table("point", *columns, "tokens", "parameters", "FLOPs", box=None)
    for point in ordered(points):
        numbers = (point.tokens, point.n_parameters, point.flops)
        cells = [_cell(name, getattr(point, name)) for name in columns]
        table.add_row(point.name, *cells, *map(count_text, numbers))
    Console(highlight=False, width=240, soft_wrap=True).print(table)


def _cell(name: str, value: float | int | None) -> str:
    if value is None:
        return "-"
    if name in ("l1_coefficient", "lr"):
        return f"{value:.3g}"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _require_ours(folder: Path, base: TrainConfig) -> None:
    """Refuse a folder that holds anything else than this sweep, or a part of it."""
    if not (folder / SETTINGS).exists():
        if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
            raise TopkapiError(f"{folder} holds something else than a sweep. Name another folder with --out.")
        require_apart(base.data.corpora)
        return
    theirs = shared_config(folder)
    if lines := differences(shared(base), theirs):
        raise TopkapiError(
            f"{folder} holds another sweep ({'; '.join(lines)}; given against saved). Give the same settings to go on "
            "with it, or name another folder with --out."
        )


def _write_settings(folder: Path, base: TrainConfig, variants: dict[str, Variant], source: Source) -> None:
    """Add these variants to sweep.json. Raises TopkapiError where language model or data have changed since."""
    identity = {**source.blocks.identity, "held_out": source.splits.held_out.fingerprint}
    before: dict[str, Any] = {"variants": {}}
    if (folder / SETTINGS).exists():
        before = read_settings(folder)
        if changed := [name for name, value in identity.items() if before["identity"].get(name) != value]:
            raise TopkapiError(
                f"{folder} was swept with other activations: {', '.join(changed)} changed since. Restore the language "
                "model and the corpus as they were, or name another --out."
            )
    values = {
        "shared": to_dict(shared(base)),
        "identity": identity,
        "variants": before["variants"] | {name: asdict(variant) for name, variant in variants.items()},
        "topkapi_version": topkapi.__version__,
    }
    if values != before:
        write_json(folder / SETTINGS, values)


def _train_and_measure(
    folder: Path, configs: dict[str, TrainConfig], source: Source, together: int | Literal["auto"]
) -> None:
    device, d_model = source.language_model.device, source.language_model.d_model
    sizes = {name: _size(config.resolved(d_model, device.type), d_model) for name, config in configs.items()}
    bound = int(_memory(device) * SHARE_OF_MEMORY)
    finished = [name for name in configs if is_finished(folder / name)]

    def fits(group: list[str]) -> bool:
        return sum(sizes[name] for name in group) <= bound if together == "auto" else len(group) <= together

    for group in divide(finished, lambda _: [], fits):
        _measure(folder, group, source)
    left = [name for name in configs if name not in finished]
    groups = divide(left, lambda name: checkpoint.steps(folder / name), fits)
    for number, group in enumerate(groups, 1):
        size = sum(sizes[name] for name in group)
        limit = f", at most {bytes_text(bound)}" if together == "auto" else ""
        say(f"group {number} of {len(groups)}: {', '.join(group)} ({bytes_text(size)} of weights and state{limit})")
        if advice := _of_checkpoints(configs[group[0]], size):
            say(advice)
        _train(folder, {name: configs[name] for name in group}, source)
        _measure(folder, [name for name in group if not _is_left_behind(folder / name)], source)


def _of_checkpoints(config: TrainConfig, size: int) -> str:
    """What the checkpoints of a group of this size in bytes cost, and what would help; "" where they cost little."""
    n = -(-config.n_steps // config.save_every)
    if config.async_checkpoints or n < 2 or n * size < MUCH_WRITTEN:
        return ""
    return (
        f"training waits while its {n} checkpoints are written, {bytes_text(n * size)} in all; a --save-every above "
        f"{config.save_every} makes fewer."
    )


def _train(folder: Path, configs: dict[str, TrainConfig], source: Source) -> None:
    """Train one group; those that become non-finite are left behind, marked as such."""
    runs = [folder / name for name in configs]
    try:
        train(list(configs.values()), runs, resume=any((run / CONFIG).exists() for run in runs), source=source)
    except NotFinite as error:
        say(f"warning: {error}")
    except Interrupted as request:
        state = f"what was done in {folder} is saved; the same command goes on from there"
        raise Interrupted(request.signal_number, state) from None


def _is_left_behind(run: Path) -> bool:
    return (run / NOT_FINITE).exists() and not (run / WEIGHTS).exists()


def _measure(folder: Path, names: list[str], source: Source) -> None:
    """Evaluate finished runs together: NAME/held_out.npz, and then a line of sweep.jsonl for each."""
    if not names:
        return
    say(f"evaluating {', '.join(names)}")
    language_model, found = source.language_model, [load_run(folder / name) for name in names]
    aes = [ae.to(language_model.device) for ae, _ in found]
    settings = found[0][1]  # data and eval are shared
    held_out = source.splits.held_out
    evaluations = evaluate_all(aes, language_model, held_out, settings.data, settings.eval)
    points = []
    for name, (ae, config), evaluation in zip(names, found, evaluations, strict=True):
        evaluation.write_latents(folder / name)
        points.append(_point(name, ae, config, evaluation.metrics))
    lines = [json.dumps(asdict(it)) + "\n" for it in ordered([*read(folder), *points])]
    write_text_atomic(folder / POINTS, "".join(lines))


def _point(name: str, ae: Autoencoder, config: TrainConfig, metrics: dict[str, float | int | None]) -> Point:
    model, is_topk = config.model, config.model.activation == "topk"
    return Point(
        name=name,
        n_latents=model.n_latents,
        k=model.k if is_topk else None,
        sparsity=config.loss.sparsity,
        l1_coefficient=config.loss.l1_coefficient,
        lr=config.optim.lr,
        decoder_norm=config.optim.unit_norm_decoder,
        seed=model.seed,
        d_model=ae.d_model,
        tokens=config.n_steps * config.batch_tokens,
        n_parameters=sum(parameter.numel() for parameter in ae.parameters()),
        flops=training_flops(config, ae.d_model),
        **metrics,
    )


def _size(config: TrainConfig, d_model: int) -> int:
    """Bytes of weights and state of a resolved config."""
    job = Job(
        n_latents=config.model.n_latents,
        d_model=d_model,
        k=config.model.k,
        batch_tokens=config.batch_tokens,
        precision=config.precision,
        state=config.optim.state,
        ema=config.optim.ema_decay > 0,
    )
    return total(weights_and_state(job, job.n_latents))


def _memory(device: torch.device) -> int:
    """Bytes free on a GPU, or of the whole machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
