"""Rows: which columns of a batch of sequences are visual, grouped by image, kept right through
every drop. A row is one unbroken run of placeholders: an image with all its tiles, or a video. For
methods that compare frames it is a whole video, also where text stands between its frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...context import Layout, Part
from ...errors import UnsupportedModel
from ...plan import Plan
from ..attention import Call, attention_rows
from .grids import Grids, check_frames, find_grids, squares
from .tiles import Shown, runs_of_images

#: text rows whose attention is held at once
TEXT_BLOCK = 64


@dataclass(frozen=True)
class Rows:
    """R images in B sequences of L columns.

    Attributes:
        sample: [R] sequence of each row; `samples` the same on the host.
        cols: [R, N] column of each token; valid: [R, N] False on padding.
        counts, original: tokens per row now, and before the first reduction.
        source: [R, N] place of each token on its original grid.
        layout: original grid of each row, None where unknown.
        parts: what the tokens of each row show, of images that were cut into tiles.
        size: [R, N] tokens that each token stands for, None while all are 1.
        mass: strength of log(size) on attention logits.
        width: columns of the sequences before the first reduction.
        last: [B] last visual column of each original sequence, -1 without one.
        carried: signals of the vision tower, [R, N] each, that later steps ask for.
    """

    sample: Tensor
    samples: tuple[int, ...]
    cols: Tensor
    valid: Tensor
    counts: tuple[int, ...]
    original: tuple[int, ...]
    source: Tensor
    layout: tuple[Layout | None, ...]
    width: int
    last: tuple[int, ...]
    size: Tensor | None = None
    mass: float = 0.0
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    parts: tuple[Sequence[Part], ...] = ()

    def take(self, x: Tensor) -> Tensor:
        """x [B, L, ...] -> the visual tokens [R, N, ...]."""
        b, length = x.shape[:2]
        flat = (self.sample[:, None] * length + self.cols).reshape(-1)
        tokens = ops.gather_rows(x.reshape(1, b * length, *x.shape[2:]), flat[None])
        return tokens.reshape(*self.cols.shape, *x.shape[2:])

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """x [B, L, D] with `values` [R, N, D] written at the visual columns."""
        b, length, width = x.shape
        flat = self.sample[:, None] * length + self.cols
        if min(self.counts) < max(self.counts):
            flat, values = flat[self.valid], values[self.valid]
        return (
            x.reshape(b * length, width)
            .index_copy(0, flat.reshape(-1), values.reshape(-1, width))
            .reshape(b, length, width)
        )

    def keep(self, plan: Plan, shape: torch.Size, empty: Tensor | None = None) -> Tensor:
        """[B, L] True for text and for the visual tokens that the plan keeps; `empty` [R] rows keep
        none."""
        b, length = shape
        spare = b * length
        flat = self.sample[:, None] * length + self.cols
        slots = plan.slots if empty is None else plan.slots & ~empty[:, None]
        kept = torch.where(slots, flat.gather(1, plan.index), spare)
        keep = torch.ones(spare + 1, dtype=torch.bool, device=flat.device)
        keep = keep.scatter(0, torch.where(self.valid, flat, spare).reshape(-1), False)
        return keep.scatter(0, kept.reshape(-1), True)[:spare].reshape(b, length)

    def after(self, plan: Plan, index: Tensor, mass: float) -> Rows:
        """The rows in the sequences packed by `index` [B, K]."""
        k = index.shape[1]
        inverse = torch.zeros(index.shape[0], self.width, dtype=torch.long, device=index.device)
        inverse = inverse.scatter(1, index, torch.arange(k, device=index.device).expand_as(index))
        cols = inverse[self.sample[:, None], self.cols.gather(1, plan.index)]
        return replace(
            self,
            cols=cols,
            valid=plan.slots,
            counts=plan.kept,
            source=self.source.gather(1, plan.index),
            size=plan.size,
            mass=mass,
            carried={
                name: ops.gather_rows(value, plan.index) for name, value in self.carried.items()
            },
        )

    def without(self, empty: Tensor) -> Rows:
        """The rows that are not `empty` [R]."""
        left = (~empty).nonzero()[:, 0]
        if len(left) == len(empty):
            return self
        rows = left.tolist()

        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[row] for row in rows)

        return replace(
            self,
            sample=self.sample[left],
            samples=pick(self.samples),
            cols=self.cols[left],
            valid=self.valid[left],
            counts=pick(self.counts),
            original=pick(self.original),
            source=self.source[left],
            layout=pick(self.layout),
            parts=pick(self.parts) if self.parts else (),
            size=None if self.size is None else self.size[left],
            carried={name: value[left] for name, value in self.carried.items()},
        )

    def sizes(self) -> Tensor:
        """[R, N] tokens that each token stands for."""
        return self.valid.float() if self.size is None else self.size

    def bias(self, b: int, k: int) -> Tensor | None:
        """[B, K] mass * log(size) at visual columns, 0 elsewhere; None when it is switched off."""
        if not self.mass or self.size is None:
            return None
        flat = torch.where(self.valid, self.sample[:, None] * k + self.cols, b * k)
        log = self.mass * self.size.clamp(min=1e-6).log()
        bias = torch.zeros(b * k + 1, device=flat.device, dtype=torch.float32)
        return bias.scatter(0, flat.reshape(-1), log.reshape(-1))[: b * k].reshape(b, k)

    def columns(self, attention: Tensor, shift: int) -> Tensor:
        """attention [B, H, T, Lk] -> [R, H, T, N] at each row's own columns."""
        picked = attention.index_select(0, self.sample)
        at = (self.cols + shift)[:, None, None, :].expand(-1, *picked.shape[1:3], -1)
        return picked.gather(3, at)

    def last_prompt(self, valid: Tensor) -> Tensor:
        """[B] column of the last real token (0 where a chunk of a prompt is padding only)."""
        columns = torch.arange(valid.shape[1], device=valid.device)
        return torch.where(valid, columns, 0).amax(1)

    def text_after(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [R, T] of the text behind the sample's last image, and which of them exist."""
        b, length = valid.shape
        spare = b * length
        flat = torch.where(self.valid, self.sample[:, None] * length + self.cols, spare)
        visual = torch.zeros(spare + 1, dtype=torch.bool, device=valid.device)
        visual = visual.scatter(0, flat.reshape(-1), True)[:spare].reshape(b, length)
        behind = visual.flip(1).cumsum(1).flip(1) == 0
        text = behind & valid
        if torch.compiler.is_compiling():
            t = length - min(self.counts)
        else:
            t = max(1, int(text.sum(1).max()))
        index = torch.argsort((~text).to(torch.uint8), dim=1, stable=True)[:, :t]
        exists = text.gather(1, index)
        return index.index_select(0, self.sample), exists.index_select(0, self.sample)

    def text_attention(self, call: Call, text: tuple[Tensor, Tensor], shift: int) -> Tensor:
        """[R, T, N] attention of the text behind the images, mean over heads; absent text rows
        are 0. Text rows go through in blocks: what is held at once does not grow with T."""
        index, exists = text
        first = torch.zeros(call.query.shape[0], dtype=torch.long, device=index.device)
        ids = torch.arange(index.shape[0], device=index.device)
        first = first.scatter(0, self.sample, ids)  # any row of the sample: they share the text
        rows = index.index_select(0, first)
        parts = [
            self.columns(attention_rows(call, block, "mean")[:, None], shift)[:, 0]
            for block in rows.split(TEXT_BLOCK, 1)
        ]
        return torch.where(exists[..., None], torch.cat(parts, 1), 0.0)

    def only_text_in_last(self, n: int) -> bool:
        """True when the caller reads the last n rows only, and no image reaches into them."""
        return n > 0 and all(last < self.width - n for last in self.last)


def find_rows(
    visual: Tensor,
    is_video: Tensor | None,
    grids: Grids,
    scope: str,
    tile: int = 0,
    features: int = 0,
    made: Sequence[tuple[int, int]] = (),
    frames: bool = False,
    tiles: Sequence[Shown] = (),
) -> Rows | None:
    """Rows of a [B, L] placeholder mask, or None when there is no visual token.

    tile: tokens of one projected image, which is a square grid when the run has as many.
    features: projected tokens in all, for torch.compile.
    made: images and tokens of each that the projector made, call by call.
    frames: the runs of one video are one row.
    tiles: what the tokens of every image show, where images were cut into tiles.
    """
    b, length = visual.shape
    if torch.compiler.is_compiling():
        return _static_rows(visual, features, tile)
    edge = torch.zeros(b, 1, dtype=torch.bool, device=visual.device)
    changes = torch.cat([edge, visual, edge], 1).int().diff(dim=1)
    starts, ends = (changes == 1).nonzero().tolist(), (changes == -1).nonzero().tolist()
    if not starts:
        return None
    kinds = [0] * len(starts)
    if is_video is not None:
        at = torch.tensor(starts, device=visual.device)
        kinds = is_video[at[:, 0], at[:, 1]].int().tolist()
    runs = [(s[0], s[1], e[1] - s[1]) for s, e in zip(starts, ends, strict=True)]
    found = find_grids(runs, kinds, grids, tile, made)
    if frames:
        check_frames(runs, kinds, found, grids)
    alike = frames and is_video is None and not any(grids.values())  # frames come as images
    spans: list[list[tuple[int, int]]] = []
    samples: list[int] = []
    grid: list[Layout | None] = []
    shown = runs_of_images(runs, kinds, tiles)
    parts: list[Sequence[Part]] = []
    before: tuple[Any, ...] = ()
    for (sample, start, n), kind, (layout, video), part in zip(
        runs, kinds, found, shown, strict=True
    ):
        known = frames and layout is not None and (alike or video >= 0)
        here = (sample, kind, -1 if alike else video, n, layout) if known else ()
        last = grid[-1] if grid else None
        if layout and last and here and here == before:
            spans[-1].append((start, n))
            grid[-1] = replace(last, frames=last.frames + layout.frames)
        elif scope == "sample" and samples and samples[-1] == sample:
            spans[-1].append((start, n))
            grid[-1], parts[-1] = None, ()
        else:
            spans.append([(start, n)])
            samples.append(sample)
            grid.append(layout)
            parts.append(part)
        before = here
    counts = tuple(sum(n for _, n in span) for span in spans)
    width = max(counts)
    cols = torch.zeros(len(spans), width, dtype=torch.long, device="cpu")
    for row, span in enumerate(spans):
        columns = torch.cat([torch.arange(start, start + n, device="cpu") for start, n in span])
        cols[row, : len(columns)] = columns
        cols[row, len(columns) :] = columns[-1]
    last = [-1] * b
    for sample, start, n in runs:
        last[sample] = max(last[sample], start + n - 1)
    device = visual.device
    steps = torch.arange(width, device=device).expand(len(spans), -1)
    return Rows(
        sample=torch.tensor(samples, device=device),
        samples=tuple(samples),
        cols=cols.to(device),
        valid=steps < torch.tensor(counts, device=device)[:, None],
        counts=counts,
        original=counts,
        source=steps,
        layout=tuple(grid),
        width=length,
        last=tuple(last),
        parts=tuple(parts),
    )


def rows_of_notes(notes: Tensor, valid: Tensor) -> Rows | None:
    """Rows of the visual columns that a cache stage holds; see `Stage.notes`. Grids are unknown."""
    spans: dict[tuple[int, int], list[list[int]]] = {}
    for sample, line in enumerate(torch.where(valid[..., None], notes, -1).tolist()):
        for column, (image, place, had) in enumerate(line):
            if image >= 0:
                spans.setdefault((sample, image), []).append([column, place, had])
    if not spans:
        return None
    counts = tuple(len(span) for span in spans.values())
    width, device = max(counts), notes.device
    table = torch.tensor(
        [span + span[-1:] * (width - len(span)) for span in spans.values()], device="cpu"
    )
    table = table.to(device)
    steps = torch.arange(width, device=device)
    return Rows(
        sample=torch.tensor([sample for sample, _ in spans], device=device),
        samples=tuple(sample for sample, _ in spans),
        cols=table[..., 0],
        valid=steps < torch.tensor(counts, device=device)[:, None],
        counts=counts,
        original=tuple(span[0][2] for span in spans.values()),
        source=table[..., 1],
        layout=(None,) * len(spans),
        width=valid.shape[1],
        last=(-1,) * len(valid),
    )


def _static_rows(visual: Tensor, features: int, tile: int) -> Rows:
    """Rows while torch.compile traces: shapes must not depend on data, so every sequence is taken
    to hold one image, or frames that touch, of the same token count, and that is checked on the
    device."""
    b, length = visual.shape
    n = features // b
    if n == 0 or n * b != features:
        raise UnsupportedModel(
            f"torch.compile: {features} visual tokens do not split evenly over {b} prompts. "
            f"Compile with one image of one size per prompt."
        )
    cols = torch.argsort((~visual).to(torch.uint8), dim=1, stable=True)[:, :n]
    one_run = (visual.sum(1) == n) & (cols[:, -1] - cols[:, 0] == n - 1)
    torch._assert_async(one_run.all(), "vtc under torch.compile needs one image per prompt")
    return Rows(
        sample=torch.arange(b, device=visual.device),
        samples=tuple(range(b)),
        cols=cols,
        valid=torch.ones_like(cols, dtype=torch.bool),
        counts=(n,) * b,
        original=(n,) * b,
        source=torch.arange(n, device=visual.device).expand(b, -1),
        layout=(squares(n, tile) or squares(n, n),) * b,
        width=length,
        last=(length,) * b,
    )


def pack(
    keep: Tensor, valid: Tensor, dense: bool, rows: Rows, plan: Plan
) -> tuple[Tensor, Tensor, bool]:
    """Pack kept columns to the right: index [B, K], filled [B, K], and whether all are filled.

    Left padding vanishes as far as every sequence allows; right padding stays where it is. A
    sequence that keeps fewer columns is filled up on the left with columns that do not count.
    """
    b, length = keep.shape
    if torch.compiler.is_compiling():  # widths must not depend on data
        dropped = [0] * b
        for sample, before, after in zip(rows.samples, rows.counts, plan.kept, strict=True):
            dropped[sample] += before - after
        k, even = length - min(dropped), min(dropped) == max(dropped)
    else:
        if not dense:
            keep = keep & (valid.cumsum(1) > 0)
        kept = keep.sum(1)
        k, least = (int(n) for n in torch.stack([kept.max(), kept.min()]).tolist())
        even = k == least
    index = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, length - k :]
    return index, keep.gather(1, index), even
