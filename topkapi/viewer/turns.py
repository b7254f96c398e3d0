"""Who goes first: what is asked for now, and then what is counted in the background.

Both share an interpreter, and the browser the cores beside it: the first look at a run is a second, its index minutes.
"""

import time
from threading import Event

CALM = 0.3  # seconds without a request, after which counting goes on


class Turns:
    """When something was asked for last."""

    def __init__(self) -> None:
        self._asked = -float("inf")

    def ask(self) -> None:
        """A request has come."""
        self._asked = time.monotonic()

    def is_over(self, stop: Event) -> bool:
        """Wait until nothing was asked for a moment; whether `stop` is set, which ends the wait."""
        while not stop.is_set():
            left = self._asked + CALM - time.monotonic()
            if left <= 0:
                return False
            stop.wait(left)
        return True
