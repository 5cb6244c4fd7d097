"""Tokens of a frame-wise vision tower on videos: a row is a whole video, and its frames may keep
different numbers of tokens.

What is left of all frames lies one behind the other, [1, tokens, channels], and every frame attends
to itself alone; or, as STTS packs (arXiv 2603.18004), frames share bins as long as one whole frame,
[bins, tokens of a frame, channels]. Either way no token of another frame is ever seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..context import Layout
from ..errors import MissingSignal
from ..plan import Plan
from .units import Units, group_patches


def first_fit(counts: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers, first-fit decreasing: every item with tokens goes, the longest first,
    into the first bin that has room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(counts)), key=lambda i: -counts[i]):
        if not counts[item]:
            continue
        place = next((b for b, free in enumerate(room) if free >= counts[item]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= counts[item]
    return bins


@dataclass(frozen=True)
class Clips:
    """What the caller of a tower knows of videos.

    frames: of every video. groups: [cells, patches] which patches of a frame become one token, -1
    is none; grid: rows and columns of those. None where the model has one rule for all.
    """

    frames: tuple[int, ...]
    groups: Tensor | None = None
    grid: tuple[int, int] = (0, 0)


class VideoUnits(Units):
    """Units of videos whose frames went through the tower as images [frames, prefix + patches, C].

    patches: grid of patches of a frame; merge: side of the groups that become one token, unless
    `clips` says which do; where it does not divide the grid, the last groups are smaller.
    """

    packed = False

    def __init__(
        self,
        clips: Clips,
        prefix: int,
        patches: Layout,
        merge: int,
        device: torch.device,
    ) -> None:
        if clips.groups is not None:
            self.patches, (height, width) = clips.groups.to(device), clips.grid
        else:
            self.patches = group_patches(patches, merge, device)  # [cells, group], -1 is no patch
            height, width = -(-patches.height // merge), -(-patches.width // merge)
        layout = [Layout(t, height, width) for t in clips.frames]
        super().__init__(layout, self.patches.shape[1], device)
        self.frames, self.prefix, self.tokens = clips.frames, prefix, prefix + patches.n
        self.cells = height * width
        #: some groups have fewer patches: behind the tower they are pooled with neighbours
        self.uneven = bool((self.patches < 0).any())
        self.bins = False
        self._map: ops.PackMap | None = None

    # -------------------------------------------------------------- whole frames

    def take(self, x: Tensor) -> Tensor:
        x = self.restore(x)[:, self.prefix :]
        whole = F.pad(x, (0, 0, 0, 1))  # a patch of zeros, where there is none
        cells = whole[:, self.patches.reshape(-1)].reshape(len(x), self.cells, -1)
        units = self._by_video(cells)
        if not self.shortened:
            return units
        return units.gather(1, self.source[..., None].expand(-1, -1, units.shape[-1]))

    def per_unit(self, values: Tensor) -> Tensor:
        if self.bins:
            raise MissingSignal(
                "frames that share bins share attention calls, from which no scores are read: use "
                "packing='segments'."
            )
        units = self.take(values.float().mean(1))
        return units.reshape(*units.shape[:2], self.group, values.shape[-1])

    def pool(self, values: Tensor, fill: float = 0.0) -> Tensor:
        whole = self.spread(values, fill)
        return torch.cat([row[:n] for row, n in zip(whole, self.original, strict=True)])

    def key_bias(self, values: Tensor) -> Tensor:
        patches = self._patches_of(self.pool(values).reshape(-1, self.cells))
        return self.pack(F.pad(patches, (self.prefix, 0))[..., None])[..., 0]

    def columns(self) -> None:
        return None  # nothing is padded that a token could see

    # -------------------------------------------------------------- what is left

    def after(self, plan: Plan, mass: float) -> Self:
        new = super().after(plan, mass)
        new.pack_in(bins=False, refill=False)
        return new

    def pack_in(self, bins: bool, refill: bool) -> None:
        """Say where the tokens that are left lie."""
        self.bins = bins
        cells = self.kept()
        if refill:  # alone in its bin a frame costs the same with all its tokens
            patches = self._patches_of(cells).sum(1)
            counts = torch.where(patches > 0, patches + self.prefix, 0).tolist()
            alone = [b[0] for b in first_fit(counts, self.tokens) if len(b) == 1]
            cells = cells.index_fill(0, torch.tensor(alone, device=cells.device).long(), True)
        keep = self._patches_of(cells)
        head = keep.any(1, keepdim=True).expand(-1, self.prefix)
        self._map = ops.PackMap.of(torch.cat([head, keep], 1))
        self.clear()

    def kept(self) -> Tensor:
        """[frames, cells] True where a unit is left."""
        return self.pool(self.real).reshape(-1, self.cells)

    def _patches_of(self, cells: Tensor) -> Tensor:
        """[frames, cells] -> [frames, patches], all patches of a cell alike."""
        patches = cells.new_zeros(len(cells), self.tokens - self.prefix)
        return self._write(patches, cells.repeat_interleave(self.group, 1))

    def _write(self, patches: Tensor, values: Tensor) -> Tensor:
        """[frames, patches, ...] with values [frames, cells x group, ...] in their places."""
        spare = F.pad(patches, (0, 0) * (patches.ndim - 2) + (0, 1))  # for what is no patch
        where = self.patches.reshape(-1) % spare.shape[1]
        return spare.index_copy(1, where, values)[:, :-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that every frame has left, frames that lost all not counted."""
        return self.once("lengths", None, lambda: tuple(n for n in self._lengths() if n))

    def _lengths(self) -> list[int]:
        assert self._map is not None
        return self._map.cu_seqlens.diff().tolist()

    def mask(self) -> Tensor | None:
        """[bins, 1, capacity, capacity] True where both slots hold tokens of one frame; empty slots
        see themselves. None without bins."""
        if not self.bins:
            return None
        frame = self._slots()[1]
        same = (frame[:, :, None] == frame[:, None, :]) & (frame >= 0)[:, None, :]
        return (same | torch.eye(same.shape[1], dtype=torch.bool, device=same.device))[:, None]

    def _slots(self) -> tuple[Tensor, Tensor]:
        """[bins, capacity] packed row in every slot (-1: empty), and the frame it is of."""
        return self.once("slots", None, self._make_slots)

    def _make_slots(self) -> tuple[Tensor, Tensor]:
        assert self._map is not None
        counts, starts = self._lengths(), self._map.cu_seqlens.tolist()
        bins = first_fit(counts, self.tokens)
        rows = torch.full((len(bins), self.tokens), -1, device="cpu")
        frames = torch.full_like(rows, -1)
        for b, members in enumerate(bins):
            at = 0
            for frame in members:
                n = counts[frame]
                rows[b, at : at + n] = torch.arange(starts[frame], starts[frame] + n, device="cpu")
                frames[b, at : at + n] = frame
                at += n
        device = self.real.device
        return rows.to(device), frames.to(device)

    # -------------------------------------------------------------- moving

    def shrink(self, x: Tensor, plan: Plan, left: Self) -> Tensor:
        whole = self.restore(x)
        if plan.weight is not None:
            whole = left.put(whole, ops.apply(plan, self.take(x)))
        return left.pack(whole)

    def put(self, x: Tensor, units: Tensor) -> Tensor:
        """Whole frames x with units [R, N, U] written over the patches they are made of."""
        values = self.pool(units).reshape(len(x), -1, x.shape[-1])
        return torch.cat([x[:, : self.prefix], self._write(x[:, self.prefix :], values)], 1)

    def pack(self, x: Tensor) -> Tensor:
        """Whole frames [frames, tokens, C] -> what is left of them."""
        if self._map is None:
            return x
        rows = ops.pack_varlen(x, self._map)
        if not self.bins:
            return rows[None]
        slots = self._slots()[0]
        return torch.where((slots >= 0)[..., None], rows[slots.clamp(min=0)], 0)

    def restore(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """The way back, with `fill` [frames, tokens, C] (zeros) in place of what was dropped."""
        if self._map is None:
            return x
        if self.bins:
            slots = self._slots()[0].reshape(-1)
            order = torch.argsort(torch.where(slots >= 0, slots, len(slots)), stable=True)
            rows = x.flatten(0, 1)[order[: len(self._map.source)]]
        else:
            rows = x[0]
        whole = ops.unpack_varlen(rows, self._map)
        if fill is None:
            return whole
        return torch.where((self._map.inverse >= 0)[..., None], whole, fill)

    def fits(self, x: Tensor) -> bool:
        """x has the shape of what is left."""
        if self._map is None:
            return False
        rows = len(self._map.source)
        return x.ndim == 3 and (
            x.shape[:2] == (1, rows) if not self.bins else x.shape[:2] == self._slots()[0].shape
        )

    def _by_video(self, cells: Tensor) -> Tensor:
        """[frames, cells, U] -> [videos, most frames x cells, U], right padded."""
        parts = cells.split(list(self.frames))
        if len(set(self.frames)) == 1:
            return cells.reshape(len(self.frames), -1, cells.shape[-1])
        return torch.nn.utils.rnn.pad_sequence([p.flatten(0, 1) for p in parts], batch_first=True)
