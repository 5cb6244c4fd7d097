"""Moving tokens. The only file of vtc that imports `vtc_kernels`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from vtc_kernels import (
    Norm,
    PackMap,
    TokenMap,
    TwoLayer,
    bipartite_match,
    difference_sensitivity,
    expand_tokens,
    gather_tokens,
    hash_uniform,
    jacobian_products,
    jacobian_sensitivity,
    low_rank,
    maxmin_tokens,
    merge_tokens,
    pack_varlen,
    qrow_scores,
    segments,
    select_topk,
    temporal_cosine,
    triangular_root,
    unit_directions,
    unpack_varlen,
    zoo_sensitivity,
)

from .plan import Plan

__all__ = [
    "Norm",
    "PackMap",
    "TwoLayer",
    "absorb",
    "apply",
    "bipartite_match",
    "difference_sensitivity",
    "gather_columns",
    "gather_rows",
    "gather_tokens",
    "hash_uniform",
    "jacobian_products",
    "jacobian_sensitivity",
    "low_rank",
    "maxmin_tokens",
    "pack_varlen",
    "put_rows",
    "qrow_scores",
    "restore",
    "select_topk",
    "temporal_cosine",
    "triangular_root",
    "unit_directions",
    "unpack_varlen",
    "zoo_sensitivity",
]


def apply(plan: Plan, x: Tensor) -> Tensor:
    """Reduce x [R, N, ...] to [R, M, ...]: a gather, or a weighted merge when the plan says so."""
    if plan.assign is None or plan.weight is None:
        return gather_rows(x, plan.index)
    to = TokenMap(plan.index, plan.assign.int(), *segments(plan.assign, plan.m))
    return merge_tokens(x, to, plan.weight, mean=False)[0]


def restore(plan: Plan, y: Tensor, residual: Tensor | None = None) -> Tensor:
    """Back to [R, N, D]: each source token gets its slot's value on top of `residual`, lost ones
    their residual alone (zeros without one)."""
    to = TokenMap(plan.index, plan.destination())
    return expand_tokens(y, to, residual)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, ...] at index [B, K] -> [B, K, ...]."""
    return gather_tokens(index, x)[0]


def put_rows(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """x [B, N, D] with rows y [B, K, D] in place of those at index [B, K], which are different."""
    return x.scatter(1, index[..., None].expand_as(y), y)


def gather_columns(index: Tensor, *parts: tuple[Tensor, int]) -> list[Tensor]:
    """Several tensors at the columns index [B, K], in one launch.

    parts: (x, token axis counted from the end). The batch axis is the one before it (a batch of
    one is broadcast); planes in front of it, as mRoPE's positions have, are carried along.
    """
    front = [x.movedim(dim - 1, 0) for x, dim in parts]
    axes = [x.ndim + dim for x, dim in parts]
    out = gather_tokens(index, *front, axis=axes)
    return [y.movedim(0, dim - 1) for y, (_, dim) in zip(out, parts, strict=True)]


def absorb(
    plan: Plan, x: Tensor, valid: Tensor, size: Tensor | None, threshold: float, average: bool
) -> Plan:
    """Give every dropped token to its most similar kept token (cosine of x above `threshold`).

    Kept tokens count how many original tokens they stand for; with `average` they also become
    the size-weighted mean. Tokens the method merged itself stay where it put them.
    """
    r, n = x.shape[:2]
    own = plan.destination()
    cosine, near = bipartite_match(x, gather_rows(x, plan.index), valid=plan.slots)
    slot = torch.where((own < 0) & valid & (cosine > threshold), near, own)
    mass = torch.ones(r, n, device=x.device, dtype=torch.float32) if size is None else size
    total = torch.zeros(r, plan.m, device=x.device, dtype=torch.float32)
    total = total.scatter_add(1, slot.clamp(min=0), torch.where(slot >= 0, mass, 0.0))
    weight = plan.weight
    if average:
        weight = mass / total.gather(1, slot.clamp(min=0)).clamp(min=1e-12)
        if plan.weight is not None:  # what the method merged keeps the method's weights
            ones = (own >= 0).to(mass.dtype)
            members = torch.zeros_like(total).scatter_add(1, own.clamp(min=0), ones)
            merged = (own >= 0) & (members.gather(1, own.clamp(min=0)) > 1)
            weight = torch.where(merged, plan.weight, weight)
    assign = slot if average else plan.assign
    return replace(plan, assign=assign, weight=weight, size=total)
