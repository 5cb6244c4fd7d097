"""Which KV caches can hold a sequence that is shorter than the one that was given, which can lose
columns later, and which were made anew from a shortened one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...errors import UnsupportedModel
from .columns import State, physical_length, state_of

#: fingerprints that a session remembers; the oldest go first
REMEMBERED = 256


def is_static(cache: Any) -> bool:
    return cache is not None and any(hasattr(layer, "max_cache_len") for layer in cache.layers)


def check_layers(cache: Any) -> None:
    """Refuse a cache whose columns cannot be counted."""
    if cache is not None and not hasattr(cache, "layers"):
        name = type(cache).__name__
        raise UnsupportedModel(f"cache {name} has no layers: use a DynamicCache.")


def check_shorter(cache: Any) -> None:
    """Refuse a cache, or None, whose columns cannot be fewer than the tokens that were given."""
    if cache is None:
        return
    own = _counts_itself(cache)
    if own is not None:
        raise UnsupportedModel(own)
    for layer in cache.layers:
        if hasattr(layer, "update_indexer"):
            raise UnsupportedModel(
                f"cache layer {type(layer).__name__} keeps an index that counts original columns, "
                f"so it cannot hold a shortened sequence. Use keep=1.0, or another model."
            )
        if getattr(layer, "is_sliding", False) and hasattr(layer, "max_cache_len"):
            raise UnsupportedModel(
                "a StaticCache with sliding-window or chunked layers cannot hold a shortened "
                "sequence (its ring buffer counts original columns). Use the default cache."
            )


def _counts_itself(cache: Any) -> str | None:
    """Why columns may not be missing from a cache that says itself where a sequence ends."""
    for method in ("get_query_offset", "get_mask_sizes"):
        if getattr(type(cache), method, None) is not getattr(Cache, method):
            return (
                f"cache {type(cache).__name__} has a {method} of its own, so where a shortened "
                f"sequence ends in it is not known: use a DynamicCache."
            )
    return None


def stuck(cache: Any, i: int) -> str | None:
    """Why columns cannot be taken out of layer `i` of a filled cache; None where they can."""
    own, layer = _counts_itself(cache), cache.layers[i]
    if own is not None:
        return own
    name, instead = type(layer).__name__, "use the default cache for the site 'cache'"
    if hasattr(layer, "max_cache_len"):
        return (
            f"cache layer {name} has buffers of a fixed size, so dropping columns saves nothing: "
            f"{instead}, or leave that step out (mustdrop: decode=False)."
        )
    if getattr(cache, "offloading", False):
        return f"this {type(cache).__name__} is offloaded, its columns are elsewhere: {instead}."
    if hasattr(layer, "_quantized_keys"):
        return f"cache layer {name} keeps its columns quantised, not as plain tensors: {instead}."
    keys: Any = getattr(layer, "keys", None)
    plain = torch.is_tensor(keys) and keys.ndim == 4
    if hasattr(layer, "update_indexer") or not plain or keys.shape[-2] != layer.get_seq_length():
        return f"cache layer {name} does not keep its columns as plain tensors alone: {instead}."
    return None


# --------------------------------------------------------------------------------------------
# caches made anew


@dataclass(frozen=True)
class Print:
    """A column of a shortened cache that is not where it would be in a whole one: `keys` [B, H, D]
    of `layer` at `column` [B], the first such column of every row; NaN for rows without one."""

    layer: int
    column: Tensor
    keys: Tensor

    def inside(self, cache: Any) -> Tensor | None:
        """[] some row of a cache is of this one; None where that cannot be seen."""
        stored = _keys(cache, self.layer)
        if stored is None or not stored.shape[2]:
            return None
        if stored.shape[1:2] + stored.shape[3:] != self.keys.shape[1:]:
            return None
        length, column = stored.shape[2], self.column.to(stored.device)
        found = stored.index_select(2, column.clamp(max=length - 1)).transpose(1, 2)
        same = (found == self.keys.to(found.device, found.dtype)).flatten(2).all(-1)
        return (same & (column < length)).any()


class Prints:
    """What one session remembers of the caches that it has shortened. What is known of a cache is
    on the cache object; tensors that somebody puts into another one come without it."""

    def __init__(self) -> None:
        self._prints: dict[object, Print] = {}

    def add(self, cache: Any, state: State) -> None:
        """Remember a cache whose columns this forward has changed."""
        if not state.stages:
            return
        stage = max(state.stages, key=lambda stage: stage.gap)
        width = stage.valid.shape[1]
        for layer in range(stage.start, len(cache.layers)):
            keys = _keys(cache, layer)
            if keys is not None and keys.shape[2] >= width and state.stage(layer) is stage:
                break
        else:
            return
        moved = stage.origin != torch.arange(width, device=stage.origin.device)
        column = moved.long().argmax(1)
        at = column.to(keys.device)[:, None, None, None].expand(-1, keys.shape[1], 1, keys.shape[3])
        found = keys.detach().gather(2, at)[:, :, 0]
        real = moved.any(1).to(keys.device)[:, None, None]
        self._prints.pop(state.key, None)
        self._prints[state.key] = Print(layer, column, torch.where(real, found, torch.nan))
        while len(self._prints) > REMEMBERED:
            self._prints.pop(next(iter(self._prints)), None)

    def check(self, cache: Any, fresh: int, mask: Any) -> None:
        """Refuse a cache that was filled elsewhere and is shorter than it should be; asked once per
        cache. fresh: columns of this forward. mask: its attention mask."""
        if cache is None or torch.compiler.is_compiling() or not hasattr(cache, "layers"):
            return
        if state_of(cache) is not None or getattr(cache, "_vtc_whole", False):
            return
        past = physical_length(cache)
        if past:
            found = [
                seen for p in list(self._prints.values()) if (seen := p.inside(cache)) is not None
            ]
            uneven = len({_length(cache, i) for i in range(len(cache.layers))} - {None}) > 1
            wide = torch.is_tensor(mask) and mask.ndim == 2 and mask.shape[1] > past + fresh
            shorter = uneven or (wide and not is_static(cache))
            if shorter or (found and bool(torch.stack([x.cpu() for x in found]).any())):
                raise UnsupportedModel(
                    f"this {type(cache).__name__} holds a shortened sequence, but not what is "
                    f"known of its columns: it was made anew from the tensors of another cache. "
                    f"Hand on the cache object itself or copy.deepcopy(cache), which keep that, "
                    f"or fill a new cache in this session."
                )
        cache._vtc_whole = True


def _keys(cache: Any, i: int) -> Tensor | None:
    """[B, H, columns, D] of layer i, where they are plain."""
    keys = getattr(cache.layers[i], "keys", None) if i < len(cache.layers) else None
    return keys if torch.is_tensor(keys) and keys.ndim == 4 else None


def _length(cache: Any, i: int) -> int | None:
    """Columns of layer i, where all of them are stored."""
    layer, keys = cache.layers[i], _keys(cache, i)
    bounded = getattr(layer, "is_sliding", False) or hasattr(layer, "max_cache_len")
    return None if keys is None or bounded else keys.shape[2]
