"""The viewer as an ASGI application: the page, its numbers, and what is said where something is wrong."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Router
from starlette.staticfiles import StaticFiles

from topkapi.errors import TopkapiError
from topkapi.study import Study
from topkapi.viewer.answers import Answer
from topkapi.viewer.asking import Refused
from topkapi.viewer.guard import Guard, Names
from topkapi.viewer.model_api import LIMITS, ModelApi
from topkapi.viewer.opened import Opened
from topkapi.viewer.study_api import StudyApi

STATIC = Path(__file__).parent / "static"
OF_DAMAGE = (ArithmeticError, LookupError, MemoryError, TypeError, ValueError)  # numbers that cannot be


def create_app(run: Path, study: Study, *, model: bool = True, host: str = "127.0.0.1") -> Starlette:
    """The viewer of a run and a study of it, as an application that answers to the name `host`.

    Once it starts, the autoencoder, the index of latents and, with `model`, the language model are loaded in the
    background.

    Raises:
        TopkapiError: no such run, a study of another one, damaged labels.
    """
    opened = Opened(run, study, model)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        opened.start()
        try:
            yield
        finally:
            opened.close()

    def unexpected(request: Request, error: Exception) -> Response:
        """What a damaged study may cause: its files are read once, and where they are sound the fault is ours."""
        try:
            study.verify()
        except TopkapiError as damage:
            return _mistaken(request, damage)
        except OSError as missing:
            return _mistaken(request, TopkapiError(f"the study cannot be read: {missing}."))
        raise error

    routes = [*StudyApi(opened, LIMITS).routes(), *ModelApi(opened).routes()]
    api = Router(routes, redirect_slashes=False)
    return Starlette(
        routes=[Mount("/api", api), Mount("/", StaticFiles(directory=STATIC, html=True))],
        middleware=[Middleware(Guard, names=Names(host))],
        exception_handlers=dict.fromkeys(OF_DAMAGE, unexpected)
        | {Refused: _refused, TopkapiError: _mistaken, HTTPException: _http},
        lifespan=lifespan,
    )


def _refused(_request: Request, error: Refused) -> Response:
    return Answer({"error": error.sentence}, error.status)


def _mistaken(_request: Request, error: TopkapiError) -> Response:
    return Answer({"error": str(error)}, 400)


def _http(request: Request, error: HTTPException) -> Response:
    sentences = {404: "there is nothing here", 405: f"{request.method} is not for this address"}
    return Answer({"error": f"{sentences.get(error.status_code, error.detail)}."}, error.status_code, error.headers)
