"""Arrays as ``.npy`` files in memory; nothing is unpickled, and a header cannot ask for memory that is not there."""

from __future__ import annotations

import io
import math
import tokenize
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOT_AN_ARRAY", "decode_array", "encode_array"]

NOT_AN_ARRAY = (ValueError, TypeError, KeyError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError)
"""What `decode_array` raises for damaged files: numpy's reader of headers lets all of these through."""


def encode_array(data: NDArray[Any]) -> bytes:
    """An array as the content of a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, data, allow_pickle=False)
    return buffer.getvalue()


def decode_array(content: bytes) -> NDArray[Any]:
    """What `encode_array` wrote, as a view of ``content``: a header cannot ask for more memory than there is data."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"a .npy file of version {version}")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("a pickle")
    data: NDArray[Any] = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    return data.reshape(shape, order="F" if by_columns else "C")
