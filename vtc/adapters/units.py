"""Tokens of a vision tower as units: the patches that become one language-model token.

Methods see units in raster order, [R, N, U] with the channels of all their patches side by side.
A tower keeps its patches as [images, tokens, channels] (CLIP, SigLIP, InternVL, Idefics3) or packs
those of all images into one sequence (Qwen)."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..context import Context, Layout, Signals, Site
from ..errors import UnsupportedModel
from ..plan import Plan
from .slot import Memo

#: read from the attention of the block that has just run
PREVIOUS_BLOCK_SIGNALS = frozenset({"attn_cls", "vision_keys"})


class Units(Memo, ABC):
    """The units that are left in one run of a tower.

    Attributes:
        layout: grid of every image in units; `original`: units it had at first.
        source: [R, N] raster place of each unit; `real` [R, N] False on padding.
        counts: units of each image now.
        size: [R, N] original units that each one stands for, None while all are 1.
        mass: strength of log(size) on attention logits.
        shortened: something was dropped. merged: a token holds several units.
    """

    packed: bool

    def __init__(self, layout: Sequence[Layout], group: int, device: torch.device) -> None:
        super().__init__()
        self.layout = tuple(layout)
        self.original = self.counts = tuple(grid.n for grid in layout)
        self.group = group
        steps = torch.arange(max(self.counts), device=device).expand(len(self.counts), -1)
        self.source = steps
        self.real = steps < torch.tensor(self.counts, device=device)[:, None]
        self.size: Tensor | None = None
        self.mass, self.shortened, self.merged = 0.0, False, False
        self._came: tuple[Units, Plan] | None = None

    @abstractmethod
    def take(self, x: Tensor) -> Tensor:
        """Hidden states of the tower -> units [R, N, U]."""

    @abstractmethod
    def shrink(self, x: Tensor, plan: Plan, left: Self) -> Tensor:
        """Hidden states that hold the kept units only; `left` is what `after` says of them."""

    @abstractmethod
    def per_unit(self, values: Tensor) -> Tensor:
        """[images, heads or 1, tokens, C] as attention lays them out -> [R, N, group, C]."""

    @abstractmethod
    def pool(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[R, N, ...] of the units that are left -> [all units, ...] as the projector has them."""

    @abstractmethod
    def key_bias(self, values: Tensor) -> Tensor:
        """[R, N] of units -> [B, K] of every key of the tower, 0 on prefix tokens."""

    def bias(self) -> Tensor | None:
        """[B, K] mass * log(size) for every key of the tower, None when switched off."""
        log = self._log_size()
        return None if log is None else self.key_bias(log)

    def context(
        self,
        x: Tensor,
        site: Site,
        needs: frozenset[str],
        makers: Mapping[str, Callable[[], Tensor]],
        seed: int,
    ) -> Context:
        """What a method sees of hidden states x; `makers` of the signals that it may ask for."""
        sizes = {
            "token_size": lambda: self.real.float() if self.size is None else self.size,
            "tile": lambda: torch.arange(len(self.counts), device=x.device)[:, None].expand_as(
                self.real
            ),
        }
        wanted = needs | ({"token_size"} if self.size is not None else frozenset())
        known = {**sizes, **makers}
        return Context(
            x=self.take(x),
            visual=self.real,
            counts=self.counts,
            original=self.original,
            source=self.source,
            layout=self.layout,
            site=site,
            signals=Signals({name: known[name] for name in wanted}),
            seed=seed,
        )

    def after(self, plan: Plan, mass: float) -> Self:
        """The units that a plan over these leaves."""
        new = copy.copy(self)
        new.source = self.source.gather(1, plan.index)
        new.real, new.counts = plan.slots, plan.kept
        new.size, new.mass, new.shortened = plan.size, mass, True
        new.merged = self.merged or plan.weight is not None
        new._came = (self, plan)
        new.clear()
        return new

    def members(self) -> Tensor:
        """[R, all units] which of the units that are left [R, N] each one went into, -1 if lost."""
        if self._came is None:
            return torch.where(self.real, self.source, -1)
        before, plan = self._came
        went = before.members()
        return torch.where(went < 0, -1, plan.destination().gather(1, went.clamp(min=0)))

    def spread(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[R, N, ...] of the units that are left -> [R, all units, ...] in raster order."""
        width = max(self.original)
        out = values.new_full((values.shape[0], width + 1, *values.shape[2:]), fill)
        where = torch.where(self.real, self.source, width)
        rows = torch.arange(values.shape[0], device=values.device)[:, None]
        return out.index_put((rows, where), values)[:, :width]

    def kept(self) -> Tensor:
        """[R, all units] True where a unit is left."""
        return self.spread(self.real)

    def _log_size(self) -> Tensor | None:
        if not self.mass or self.size is None:
            return None
        even = min(self.counts) == max(self.counts)
        size = self.size if even else torch.where(self.real, self.size, 1.0)
        return self.mass * size.clamp(min=1e-6).log()


class GridUnits(Units):
    """Images of one size, [images, prefix + patches, channels]; prefix tokens (CLS) always stay.

    patches: grid of patches; merge: side of the groups that are one unit.
    """

    packed = False

    def __init__(
        self, images: int, prefix: int, patches: Layout, merge: int, device: torch.device
    ) -> None:
        self.prefix, self.tokens = prefix, prefix + patches.n
        grid = Layout(1, patches.height // merge, patches.width // merge)
        super().__init__([grid] * images, merge * merge, device)
        self.patches = group_patches(patches, merge, device)  # raster unit -> its patches

    @classmethod
    def square(cls, x: Tensor, merge: int) -> GridUnits:
        """From hidden states [images, tokens, channels] of square images."""
        images, tokens, _ = x.shape
        side = math.isqrt(tokens)
        prefix = tokens - side * side
        if side % merge or prefix > 8:
            raise UnsupportedModel(
                f"{tokens} tower tokens are not a square grid of {merge} x {merge} groups (and a "
                f"few prefix tokens): dropping inside this vision tower is not possible."
            )
        return cls(images, prefix, Layout(1, side, side), merge, x.device)

    def take(self, x: Tensor) -> Tensor:
        body = x[:, self.prefix :]
        if not self.shortened and self.group > 1:
            body = body.index_select(1, self.patches.reshape(-1))
        return body.reshape(x.shape[0], -1, self.group * x.shape[-1])

    def shrink(self, x: Tensor, plan: Plan, left: Self) -> Tensor:
        if self.group == 1:  # prefix tokens are moved along: nothing is copied twice
            return ops.apply(plan.behind(self.prefix), x)
        return self.replace(x, ops.apply(plan, self.take(x)))

    def replace(self, x: Tensor, units: Tensor) -> Tensor:
        """Hidden states that hold `units` [images, M, U] behind the prefix tokens of x."""
        body = units.reshape(x.shape[0], -1, x.shape[-1])
        return torch.cat([x[:, : self.prefix], body], 1) if self.prefix else body

    def index(self) -> Tensor:
        """[images, K] tower token that each token left sits on."""
        own = self.patches[self.source].flatten(1) + self.prefix
        head = torch.arange(self.prefix, device=own.device).expand(own.shape[0], -1)
        return torch.cat([head, own], 1)

    def columns(self) -> Tensor | None:
        """[images, K] False on padding; None when there is none."""
        if min(self.counts) == max(self.counts):
            return None
        return F.pad(self.real.repeat_interleave(self.group, 1), (self.prefix, 0), value=True)

    def restore(self, x: Tensor) -> Tensor:
        """[images, K, C] -> every tower token, zero where it was dropped."""
        index, real = self.index(), self.columns()
        if real is not None:  # padding goes where it is cut off
            index = torch.where(real, index, self.tokens)
        out = x.new_zeros(x.shape[0], self.tokens + 1, x.shape[-1])
        return out.scatter(1, index[..., None].expand(-1, -1, x.shape[-1]), x)[:, : self.tokens]

    def per_unit(self, values: Tensor) -> Tensor:
        images, width = values.shape[0], values.shape[-1]
        return self.take(values.float().mean(1)).reshape(images, -1, self.group, width)

    def pool(self, values: Tensor, fill: float = 0.0) -> Tensor:
        return self.spread(values, fill).flatten(0, 1)

    def key_bias(self, values: Tensor) -> Tensor:
        return F.pad(values.repeat_interleave(self.group, 1), (self.prefix, 0))


class PackedUnits(Units):
    """Images one behind the other, [patches, channels], a unit being `group` rows in a row.

    order: [all units] raster unit (counted over all images) at each place of the sequence.
    """

    packed = True

    def __init__(self, layout: Sequence[Layout], group: int, order: Tensor) -> None:
        super().__init__(layout, group, order.device)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        starts = torch.tensor([0, *self.counts[:-1]], device=order.device).cumsum(0)
        raster = (starts[:, None] + self.source).clamp(max=len(order) - 1)
        #: [R, N] place of each unit in the sequence as it is now, and in the untouched one
        self.place = self.first = place[raster]
        self.total = len(order)

    def take(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.group * x.shape[-1])[self.place]

    def shrink(self, x: Tensor, plan: Plan, left: Self) -> Tensor:
        units = ops.apply(plan, self.take(x))
        order = self.place.gather(1, plan.index)[plan.slots].argsort()
        return units[plan.slots][order].reshape(-1, x.shape[-1])

    def after(self, plan: Plan, mass: float) -> Self:
        new = super().after(plan, mass)
        new.first = self.first.gather(1, plan.index)
        new.place = (new.units_kept().cumsum(0) - 1)[new.first]
        return new

    def units_kept(self) -> Tensor:
        """[all units] True for the places of the untouched sequence that are left."""
        keep = torch.zeros(self.total, dtype=torch.bool, device=self.first.device)
        keep[self.first[self.real]] = True
        return keep

    def rows_kept(self) -> Tensor:
        """[patches] the same, row by row."""
        return self.units_kept().repeat_interleave(self.group)

    def lengths(self, cumulative: Tensor) -> Tensor:
        """Cumulative segment lengths of the rows that are left; empty segments vanish."""
        ends = F.pad(self.rows_kept().cumsum(0), (1, 0))[cumulative.long()]
        return torch.unique_consecutive(ends).to(cumulative.dtype)

    def restore(self, rows: Tensor) -> Tensor:
        """[kept units, D], one row per unit -> every unit, zero where it was dropped."""
        keep = self.units_kept()
        if not len(rows):
            return rows.new_zeros(self.total, rows.shape[-1])
        place = (keep.cumsum(0) - 1).clamp(min=0)
        return torch.where(keep[:, None], rows[place], 0.0).to(rows.dtype)

    def restore_rows(self, x: Tensor) -> Tensor:
        """[.., patches that are left, C] -> every patch; what has another length is left alone."""
        left, width = self.group * sum(self.counts), x.shape[-1]
        if x.numel() != left * width:
            return x
        whole = self.restore(x.reshape(-1, self.group * width))
        return whole.reshape(*x.shape[:-2], -1, width)

    def per_unit(self, values: Tensor) -> Tensor:
        rows = values[0].float().mean(0)
        return rows.reshape(-1, self.group, rows.shape[-1])[self.place]

    def pool(self, values: Tensor, fill: float = 0.0) -> Tensor:
        out = values.new_full((self.total, *values.shape[2:]), fill)
        return out.index_put((self.first[self.real],), values[self.real])

    def key_bias(self, values: Tensor) -> Tensor:
        out = values.new_zeros(sum(self.counts))
        out = out.index_put((self.place[self.real],), values[self.real])
        return out.repeat_interleave(self.group)[None]


def group_patches(grid: Layout, merge: int, device: torch.device) -> Tensor:
    """[groups, merge * merge] patches of every group, in raster order. A grid that does not divide
    is padded on both sides, -1 there."""
    spare_y, spare_x = -grid.height % merge, -grid.width % merge
    place = torch.arange(grid.n, device=device).reshape(grid.height, grid.width)
    sides = (spare_x // 2, spare_x - spare_x // 2, spare_y // 2, spare_y - spare_y // 2)
    place = F.pad(place, sides, value=-1)
    height, width = (n // merge for n in place.shape)
    place = place.reshape(height, merge, width, merge).transpose(1, 2)
    return place.reshape(height * width, merge * merge)


def gather_mask(mask: Tensor, index: Tensor) -> Tensor:
    """A mask [B|1, tokens] or [B|1, H, tokens|1, tokens] for the tokens index [B, K]."""
    if mask.ndim == 2:
        return mask.expand(len(index), -1).gather(1, index)
    b, k = index.shape
    mask = mask.expand(b, -1, -1, -1)
    h, tokens = mask.shape[1], mask.shape[3]
    if mask.shape[2] == tokens:
        (mask,) = ops.gather_tokens(index, mask, axis=2)
    return mask.gather(3, index[:, None, None, :].expand(b, h, mask.shape[2], k))


def fit_masks(units: GridUnits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a block, hidden states first, with masks [images, 1, tokens, tokens] or
    [images, tokens] for the tokens that are left."""

    def fit(value: Any) -> Any:
        if not torch.is_tensor(value) or value.shape[-1] != units.tokens:
            return value
        return units.once(id(value), value, partial(gather_mask, value, units.index()))

    if "attention_mask" in kwargs:
        kwargs["attention_mask"] = fit(kwargs["attention_mask"])
    return (*args[:1], *(fit(a) for a in args[1:]))


def fit_table(units: GridUnits, table: Tensor) -> Tensor:
    """A rotary table [patches, D] (or [tokens, D], prefix included) -> [images, 1, left, D]."""
    if table.ndim != 2 or table.shape[0] not in (units.tokens, units.tokens - units.prefix):
        raise UnsupportedModel(
            f"rotary tables of shape {tuple(table.shape)} for {units.tokens} tokens, "
            f"{units.prefix} of them no patches, cannot be shortened."
        )
    index = units.index()
    if table.shape[0] != units.tokens:
        index = index[:, units.prefix :] - units.prefix
    return table[index][:, None]


def restore(plans: Sequence[Plan], x: Tensor, prefix: int) -> Tensor:
    """[images, prefix + left, C] -> the whole grid, after plans in their order: merged tokens where
    they came from, zeros for dropped ones."""
    for plan in reversed(plans):
        x = ops.restore(plan.behind(prefix), x)
    return x
