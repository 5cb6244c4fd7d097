"""Readable torch versions, in the form that is fastest on a CPU.

Nothing here grows quadratically with the number of tokens N: an N x N product is formed only
where it is small beside the tokens themselves (N <= D); no attention map is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: rows of a similarity block that are held at once
BLOCK = 256


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, ...], index [B, K] -> [B, K, ...]: one flat index_select, no expanded index."""
    b, n = x.shape[:2]
    if b == 1:
        return x.index_select(1, index[0])
    offset = torch.arange(b, device=x.device)[:, None] * n
    flat = x.reshape(b * n, *x.shape[2:]).index_select(0, (index + offset).reshape(-1))
    return flat.reshape(b, index.shape[1], *x.shape[2:])


def hash_uniform(index: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) that depend on index and seed only: no generator, no global random state,
    the same on every device and inside torch.compile. A 32-bit mixing hash."""
    low = 0xFFFFFFFF
    x = (index.long() + (seed * 0x9E3779B9 & low) + 1) & low
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & low
    return ((x ^ (x >> 16)) >> 8).float() / 2**24


def segments(slot: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """CSR of a slot map [R, N] (-1 = lost): tokens sorted by slot, and where each slot starts.

    Returns (order [R*N] flat token ids, offsets [R*m + 2]); the last segment holds the lost ones.
    """
    r, n = slot.shape
    base = torch.arange(r, device=slot.device)[:, None] * m
    flat = torch.where(slot >= 0, slot + base, r * m).reshape(-1)
    order = torch.argsort(flat, stable=True)
    edges = torch.arange(r * m + 2, device=slot.device)
    return order, torch.searchsorted(flat[order], edges)


def merge_rows(x: Tensor, slot: Tensor, weight: Tensor, m: int) -> Tensor:
    """out[r, j] = sum of weight[r, n] * x[r, n] over slot[r, n] == j. x [R, N, D] -> [R, m, D].

    A CSR sum in fp32: every output row is written once, so the result is deterministic.
    """
    r, n, d = x.shape
    order, offsets = segments(slot, m)
    total = F.embedding_bag(
        order,
        x.reshape(r * n, d).float(),
        offsets,
        mode="sum",
        per_sample_weights=weight.reshape(-1).float()[order],
        include_last_offset=True,
    )
    return total[:-1].reshape(r, m, d).to(x.dtype)


def nearest_kept(x: Tensor, index: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """For every token the kept token of its row with the highest cosine, ties to the lowest slot.

    x [R, N, D], index [R, M], slots [R, M] (False = padding slot) -> slot [R, N], cosine [R, N].
    Runs over blocks of tokens: M x BLOCK similarities are held at once.
    """
    unit = F.normalize(x.float(), dim=-1)
    kept = gather_rows(unit, index).transpose(1, 2)
    best, where = [], []
    for start in range(0, x.shape[1], BLOCK):
        cosine = unit[:, start : start + BLOCK] @ kept
        cosine = cosine.masked_fill(~slots[:, None], float("-inf"))
        value, slot = cosine.max(-1)
        best.append(value)
        where.append(slot)
    return torch.cat(where, 1), torch.cat(best, 1)


def max_min_select(
    x: Tensor,
    valid: Tensor,
    k: int,
    first: Tensor | None = None,
    priority: Tensor | None = None,
) -> Tensor:
    """Greedy max-min diversity under 1 - cosine: repeatedly the token farthest from those taken.

    A running minimum replaces the distance matrix: O(N D) memory. Where the N x N similarities
    are smaller than the tokens themselves (N <= D) they are computed once, which is faster.

    Args:
        x: [R, N, D] features. valid: [R, N]. k: picks per row.
        first: [R] first pick; None starts at the token whose nearest neighbour is farthest.
        priority: [R, N] factor on the distance (None = 1).
    Returns: [R, k] picks in the order they were taken; ties go to the lowest index.
    """
    unit = F.normalize(x.float(), dim=-1)
    rows, n = torch.arange(x.shape[0], device=x.device), x.shape[1]
    gram = unit @ unit.transpose(1, 2) if n <= x.shape[2] else None
    if first is None:
        first = _most_isolated(unit, valid, gram)
    taken = ~valid
    far = torch.full(valid.shape, float("inf"), device=x.device)
    pick, picks = first, [first]
    for _ in range(k - 1):
        taken = taken.scatter(1, pick[:, None], True)
        if gram is not None:
            cosine = gram[rows, pick]
        else:
            cosine = torch.bmm(unit, unit[rows, pick][..., None])[..., 0]
        far = torch.minimum(far, (1 - cosine).clamp(min=0))
        score = far if priority is None else far * priority
        pick = score.masked_fill(taken, float("-inf")).argmax(1)
        picks.append(pick)
    return torch.stack(picks, 1)


def _most_isolated(unit: Tensor, valid: Tensor, gram: Tensor | None) -> Tensor:
    """[R] the token whose nearest other token is farthest away, in blocks of rows."""
    n, step = unit.shape[1], BLOCK if gram is None else unit.shape[1]
    columns = torch.arange(n, device=unit.device)
    closest = []
    for start in range(0, n, step):
        block = unit[:, start : start + step]
        cosine = block @ unit.transpose(1, 2) if gram is None else gram
        own = columns[start : start + step, None] == columns
        cosine.masked_fill_(own | ~valid[:, None], float("-inf"))
        closest.append(cosine.amax(-1))
    distance = (1 - torch.cat(closest, 1)).clamp(min=0)
    return distance.masked_fill(~valid, float("-inf")).argmax(1)


def row_attention(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of a few query rows, without repeating KV heads.

    query [B, H, T, D], key [B, Hkv, L, D], additive mask [B, 1|H, T, L] or None
    -> [B, H, T, L] in fp32.
    """
    b, h, t, d = query.shape
    groups = key.shape[1]
    grouped = query.reshape(b, groups, (h // groups) * t, d)
    logits = (grouped @ key.transpose(2, 3)).reshape(b, h, t, key.shape[2]).float() * scale
    return (logits if mask is None else logits + mask).softmax(-1)
