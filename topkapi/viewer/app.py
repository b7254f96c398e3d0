"""The viewer as an ASGI application: the page, its numbers, and what is said where something is wrong."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Lock, Thread

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
VERIFY_SECONDS = 1.0  # that an answer waits until a study's files are read
OF_DAMAGE = (ArithmeticError, LookupError, MemoryError, TypeError, ValueError)  # numbers that cannot be


def create_app(run: Path, study: Study, *, model: bool = True, host: str = "127.0.0.1") -> Starlette:
    """The viewer of a run and a study of it, as an application that answers to the name `host`.

    Once it starts, the autoencoder, the index of latents and, with `model`, the language model are loaded in the
    background.

    Raises:
        TopkapiError: no such run, a study of another one, damaged labels.
    """
    opened, verified = Opened(run, study, model), Verified(study)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        opened.start()
        try:
            yield
        finally:
            opened.close()

    def unexpected(request: Request, error: Exception) -> Response:
        """What a damaged study may cause: where its files are sound the fault is ours."""
        try:
            dict(study.arrays)  # each is looked at for changes since it was opened
            if not verified.wait(VERIFY_SECONDS):
                sentence = "this failed, as where a study is damaged: its files are being read to see. Ask again later."
                return Answer({"error": sentence}, 503)
        except TopkapiError as damage:
            return _mistaken(request, damage)
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


class Verified:
    """Whether a study's files are as they were written: they are read once, however large, while nobody waits long."""

    def __init__(self, study: Study) -> None:
        self._study, self._problem, self._lock = study, "", Lock()
        self._thread = Thread(target=self._verify, name="verify", daemon=True)

    def wait(self, seconds: float) -> bool:
        """Whether all are read, `seconds` from now at most. Raises TopkapiError where one is damaged."""
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()
        self._thread.join(seconds)
        if self._problem:
            raise TopkapiError(self._problem)
        return not self._thread.is_alive()

    def _verify(self) -> None:
        try:
            self._study.verify()
        except TopkapiError as damage:
            self._problem = str(damage)
        except OSError as error:
            self._problem = f"the study cannot be read: {error}."


def _refused(_request: Request, error: Refused) -> Response:
    return Answer({"error": error.sentence}, error.status)


def _mistaken(_request: Request, error: TopkapiError) -> Response:
    return Answer({"error": str(error)}, 400)


def _http(request: Request, error: HTTPException) -> Response:
    sentences = {404: "there is nothing here", 405: f"{request.method} is not for this address"}
    return Answer({"error": f"{sentences.get(error.status_code, error.detail)}."}, error.status_code, error.headers)
