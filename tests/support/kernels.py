"""What kernel tests share: device, launches with poisoned outputs, tensors between fences.

Without a GPU the kernels run in Triton's interpreter (`conftest.py` asks for it before Triton is
imported). With one, the same tests run on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: distance to a reference computed in fp32 and rounded once
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

triton = pytest.importorskip("triton", reason="kernels need triton, which has no wheels here")

if not GPU:
    import triton.language as tl

    from . import interpreter

    if type(tl.sum).__name__ != "InterpretedFunction":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    interpreter.install()


def fenced(t: Tensor) -> Tensor:
    """A copy of t inside a larger storage: a read just outside of it is out of bounds. Offset by
    a multiple of 16 bytes, so that alignment stays as it was."""
    pad = 64
    store = torch.empty(t.numel() + 2 * pad, dtype=t.dtype, device=t.device)
    store.fill_(float("nan") if t.is_floating_point() else 1)
    out = store[pad : pad + t.numel()].view(t.shape)
    return out.copy_(t)


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (or a huge integer) inside, so that an unwritten output shows."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        if out.is_floating_point():
            return out.fill_(float("nan"))
        return out.fill_(True if out.dtype == torch.bool else torch.iinfo(out.dtype).max)

    torch.empty = empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = real  # type: ignore[assignment]


def launched(function: Any, *args: Any) -> Any:
    """`function` of vtc_kernels.launch on fenced copies of its tensors, outputs poisoned."""

    def guard(value: Any) -> Any:
        if isinstance(value, list):
            return [guard(v) for v in value]
        plain = isinstance(value, Tensor) and value.is_contiguous() and not GPU
        return fenced(value) if plain else value

    with poisoned():
        return function(*(guard(a) for a in args))


def indices(b: int, n: int, k: int, seed: int = 0) -> Tensor:
    """[b, k] ascending, without repetition."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(n, generator=g)[:k].sort().values for _ in range(b)]
    return torch.stack(rows).to(DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(DEVICE, dtype)


def close(out: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Equal up to one rounding of out's dtype; `expected` is fp32 or wider."""
    tolerance = TOLERANCE[out.dtype] * factor
    torch.testing.assert_close(out.double(), expected.double(), rtol=tolerance, atol=tolerance)
