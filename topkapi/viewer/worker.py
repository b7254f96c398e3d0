"""The one thread that runs the language model, and what waits for it.

1. The thread loads the model, then does one task after the other. Tasks report how far they are.
2. A task whose asker has gone away is cancelled: one that waits is never begun, and one that runs ends at its next
   report.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, Literal

from topkapi.console import say
from topkapi.errors import TopkapiError
from topkapi.explore import Spliced

MOST_WAITING = 16  # tasks

State = Literal["off", "loading", "ready", "failed"]
Line = dict[str, Any]
Report = Callable[[int, int, str], None]
Work = Callable[[Spliced, Report], dict[str, Any]]


class Cancelled(Exception):
    """Nobody waits for the result any more."""


class Busy(Exception):
    """As many tasks wait as may."""


class Task:
    """Work to be done once, and who hears of it: lines of progress, then of a result or an error."""

    def __init__(self, work: Work, listen: Callable[[Line], None]) -> None:
        self._work, self._listen, self._cancelled = work, listen, Event()

    def cancel(self) -> None:
        """End it as soon as possible; nothing is heard of it any more."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it."""
        return self._cancelled.is_set()

    def wait(self) -> None:
        """Say that it waits."""
        self._listen({"progress": {"done": 0, "total": 0, "what": "waiting"}})

    def run(self, spliced: Spliced) -> None:
        """Do it, in the worker's thread."""
        with suppress(Cancelled):
            line = self._line(spliced)
            if not self._cancelled.is_set():
                self._listen(line)

    def _line(self, spliced: Spliced) -> Line:
        try:
            self._report(0, 0, "starting")
            return {"result": self._work(spliced, self._report)}
        except TopkapiError as error:
            return {"error": str(error)}
        except Cancelled:
            raise
        except Exception as error:
            say(f"warning: a task of the viewer failed: {type(error).__name__}: {error}")
            return {"error": f"this failed ({type(error).__name__}); the terminal of topkapi view says how."}

    def _report(self, done: int, total: int, what: str) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        self._listen({"progress": {"done": done, "total": total, "what": what}})


class Worker:
    """The thread, the model that it loads, and its queue."""

    def __init__(self, load: Callable[[], Spliced] | None) -> None:
        self.state: State = "loading" if load else "off"
        self.why = "" if load else "topkapi view was started with --no-model."
        self.spliced: Spliced | None = None
        self._load = load
        self._queue: Queue[Task | None] = Queue(MOST_WAITING)
        self._loaded, self._working, self._stopping = Event(), Event(), Event()
        self._thread = Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to load the model; without one nothing is begun."""
        if self._load:
            self._thread.start()

    def wait(self) -> Spliced:
        """The model, once it is loaded. Raises TopkapiError where it cannot be."""
        self._loaded.wait()
        if self.spliced is None:
            raise TopkapiError(f"the language model cannot be used: {self.why}")
        return self.spliced

    def stop(self, seconds: float) -> None:
        """End after the task that is running; wait so long for that."""
        self._stopping.set()
        with suppress(Full):
            self._queue.put_nowait(None)
        if self._thread.is_alive():
            self._thread.join(seconds)

    def facts(self) -> dict[str, str]:
        """Whether there is a model, and if not why."""
        return {"state": self.state, "why": self.why}

    async def lines(self, work: Work) -> AsyncIterator[Line]:
        """What is heard of some work until it is done; the work is cancelled where nobody listens any more.

        Raises:
            Busy: as many tasks wait as may.
        """
        heard: asyncio.Queue[Line] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        task = self._submit(Task(work, lambda line: _tell(loop, heard, line)))
        try:
            while True:
                line = await heard.get()
                yield line
                if "progress" not in line:
                    return
        finally:
            task.cancel()

    def _submit(self, task: Task) -> Task:
        with self._queue.mutex:  # a task that nobody waits for any more takes nobody's place
            wanted = [one for one in self._queue.queue if one is None or not one.is_cancelled]
            self._queue.queue.clear()
            self._queue.queue.extend(wanted)
        if self._working.is_set() or not self._queue.empty():
            task.wait()
        try:
            self._queue.put_nowait(task)
        except Full:
            raise Busy from None
        return task

    def _run(self) -> None:
        try:
            self.spliced = self._load()
        except Exception as error:
            self.state, self.why = "failed", str(error) or type(error).__name__
            say(f"warning: the language model cannot be used: {self.why}")
            return
        finally:
            self._loaded.set()
        self.state = "ready"
        while (task := self._queue.get()) is not None and not self._stopping.is_set():
            self._working.set()
            task.run(self.spliced)
            self._working.clear()


def _tell(loop: asyncio.AbstractEventLoop, heard: "asyncio.Queue[Line]", line: Line) -> None:
    with suppress(RuntimeError):  # the loop has ended: nobody listens
        loop.call_soon_threadsafe(heard.put_nowait, line)
