"""A plan in words and tables."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from topkapi.scaling.memory import total
from topkapi.scaling.planner import Plan, plan
from topkapi.scaling.quantities import GIB, bytes_text, count_text, ms_text, share_text
from topkapi.scaling.step_time import AUXK, ENCODE, LONGEST_ROW, UPDATE, Part, takes_kernels

SHOWN = 8  # other meshes
WORTH_SAYING = 1.03  # times as fast

# What a part counts as, where parts are few: in words, and in the picture.
GROUPS = {ENCODE: "encoder", UPDATE: "weight gradients, Adam", AUXK: "AuxK"}
SPARSE, SHARDS, REPLICAS, ALL = "other GPU work", "between shards", "between replicas", "between all"
ORDER = ("encoder", SPARSE, "AuxK", "weight gradients, Adam", SHARDS, REPLICAS, ALL)


def group_of(part: Part) -> str:
    """What a part counts as: one of ORDER."""
    if part.volume is None:
        return GROUPS.get(part.name, SPARSE)
    return {"shards": SHARDS, "replicas": REPLICAS, "all": ALL}[part.volume.group]


def grouped(found: Plan) -> dict[str, float]:
    """Seconds that each group adds to the step."""
    sums = dict.fromkeys(ORDER, 0.0)
    for part in found.step.parts:
        sums[group_of(part)] += part.exposed
    return sums


def text(found: Sequence[Plan]) -> str:
    """The best plan whole, the next in a table."""
    best = found[0]
    sections = [_headline(best), _flags(best), _time_table(best), _memory_table(best)]
    sections += [_selection(best), "What limits it\n" + "\n".join(f"  {line}" for line in limits(best))]
    if len(found) > 1:
        sections.append(_others(found))
    sections.append(
        f"GPU: {best.gpu.name}, {best.gpu.source}.\n"
        "A model, not a measurement, of the steps alone: computing the activations comes on top. docs/scaling.md says "
        "how it is made and what of it was measured."
    )
    return "\n\n".join(sections) + "\n"


def as_dict(found: Sequence[Plan]) -> dict[str, Any]:
    """For a JSON file: the same numbers, unrounded."""
    return {
        "gpu": asdict(found[0].gpu),
        "plans": [
            {
                "replicas": one.layout.n_replicas,
                "shards": one.layout.n_shards,
                "job": asdict(one.job),
                "layout": asdict(one.layout),
                "rank": asdict(one.rank),
                "memory": one.memory,
                "step": {
                    "seconds": one.step.seconds,
                    "host_seconds": one.step.host,
                    "parts": [
                        {"name": part.name, "seconds": part.seconds, "hidden_seconds": part.hidden}
                        | ({"payload": part.volume.payload, "group": part.volume.group} if part.volume else {})
                        for part in one.step.parts
                    ],
                },
                "tokens_per_day": one.tokens_per_day,
            }
            for one in found
        ],
    }


def _headline(best: Plan) -> str:
    job, layout = best.job, best.layout
    replicas = f"{layout.n_replicas} replica{'s' * (layout.n_replicas > 1)}"
    shards = f"{layout.n_shards} shard{'s' * (layout.n_shards > 1)}"
    lines = [
        f"{job.n_latents:,} latents, d_model {job.d_model:,}, k {job.k}, {job.precision}, {job.state} state, "
        f"{layout.n_ranks} {best.gpu.name}",
        f"{replicas} of {shards}: {best.rank.latents:,} latents and {best.rank.rows:,} tokens a GPU",
        f"{ms_text(best.step.seconds)} ms a step of {job.batch_tokens:,} tokens, {count_text(best.tokens_per_second)} "
        f"tokens a second, {count_text(best.tokens_per_day)} tokens a day",
    ]
    if best.is_shortened:
        lines.append(
            f"The batch of {best.wanted.batch_tokens:,} tokens fits on no mesh of these GPUs, not in micro-batches "
            f"either: a step takes {job.batch_tokens:,}, the most that fits."
        )
    if best.rank.n_micro_batches > 1:
        lines.append(
            f"In {best.rank.n_micro_batches} micro-batches of {best.rank.micro_rows:,} tokens a GPU, whose gradients "
            "are added up: the result is that of the whole batch."
        )
    return "\n".join(lines)


def _flags(best: Plan) -> str:
    """What to give to `topkapi train`."""
    job, layout = best.job, best.layout
    flags = [f"--model.n-latents {job.n_latents}", f"--model.k {job.k}", f"--batch-tokens {job.batch_tokens}"]
    flags += [f"--precision {job.precision}"]
    flags += ["--optim.state low_memory"] if job.state == "low_memory" else []
    flags += [] if job.ema else ["--optim.ema-decay 0"]
    if layout.n_ranks > 1:
        flags.append(f"--parallel.shards {layout.n_shards}")
    if layout.n_shards > 1 and layout.selection != "exact":
        flags.append(f"--parallel.selection capacity --parallel.capacity {layout.capacity:g}")
        flags += [f"--parallel.candidates {layout.candidates}"] if layout.candidates else []
    if layout.n_replicas > 1 and layout.exchange != "auto":
        flags.append(f"--parallel.exchange {layout.exchange}")
    if best.rank.n_micro_batches > 1:
        flags.append(f"--parallel.micro-batch-tokens {layout.micro_batch_tokens}")
    return "Flags: " + " ".join(flags)


def _time_table(best: Plan) -> str:
    rows = []
    for part in best.step.parts:
        note = ""
        if part.volume is not None:
            note = f"{bytes_text(part.volume.sent)} a GPU, {part.volume.members} GPUs"
        if part.hidden:
            note += f"; {ms_text(part.hidden)} ms of it while the GPU computes"
        rows.append([part.name, ms_text(part.seconds), f"{100 * part.exposed / best.step.seconds:.0f} %", note])
    if best.step.host > best.step.device:
        rows.append(["waiting for the host", ms_text(best.step.host - best.step.device), "", ""])
    rows.append(["step", ms_text(best.step.seconds), "", ""])
    return _table(["part of a step", "ms", "of it", ""], rows, left=(0, 3))


def _memory_table(best: Plan) -> str:
    rows = [[name, f"{size / GIB:.2f}"] for name, size in best.memory.items()]
    usable = best.gpu.memory * best.gpu.usable
    rows.append([f"all, of {usable / GIB:.0f} GiB to use", f"{total(best.memory) / GIB:.2f}"])
    return _table(["memory of a GPU", "GiB"], rows)


def _selection(best: Plan) -> str:
    layout, rank, k = best.layout, best.rank, best.job.k
    if layout.n_shards == 1:
        return f"Selection: one shard sees all latents, and the {k} largest of each token are kept."
    if layout.selection == "exact":
        return (
            f"Selection: exact. Each shard offers its {rank.candidates} largest latents a token, and the {k} largest "
            "of all are kept: nothing is lost."
        )
    return (
        f"Selection: capacity. Each shard offers its {rank.candidates} largest latents a token instead of {k}: of the "
        f"{k} largest of all, {share_text(rank.lost)} are lost if latents are spread over shards at random."
    )


def limits(best: Plan) -> list[str]:
    """What a step spends its time on, what would make it faster, and what it runs into."""
    step, sums = best.step, grouped(best)
    ranked = sorted(sums.items(), key=lambda item: -item[1])
    names = [f"{name} {100 * seconds / step.device:.0f} %" for name, seconds in ranked if seconds > 0.05 * step.device]
    lines = [f"Of the step: {', '.join(names)}."]
    if step.host > step.device:
        lines.append("The host needs longer to queue the step than the GPU to do it: take more tokens a step.")
    for what, other in _alternatives(best):
        gain = other.tokens_per_second / best.tokens_per_second
        if other.fits and not (other.is_shortened and not best.is_shortened) and gain > WORTH_SAYING:
            lines.append(f"{what}: {gain:.2f} times as fast.")
    return lines + _warnings(best)


def _alternatives(best: Plan) -> list[tuple[str, Plan]]:
    """The same mesh with one thing changed."""
    job, layout, gpu = best.job, best.layout, best.gpu
    changed = [
        ("Twice the tokens a step (--batch-tokens)", replace(job, batch_tokens=2 * job.batch_tokens), layout, gpu)
    ]
    if job.precision == "bf16":
        changed.append(("fp8 screening (--precision fp8)", replace(job, precision="fp8"), layout, gpu))
    if job.state == "float32" and job.precision != "float32":
        changed.append(("Low-memory state", replace(job, state="low_memory"), layout, gpu))
    if layout.n_ranks > 1:
        inside = replace(gpu.inside, gather=2 * gpu.inside.gather, sum=2 * gpu.inside.sum)
        between = replace(gpu.between, gather=2 * gpu.between.gather, sum=2 * gpu.between.sum)
        changed.append(("Links twice as fast inside nodes", job, layout, replace(gpu, inside=inside)))
        changed.append(("Links twice as fast between nodes", job, layout, replace(gpu, between=between)))
        both = replace(gpu, inside=inside, between=between)
        changed.append(("Links twice as fast, inside and between nodes", job, layout, both))
    return [(what, plan(*changes)) for what, *changes in changed]


def _warnings(best: Plan) -> list[str]:
    rank, lines = best.rank, []
    for what, offered in (("latents", rank.candidates), ("dead latents", rank.auxk_candidates)):
        if best.layout.n_shards > 1 and offered * best.layout.n_shards > LONGEST_ROW:
            lines.append(
                f"All shards offer {offered * best.layout.n_shards:,} {what} a token, more than the {LONGEST_ROW:,} "
                "that the kernel comparing them takes: plain PyTorch does it, far slower."
            )
    if not takes_kernels(best.job.d_model, rank.latents, rank.candidates):
        lines.append(
            f"{rank.latents:,} latents a GPU with k {rank.candidates} (d_model {best.job.d_model}) do not suit the "
            "encoder's kernels: a matmul and torch.topk take their place, far slower."
        )
    return lines


def _others(found: Sequence[Plan]) -> str:
    rows = []
    for one in found[: SHOWN + 1]:
        selection = "one shard" if one.layout.n_shards == 1 else f"{one.layout.selection}, {one.rank.candidates}"
        rows.append(
            [
                one.mesh,
                selection,
                one.rank.exchange if one.layout.n_replicas > 1 else "none",
                f"{one.job.batch_tokens:,}",
                f"{one.rank.n_micro_batches}",
                ms_text(one.step.seconds),
                count_text(one.tokens_per_day),
                f"{100 * one.step.communication / one.step.seconds:.0f} %",
                f"{total(one.memory) / GIB:.1f}",
                share_text(one.rank.lost),
            ]
        )
    head = [
        "replicas x shards",
        "selection, candidates",
        "exchange",
        "batch",
        "parts",
        "ms",
        "tokens a day",
        "links",
        "GiB",
        "lost",
    ]
    return _table(head, rows, left=(0, 1, 2))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns that line up, some of them to the left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    texts = []
    for line in lines:
        cells = zip(line, widths, strict=True)
        padded = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
        texts.append("  ".join(padded).rstrip())
    return "\n".join(texts)
