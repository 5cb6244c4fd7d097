"""bipartite_match: the most similar token of another set (ToMe, tomesd, absorbing of losses)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import TRITON, on_gpu, operator
from ..token_map import segments
from .expand import rows_at
from .merge import segment_merge

if TYPE_CHECKING or TRITON:
    from ..launch import match as launch

#: rows of a similarity block that the torch formula holds at once
BLOCK = 256
#: norms are at least this
TINY = 1e-12
#: the widest rows that the kernel was made for
WIDEST = 8192


def bipartite_match(
    a: Tensor, b: Tensor, valid: Tensor | None = None, protect: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For every token of `a` the token of `b` with the highest cosine, in fp32.

    The Na x Nb similarities are never stored (a CPU holds Nb x 256 of them). Equal cosines go to
    the lowest index; NaN counts as highest, as it does in torch. A zero vector has cosine 0 with
    everything: norms are at least 1e-12. Differentiable in the cosine; the index is not.

    fp64 and rows wider than 8192 run the torch formula on a GPU too.

    Args:
        a: [B, Na, D], b: [B, Nb, D], floating point and of one dtype; D at least 1. Both may be
            strided (x[:, ::2] and x[:, 1::2]); last axes that are contiguous are read in place on
            a GPU.
        valid: [B, Nb] bool, False for tokens of b that nothing may match; None is all.
        protect: [B, Na] bool, True for tokens of a that match nothing; None is none.
    Returns: cosine [B, Na] fp32 (fp64 for fp64) and index [B, Na] int64. Protected tokens, and all
        tokens of a row without valid ones, have cosine -inf and index 0.
    """
    _check(a, b, valid, protect)
    run = bipartite if on_gpu(a, b) else reference
    return run(a, b, valid, protect)


def _check(a: Tensor, b: Tensor, valid: Tensor | None, protect: Tensor | None) -> None:
    shapes = f"a of shape {tuple(a.shape)} and b of shape {tuple(b.shape)}"
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ValueError(
            f"{shapes}: both need three axes, [batch, tokens, width], of the same batch and width"
        )
    if a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(f"a is {a.dtype} and b {b.dtype}: give both in one floating point dtype")
    for name, flags, tokens in (("valid", valid, b), ("protect", protect, a)):
        if flags is None:
            continue
        if flags.dtype != torch.bool or flags.shape != tokens.shape[:2]:
            raise ValueError(
                f"{name} is {flags.dtype} of shape {tuple(flags.shape)}, it must be torch.bool of "
                f"shape {tuple(tokens.shape[:2])}: one flag per token of "
                f"{'b' if tokens is b else 'a'}"
            )


def reference(
    a: Tensor, b: Tensor, valid: Tensor | None, protect: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Blocks of tokens of a against all of b."""
    rows, na = a.shape[:2]
    wide = torch.promote_types(a.dtype, torch.float32)
    if b.shape[1] == 0:
        shape = rows, na
        best = torch.full(shape, float("-inf"), dtype=wide, device=a.device)
        return best, torch.zeros(shape, dtype=torch.int64, device=a.device)
    unit = F.normalize(b.to(wide), dim=-1, eps=TINY).transpose(1, 2)
    found = []
    for start in range(0, na, BLOCK) if na > BLOCK else (0,):
        block = a[:, start : start + BLOCK] if na > BLOCK else a
        cosine = F.normalize(block.to(wide), dim=-1, eps=TINY) @ unit
        if valid is not None:
            cosine = cosine.masked_fill(~valid[:, None], float("-inf"))
        found.append(cosine.max(-1))
    best, index = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    if protect is not None:
        best = best.masked_fill(protect, float("-inf"))
        index = index.masked_fill(protect, 0)
    return best, index


def _bipartite(
    a: Tensor, b: Tensor, valid: Tensor | None, protect: Tensor | None
) -> tuple[Tensor, Tensor]:
    run = launch.bipartite if on_gpu(a) and a.shape[2] <= WIDEST else reference
    return run(a, b, valid, protect)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output)


def _backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    a, b, cosine, index = ctx.saved_tensors
    slot = torch.where(cosine == float("-inf"), -1, index)
    unit_a, unit_b = (F.normalize(t.to(cosine.dtype), dim=-1, eps=TINY) for t in (a, b))
    pull = rows_at(unit_b, slot) * g[..., None]
    grad_a = unit_gradient(a, pull).to(a.dtype)
    push, nb = unit_a * g[..., None], b.shape[1]
    push, _ = segment_merge(push, None, slot, *segments(slot, nb), nb, False)
    return grad_a, unit_gradient(b, push).to(b.dtype), None, None


def unit_gradient(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of F.normalize(x) for g, in g's dtype."""
    x = x.to(g.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / norm.clamp(min=TINY)
    along = unit * (unit * g).sum(-1, keepdim=True)
    return (g - torch.where(norm >= TINY, along, 0.0)) / norm.clamp(min=TINY)


bipartite = operator(_bipartite)
bipartite.register_autograd(_backward, setup_context=_setup)
