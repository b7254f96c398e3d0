"""The command topkapi view: opens a run with its study and serves them to a browser."""

import os
import socket
import webbrowser
from pathlib import Path
from threading import Timer

import uvicorn

import topkapi.study
from topkapi.console import say
from topkapi.errors import TopkapiError, command_line
from topkapi.published import require_run
from topkapi.study import Study
from topkapi.study.layout import PROGRESS, STUDY
from topkapi.viewer.app import create_app

BACKLOG = 128  # connections that may wait to be taken
SHUTDOWN_SECONDS = 2  # that requests have to end when the server is stopped


def open_for(run: Path, folder: Path) -> Study:
    """The study in a folder, whose autoencoder is that of `run`.

    Raises:
        TopkapiError: there is none, with the command that writes it; it is damaged, or of another run.
    """
    require_run(run)
    if not (folder / STUDY).exists() and not (folder / PROGRESS).exists():
        out = [] if folder == run / "study" else ["--out", folder]
        write = command_line("study", run, "--tokens", 16_000, *out)
        raise TopkapiError(f"{folder} holds no study, which the viewer shows. Write it: {write}")
    study = topkapi.study.open(folder, run)
    study.require_run()
    return study


def view(run: Path, folder: Path, host: str, port: int, model: bool, in_browser: bool) -> None:
    """Serve the run until interrupted; says where.

    Raises:
        TopkapiError: no run or study, or the port is taken.
    """
    app = create_app(run, open_for(run, folder), model=model, host=host)
    with listening(host, port) as listener:
        address = address_of(listener, host)
        say(f"{run} is at {address} - stop with Ctrl-C.")
        if in_browser:
            Timer(0.5, webbrowser.open, [address]).start()
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS, server_header=False, lifespan="on"
        )
        uvicorn.Server(config).run(sockets=[listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free. Raises TopkapiError where it cannot."""
    if not 0 <= port < 2**16:
        raise TopkapiError(f"--port must be from 0 to {2**16 - 1}; got {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sends at once only where TCP is said to be TCP
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host, as 127.0.0..1
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number and number > 0 else str(error)
        where = f"{host!r}, port {port}"
        raise TopkapiError(f"cannot listen on {where}: {reason}. Choose another --host or --port.") from None
    return listener


def address_of(listener: socket.socket, host: str) -> str:
    """The URL of a listening socket."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}/"
