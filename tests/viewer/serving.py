"""The viewer served by a thread of this process, on a free port."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn

import topkapi.study
from topkapi.viewer.app import create_app
from topkapi.viewer.serve import address_of, listening


@contextmanager
def served(run: Path, *, model: bool = True) -> Iterator[str]:
    """The address of the viewer of a run with its own study, within the block."""
    app = create_app(run, topkapi.study.open(run / "study", run), model=model)
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield address_of(listener, "127.0.0.1")
        server.should_exit = True
        thread.join()
