"""Rows: which columns of a batch of sequences are visual, grouped by image, kept right through
every drop. A row is one unbroken run of placeholders: an image with all its tiles, or a video. For
methods that compare frames it is a whole video, also where text stands between its frames.

Newlines, which some models put after every line of tiles and after a video, are in no row: methods
do not see them, budgets do not count them, nothing merges with them. A newline stays as long as a
token of the line that it ends does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import ops
from ...context import Layout, Part
from ...errors import UnsupportedModel
from ...plan import Plan
from ..attention import Call, attention_rows
from .grids import Grids, Run, check_frames, find_grids, squares
from .packed import ends_of
from .tiles import Shown, runs_of_images

#: first column and columns of a run, and where in it newlines are
Span = tuple[int, int, list[int]]
#: text rows whose attention is held at once
TEXT_BLOCK = 64


@dataclass(frozen=True)
class Rows:
    """R images in B sequences of L columns.

    Attributes:
        sample: [R] sequence of each row; `samples` the same on the host.
        cols: [R, N] column of each token; valid: [R, N] False on padding.
        counts, original: tokens per row now, and before the first reduction.
        source: [R, N] place of each token on its original grid; newlines have places too.
        layout: original grid of each row, None where unknown.
        parts: what the tokens of each row show, of images that were cut into tiles.
        size: [R, N] tokens that each token stands for, None while all are 1.
        mass: strength of log(size) on attention logits.
        width: columns of the sequences before the first reduction.
        last: [B] last visual column of each original sequence, -1 without one.
        carried: signals of the vision tower, [R, N] each, that later steps ask for.
        ends: [R, N] column of the newline that ends each token's line, its own where none does;
            None while no image has any.
        part: [B, L] number of the sample that a column belongs to, where a sequence packs several.
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
    ends: Tensor | None = None
    part: Tensor | None = None

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
        """[B, L] True for text, for the visual tokens that the plan keeps, and for the newlines of
        their lines; `empty` [R] rows keep none."""
        b, length = shape
        spare = b * length
        slots = plan.slots if empty is None else plan.slots & ~empty[:, None]
        keep = torch.ones(spare + 1, dtype=torch.bool, device=self.cols.device)
        columns = [self.cols] if self.ends is None else [self.cols, self.ends]
        flat = [self.sample[:, None] * length + column for column in columns]
        for at in flat:
            keep = keep.scatter(0, torch.where(self.valid, at, spare).reshape(-1), False)
        for at in flat:
            kept = torch.where(slots, at.gather(1, plan.index), spare)
            keep = keep.scatter(0, kept.reshape(-1), True)
        return keep[:spare].reshape(b, length)

    def after(self, plan: Plan, index: Tensor, mass: float) -> Rows:
        """The rows in the sequences packed by `index` [B, K]."""
        k = index.shape[1]
        inverse = torch.zeros(index.shape[0], self.width, dtype=torch.long, device=index.device)
        inverse = inverse.scatter(1, index, torch.arange(k, device=index.device).expand_as(index))

        def moved(columns: Tensor) -> Tensor:
            return inverse[self.sample[:, None], columns.gather(1, plan.index)]

        return replace(
            self,
            cols=moved(self.cols),
            ends=None if self.ends is None else moved(self.ends),
            valid=plan.slots,
            counts=plan.kept,
            source=self.source.gather(1, plan.index),
            size=plan.size,
            mass=mass,
            carried={
                name: ops.gather_rows(value, plan.index) for name, value in self.carried.items()
            },
            part=None if self.part is None else self.part.gather(1, index),
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
            ends=None if self.ends is None else self.ends[left],
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

    @property
    def own(self) -> Tensor:
        """[R] number of the sample that each row belongs to, of those in its sequence."""
        if self.part is None:
            return torch.zeros_like(self.sample)
        return self.part[self.sample, self.cols[:, 0]]

    def last_prompt(self, valid: Tensor) -> Tensor:
        """[B, S] column of the last real token of every sample in a sequence (0 where a chunk of a
        prompt is padding only)."""
        columns = torch.arange(valid.shape[1], device=valid.device)
        columns = torch.where(valid, columns, 0)
        if self.part is None:
            return columns.amax(1, keepdim=True)
        last = columns.new_zeros(len(valid), int(self.part.max()) + 1)
        return last.scatter_reduce(1, self.part, columns, "amax")

    def last_attention(self, call: Call, last: Tensor, shift: int) -> Tensor:
        """[R, H, N] attention of the last token of each row's sample; see `last_prompt`."""
        attention = self.columns(attention_rows(call, last), shift)
        if self.part is None:
            return attention[:, :, 0]
        return attention[torch.arange(len(attention), device=last.device), :, self.own]

    def text_after(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [R, T] of the text behind the sample's last image, and which of them exist."""
        b, length = valid.shape
        spare = b * length
        visual = torch.zeros(spare + 1, dtype=torch.bool, device=valid.device)
        for columns in (self.cols, self.cols if self.ends is None else self.ends):
            flat = torch.where(self.valid, self.sample[:, None] * length + columns, spare)
            visual = visual.scatter(0, flat.reshape(-1), True)
        visual = visual[:spare].reshape(b, length)
        later = visual.flip(1).cumsum(1).flip(1)
        text = (later == (0 if self.part is None else ends_of(self.part, visual))) & valid
        if torch.compiler.is_compiling():
            t = length - min(self.counts)
        else:
            t = max(1, int(text.sum(1).max()))
        index = torch.argsort((~text).to(torch.uint8), dim=1, stable=True)[:, :t]
        exists = text.gather(1, index).index_select(0, self.sample)
        if self.part is not None:
            exists &= self.part.gather(1, index)[self.sample] == self.own[:, None]
        return index.index_select(0, self.sample), exists

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
    newline: Tensor | None = None,
    part: Tensor | None = None,
) -> Rows | None:
    """Rows of a [B, L] placeholder mask, or None when there is no visual token.

    tile: tokens of one projected image, which is a square grid when the run has as many.
    features: projected tokens in all, for torch.compile.
    made: images and tokens of each that the projector made, call by call.
    frames: the runs of one video are one row.
    tiles: what the tokens of every image show, where images were cut into tiles.
    newline: [B, L] placeholders that hold a newline; None where a model has none.
    part: [B, L] number of the sample, where sequences pack several.
    """
    b, length = visual.shape
    if torch.compiler.is_compiling():
        return _static_rows(visual, features, tile)
    label = visual.long() if part is None else torch.where(visual, part + 1, 0)
    edge = label.new_zeros(b, 1)
    label = torch.cat([edge, label, edge], 1)
    change = label[:, 1:] != label[:, :-1]
    starts = (change & (label[:, 1:] > 0)).nonzero().tolist()
    ends = (change & (label[:, :-1] > 0)).nonzero().tolist()
    if not starts:
        return None
    kinds = [0] * len(starts)
    if is_video is not None:
        at = torch.tensor(starts, device=visual.device)
        kinds = is_video[at[:, 0], at[:, 1]].int().tolist()
    every = [(s[0], s[1], e[1] - s[1]) for s, e in zip(starts, ends, strict=True)]
    every, kinds, breaks = _with_tokens(every, kinds, newline)
    if not every:
        return None
    # one newline after all of an image or a video is no part of its grid
    runs = [
        (*run[:2], run[2] - (at == [run[2] - 1])) for run, at in zip(every, breaks, strict=True)
    ]
    found = find_grids(runs, kinds, grids, tile, made)
    if frames:
        check_frames(runs, kinds, found, grids)
    alike = frames and is_video is None and not any(grids.values())  # frames come as images
    spans: list[list[Span]] = []
    samples: list[int] = []
    grid: list[Layout | None] = []
    shown = runs_of_images(every, kinds, tiles)
    prompts = [0] * len(every)  # of one sequence
    if part is not None:
        at = torch.tensor([run[:2] for run in every], device=part.device)
        prompts = part[at[:, 0], at[:, 1]].tolist()
    owner: tuple[int, int] | None = None
    parts: list[Sequence[Part]] = []
    before: tuple[Any, ...] = ()
    for number, ((sample, _, n), prompt, kind, (layout, video), shows) in enumerate(
        zip(runs, prompts, kinds, found, shown, strict=True)
    ):
        span = (every[number][1], every[number][2], breaks[number])
        known = frames and layout is not None and (alike or video >= 0)
        here = (sample, prompt, kind, -1 if alike else video, n, layout) if known else ()
        last = grid[-1] if grid else None
        if layout and last and here and here == before:
            spans[-1].append(span)
            grid[-1] = replace(last, frames=last.frames + layout.frames)
        elif scope == "sample" and owner == (sample, prompt):
            spans[-1].append(span)
            grid[-1], parts[-1] = None, ()
        else:
            spans.append([span])
            samples.append(sample)
            grid.append(layout)
            parts.append(shows)
        before, owner = here, (sample, prompt)
    tables = list(map(_columns, spans))
    counts = tuple(len(columns) for columns, _, _ in tables)
    width, device = max(counts), visual.device
    cols, source, lines = (
        torch.stack([F.pad(t, (0, width - len(t)), value=int(t[-1])) for t in each]).to(device)
        for each in zip(*tables, strict=True)
    )
    last = [-1] * b
    for sample, start, n in every:
        last[sample] = max(last[sample], start + n - 1)
    steps = torch.arange(width, device=device)
    return Rows(
        sample=torch.tensor(samples, device=device),
        samples=tuple(samples),
        cols=cols,
        valid=steps < torch.tensor(counts, device=device)[:, None],
        counts=counts,
        original=counts,
        source=source,
        layout=tuple(grid),
        width=length,
        last=tuple(last),
        parts=tuple(parts),
        ends=lines if any(breaks) else None,
        part=part,
    )


def _with_tokens(
    runs: list[Run], kinds: list[int], newline: Tensor | None
) -> tuple[list[Run], list[int], list[list[int]]]:
    """The runs that hold more than newlines, their kinds, and where each has its newlines."""
    at = [] if newline is None else newline.nonzero().tolist()
    breaks = [
        [column - start for owner, column in at if owner == sample and 0 <= column - start < n]
        for sample, start, n in runs
    ]
    left = [number for number, (_, _, n) in enumerate(runs) if len(breaks[number]) < n]
    return [runs[i] for i in left], [kinds[i] for i in left], [breaks[i] for i in left]


def _columns(spans: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token that is no newline: its column, its place, and the column of the newline that
    ends its line (its own where none does).

    Lines of an image are equally long. So where more tokens come before a newline than between it
    and the next, those that come first are a view of the whole picture, without lines.
    """
    out: list[tuple[Tensor, Tensor, Tensor]] = []
    first = 0
    for start, n, breaks in spans:
        place = torch.arange(n, device="cpu")
        end, token = place.clone(), torch.ones(n, dtype=torch.bool, device="cpu")
        for number, at in enumerate(breaks):
            width = at - (breaks[number - 1] + 1 if number else 0)
            if number + 1 < len(breaks):
                width = min(width, breaks[number + 1] - at - 1)
            end[at - width : at], token[at] = at, False
        out.append((start + place[token], first + place[token], start + end[token]))
        first += n
    columns, places, ends = (torch.cat(each) for each in zip(*out, strict=True))
    return columns, places, ends


def rows_of_notes(notes: Tensor, valid: Tensor) -> Rows | None:
    """Rows of the visual columns that a cache stage holds; see `Stage.notes`. Grids are unknown."""
    spans: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    newlines: dict[tuple[int, int, int], int] = {}
    for sample, line in enumerate(torch.where(valid[..., None], notes, -1).tolist()):
        for column, (image, place, had, end) in enumerate(line):
            if image >= 0 and place < 0:
                newlines[sample, image, end] = column
            elif image >= 0:
                spans.setdefault((sample, image), []).append((column, place, had, end))
    if not spans:
        return None
    counts = tuple(len(span) for span in spans.values())
    width, device = max(counts), notes.device
    table = torch.tensor(
        [
            [(c, p, h, newlines.get((*key, e), c)) for c, p, h, e in span + span[-1:] * (width - n)]
            for (key, span), n in zip(spans.items(), counts, strict=True)
        ],
        device="cpu",
    ).to(device)
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
        ends=table[..., 3] if newlines else None,
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
