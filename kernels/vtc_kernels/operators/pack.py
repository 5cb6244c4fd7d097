"""Packed rows: the kept tokens of a ragged batch one after another, for varlen attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.library import custom_op, get_ctx
from torch.nn import functional as F

from ..backend import OPERATORS, TRITON, on_gpu, operator
from .expand import expand
from .expand import reference as expand_reference

if TYPE_CHECKING or TRITON:
    from ..launch import pack as launch


@dataclass(frozen=True)
class PackMap:
    """Where the kept tokens of a [B, N] mask lie when they are packed without gaps.

    Attributes:
        source: [T] int32, flat token b * N + n of each packed row; -1 behind the last one.
        inverse: [B, N] int32, the packed row of each token; -1 when it is lost.
        cu_seqlens: [B + 1] int32, row b is packed in cu_seqlens[b] : cu_seqlens[b + 1].
        max_seqlen: the most tokens of a row, or N where finding out would wait for the GPU (with a
            capacity, or compiled). Varlen attention needs no more than a bound.
    """

    source: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, keep: Tensor, capacity: int | None = None) -> PackMap:
        """Pack the tokens of `keep` [B, N] bool, in order.

        Args:
            keep: which tokens stay; a row may lose all of them, and rows may be strided.
            capacity: T, the number of packed rows. Without it T is the number of kept tokens,
                which the host waits for once (torch.compile makes it a size of its own). With it
                nothing waits and shapes are static: rows left over hold no token (source -1, zeros
                when packed) and belong to no sequence. Tokens beyond it are an error on a CPU; on a
                GPU, and compiled, they are lost from the end.
        """
        if keep.ndim != 2 or keep.dtype != torch.bool:
            raise ValueError(
                f"keep is {keep.dtype} of shape {tuple(keep.shape)}: it must be bool [B, N]"
            )
        b, n = keep.shape
        compiling = torch.compiler.is_compiling()
        if capacity is None and compiling:
            source, inverse, starts = pack_ragged(keep)
            return cls(source, inverse, starts, n)
        starts = _starts(keep)
        if capacity is None:
            total, longest = _sizes(starts)
        else:
            total, longest = capacity, n
            if capacity < 0:
                raise ValueError(f"a capacity is at least 0, not {capacity}")
            if not compiling and keep.device.type == "cpu" and int(starts[-1]) > capacity:
                raise ValueError(
                    f"{int(starts[-1])} tokens are kept and capacity={capacity} rows are there for "
                    f"them: raise the capacity, or leave it out to count the tokens"
                )
            starts = starts.clamp(max=capacity)
        if capacity is None and keep.device.type == "cpu":
            source, inverse = _found(keep)
        else:
            run = pack if on_gpu(keep) else reference
            source, inverse = run(keep, starts, total, capacity is None)
        return cls(source, inverse, starts, longest)


def pack_varlen(x: Tensor, to: PackMap) -> Tensor:
    """x [B, N, ...] -> [T, ...], the kept tokens of all rows; exact copies in any dtype.

    Differentiable; its adjoint is `unpack_varlen`. A GPU runs the kernel of expand_tokens; fp64
    takes the torch formula. Rows behind the last token are zero.
    """
    if x.shape[:2] != to.inverse.shape:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not go with a map of {tuple(to.inverse.shape)} "
            f"tokens: its first two axes must be those"
        )
    flat, rest = x.reshape(1, x.shape[0] * x.shape[1], x.shape[2:].numel()), x.shape[2:]
    if on_gpu(x):
        return expand(flat, to.source[None], None, None, None).reshape(-1, *rest)
    return _take(flat[0], to.source).reshape(-1, *rest)


def unpack_varlen(y: Tensor, to: PackMap, fill: Tensor | None = None) -> Tensor:
    """y [T, ...] -> [B, N, ...], every kept token in its place; exact copies in any dtype.

    Differentiable; without `fill` its adjoint is `pack_varlen`. A GPU runs the kernel of
    expand_tokens; fp64 takes the torch formula.

    Args:
        fill: what lost tokens hold, of the shape of a token (or broadcast to it); None is zeros.
    """
    if y.shape[:1] != to.source.shape:
        raise ValueError(
            f"y of shape {tuple(y.shape)} does not go with a map of {to.source.shape[0]} packed "
            f"rows: its first axis must be those"
        )
    (b, n), rest = to.inverse.shape, y.shape[1:]
    if fill is not None:
        fill = fill.expand(rest).reshape(-1)
    run = expand if on_gpu(y, fill) else expand_reference
    out = run(y.reshape(1, -1, rest.numel()), to.inverse.reshape(1, -1), None, None, fill)
    return out.reshape(b, n, *rest)


def _take(rows: Tensor, source: Tensor) -> Tensor:
    """rows [M, D] at `source` [T], zero where it is negative: only at the end, if anywhere."""
    compiling = torch.compiler.is_compiling()
    if not compiling and (source.numel() == 0 or int(source[-1]) >= 0):
        return rows.index_select(0, source)
    if rows.shape[0] == 0:
        return rows.new_zeros(source.shape[0], rows.shape[1])
    out = rows.index_select(0, source.clamp(min=0))
    return torch.where(source[:, None] >= 0, out, out.new_zeros(()))


def _starts(keep: Tensor) -> Tensor:
    """[B + 1] int32: packed rows before each row, and all of them."""
    return F.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def _sizes(starts: Tensor) -> tuple[int, int]:
    """Kept tokens of all rows and of the longest one, by one transfer."""
    if starts.shape[0] == 1:
        return 0, 0
    total, longest = torch.stack([starts[-1], starts.diff().amax()]).tolist()
    return total, longest


def _found(keep: Tensor) -> tuple[Tensor, Tensor]:
    """source and inverse where the data may decide how long they are."""
    source = keep.reshape(-1).nonzero()[:, 0]
    inverse = torch.full((keep.numel(),), -1, dtype=torch.int32, device=keep.device)
    row = torch.arange(source.shape[0], dtype=torch.int32, device=keep.device)
    return source.to(torch.int32), inverse.index_copy_(0, source, row).view(keep.shape)


def reference(keep: Tensor, starts: Tensor, total: int, full: bool) -> tuple[Tensor, Tensor]:
    """keep [B, N], starts [B + 1] -> source [total] and inverse [B, N]. `full`: no row of the
    total is left over, and none is missing."""
    flat = keep.reshape(-1)
    source = torch.nonzero_static(flat, size=total, fill_value=-1)[:, 0].to(torch.int32)
    row = flat.cumsum(0, dtype=torch.int32) - 1
    here = flat if full else flat & (row < total)
    return source, torch.where(here, row, -1).reshape(keep.shape)


def _pack(keep: Tensor, starts: Tensor, total: int, full: bool) -> tuple[Tensor, Tensor]:
    run = launch.pack if on_gpu(keep) else reference
    return run(keep, starts, total, full)


def _pack_ragged(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """source, inverse and cu_seqlens: an operator that nothing traces, for T follows from data."""
    starts = _starts(keep)
    run = launch.pack if on_gpu(keep) else reference
    source, inverse = run(keep, starts, int(starts[-1]), True)
    return source, inverse, starts


def _fake(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return keep.new_empty(shape, dtype=torch.int32)

    b, n = keep.shape
    return new(get_ctx().new_dynamic_size()), new(b, n), new(b + 1)


pack = operator(_pack)
pack_ragged = custom_op("vtc_kernels::pack_ragged", _pack_ragged, mutates_args=())
pack_ragged.register_fake(_fake)
OPERATORS["pack_ragged"] = pack_ragged
