"""What has to outlive a prefill: which KV columns exist, where they came from, what they weigh.

The state lives on the cache object itself, so that interleaved generations, threads, beams and
multi-turn chats do not mix. The cache's own length is extended by what was dropped, so that
`generate` and hand-written loops keep counting original tokens."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ... import ops


def columns_before(origin: Tensor, past: int) -> Tensor:
    """[B, past] original columns before those of `origin` [B, L], where none was dropped."""
    return origin[:, :1] + torch.arange(-past, 0, device=origin.device)


def physical_length(cache: Any, layer: int = 0) -> int:
    """KV columns really stored for `layer`; for a layer without a length, of the first with one."""
    if cache is None or layer >= len(cache.layers):
        return 0
    item = cache.layers[layer]
    if not hasattr(item, "get_seq_length"):
        item = next((x for x in cache.layers if hasattr(x, "get_seq_length")), None)
    return 0 if item is None else int(item.get_seq_length())


@dataclass
class Stage:
    """Columns of the layers from `start` up to the next stage.

    Attributes:
        valid: [B, K] False where a column is padding.
        origin: [B, K] column in the sequence as if nothing had been dropped; where layers look at
            chunks, counted from the first real one; of packed samples, the place in its own.
        bias: [B, K] added to attention logits, or None.
        dense: all of `valid` is True (known on the host).
        gap: columns dropped so far.
        shift: [B] by how much these layers count positions lower, [axes, B] where positions have
            axes; None for not at all.
        notes: [B, K, 4] image, place on its grid (-1: a newline), tokens it had at first, a number
            for its line; -1 for text. Kept only for methods that act in every step.
        part: [B, K] number of the sample within its row, where rows pack several (no cache then).
    """

    start: int
    valid: Tensor
    origin: Tensor
    bias: Tensor | None = None
    dense: bool = False
    gap: int = 0
    notes: Tensor | None = None
    shift: Tensor | None = None
    part: Tensor | None = None
    _mark: object = None

    def extend(self, past: int, valid: Tensor, origin: Tensor, dense: bool, mark: object) -> None:
        """Append this forward's columns, once; columns beyond `past` were rolled back."""
        if self.made_by(mark):
            return
        self._mark = mark
        self.valid = torch.cat([self.valid[:, :past], valid], 1)
        self.origin = torch.cat([self.origin[:, :past], origin], 1)
        self.dense = self.dense and dense
        if self.bias is not None:
            new = self.bias.new_zeros(valid.shape)
            self.bias = torch.cat([self.bias[:, :past], new], 1)
        if self.notes is not None:
            text = self.notes.new_full((*valid.shape, self.notes.shape[-1]), -1)
            self.notes = torch.cat([self.notes[:, :past], text], 1)

    def made_by(self, mark: object) -> bool:
        """This forward's columns are in."""
        return self._mark is mark

    def pick(self, index: Tensor, filled: Tensor, even: bool) -> Stage:
        """The stage of the columns `index` [B, K'] alone; `filled` is False on fill-up."""
        notes = self.notes
        return replace(
            self,
            valid=self.valid.gather(1, index) & filled,
            origin=self.origin.gather(1, index),
            bias=None if self.bias is None else self.bias.gather(1, index),
            dense=self.dense and even,
            gap=self.gap + self.valid.shape[1] - index.shape[1],
            notes=None if notes is None else ops.gather_rows(notes, index),
        )

    @property
    def moved(self) -> bool:
        """Columns are missing, or not where they were."""
        return self.gap != 0 or bool((self.origin.diff(dim=1) != 1).any())

    def same(self, other: Stage) -> bool:
        """Both hold the same columns."""

        def equal(a: Tensor | None, b: Tensor | None) -> bool:
            if a is None or b is None:
                return a is b
            return a is b or (a.shape == b.shape and torch.equal(a, b))

        mine = (self.valid, self.origin, self.bias, self.notes, self.shift)
        theirs = (other.valid, other.origin, other.bias, other.notes, other.shift)
        return self.gap == other.gap and all(map(equal, mine, theirs))


@dataclass
class State:
    """All stages of one cache, the last position id handed to the model, the length it ends, and
    the padding [B] on the left where somebody asks for it."""

    stages: list[Stage] = field(default_factory=list)
    last_position: Tensor | None = None
    total: int = 0
    key: object = field(default_factory=object)  # of this cache; a deep copy gets one of its own
    padding: Tensor | None = None
    inside: bool = False  # the text model runs: it knows the columns of its first layer alone

    def stage(self, layer: int) -> Stage | None:
        """The stage that governs `layer`."""
        found = None
        for stage in self.stages:
            if stage.start <= layer:
                found = stage
        return found

    def add(self, stage: Stage, mark: object) -> None:
        stage._mark = mark
        earlier = [s for s in self.stages if s.start < stage.start]
        self.stages = [*earlier, stage, *(s for s in self.stages if s.start > stage.start)]

    def rows(self, pick: Any) -> None:
        """Apply a change of batch rows (beam reorder, selection, repeat) to every column tensor."""
        for stage in self.stages:
            stage.valid, stage.origin = pick(stage.valid, 0), pick(stage.origin, 0)
            stage.bias = None if stage.bias is None else pick(stage.bias, 0)
            stage.notes = None if stage.notes is None else pick(stage.notes, 0)
            stage.shift = None if stage.shift is None else pick(stage.shift, -1)
        if self.padding is not None:
            self.padding = pick(self.padding, 0)
        if self.last_position is not None:
            self.last_position = pick(self.last_position, self.last_position.ndim - 2)


def state_of(cache: Any) -> State | None:
    return getattr(cache, "_vtc_state", None)


def adopt(cache: Any, state: State) -> None:
    """Bind `state` to `cache` for the cache's lifetime: length, row changes and reset follow it.

    Methods are replaced on this one object; they hold it weakly, so that it is freed at once.
    """
    cache._vtc_state = state
    for name in _METHODS:
        setattr(cache, name, _Bound(name, cache))


class _Bound:
    """One of `_METHODS` on one cache; a deep copy belongs to the copied cache."""

    def __init__(self, name: str, cache: Any) -> None:
        self._name, self._cache = name, weakref.ref(cache)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _METHODS[self._name](self._cache(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bound:
        cache = self._cache()
        return _Bound(self._name, memo.get(id(cache), cache))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Bound, (self._name, self._cache())


def _get_seq_length(self: Any, layer_idx: int = 0) -> Any:
    stage = self._vtc_state.stage(layer_idx)
    return type(self).get_seq_length(self, layer_idx) + (0 if stage is None else stage.gap)


def _shift(self: Any, layer_idx: int) -> int:
    """Columns missing before a layer's own, as seen by who asks: outside of the text model all that
    were dropped, inside it those that its first layer still has."""
    state = self._vtc_state
    stage, first = state.stage(layer_idx), state.stage(0) if state.inside else None
    return (0 if stage is None else stage.gap) - (0 if first is None else first.gap)


def _get_query_offset(self: Any, layer_idx: int = 0) -> Any:
    return type(self).get_seq_length(self, layer_idx) + _shift(self, layer_idx)


def _get_mask_sizes(self: Any, query_length: int, layer_idx: int) -> tuple[Any, Any]:
    length, offset = type(self).get_mask_sizes(self, query_length, layer_idx)
    offset = offset + _shift(self, layer_idx)
    surplus = max(0, -offset)  # columns that the first layer has not, when it was evicted more
    return length - surplus, offset + surplus


def _reorder_cache(self: Any, beam_idx: Tensor) -> None:
    type(self).reorder_cache(self, beam_idx)
    self._vtc_state.rows(lambda t, dim: t.index_select(dim, beam_idx.to(t.device)))


def _batch_select_indices(self: Any, indices: Tensor) -> None:
    type(self).batch_select_indices(self, indices)
    rows = indices if torch.is_tensor(indices) else torch.tensor(indices, device="cpu")
    rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
    self._vtc_state.rows(lambda t, dim: t.index_select(dim, rows.to(t.device)))


def _batch_repeat_interleave(self: Any, repeats: int) -> None:
    type(self).batch_repeat_interleave(self, repeats)
    self._vtc_state.rows(lambda t, dim: t.repeat_interleave(repeats, dim))


def _reset(self: Any) -> None:
    type(self).reset(self)
    for name in (*_METHODS, "_vtc_state"):
        delattr(self, name)


_METHODS = {
    "get_seq_length": _get_seq_length,
    "get_query_offset": _get_query_offset,
    "get_mask_sizes": _get_mask_sizes,
    "reorder_cache": _reorder_cache,
    "batch_select_indices": _batch_select_indices,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "reset": _reset,
}
