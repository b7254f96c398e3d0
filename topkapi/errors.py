"""The one exception that means "the user can mend this"; the command line prints it as one line and exits with 2."""


class TopkapiError(Exception):
    """Input that Topkapi cannot use. The message says what was given, what was wanted and the next step.

    Not a ValueError: those are bugs of ours, or of a library, and keep their traceback.
    """
