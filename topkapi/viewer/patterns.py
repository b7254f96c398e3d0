"""Regular expressions that a person types, searched for in a process of their own.

Some expressions take for ever on some texts, and Python's matcher can neither be interrupted nor lets other threads
run meanwhile. A process can be ended.
"""

import json
import re
import subprocess
import sys

from topkapi.errors import TopkapiError

SECONDS = 5.0
SEARCH = (
    "import json, re, sys\n"
    "pattern, texts = json.load(sys.stdin)\n"
    "print(sum(re.search(pattern, text) is not None for text in texts))"
)


class Pattern:
    """A regular expression. Raises TopkapiError where a text is none."""

    def __init__(self, text: str) -> None:
        try:
            re.compile(text)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise TopkapiError(f"{text[:60]!r} is no regular expression: {error}.") from None
        self.text = text

    def count(self, texts: list[str]) -> int:
        """In how many of the texts it occurs. Raises TopkapiError where that takes longer than some seconds."""
        try:
            found = subprocess.run(
                [sys.executable, "-I", "-c", SEARCH],
                input=json.dumps([self.text, texts]),
                capture_output=True,
                encoding="utf-8",
                timeout=SECONDS,
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise TopkapiError(f"the pattern {self.text[:60]!r} takes too long to search for.") from None
        return int(found.stdout)
