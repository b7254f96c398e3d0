"""A process that has imported torch, transformers and topkapi, and forks a child for each command line.

Starting topkapi takes seconds, all of it imports; a fork takes none, so that tests can afford hundreds of real
processes, with real signals. Nothing here uses threads before the fork.

    python -m tests.fork_server     reads requests from stdin, a JSON object a line, and answers each with one
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PHASES = ("tokens", "activations", "checkpoints", "publishing", "config", "metrics")


class ForkServer:
    """The test's side: starts the server and talks to it."""

    def __init__(self) -> None:
        how = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.stores: list[Any] = []  # what worlds meet at, as torchrun keeps it for its processes
        self.process = subprocess.Popen([sys.executable, "-m", "tests.fork_server"], **how)

    def start(self, arguments: list[str], log: Path, cache: Path, **options: Any) -> int:
        """Run `topkapi ARGUMENTS` with stdout and stderr in `log` and the cache in `cache`; its process id.

        `kill_at=(phase, n)`: the child kills itself (SIGKILL) before the n-th file operation of a phase, and says so
        in the log. `file_limit=n`: no file grows beyond n bytes. `list_phases=True`: the log ends with the number of
        file operations a phase. `environment={...}`: variables set in it. `call="module:function"`: that function is
        called with the arguments, not the command line.
        """
        return self._ask(arguments=arguments, log=str(log), cache=str(cache), **options)

    def start_world(self, n_ranks: int, arguments: list[str], folder: Path, cache: Path, **options: Any) -> list[int]:
        """`start` for processes that train together, as torchrun would start them; rank r writes to folder/rank-r.

        One that hangs is ended by SIGALRM.
        """
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.stores.append(store)
        common = {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        pids = []
        for rank in range(n_ranks):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            pids.append(
                self.start(arguments, folder / f"rank-{rank}", cache, environment=environment, seconds=150, **options)
            )
        return pids

    def run_world(self, n_ranks: int, arguments: list[str], folder: Path, cache: Path, **options: Any) -> list[int]:
        """`start_world` and `wait` for each."""
        return [self.wait(pid) for pid in self.start_world(n_ranks, arguments, folder, cache, **options)]

    def wait(self, pid: int) -> int:
        """The exit status of a child, -n if signal n ended it."""
        return self._ask(wait=pid)

    def run(self, arguments: list[str], log: Path, cache: Path, **options: Any) -> int:
        """`start` and `wait`."""
        return self.wait(self.start(arguments, log, cache, **options))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def serve() -> None:
    """The server's side."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (imported here, or in every child)

    import topkapi.cli
    import topkapi.demo

    topkapi.cli.SPEAKING_SECONDS = 0.0  # no launcher here ends the others when the first one ends
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (answer := os.fork()):
            _child(topkapi.cli.main, **request)
        print(json.dumps(answer), flush=True)


def _child(
    main: Any, arguments: list[str], log: str, cache: str, kill_at: Any = None, file_limit: int = 0, **options: Any
) -> None:
    """Never returns."""
    status = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ["XDG_CACHE_HOME"] = cache
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        counts = dict.fromkeys(PHASES, 0)
        os.environ.update(options.get("environment", {}))
        signal.alarm(options.get("seconds", 0))
        if "call" in options:
            module, _, name = options["call"].partition(":")
            main = _calling(getattr(importlib.import_module(module), name))
        sys.addaudithook(lambda event, details: _watch(event, details, cache, counts, kill_at))
        status = main(arguments)
        if options.get("list_phases"):
            print(json.dumps(counts))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _calling(function: Any) -> Any:
    """A command line that calls a function, which may return an exit status."""

    def main(arguments: list[str]) -> int:
        return function(*arguments) or 0

    return main


def _watch(event: str, details: tuple[Any, ...], cache: str, counts: dict[str, int], kill_at: Any) -> None:
    """Count a file operation under its phase; kill this process if it is the one asked for."""
    watched = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
    if event not in watched or not isinstance(details[0], str | Path):
        return
    phase = phase_of(str(details[0]), cache)
    if phase is None:
        return
    counts[phase] += 1
    if kill_at and [phase, counts[phase]] == list(kill_at):
        os.write(2, f"killed before {event} {details[0]}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def phase_of(path: str, cache: str) -> str | None:
    """What a run was doing when it touched `path`; None for files that are not its own.

    The run folder must be called "run".
    """
    if path.startswith(cache):
        return next((phase for phase in ("tokens", "activations") if f"/{phase}/" in path), None)
    if "/run/" not in path:
        return None
    name = path.partition("/run/")[2]
    named = {"checkpoints": "checkpoints", "model.safetensors": "publishing", "README": "publishing"}
    named |= {"config": "config", "metrics": "metrics"}
    return next((phase for part, phase in named.items() if part in name), None)


if __name__ == "__main__":
    serve()
