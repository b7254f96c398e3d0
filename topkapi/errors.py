"""The one exception that means "the user can mend this"; the command line prints it as one line and exits with 2."""

import shlex
import signal


class TopkapiError(Exception):
    """Input that Topkapi cannot use. The message says what was given, what was wanted and the next step.

    Not a ValueError: those are bugs of ours, or of a library, and keep their traceback.
    """


class Interrupted(BaseException):
    """A signal asked to stop; everything up to the last step is saved. No Exception: it is no error."""

    def __init__(self, signal_number: int, state: str = "no step was done; run the same command again") -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}: {state}.")
        self.signal_number = signal_number


def command_line(*words: object) -> str:
    """The next step as a shell takes it: topkapi and these words, of which paths may have spaces."""
    return shlex.join(["topkapi", *map(str, words)])
