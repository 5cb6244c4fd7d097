"""What launches share: rows as machine words, strides in units, warps per row."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

#: lanes of a warp
WARP = 64 if torch.version.hip else 32
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


def as_words(*tensors: Tensor) -> list[Tensor]:
    """The same memory as the widest integers (4, 2 or 1 bytes) that fit rows, strides and offsets
    of all tensors. Last axes must be contiguous, or of size 1."""
    size = 4
    tensors = tuple(
        x if x.stride(-1) == 1 else x.as_strided(x.shape, (*x.stride()[:-1], 1)) for x in tensors
    )
    for x in tensors:
        lengths = (x.shape[-1], x.storage_offset(), *(s for s in x.stride()[:-1]))
        while any(length * x.element_size() % size for length in lengths):
            size //= 2
    return [x.view(_WORDS[size]) for x in tensors]


def unit(x: Tensor, *strides: int) -> int:
    """The most elements, up to 16 bytes, that divide all these strides (and the row length)."""
    most = max(1, 16 // x.element_size())
    while any(s % most for s in (*strides, x.shape[-1])):
        most //= 2
    return most


def contiguous_rows(x: Tensor) -> Tensor:
    """x with a contiguous last axis."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def warps(row_bytes: int, rows: int = 1) -> int:
    """Warps that move `rows` rows with 16 bytes per lane: 1 to 8."""
    full = int(row_bytes) * rows // (16 * WARP)
    return max(1, min(8, triton.next_power_of_2(full + 1) // 2))


def power(n: int) -> int:
    """The next power of two, at least 1."""
    return triton.next_power_of_2(max(1, int(n)))


def tile(width: int, elements: int = 2048, columns: int = 1024) -> tuple[int, int]:
    """(rows, columns) of a tile of about `elements` elements, for rows of `width`."""
    wide = min(power(width), columns)
    return max(1, elements // wide), wide
