"""Answers as JSON: numpy's numbers as Python's, what is not finite as null; and the threads that find them."""

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

LARGEST = 1e300
AT_ONCE = 4  # slow answers of one kind; there are eight kinds, and 40 threads


def finite(value: Any) -> float | int | None:
    """A value that was read from a file, if it is a number of any use, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and -LARGEST <= value <= LARGEST else None


def plain(value: Any) -> Any:
    """`value` out of dicts, lists, strings and Python's numbers alone; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any) -> bytes:
    """JSON in UTF-8. What is no text (half of a surrogate pair, of a file's name say) becomes a question mark."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class Answer(Response):
    """A JSON answer that no cache keeps, as labels and the model's state change."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(content, status_code, {"cache-control": "no-store", **(headers or {})})

    def render(self, content: Any) -> bytes:
        return to_json(content)


def slow(find: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """What `find` returns, found in AT_ONCE threads at most: whoever waits beyond them takes no thread from others."""
    places = asyncio.Semaphore(AT_ONCE)

    async def wait(*arguments: Any) -> Any:
        async with places:
            return await run_in_threadpool(find, *arguments)

    return wait
