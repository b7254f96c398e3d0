"""The routes: what may be asked, and which part of the viewer answers.

Functions without `async` run in threads, so that a slow answer keeps no other waiting.
"""

import gzip
import hashlib
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from topkapi.errors import TopkapiError
from topkapi.study import Study
from topkapi.viewer import asking, columns, examples, runs
from topkapi.viewer.answers import Answer
from topkapi.viewer.asking import Refused
from topkapi.viewer.guard import Guard, Names
from topkapi.viewer.labels import checked
from topkapi.viewer.opened import Opened

STATIC = Path(__file__).parent / "static"
MOST_EXAMPLES = 100


def create_app(run: Path, study: Study, *, model: bool = True, host: str = "127.0.0.1") -> Starlette:
    """The viewer of a run and a study of it, as an ASGI application that answers to the name `host`.

    With `model` the language model is loaded once the application starts, and experiments may be asked for.

    Raises:
        TopkapiError: no such run, a study of another one, damaged labels.
    """
    opened = Opened(run, study)
    api = Api(opened)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            opened.close()

    return Starlette(
        routes=[Mount("/api", routes=api.routes()), Mount("/", StaticFiles(directory=STATIC, html=True))],
        middleware=[Middleware(Guard, names=Names(host))],
        exception_handlers={Refused: _refused, TopkapiError: _mistaken, HTTPException: _http},
        lifespan=lifespan,
    )


def _refused(_request: Request, error: Refused) -> Response:
    return Answer({"error": error.sentence}, error.status)


def _mistaken(_request: Request, error: TopkapiError) -> Response:
    return Answer({"error": str(error)}, 409)


def _http(request: Request, error: HTTPException) -> Response:
    sentences = {404: "there is nothing here", 405: f"{request.method} is not for this address"}
    sentence = sentences.get(error.status_code, error.detail)
    return Answer({"error": f"{sentence}."}, error.status_code, error.headers)


class Api:
    """What is asked of an opened run, in JSON."""

    def __init__(self, opened: Opened) -> None:
        self.opened, self.study = opened, opened.study

    def routes(self) -> list[Route]:
        """The addresses below /api."""
        return [
            Route("/about", self.about),
            Route("/columns", self.columns),
            Route("/latent/{i}", self.latent),
            Route("/latent/{i}/examples", self.examples),
            Route("/global", self.overview),
            Route("/runs", self.runs),
            Route("/labels", self.labels, methods=["GET"]),
            Route("/labels", self.import_labels, methods=["POST"]),
            Route("/labels/{i}", self.set_label, methods=["PUT"]),
        ]

    def about(self, _request: Request) -> Response:
        """What is looked at, and what of it is ready."""
        return Answer(self.opened.about())

    def columns(self, request: Request) -> Response:
        """The table of all latents."""
        header = {"n_latents": self.study.n_latents, "n_tokens": self.study.n_tokens, "tokens": []}
        data = columns.pack(header, columns.of_study(self.study))
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "no-cache", "vary": "accept-encoding"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            data, headers = gzip.compress(data, 1), headers | {"content-encoding": "gzip"}
        return Response(data, media_type="application/octet-stream", headers=headers)

    def latent(self, request: Request) -> Response:
        """Everything about one latent but its examples."""
        i = self._latent(request)
        return Answer(self.opened.describe(i) | {"label": self.opened.labels.all().get(i)})

    def examples(self, request: Request) -> Response:
        """Firings of one latent with the text around them."""
        i, query = self._latent(request), request.query_params
        kind = query.get("kind", "top")
        if kind not in examples.KINDS:
            raise Refused(f"kind must be one of {', '.join(examples.KINDS)}.")
        choice = examples.Choice(
            kind,
            asking.query_whole(query, "n", 10, 1, MOST_EXAMPLES),
            asking.query_whole(query, "seed", 0, 0, 2**32 - 1),
            asking.query_number(query, "low", -math.inf),
            asking.query_number(query, "high", math.inf),
        )
        return Answer(examples.choose(self.study.latent(i), choice, self.opened.texts))

    def overview(self, _request: Request) -> Response:
        """The dictionary as a whole."""
        return Answer(self.opened.overview)

    def runs(self, _request: Request) -> Response:
        """Runs beside this one."""
        return Answer(runs.beside(self.opened.run))

    def labels(self, _request: Request) -> Response:
        """All labels."""
        return Answer({"labels": self.opened.labels.all()})

    async def set_label(self, request: Request) -> Response:
        """Label one latent."""
        i = self._latent(request)
        values = await asking.body(request)
        return await run_in_threadpool(self._save, {str(i): values})

    async def import_labels(self, request: Request) -> Response:
        """Add labels to those that are there, in place of those of the same latents."""
        values = await asking.body(request, asking.IMPORT_BYTES)
        labels = values.get("labels")
        if not isinstance(labels, dict):
            raise Refused("the body must have labels, an object of latents' numbers and labels.")
        return await run_in_threadpool(self._save, labels)

    def _save(self, labels: dict[str, Any]) -> Response:
        found = {}
        for name, label in labels.items():
            i = asking.whole(name, "a latent", 0, self.study.n_latents - 1)
            try:
                found[i] = checked(label)
            except ValueError as error:
                raise Refused(f"latent {i}: {error}.") from None
        self.opened.labels.set(found)
        return Answer({"labels": self.opened.labels.all()})

    def _latent(self, request: Request) -> int:
        """The latent that the address names; 404 where there is none."""
        try:
            return asking.whole(request.path_params["i"], "a latent", 0, self.study.n_latents - 1)
        except Refused as refused:
            raise Refused(refused.sentence, 404) from None
