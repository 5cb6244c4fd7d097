"""Rotary tables of the tokens that are left."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import UnsupportedModel
from ...hooks import Installed

Tables = tuple[Tensor, Tensor]


def each(index: Tensor, tables: Tables) -> Tables:
    """Wan: cos and sin [1, N, 1, D] -> [B, K, 1, D] at index [B, K]."""
    if any(table.ndim != 4 or table.shape[2] != 1 for table in tables):
        raise UnsupportedModel(
            f"rotary tables {[tuple(t.shape) for t in tables]}, expected [1, tokens, 1, width]."
        )
    cos, sin = ops.gather_columns(
        index, *((t[:, :, 0].expand(len(index), -1, -1), -2) for t in tables)
    )
    return cos[:, :, None], sin[:, :, None]


class Shared:
    """Flux applies one table [T + N, D] to all samples of a batch. When samples keep different
    tokens the model is given none, and what norms queries and keys rotates them here: these modules
    are the last to see them."""

    def __init__(self, tables: Tables, text: int, index: Tensor) -> None:
        rows = len(index)
        front = torch.arange(text, device=index.device).expand(rows, -1)
        self.image = self._at(tables, index + text)
        self.prompt = self._at(tables, front)
        self.all = self._at(tables, torch.cat([front, index + text], 1))

    @staticmethod
    def _at(tables: Tables, index: Tensor) -> Tables:
        cos, sin = (table[index][:, :, None] for table in tables)
        return cos, sin


def rotated(tables: Tables, x: Tensor) -> Tensor:
    """x [B, n, H, D] by cos and sin [B, n, 1, D] of interleaved pairs."""
    cos, sin = tables
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def install(attention: Any, current: Callable[[], Shared | None], on: Installed) -> None:
    """Hook the norms of queries and keys of one attention of Flux; `current`: tables of the running
    forward, None where the model has its own."""
    joint = getattr(attention, "norm_added_q", None) is not None
    places = {"norm_q": "image", "norm_k": "image"} if joint else {"norm_q": "all", "norm_k": "all"}
    if joint:
        places |= {"norm_added_q": "prompt", "norm_added_k": "prompt"}

    def turn(which: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        tables = current()
        return None if tables is None else rotated(getattr(tables, which), output)

    for name, which in places.items():
        on.after(getattr(attention, name), partial(turn, which))
