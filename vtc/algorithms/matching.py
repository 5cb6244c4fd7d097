"""Bipartite matching: the most similar tokens of one part merge into those of another."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..plan import Plan

Part = slice | Tensor


def merge_pairs(
    keys: Tensor,
    size: Tensor,
    valid: Tensor,
    counts: tuple[int, ...],
    k: tuple[int, ...],
    a: Part,
    b: Part,
) -> Plan:
    """One matching: row r goes from counts[r] to k[r] tokens, at least those of b.

    Args:
        keys: [R, N, C], compared by cosine. size: [R, N] weights of the means.
        valid: [R, N] bool, counts: how many that are.
        a, b: places of the tokens that may merge, and of those that they merge into.
    """
    even = min(counts) == valid.shape[1]
    real = (None, None) if even else (valid[:, b].contiguous(), ~valid[:, a])
    cosine, partner = ops.bipartite_match(keys[:, a], keys[:, b], *real)
    stays = torch.full(valid.shape, float("inf"), device=keys.device, dtype=torch.float32)
    stays[:, a] = -cosine
    same = min(k) == max(k)
    many = None if same else torch.tensor(k, device=keys.device)
    kept = ops.select_topk(stays, max(k), valid=None if even else valid, counts=many)
    slot = kept.inverse.long()
    goes_to = slot[:, b].gather(1, partner)
    slot[:, a] = torch.where((slot[:, a] < 0) & valid[:, a], goes_to, slot[:, a])
    mass = size if even else torch.where(valid, size, 0.0)
    total = mass.new_zeros(len(k), max(k)).scatter_add(1, slot.clamp(min=0), mass)
    weight = mass / total.gather(1, slot.clamp(min=0)).clamp(min=1e-12)
    return Plan(kept.index, valid.shape[1], None if same else k, slot, weight, total)
