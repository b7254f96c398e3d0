"""The rows in which a person reads eval.json: a name, a value, its 95 % interval, a unit."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]
UNITS = {
    "normalized_mse": "0 perfect, 1 the mean",
    "l0": "latents per token",
    "dead_fraction": "of the latents",
    "ce_clean": "nats per token",
    "ce_spliced": "nats per token",
    "ce_zero_ablation": "nats per token",
    "ce_mean_ablation": "nats per token",
    "kl": "nats per token",
    "loss_recovered": "1 clean, 0 zeroed",
    "n_tokens": "tokens",
}


class Row(NamedTuple):
    """One line of the table, as text."""

    name: str
    value: str
    interval: str
    unit: str


def rows(results: Json) -> list[Row]:
    """The rows of all metrics that `results` holds, whole sections in the order of docs/metrics.md.

    A metric that is None is "undefined": why is in results["gaps"].
    """
    found = []
    for name, unit in UNITS.items():
        value, (low, high) = results[name], results.get("intervals", {}).get(name, (None, None))
        found.append(_row(name, {"value": value, "low": low, "high": high}, unit))
    for name, section in SECTIONS.items():
        if results.get(name) is not None:
            found += section(results[name])
        elif name in results:
            found.append(Row(name, "undefined", "", ""))
    return found


def _row(name: str, it: Json, unit: str) -> Row:
    value, low, high = it["value"], it.get("low"), it.get("high")
    interval = "" if low is None or low == high else f"{_number(low)} to {_number(high)}"
    return Row(name, "undefined" if value is None else _number(value), interval, unit)


def _number(value: float | int) -> str:
    """Four decimals, or four digits where these would be zeros."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if 0 < abs(value) < 0.01 else f"{value:.4f}"


def _compute_equivalent(it: Json) -> Iterator[Row]:
    yield _row("compute_equivalent", it["share"], "of the compute")


def _refinement(it: Json) -> Iterator[Row]:
    yield _row("normalized_mse, refined", it["normalized_mse_refined"], UNITS["normalized_mse"])
    yield _row("refined / value, mean", it["mean_ratio"], "1: no shrinkage")
    yield _row("refined / value, total", it["total_ratio"], "1: no shrinkage")


def _progressive(it: Json) -> Iterator[Row]:
    for i in _few(it):
        yield _point(it, i, f"normalized_mse, k'={it['k'][i]}", UNITS["normalized_mse"])


def _threshold(it: Json) -> Iterator[Row]:
    for i in _few(it):
        yield _point(it, i, f"by threshold, l0 {it['l0'][i]:.1f}", UNITS["normalized_mse"])


def _few(curve: Json) -> list[int]:
    """Where the first and last point of a curve are, and those of a quarter of k, k and doubles of it."""
    ks, k = curve["k"], curve["trained_k"]
    wanted = {ks[0], k // 4, k // 2, k, 2 * k, ks[-1]}
    return [i for i, it in enumerate(ks) if it in wanted]


def _point(it: Json, i: int, name: str, unit: str) -> Row:
    return _row(name, {"value": it["normalized_mse"][i], "low": it["low"][i], "high": it["high"][i]}, unit)


def _ablation_sparsity(it: Json) -> Iterator[Row]:
    yield _row("ablation_sparsity", it["over_tokens"], "of the logits")
    yield _row("same, over latents", it["over_latents"], "of the logits")
    yield _row("same, of channels", it["channels"], "of the logits")


def _n2g(it: Json) -> Iterator[Row]:
    for name in ("precision", "recall", "f1"):
        yield _row(f"n2g {name}", it[name], f"of {it[name]['n']} latents")


def _n2g_loss(it: Json) -> Iterator[Row]:
    yield _row("ce_simulated, by n2g", it["ce_simulated"], UNITS["ce_spliced"])
    yield _row("same, loss_recovered", it["loss_recovered"], UNITS["loss_recovered"])


def _probes(it: Json) -> Iterator[Row]:
    n, n_left_out = len(it["tasks"]), len(it["left_out"])
    yield _row("probe loss", it["mean"], f"nats, {n} of {n + n_left_out} tasks")
    yield _row("same, of channels", it["channels"], "nats")
    yield _row("same, class shares", {"value": it["prior"]}, "nats")


SECTIONS: dict[str, Callable[[Json], Iterator[Row]]] = {
    "compute_equivalent": _compute_equivalent,
    "refinement": _refinement,
    "progressive": _progressive,
    "threshold": _threshold,
    "ablation_sparsity": _ablation_sparsity,
    "n2g": _n2g,
    "n2g_loss": _n2g_loss,
    "probes": _probes,
}


def remarks(results: Json) -> list[str]:
    """A line for each gap, for each estimate that is undefined, and for tasks that were left out."""
    lines = [f"{name}: {reason}" for name, reason in results.get("gaps", {}).items()]
    for section in SECTIONS:
        for name, it in (results.get(section) or {}).items():
            if isinstance(it, dict) and "value" in it and it["value"] is None:
                lines.append(f"{section}, {name}: {it['reason']}")
    probes = results.get("probes")
    for reason in dict.fromkeys(probes["left_out"].values() if probes else ()):
        names = [name for name, it in probes["left_out"].items() if it == reason]
        shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        lines.append(f"probe tasks left out, {shown}: {reason}")
    return lines
