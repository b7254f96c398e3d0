"""The picture of a plan: a step's time by part, for every number of shards."""

from collections.abc import Sequence
from pathlib import Path

from topkapi.files import write_atomic
from topkapi.plotting import pyplot
from topkapi.scaling.planner import Plan
from topkapi.scaling.quantities import count_text, ms_text
from topkapi.scaling.report import ORDER, grouped

COLOURS = ("#1f6fb4", "#7fb3dd", "#8a5fb0", "#2f9e77", "#d95f02", "#e6a817", "#777777")
TALLEST = 4.5  # times the fastest step that fits
ACROSS = ("between shards", "between replicas", "between all")  # links, not the GPU: hatched


def draw(found: Sequence[Plan], chosen: Plan, path: Path) -> None:
    """Draw a bar for each plan, all with the same batch; pale ones do not fit in memory."""
    plt = pyplot()
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(figsize=(max(6.5, 1.05 * len(found) + 3.2), 4.8), layout="constrained")
    heights, handles = [0.0] * len(found), []
    for name, colour in zip(ORDER, COLOURS, strict=True):
        values = [1e3 * grouped(one)[name] for one in found]
        if max(values) < 0.002 * max(1e3 * one.step.seconds for one in found):
            continue
        style = {"facecolor": colour, "edgecolor": "white", "hatch": "///" if name in ACROSS else None}
        bars = axes.bar(range(len(found)), values, bottom=heights, width=0.72, linewidth=0.5, **style)
        handles.append(Patch(label=name, **style))
        for bar, one in zip(bars, found, strict=True):
            bar.set_alpha(1.0 if one.fits else 0.3)
        heights = [height + value for height, value in zip(heights, values, strict=True)]
    _label(axes, found, chosen, heights)
    figure.legend(handles=handles[::-1], loc="outside right center", frameon=False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    plt.close(figure)


def _label(axes: object, found: Sequence[Plan], chosen: Plan, heights: Sequence[float]) -> None:
    job = chosen.wanted
    limit = min(
        1.14 * max(heights),
        TALLEST * min([h for h, one in zip(heights, found, strict=True) if one.fits], default=max(heights)),
    )
    for place, (one, height) in enumerate(zip(found, heights, strict=True)):
        is_chosen = one.layout.n_shards == chosen.layout.n_shards
        text = f"{ms_text(one.step.seconds)} ms" + ("" if one.fits else "\ndoes not fit")
        where = min(height, 0.92 * limit)  # a bar that is too long is cut off
        label = axes.text(place, where, text, ha="center", va="bottom", fontsize=8)
        label.set_weight("bold" if is_chosen else "normal")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5} if height > limit else None)
    names = [f"{one.layout.n_shards}\nx {one.layout.n_replicas}" for one in found]
    axes.set_xticks(range(len(found)), names)
    axes.set_xlabel("shards x replicas")
    axes.set_ylabel("milliseconds of a step")
    axes.set_ylim(0, limit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    dead = f", {100 * job.dead:g} % dead" if job.dead else ""
    axes.set_title(
        f"{count_text(job.n_latents)} latents, d_model {job.d_model:,}, k {job.k}, {job.precision}{dead}\n"
        f"{count_text(job.batch_tokens)} tokens a step on {chosen.layout.n_ranks} {chosen.gpu.name} (modelled)",
        loc="left",
        fontsize=10,
    )
