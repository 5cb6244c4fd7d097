"""What a session decided, in the columns of the complete prompt: input for the two references.

Rows of a trace are images: unbroken runs of placeholders, or with `scope="sample"` all the
placeholders of one prompt.  They are found again here, from the placeholder mask alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.session import Reduction

from .maskref import Stage

Row = tuple[int, list[int]]  # sample, columns of its visual tokens


@dataclass
class Masks:
    """Arguments of `oracle.run` and `maskref.masked`, for a prompt of L columns."""

    keep: dict[Stage, Tensor] = field(default_factory=dict)  # [B, L] bool
    bias: dict[Stage, Tensor] = field(default_factory=dict)  # [B, L]
    mix: dict[Stage, Tensor] = field(default_factory=dict)  # [B, L, L]

    def final(self, visual: Tensor) -> Tensor:
        """Columns that are left after all stages, [B, L]."""
        left = torch.ones_like(visual)
        for keep in self.keep.values():
            left = left & keep
        return left

    def repeat(self, times: int) -> Masks:
        """Every prompt `times` times, as beams and several returned sequences do."""
        return Masks(
            *(
                {stage: value.repeat_interleave(times, 0) for stage, value in group.items()}
                for group in (self.keep, self.bias, self.mix)
            )
        )


def rows_of(visual: Tensor, scope: str = "image") -> list[Row]:
    """The images of a placeholder mask [B, L], in reading order."""
    rows: list[Row] = []
    for sample, line in enumerate(visual.tolist()):
        before = False
        for column, here in enumerate(line):
            fresh = here and not before
            if fresh and (scope == "image" or not rows or rows[-1][0] != sample):
                rows.append((sample, []))
            if here:
                rows[-1][1].append(column)
            before = here
    return rows


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
) -> Masks:
    """Keep, bias and mix of the reductions of one prefill.

    visual: [B, L] placeholders of the prompt.
    mass: strength of the bias, one for all sites or per site.
    offsets, widths: the prompt came in pieces, `visual[:, offset : offset + width]` each; a site
        acts once per piece that has placeholders.
    """
    out = Masks()
    pieces = [(0, visual.shape[1])] if offsets is None else list(zip(offsets, widths, strict=True))
    pieces = [(at, n) for at, n in pieces if bool(visual[:, at : at + n].any())]
    turn: dict[str, int] = {}
    for reduction in trace:
        number = turn.get(reduction.site, 0)
        turn[reduction.site] = number + 1
        offset, width = pieces[number]
        rows = rows_of(visual[:, offset : offset + width], scope)
        rows = [(sample, [offset + c for c in columns]) for sample, columns in rows]
        strength = mass if isinstance(mass, int | float) else mass.get(reduction.site, 0.0)
        _add(out, reduction, rows, visual, strength)
    if set(turn.values()) - {len(pieces)}:
        raise ValueError(f"{len(pieces)} piece(s) of the prompt have images, the sites ran {turn}")
    return out


def _add(out: Masks, reduction: Reduction, rows: list[Row], visual: Tensor, mass: float) -> None:
    if tuple(sample for sample, _ in rows) != tuple(reduction.samples):
        raise ValueError(f"images of samples {reduction.samples}, prompt has {rows}")
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
            bias[sample, after] = mass * plan.size[row, : len(after)].log()
        if mix is not None:
            slot = plan.assign[row, : len(before)]
            weight = plan.weight[row, : len(before)].float()
            for j, column in enumerate(after.tolist()):
                member = slot == j
                mix[sample, column] = 0
                mix[sample, column, before[member]] = weight[member]
