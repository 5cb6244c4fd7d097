"""Exact allocation of a budget: one level for every item, at the least total cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ..errors import InvalidBudget, InvalidInput

#: most cells of the table, items times units of the budget
CELLS = 10**8


def knapsack_allocate(cost: Tensor, levels: Sequence[float], budget: float) -> Tensor:
    """[items] number of the level of each item, so that the levels add up to the budget and the
    costs to the least possible: the multiple-choice knapsack by dynamic programming, as DiffSparse
    (https://arxiv.org/abs/2604.03674) shares tokens out to blocks and steps.

    Args:
        cost: [items, levels] of each level for each item; inf forbids one (the shares of a first
            step that has to be whole), negative ones are allowed.
        levels: what each level takes of the budget, such as (0, 0.25, 0.5, 0.75, 1); all numbers
            are taken as the nearest fractions with denominators up to 10000.
        budget: the sum over all items, in the same unit.
    """
    table = torch.as_tensor(cost, dtype=torch.float64, device="cpu").detach()
    if table.ndim != 2 or table.shape[1] != len(levels) or 0 in table.shape:
        raise InvalidInput(
            f"cost has shape {tuple(table.shape)} and there are {len(levels)} levels: give "
            f"[items, levels], at least one of each."
        )
    if bool(torch.isnan(table).any()) or bool((table == -math.inf).any()):
        raise InvalidInput("cost holds NaN or -inf: give finite numbers, or inf to forbid a level.")
    steps, total, unit = _units(levels, budget)
    items = len(table)
    low = min(steps)
    steps, room = [step - low for step in steps], total - items * low
    if not 0 <= room <= items * max(steps):
        raise InvalidBudget(
            f"budget {budget}: {items} items with levels {list(levels)} take "
            f"{items * min(levels):g} to {items * max(levels):g} together."
        )
    if items * (room + 1) > CELLS:
        raise InvalidBudget(
            f"budget {budget} is {room} units of the greatest common divisor of the levels, too "
            f"many for {items} items: round levels to multiples of a larger unit."
        )
    chosen = torch.empty(items, room + 1, dtype=torch.int16, device="cpu")
    best = torch.full((room + 1,), math.inf, dtype=torch.float64, device="cpu")
    best[0] = 0.0
    for i in range(items):  # best[r]: least cost of the items so far that take r units together
        paths = torch.full((len(steps), room + 1), math.inf, dtype=torch.float64, device="cpu")
        for level, step in enumerate(steps):
            if step <= room:
                paths[level, step:] = best[: room + 1 - step] + table[i, level]
        best, level = paths.min(0)
        chosen[i] = level.to(torch.int16)
    if not math.isfinite(float(best[room])):
        below = best.isfinite().nonzero().flatten().tolist()
        near = f"{float((below[-1] + items * low) * unit):g}" if below else "none"
        raise InvalidBudget(
            f"budget {budget}: no choice of levels {list(levels)} for {items} items adds up to it "
            f"at a finite cost. The next budget below it that can be met: {near}."
        )
    out, left = torch.empty(items, dtype=torch.int64, device="cpu"), room
    for i in reversed(range(items)):
        out[i] = chosen[i, left]
        left -= steps[int(out[i])]
    return out


def _units(levels: Sequence[float], budget: float) -> tuple[list[int], int, Fraction]:
    """Levels and budget as whole multiples of one unit, and the unit."""
    for number in (*levels, budget):
        if not math.isfinite(number):
            raise InvalidBudget(f"{number} is no level and no budget: give finite numbers.")
    parts = [Fraction(number).limit_denominator(10_000) for number in levels]
    whole = Fraction(budget).limit_denominator(10_000)
    shared = math.lcm(*(part.denominator for part in (*parts, whole)))
    counts = [int(part * shared) for part in (*parts, whole)]
    unit = math.gcd(*counts) or 1
    *steps, total = (count // unit for count in counts)
    return steps, total, Fraction(unit, shared)
