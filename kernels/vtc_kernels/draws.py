"""Random numbers that belong to a place, not to a generator."""

from __future__ import annotations

import torch
from torch import Tensor


def hash_uniform(index: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) that depend on index and seed only: no generator, no global random state,
    the same on every device and inside torch.compile. A 32-bit mixing hash."""
    low = 0xFFFFFFFF
    start: int | Tensor = seed
    if torch.compiler.is_compiling():  # where it may be a symbol, whose bits compilers get wrong
        start = torch.full((), seed, dtype=torch.int64, device=index.device)
    x = (index.long() + (start * 0x9E3779B9 & low) + 1) & low
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & low
    return ((x ^ (x >> 16)) >> 8).float() / 2**24
