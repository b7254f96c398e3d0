"""What may be asked of a run and its study: JSON for each part of the page.

Functions without `async` run in threads, so that a slow answer keeps no other waiting; many `slow` ones do not either.
"""

import asyncio
import math
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from topkapi.viewer import asking, examples, runs
from topkapi.viewer.answers import Answer, slow
from topkapi.viewer.asking import Refused
from topkapi.viewer.labels import checked
from topkapi.viewer.opened import Opened

MOST_EXAMPLES = 100


class StudyApi:
    """Answers from an opened run."""

    def __init__(self, opened: Opened, limits: dict[str, int]) -> None:
        self.opened, self.study, self.limits = opened, opened.study, limits
        self._saving = asyncio.Lock()  # which is given in the order asked for, as threads' locks are not

    def routes(self) -> list[Route]:
        """The addresses below /api."""
        return [
            Route("/about", self.about),
            Route("/columns", slow(self.columns)),
            Route("/latent/{i}", slow(self.latent)),
            Route("/latent/{i}/examples", slow(self.examples)),
            Route("/global", slow(self.overview)),
            Route("/runs", slow(self.runs)),
            Route("/labels", self.labels, methods=["GET"]),
            Route("/labels", self.import_labels, methods=["POST"]),
            Route("/labels/{i}", self.set_label, methods=["PUT"]),
        ]

    def about(self, _request: Request) -> Response:
        """What is looked at, and what of it is ready."""
        return Answer(self.opened.about() | {"limits": self.limits})

    def columns(self, request: Request) -> Response:
        """The table of all latents, as far as it is known."""
        table = self.opened.table.current()  # its tag is weak, as plain and zipped share it: RFC 9110, section 8.8.1
        headers = {"etag": f"W/{table.tag}", "cache-control": "no-cache", "vary": "accept-encoding"}
        if table.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        data = table.plain
        if "gzip" in request.headers.get("accept-encoding", ""):
            data, headers = table.zipped, headers | {"content-encoding": "gzip"}
        return Response(data, media_type="application/octet-stream", headers=headers)

    def latent(self, request: Request) -> Response:
        """Everything about one latent but its examples."""
        i = latent_of(request, self.study.n_latents)
        return Answer(self.opened.describe(i) | {"label": self.opened.labels.all().get(i)})

    def examples(self, request: Request) -> Response:
        """Firings of one latent with the text around them."""
        i, query = latent_of(request, self.study.n_latents), request.query_params
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
        texts = self.opened.texts  # before the study is read: it may be long in coming
        return Answer(examples.choose(self.study.latent(i), choice, texts))

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
        """Label one latent, or remove its label."""
        i = latent_of(request, self.study.n_latents)
        values = await asking.body(request)
        return await self._save({str(i): values})

    async def import_labels(self, request: Request) -> Response:
        """Add labels to those that are there, in place of those of the same latents."""
        values = await asking.body(request, asking.IMPORT_BYTES)
        labels = values.get("labels")
        if not isinstance(labels, dict):
            raise Refused("the body must have labels, an object of latents' numbers and labels.")
        return await self._save(labels)

    async def _save(self, labels: dict[str, Any]) -> Response:
        """One at a time, in the order of their arrival: of two for one latent the later one is kept."""
        found = {}
        for name, label in labels.items():
            i = asking.whole(name, "a latent", 0, self.study.n_latents - 1)
            try:
                found[i] = checked(label)
            except ValueError as error:
                raise Refused(f"latent {i}: {error}.") from None
        async with self._saving:
            replaced = await run_in_threadpool(self.opened.labels.set, found)
        return Answer({"labels": await run_in_threadpool(self.opened.labels.all), "replaced": replaced})


def latent_of(request: Request, n_latents: int) -> int:
    """The latent that the address names. Raises Refused, with status 404, where there is none."""
    try:
        return asking.whole(request.path_params["i"], "a latent", 0, n_latents - 1)
    except Refused as refused:
        raise Refused(refused.sentence, 404) from None
