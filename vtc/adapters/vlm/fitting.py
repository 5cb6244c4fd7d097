"""What columns and masks of a forward mean, and masks for the columns that layers really have."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .cache_kinds import is_static
from .columns import Stage
from .masks import Stored, fit_mask, is_ready, layer_mask, padding_before
from .packed import fills_cache, samples_of

if TYPE_CHECKING:
    from .adapter import HfDecoder
    from .hooks import Forward


class Fitting:
    """Of the forwards of one model. rotated: a method reads what positions turn."""

    def __init__(self, adapter: HfDecoder, rotated: bool) -> None:
        self.a, self.rotated = adapter, rotated
        self.chunked = "chunked_attention" in adapter.kinds

    def count(self, f: Forward, positions: Tensor | None, start: int, first: Stage | None) -> None:
        """Leave out the padding on the left where layers count columns without it (chunks), or
        where a method reads what positions turn and the model's own count includes it."""
        assert f.state is not None
        alike = positions is None or (positions.ndim == 2 and (f.follows or len(positions) == 1))
        padded = f.asked is None and alike and not (f.dense and f.past_dense)
        if not self.chunked and not (padded and self.rotated):
            return
        known = f.state.padding
        padding = padding_before(f.past_valid, f.valid, start, known, first is None)[:, None]
        f.state.padding = padding[:, 0]
        if padded and self.rotated:
            places = f.origin if positions is None else positions
            f.unpadded = (places - padding).clamp(min=0)
        if self.chunked:
            f.origin = f.origin - padding

    def part(self, f: Forward, positions: Tensor, caching: bool | None) -> None:
        """Find out whether rows pack several samples."""
        a = self.a
        axes, flash = hasattr(a.base, "rope_deltas"), "flash" in a.implementation
        caches = fills_cache(a.text, caching)
        f.part, f.refusal = samples_of(positions, len(f.valid), axes, caches, flash)
        if f.part is not None:  # windows and chunks begin with every sample
            line = positions if positions.ndim == 2 else positions[0]
            f.origin = line.expand_as(f.origin)

    def whole(self, f: Forward, mask: Tensor, cache: Any) -> bool:
        """A mask of the sequence as if nothing had been dropped."""
        assert f.state is not None
        return not is_static(cache) and mask.shape[-1] == f.state.total

    def take(self, f: Forward, mask: Any, cache: Any) -> None:
        """Keep the ready masks that the text model is called with, where layers can follow them."""
        masks = mask if isinstance(mask, dict) else dict.fromkeys(self.a.kinds, mask)
        f.given = {
            kind: ready
            for kind, ready in masks.items()
            if is_ready(ready) and (f.entry is not None or self.whole(f, ready, cache))
        }

    def text(self, f: Forward, mask: Any, past: int, hidden: Tensor, cache: Any) -> Any:
        """The mask argument for the text model's own columns."""
        assert f.state is not None
        stage, given = f.state.stages[0], mask if isinstance(mask, dict) else {"": mask}
        wanted = {k for k, m in given.items() if is_ready(m) or not stage.dense}
        wanted &= {"", *self.a.kinds}  # those that a layer takes
        if f.given and isinstance(mask, dict) and wanted <= f.given.keys():
            first = {kind: self.a.kinds.index(kind) for kind in wanted}
            return mask | {k: self.fit(f, i, stage, past, cache) for k, i in first.items()}
        if f.given and not isinstance(mask, dict):
            return self.fit(f, 0, stage, past, cache)
        f.given = {}
        if f.part is not None and f.drops:
            return layer_mask(self.a.config, None, 0, stage, hidden, None)
        # Without a cache never None: gapped positions would be read as packed sequences.
        return None if stage.dense and cache is not None else stage.valid

    def fit(self, f: Forward, i: int, stage: Stage, past: int, cache: Any) -> Tensor:
        """The mask that came from outside for the kind of layer i, for the columns of its stage."""
        mask, columns = f.given[self.a.kinds[i]], None
        if past and self.whole(f, mask, cache):
            assert f.state is not None
            columns = stage.origin[:, :past]
            if self.chunked and f.state.padding is not None:
                columns = columns + f.state.padding[:, None]
        index = f.drops[-1][1] if f.drops else None
        start = f.text_past if is_static(cache) else None
        reach, held = self.a.reach(i), None
        if reach is not None and past:
            held = Stored(cache).get_mask_sizes(f.length, i)[0] - f.length
        return fit_mask(mask, f.width, stage, past, index, reach, start, columns, held)

    def layer(
        self, i: int, f: Forward, stage: Stage, past: int, hidden: Tensor, mask: Any, cache: Any
    ) -> Any:
        """The mask of layer i, which the text model gives `mask`."""
        kind = self.a.kinds[i]
        if kind in f.given:
            fit = partial(self.fit, f, i, stage, past, cache)
            return f.once(("given", stage.start, kind), None, fit)
        if self.a.reach(i) is None and f.entry is not None and is_ready(mask):
            start = f.text_past if is_static(cache) else None
            fit = partial(fit_mask, mask, f.text_length, stage, past, f.index, None, start)
            return f.once(("mask", stage.start, id(mask)), mask, fit)
        return self.fresh(i, f, stage, hidden, cache)

    def fresh(self, i: int, f: Forward, stage: Stage, hidden: Tensor, cache: Any) -> Any:
        """A mask made from what the stage of layer i knows."""
        make = partial(layer_mask, self.a.config, self.a.reach(i), i, stage, hidden, cache)
        return f.once((stage.start, self.a.kinds[i]), None, make)
