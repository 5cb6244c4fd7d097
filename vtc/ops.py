"""Moving tokens. The only file of vtc that imports `vtc_kernels`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from vtc_kernels import (
    Norm,
    TwoLayer,
    algebraic_sensitivity,
    difference_sensitivity,
    gather_rows,
    hash_uniform,
    jacobian_products,
    jacobian_sensitivity,
    low_rank,
    max_min_select,
    merge_rows,
    nearest_kept,
    row_attention,
    triangular_root,
    unit_directions,
)

from .plan import Plan

__all__ = [
    "Norm",
    "TwoLayer",
    "absorb",
    "algebraic_sensitivity",
    "apply",
    "difference_sensitivity",
    "gather_rows",
    "gather_tokens",
    "hash_uniform",
    "jacobian_products",
    "jacobian_sensitivity",
    "low_rank",
    "max_min_select",
    "merge_rows",
    "nearest_kept",
    "row_attention",
    "triangular_root",
    "unit_directions",
]


def apply(plan: Plan, x: Tensor) -> Tensor:
    """Reduce x [R, N, ...] to [R, M, ...]: a gather, or a weighted merge when the plan says so."""
    if plan.assign is None or plan.weight is None:
        return gather_rows(x, plan.index)
    return merge_rows(x, plan.assign, plan.weight, plan.m)


def gather_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather along token axis `dim` (negative) with index [B, K]; the batch axis is `dim - 1`.

    Axes before the batch (the planes of mRoPE) and after the tokens are carried along; a batch
    axis of one is broadcast.
    """
    b = index.shape[0]
    axis = x.ndim + dim
    lead, rest = x.shape[: axis - 1], x.shape[axis + 1 :]
    if x.shape[axis - 1] != b:
        x = x.expand(*lead, b, *x.shape[axis:])
    planes = lead.numel()
    flat = gather_rows(x.reshape(planes * b, x.shape[axis], *rest), index.repeat(planes, 1))
    return flat.reshape(*lead, b, index.shape[1], *rest)


def absorb(
    plan: Plan, x: Tensor, valid: Tensor, size: Tensor | None, threshold: float, average: bool
) -> Plan:
    """Give every dropped token to its most similar kept token (cosine of x above `threshold`).

    Kept tokens count how many original tokens they stand for; with `average` they also become
    the size-weighted mean. Tokens the method merged itself stay where it put them.
    """
    r, n = x.shape[:2]
    own = plan.destination()
    near, cosine = nearest_kept(x, plan.index, plan.slots)
    slot = torch.where((own < 0) & valid & (cosine > threshold), near, own)
    mass = torch.ones(r, n, device=x.device) if size is None else size
    total = torch.zeros(r, plan.m, device=x.device)
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
