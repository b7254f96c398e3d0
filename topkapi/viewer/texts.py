"""Tokens as texts, one for each, that together are the text they encode."""

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

from topkapi.evaluate.contexts import CUT, visible
from topkapi.explore.prompts import inside

LONGEST_CHARACTER = 4  # bytes in UTF-8, hence tokens that may share one


class Texts:
    """What a tokenizer makes of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = Lock()  # the tokenizers of transformers fail where two threads use one at a time
        self._decoded = lru_cache(2**16)(self._decode)  # the same pairs of tokens come again and again

    def each(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, spaces included.

        A token's text is what it adds to that of the tokens before it, as decoders drop spaces at a beginning. A
        character that several tokens make up is shown at the first of them, and the others show U+FFFD, as pieces
        without the rest do. Line breaks and other control characters become visible signs.
        """
        texts, before, start = [CUT] * len(ids), (), 0
        for end in range(1, len(ids) + 1):
            group = tuple(ids[start:end])
            added = self._decoded(before + group).removeprefix(self._decoded(before))
            if added.endswith(CUT) and len(group) < LONGEST_CHARACTER and end < len(ids):
                continue
            texts[start] = visible(added) or self.name(group[0])
            before, start = group, end
        return texts

    def alone(self, token: int) -> str:
        """The text of one token without any before it."""
        return self.each([token])[0]

    def name(self, token: int) -> str:
        """What the tokenizer calls a token that has no text."""
        with self._lock:
            return visible(str(self.tokenizer.convert_ids_to_tokens(token)))

    def ids(self, text: str, whole: bool = True) -> list[int]:
        """The tokens of a text; of a whole one with special ones that the tokenizer puts before it."""
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=whole)["input_ids"])

    def ids_inside(self, text: str) -> list[int]:
        """The tokens of a text that is a part of one."""
        return inside(lambda some: self.ids(some, whole=False), text)

    def _decode(self, ids: tuple[int, ...]) -> str:
        if not ids:
            return ""
        with self._lock:
            return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
