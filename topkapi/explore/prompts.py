"""Text to tokens and back, for prompts that a person types."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from topkapi.data.language_model import LanguageModel, quiet
from topkapi.errors import TopkapiError
from topkapi.evaluate.contexts import CUT, visible


def encode(lm: LanguageModel, text: str, n_new: int = 0) -> Int[Tensor, "1 c"]:
    """The tokens of a prompt, with what the tokenizer puts before a text; `n_new` more are to fit behind them.

    Raises:
        TopkapiError: no token, too many for the language model, or no text.
    """
    _require_text(text)
    with quiet():  # or it warns of texts longer than the model's context
        ids = list(lm.tokenizer(text)["input_ids"])
    if not text or not ids:
        raise TopkapiError("the prompt is empty: give some text.")
    if lm.max_context is not None and len(ids) + n_new > lm.max_context:
        more = f" and {n_new} new ones" if n_new else ""
        raise TopkapiError(
            f"the prompt has {len(ids)} tokens{more}; {lm.name} sees at most {lm.max_context}: shorten it."
        )
    return torch.tensor([ids])


def single_token(lm: LanguageModel, text: str) -> int:
    """The one token that a text is.

    Raises:
        TopkapiError: it is none, or several, which the message names; or no text.
    """
    _require_text(text)
    ids = inside(lambda some: _ids(lm, some), text)
    if len(ids) != 1:
        pieces = ", ".join(repr(piece) for piece in texts(lm, ids))
        raise TopkapiError(
            f"{text!r} must be one token; {lm.name} makes {len(ids)} of it{f': {pieces}' if pieces else ''}. "
            "Most words inside of a text begin with their space, as in ' he'."
        )
    return ids[0]


def _require_text(text: str) -> None:
    """Raise TopkapiError for halves of surrogate pairs, as which Python reads bytes of a shell that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TopkapiError(f"{text[:60]!r} is no text: it has bytes that are not UTF-8. Write them in UTF-8.") from None


def inside(ids_of: Callable[[str], list[int]], text: str) -> list[int]:
    """The tokens of a text; the one that it is behind a letter, where by itself it is several.

    Tokenizers that put a space before every text make two tokens of " he", but one of it inside of a text.
    """
    ids = ids_of(text)
    if len(ids) > 1:
        before, after = ids_of("a"), ids_of(f"a{text}")
        ids = after[len(before) :] if after[:-1] == before else ids
    return ids


def _ids(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def texts(lm: LanguageModel, ids: Sequence[int]) -> list[str]:
    """The text of each token, with its space, made safe to print; a piece of a character is the tokenizer's name of it.

    What a token adds to itself, as some tokenizers drop the space of the first one.
    """
    found = []
    for i in ids:
        once, twice = (_decode(lm, [i] * n) for n in (1, 2))
        text = twice[len(once) :] if twice.startswith(once) else once
        found.append(visible(lm.tokenizer.convert_ids_to_tokens(i) if CUT in text or not text else text))
    return found


def _decode(lm: LanguageModel, ids: Sequence[int]) -> str:
    return lm.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def continuation(lm: LanguageModel, ids: Sequence[int]) -> str:
    """The text of sampled tokens, without those that stand for no text."""
    return lm.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
