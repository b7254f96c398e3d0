"""The one exception that means "the user can mend this"; the command line prints it as one line and exits with 2."""

import shlex


class TopkapiError(Exception):
    """Input that Topkapi cannot use. The message says what was given, what was wanted and the next step.

    Not a ValueError: those are bugs of ours, or of a library, and keep their traceback.
    """


def command_line(*words: object) -> str:
    """The next step as a shell takes it: topkapi and these words, of which paths may have spaces."""
    return shlex.join(["topkapi", *map(str, words)])
