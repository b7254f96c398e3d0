"""Columns of numbers as one binary file, which a browser maps onto typed arrays without parsing.

    8 bytes   length of the header, little-endian
    header    JSON: {..., "columns": [{"name", "dtype", "offset"}, ...]}, padded with spaces
    arrays    little-endian, each at a multiple of 8 bytes; `offset` counts from the beginning of the file

The table that the page shows is such a file (`topkapi.viewer.columns`), and so is the index that is kept beside a study
(`topkapi.viewer.index`).
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from topkapi.viewer.answers import to_json

DTYPES = {"f4": "<f4", "u4": "<u4", "u1": "|u1"}


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The file of a header and some arrays, each of one of DTYPES and of the header's n_latents."""
    kind_of = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
    kinds = {name: kind_of[array.dtype] for name, array in arrays.items()}
    columns = [{"name": name, "dtype": kind, "offset": 0} for name, kind in kinds.items()]
    length = _padded(len(to_json({**header, "columns": columns})) + 20 * len(columns))  # offsets have up to 20 digits
    offset = 8 + length
    for column in columns:
        column["offset"] = offset
        offset += _padded(arrays[column["name"]].nbytes)
    text = to_json({**header, "columns": columns}).ljust(length)
    parts = [length.to_bytes(8, "little"), text]
    for array in arrays.values():
        parts += [array.tobytes(), bytes(_padded(array.nbytes) - array.nbytes)]
    return b"".join(parts)


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a file that `pack` made. Raises ValueError where it is not one, or is cut."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    try:
        columns = header.pop("columns")
        rows = header["n_latents"]
        arrays = {c["name"]: np.frombuffer(data, DTYPES[c["dtype"]], rows, c["offset"]) for c in columns}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no table: {error!r}") from None
    return header, arrays


def _padded(length: int) -> int:
    return -(-length // 8) * 8
