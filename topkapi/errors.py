"""The one exception that means "the user can mend this"; the command line prints it as one line and exits with 2."""


class TopkapiError(ValueError):
    """Input that Topkapi cannot use. The message says what was given, what was wanted and the next step."""
