"""Errors for the caller. Values are looked at on a CPU only: on a GPU that would wait for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tensor(name: str, value: Any, axes: int | None = None) -> None:
    """`value` is a tensor, with this many axes."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {type(value).__name__}: it must be a tensor")
    if axes is not None and value.ndim != axes:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it must have {axes} axes")


def shape(name: str, value: Tensor, wanted: tuple[int, ...], why: str) -> None:
    """`value` has exactly this shape."""
    if value.shape != wanted:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: {why} needs {tuple(wanted)}")


def indices(name: str, value: Any, low: int, high: int) -> None:
    """`value` is [B, K] int32 or int64 with numbers from low up to, not including, high."""
    tensor(name, value, 2)
    if value.dtype not in (torch.int32, torch.int64):
        hint = ", for instance mask.nonzero()" if value.dtype == torch.bool else ""
        raise ValueError(f"{name} is {value.dtype}: token numbers are int32 or int64{hint}")
    if value.device.type != "cpu" or torch.compiler.is_compiling() or not value.numel():
        return
    least, most = map(int, torch.aminmax(value))
    if least < low or most >= high:
        raise ValueError(
            f"{name} goes from {least} to {most}, but {low} to {high - 1} are there to choose from"
            if high > low
            else f"{name} goes from {least} to {most}, but there is nothing to choose from"
        )
