"""What a session decided, in the columns of the complete prompt: input for the two references.

Rows of a trace are images: unbroken runs of placeholders, or with `scope="sample"` all the
placeholders of one prompt; with `scope="video"` runs of one length that follow one another in a
prompt, the frames of a video.  They are found again here, from the placeholder mask alone.  Rows of
a reduction at a `vision` site are the images of a tower call: `tower_reductions` reads those.

Placeholders that no method is shown are newlines.  Each is there as long as a token of its line is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .images import Row, line_of, rows_of
from .maskref import Stage
from .towerref import TowerReduction

__all__ = ["Masks", "Row", "line_of", "masks", "rows_of", "stage_of", "tower_reductions"]

if TYPE_CHECKING:
    from vtc.plan import Plan
    from vtc.session import Reduction


@dataclass
class Masks:
    """Arguments of `oracle.run` and `maskref.masked`, for a prompt of L columns."""

    keep: dict[Stage, Tensor] = field(default_factory=dict)  # [B, L] bool
    bias: dict[Stage, Tensor] = field(default_factory=dict)  # [B, L]
    mix: dict[Stage, Tensor] = field(default_factory=dict)  # [B, L, L]
    evict: dict[int, Tensor] = field(default_factory=dict)  # [B, L] bool, what later queries see

    def final(self, visual: Tensor) -> Tensor:
        """Columns that are left after all stages, [B, L]."""
        left = torch.ones_like(visual)
        for keep in self.keep.values():
            left = left & keep
        return left

    def repeat(self, times: int) -> Masks:
        """Every prompt `times` times, as beams and several returned sequences do."""
        stages = (
            {stage: value.repeat_interleave(times, 0) for stage, value in group.items()}
            for group in (self.keep, self.bias, self.mix)
        )
        evict = {layer: value.repeat_interleave(times, 0) for layer, value in self.evict.items()}
        return Masks(*stages, evict=evict)


def stage_of(site: str) -> Stage:
    """`projector` or the number of a decoder layer."""
    return site if site == "projector" else int(site.removeprefix("decoder."))


def masks(
    trace: Iterable[Reduction],
    visual: Tensor,
    mass: float | Mapping[str, float] = 0.0,
    scope: str = "image",
    offsets: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    gone: Tensor | None = None,
    newline: Tensor | None = None,
) -> Masks:
    """Keep, bias and mix of the reductions of one prefill, and what was evicted behind it.

    Reductions at `vision` sites are skipped: their rows are no prompts.  Those at `cache` sites
    add up (AND) over all steps; their rows are the images of the whole prompt.

    visual: [B, L] placeholders of the prompt.
    mass: strength of the bias, one for all sites or per site.
    offsets, widths: the prompt came in pieces, `visual[:, offset : offset + width]` each; a site
        acts once per piece that has placeholders.
    gone: [B, L] columns that the vision tower dropped; images that lost all of them are no rows.
    newline: [B, L] newlines; without it the placeholders that were never shown, so give it beside
        `gone`.
    """
    out = Masks()
    there = visual if gone is None else visual & ~gone

    def rows_there(offset: int, width: int) -> list[Row]:
        rows = rows_of(visual[:, offset : offset + width], scope)
        moved = [(sample, [offset + c for c in columns]) for sample, columns in rows]
        return [(sample, cols) for sample, cols in moved if bool(there[sample, cols].any())]

    pieces = (
        [(0, visual.shape[1])] if offsets is None else list(zip(offsets, widths or (), strict=True))
    )
    pieces = [(at, n) for at, n in pieces if bool(there[:, at : at + n].any())]
    turn: dict[str, int] = {}
    acting: list[tuple[Reduction, list[Row]]] = []
    shown = torch.zeros_like(visual)
    for reduction in trace:
        if reduction.site.startswith("vision."):
            continue
        offset, width = 0, visual.shape[1]
        if not reduction.site.startswith("cache."):
            number = turn.get(reduction.site, 0)
            turn[reduction.site] = number + 1
            offset, width = pieces[number]
        rows = rows_there(offset, width)
        acting.append((reduction, rows))
        _mark(shown, reduction, rows)
    newline = there & ~shown if newline is None else newline
    for reduction, rows in acting:
        if reduction.site.startswith("cache."):
            _evict(out, reduction, rows, visual, newline)
        else:
            strength = _strength(mass, reduction.site)
            _add(out, reduction, rows, visual, strength, newline)
    if set(turn.values()) - {len(pieces)}:
        raise ValueError(f"{len(pieces)} piece(s) of the prompt have images, the sites ran {turn}")
    return out


def tower_reductions(
    trace: Iterable[Reduction], calls: int, mass: float | Mapping[str, float] = 0.0
) -> list[list[TowerReduction]]:
    """The reductions at `vision` sites as the argument of `towerref.masked_tower`.

    calls: number of tower calls; every site acts once in each call, in order.
    mass: strength of the bias, one for all sites or per site.  A plan without sizes leaves the
        bias of earlier sites as it is.
    """
    sites: dict[int, list[Reduction]] = {}
    for reduction in trace:
        if reduction.site.startswith("vision."):
            sites.setdefault(int(reduction.site.removeprefix("vision.")), []).append(reduction)
    if any(len(turns) != calls for turns in sites.values()):
        ran = {layer: len(turns) for layer, turns in sites.items()}
        raise ValueError(f"{calls} call(s) of the tower, the sites ran {ran}")
    out: list[list[TowerReduction]] = []
    for call in range(calls):
        steps = [(layer, sites[layer][call]) for layer in sorted(sites)]
        units = steps[0][1].n_in if steps else ()  # units of each image before the first site
        done = [
            _tower_reduction(layer, step, step.plan, units, _strength(mass, step.site))
            for layer, step in steps
            if step.plan is not None
        ]
        out.append(done)
    return out


def _tower_reduction(
    layer: int, reduction: Reduction, plan: Plan, units: Sequence[int], mass: float
) -> TowerReduction:
    if len(reduction.n_in) != len(units):
        raise ValueError(f"{reduction.site} has {len(reduction.n_in)} images, not {len(units)}")
    keeps, mixes, biases = [], [], []
    for row, count in enumerate(units):
        before = reduction.source_in[row, : reduction.n_in[row]]  # [n_in] raster numbers
        after = reduction.source[row, : reduction.n_out[row]]  # [n_out]
        keep = torch.zeros(count, dtype=torch.bool)
        keep[after] = True
        keeps.append(keep)
        if mass and plan.size is not None:
            bias = torch.zeros(count)
            bias[after] = mass * plan.size[row, : len(after)].float().log()
            biases.append(bias)
        if plan.weight is not None:
            mix = torch.eye(count)
            _merge(mix, plan, row, before, after)
            mixes.append(mix)
    return TowerReduction(layer, keeps, mixes or None, biases or None)


def _strength(mass: float | Mapping[str, float], site: str) -> float:
    return mass if isinstance(mass, int | float) else mass.get(site, 0.0)


def _check_rows(reduction: Reduction, rows: list[Row]) -> None:
    if tuple(sample for sample, _ in rows) != tuple(reduction.samples):
        raise ValueError(f"images of samples {reduction.samples}, prompt has {rows}")


def _merge(mix: Tensor, plan: Plan, row: int, before: Tensor, after: Tensor) -> None:
    """Write the weights of one image into a matrix: `after` becomes a sum over `before`."""
    assert plan.assign is not None and plan.weight is not None
    slot = plan.assign[row, : len(before)]
    weight = plan.weight[row, : len(before)].float()
    for j, place in enumerate(after.tolist()):
        member = slot == j
        mix[place] = 0
        mix[place, before[member]] = weight[member]


def _mark(shown: Tensor, reduction: Reduction, rows: list[Row]) -> None:
    """Write into `shown` [B, L] the columns of the tokens that a method saw."""
    _check_rows(reduction, rows)
    for row, (sample, columns) in enumerate(rows):
        seen = reduction.source_in[row, : reduction.n_in[row]]
        shown[sample, torch.tensor(columns)[seen]] = True


def _end_lines(left: Tensor, rows: list[Row], newline: Tensor) -> None:
    """Write into `left` [B, L] which columns of `newline` [B, L] stay."""
    for sample, columns in rows:
        places = newline[sample, columns].nonzero()[:, 0].tolist()
        for place in places:
            line = [columns[p] for p in line_of(place, places)]
            left[sample, columns[place]] = not line or bool(left[sample, line].any())


def _evict(
    out: Masks, reduction: Reduction, rows: list[Row], visual: Tensor, newline: Tensor
) -> None:
    if reduction.plan is None:
        return
    if reduction.plan.weight is not None:
        raise ValueError(f"{reduction.site}: the cache cannot be merged")
    left = torch.ones_like(visual)
    for row, (sample, columns) in enumerate(rows):
        place = torch.tensor(columns)
        left[sample, place] = False
        left[sample, place[reduction.source[row, : reduction.n_out[row]]]] = True
    _end_lines(left, rows, newline)
    layer = int(reduction.site.removeprefix("cache."))
    out.evict[layer] = out.evict[layer] & left if layer in out.evict else left


def _add(
    out: Masks,
    reduction: Reduction,
    rows: list[Row],
    visual: Tensor,
    mass: float,
    newline: Tensor,
) -> None:
    plan, stage = reduction.plan, stage_of(reduction.site)
    if plan is None:
        return
    batch, length = visual.shape
    mine = torch.zeros_like(visual)
    for sample, columns in rows:
        mine[sample, columns] = True
    keep = out.keep.setdefault(stage, torch.ones_like(visual))
    keep &= ~mine
    bias = out.bias.setdefault(stage, torch.zeros(batch, length)) if mass else None
    mix = None
    if plan.weight is not None:
        mix = out.mix.setdefault(stage, torch.eye(length).repeat(batch, 1, 1))
    for row, (sample, columns) in enumerate(rows):
        place = torch.tensor(columns)
        before = place[reduction.source_in[row, : reduction.n_in[row]]]  # [n_in]
        after = place[reduction.source[row, : reduction.n_out[row]]]  # [n_out]
        keep[sample, after] = True
        if bias is not None:
            assert plan.size is not None
            bias[sample, after] = mass * plan.size[row, : len(after)].log()
        if mix is not None:
            _merge(mix[sample], plan, row, before, after)
    _end_lines(keep, rows, newline)
