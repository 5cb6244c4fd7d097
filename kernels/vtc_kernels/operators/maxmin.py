"""maxmin_select, maxmin_tokens: greedy max-min diversity (DivPrune, ZOO-Prune, CDPruner)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import GPUS, TRITON, on_gpu, operator

if TYPE_CHECKING or TRITON:
    from ..launch import maxmin as launch

#: rows of similarities that are held at once, and tokens whose distances fit into one
#: program, half as many with priorities
BLOCK, LIMIT = 256, 16384


def maxmin_select(
    similarity: Tensor,
    k: int,
    valid: Tensor | None = None,
    first: Tensor | None = None,
    priority: Tensor | None = None,
) -> Tensor:
    """k tokens per row, taken one by one: the token whose smallest distance to those taken, times
    its priority, is largest. The distance is 1 - similarity, at least 0; NaN counts as 0.

    Picks are not differentiable; inputs may require grad. On a GPU one program per row takes all
    k tokens, for N up to 16384, or 8192 with `priority`; longer rows and fp64 run the torch
    formula, k times a few launches.

    Args:
        similarity: [B, N, N], symmetric.
        k: picks per row, at most N. It must also not exceed the number of valid tokens of a row;
            that is not checked, for it would wait for the device: what such a row gives behind
            its valid tokens is token 0.
        valid: [B, N] bool, None is all.
        first: [B] integers, the first picks, which must be valid. None starts at the valid token
            whose nearest other valid token is farthest away.
        priority: [B, N], at least 0; None is one.
    Returns: int64 [B, k] in the order in which tokens are taken, ties to the lowest index, no
        token twice while there are valid ones.
    """
    if similarity.ndim != 3 or similarity.shape[1] != similarity.shape[2]:
        raise ValueError(
            f"similarity of shape {tuple(similarity.shape)} is not [B, N, N]: give one square "
            f"matrix per row, or features to maxmin_tokens"
        )
    if not similarity.is_floating_point():
        raise ValueError(f"similarity is {similarity.dtype}: use floating-point cosines")
    b, n = similarity.shape[:2]
    _check(b, n, k, valid, first, priority)
    similarity = similarity.detach()
    priority = None if priority is None else priority.detach()
    fits = n <= (LIMIT if priority is None else LIMIT // 2)
    kernel = fits and on_gpu(similarity, priority)
    return (maxmin if kernel else reference)(similarity, k, valid, first, priority)


def maxmin_tokens(
    x: Tensor,
    k: int,
    valid: Tensor | None = None,
    first: Tensor | None = None,
    priority: Tensor | None = None,
) -> Tensor:
    """`maxmin_select` under the cosine similarity of features.

    Where the N x N similarities are no larger than the features (N <= D) they are computed once.
    Otherwise no N x N is stored: every pick costs one pass over the features, on a GPU in one
    launch. Cosines are computed in fp32 (fp64 for fp64), never in TF32 or bf16, whatever the
    settings for matrix products and autocast are: greedy picks amplify every rounding.

    Args:
        x: [B, N, D] floating point.
        k, valid, first, priority: as in `maxmin_select`.
    Returns: int64 [B, k], as `maxmin_select`.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and {x.dtype} is not a floating point [B, N, D]"
        )
    b, n = x.shape[:2]
    _check(b, n, k, valid, first, priority)
    x, priority = x.detach(), None if priority is None else priority.detach()
    run = tokens if on_gpu(x, priority) else tokens_reference
    return run(x, k, valid, first, priority)


def _check(
    b: int,
    n: int,
    k: int,
    valid: Tensor | None,
    first: Tensor | None,
    priority: Tensor | None,
) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"k={k} of {n} tokens per row: use 0 to {n}")
    for name, t, shape in (
        ("valid", valid, (b, n)),
        ("first", first, (b,)),
        ("priority", priority, (b, n)),
    ):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, these tokens need {shape}")
    if first is not None and (first.is_floating_point() or first.dtype == torch.bool):
        raise ValueError(f"first is {first.dtype}: use token numbers, int64")
    if priority is not None and not priority.is_floating_point():
        raise ValueError(f"priority is {priority.dtype}: use floating-point numbers from 0 on")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid is {valid.dtype}: use torch.bool, for example `valid > 0`")


def reference(
    similarity: Tensor,
    k: int,
    valid: Tensor | None,
    first: Tensor | None,
    priority: Tensor | None,
) -> Tensor:
    """A running minimum of distances; every pick reads one row of the similarities."""
    if k == 0:
        return torch.zeros(len(similarity), 0, dtype=torch.int64, device=similarity.device)
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    first = _isolated(similarity, None, valid) if first is None else first.long()
    batch = torch.arange(len(similarity), device=similarity.device)
    return _greedy(lambda pick: similarity[batch, pick], first, k, valid, priority)


def tokens_reference(
    x: Tensor,
    k: int,
    valid: Tensor | None,
    first: Tensor | None,
    priority: Tensor | None,
) -> Tensor:
    """With N <= D the similarities, otherwise one matrix-vector product per pick. In fp64 where
    products of fp32 may be rounded to less."""
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        if _lossy(unit):
            unit = unit.double()
        if unit.shape[1] <= unit.shape[2]:
            return reference(unit @ unit.transpose(1, 2), k, valid, first, priority)
        if k == 0:
            return torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
        first = _isolated(unit, unit.transpose(1, 2), valid) if first is None else first.long()
        batch = torch.arange(len(x), device=x.device)
        return _greedy(
            lambda pick: torch.bmm(unit, unit[batch, pick][..., None])[..., 0],
            first,
            k,
            valid,
            priority,
        )


def _lossy(x: Tensor) -> bool:
    """Whether matrix products of fp32 may be computed in a lower precision here. Compiled code
    cannot ask, for the setting may change after it is compiled."""
    if x.device.type in GPUS or torch.compiler.is_compiling():
        return True
    return torch.get_float32_matmul_precision() != "highest"


def _greedy(
    similar: Callable[[Tensor], Tensor],
    first: Tensor,
    k: int,
    valid: Tensor | None,
    priority: Tensor | None,
) -> Tensor:
    """`similar` gives the similarities [B, N] of all tokens to one of each row. Tokens that are
    taken or not valid are at distance -inf."""
    row = similar(first)
    zero, lowest = row.new_zeros(()), row.new_full((), float("-inf"))
    far = torch.full_like(row, float("inf"))
    far = far if valid is None else far.where(valid, lowest)
    pick, picks = first, [first]
    for step in range(1, k):
        row = row if step == 1 else similar(pick)
        far = torch.minimum(far, torch.fmax(1 - row, zero))  # fmax(NaN, 0) is 0
        far = far.scatter(1, pick[:, None], float("-inf"))
        score = far
        if priority is not None:
            score = torch.where(far < 0, far, torch.fmax(far * priority, zero))
        pick = score.argmax(1)
        picks.append(pick)
    return torch.stack(picks, 1)


def _isolated(rows: Tensor, columns: Tensor | None, valid: Tensor | None) -> Tensor:
    """[B] the token whose nearest other one is farthest, in blocks of the similarities `rows`, or
    of `rows @ columns`."""
    n, nearest = rows.shape[1], []
    for start in range(0, n, BLOCK):
        block = rows[:, start : start + BLOCK]
        block = block.clone() if columns is None else block @ columns
        block.diagonal(start, 1, 2).fill_(float("-inf"))
        if valid is not None:
            block.masked_fill_(~valid[:, None], float("-inf"))
        nearest.append(block.amax(-1))
    far = torch.fmax(1 - torch.cat(nearest, 1), rows.new_zeros(()))
    return (far if valid is None else far.masked_fill(~valid, float("-inf"))).argmax(1)


def _maxmin(
    similarity: Tensor,
    k: int,
    valid: Tensor | None,
    first: Tensor | None,
    priority: Tensor | None,
) -> Tensor:
    run = launch.maxmin if on_gpu(similarity) else reference
    return run(similarity, k, valid, first, priority)


def _maxmin_tokens(
    x: Tensor,
    k: int,
    valid: Tensor | None,
    first: Tensor | None,
    priority: Tensor | None,
) -> Tensor:
    return (launch.tokens if on_gpu(x) else tokens_reference)(x, k, valid, first, priority)


maxmin = operator(_maxmin)
tokens = operator(_maxmin_tokens)
