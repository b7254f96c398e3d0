"""Reads what a request asks for. Whatever is not as it should be is `Refused`, with a sentence that says what is."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.requests import Request

BODY_BYTES = 64 * 2**10
IMPORT_BYTES = 8 * 2**20  # of labels, some for each of 100 000 latents

Object = dict[str, Any]


class Refused(Exception):
    """An answer with an HTTP status and a sentence instead of a result."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.sentence, self.status = sentence, status


def whole(text: str, name: str, low: int, high: int) -> int:
    """The whole number between `low` and `high` that a text from a URL is."""
    if not re.fullmatch("[0-9]{1,18}", text) or not low <= int(text) <= high:
        raise Refused(f"{name} must be a whole number from {low} to {high}; got {_shown(text)}.")
    return int(text)


def query_whole(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """A parameter of the query that is a whole number; `default` where it is missing."""
    return whole(query[name], name, low, high) if name in query else default


def query_number(query: Mapping[str, str], name: str, default: float) -> float:
    """A parameter of the query that is a finite number; `default` where it is missing or empty."""
    text = query.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) or not math.isfinite(float(text)):
        raise Refused(f"{name} must be a number; got {_shown(text)}.")
    return float(text)


async def body(request: Request, limit: int = BODY_BYTES) -> Object:
    """The JSON object that a request brings.

    Raises:
        Refused: not application/json (415), more than `limit` bytes (413), or no JSON object.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(f"content-type must be application/json; got {_shown(kind)}.", 415)
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:12]) > limit:
        raise Refused(f"the body may have {limit:,} bytes.", 413)
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise Refused(f"the body may have {limit:,} bytes.", 413)
    return _object(bytes(data))


def _object(data: bytes) -> Object:
    def refuse(name: str) -> NoReturn:
        raise Refused(f"{name} is no number of JSON.")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise Refused("the body is nested too deeply.") from None
    except UnicodeError:
        raise Refused("the body must be valid UTF-8, without halves of surrogate pairs.") from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise Refused(f"the body is not JSON: {str(error)[:100]}.") from None
    if not isinstance(value, dict):
        raise Refused("the body must be a JSON object.")
    return value


def only(values: Object, *names: str) -> None:
    """Refuse names that nothing reads."""
    if strange := [name for name in values if name not in names]:
        raise Refused(f"unknown field {_shown(strange[0])}; fields: {', '.join(names)}.")


def text(values: Object, name: str, most: int, default: str | None = None) -> str:
    """A text of at most `most` characters."""
    value = values.get(name, default)
    if not isinstance(value, str):
        raise Refused(f"{name} must be a text; got {_shown(value)}.")
    if len(value) > most:
        raise Refused(f"{name} may have {most:,} characters; got {len(value):,}.")
    return value


def integer(values: Object, name: str, low: int, high: int, default: int | None = None) -> int:
    """A whole number between `low` and `high`."""
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused(f"{name} must be a whole number from {low} to {high}; got {_shown(value)}.")
    return value


def number(values: Object, name: str, low: float, high: float, default: float | None = None) -> float:
    """A number between `low` and `high`."""
    value = values.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise Refused(f"{name} must be a number from {low:g} to {high:g}; got {_shown(value)}.")
    return float(value)


def items(values: Object, name: str, most: int) -> list[Any]:
    """A list of at most `most` things; empty where it is missing."""
    value = values.get(name, [])
    if not isinstance(value, list):
        raise Refused(f"{name} must be a list; got {_shown(value)}.")
    if len(value) > most:
        raise Refused(f"{name} may have {most} entries; got {len(value)}.")
    return value


def _shown(value: Any) -> str:
    """A value short enough for a sentence."""
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of more than 30 digits"
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
