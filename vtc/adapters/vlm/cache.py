"""The `cache` site: after a forward, a method decides layer by layer which visual columns of the KV
cache stay.

Layers that attend to everything are asked; sliding-window layers keep their window. Every layer may
keep other columns: its stage says which, and masks are made from the stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...context import Context, Signals
from ...errors import UnsupportedModel
from ...session import Session
from ..attention import Tap
from .cache_kinds import stuck
from .columns import Stage, State, adopt, columns_before, physical_length
from .rows import Rows, pack, rows_of_notes


@dataclass(frozen=True)
class Moment:
    """The sequence as the layers from `layer` on saw it in this forward: visual rows, real columns
    [B, L] and [B, past], original columns [B, L], whether all are real."""

    layer: int
    rows: Rows
    valid: Tensor
    past_valid: Tensor
    origin: Tensor
    dense: bool

    def notes(self, past: int) -> Tensor:
        """[B, past + L, 4] image, place on its grid (-1: a newline), tokens it had at first, a
        number for its line; -1 for text."""
        b, length = self.valid.shape
        rows = self.rows
        image = torch.arange(len(rows.counts), device=rows.cols.device)[:, None]
        had = torch.tensor(rows.original, device=rows.cols.device)[:, None]
        ends = rows.cols if rows.ends is None else rows.ends
        out = torch.full((b * length + 1, 4), -1, device=ends.device)
        newline = torch.full_like(rows.source, -1)
        for columns, place in ((ends, newline), (rows.cols, rows.source)):
            note = torch.stack([t.expand_as(place) for t in (image, place, had, ends)], -1)
            flat = torch.where(rows.valid, rows.sample[:, None] * length + columns, b * length)
            out = out.index_put((flat,), note)
        out = out[:-1].reshape(b, length, 4)
        return torch.cat([out.new_full((b, past, 4), -1), out], 1)


@dataclass
class CacheSource:
    """Signals of one layer. rows: visual columns of `layer`, counted from its first column."""

    layer: Any
    rows: Rows
    tap: Tap | None
    valid: Tensor
    fresh: int
    final: Rows | None

    def makers(self, needs: frozenset[str]) -> dict[str, Callable[[], Any]]:
        wanted = needs | ({"token_size"} if self.rows.size is not None else frozenset())
        carried = self.rows.carried
        return {n: (lambda n=n: carried[n]) if n in carried else getattr(self, n) for n in wanted}

    def keys(self) -> Tensor:
        return self.rows.take(self.layer.keys.transpose(1, 2).flatten(2))

    def values(self) -> Tensor:
        return self.rows.take(self.layer.values.transpose(1, 2).flatten(2))

    def token_size(self) -> Tensor:
        return self.rows.sizes()

    def survivors(self) -> Tensor:
        """Everything, in a forward that brought no image."""
        final, rows = self.final, self.rows
        if final is None:
            return rows.valid
        places = rows.width  # no image has as many
        kept = torch.zeros(len(rows.original), places + 1, dtype=torch.bool, device="cpu")
        kept = kept.to(rows.cols.device)
        spare = torch.where(final.valid, final.source, places)
        kept = kept.scatter(1, spare, True)
        kept[:, -1] = False
        return kept.gather(1, rows.source) & rows.valid

    def attn_last(self) -> Tensor:
        call = (self.tap or Tap()).call
        new = self.valid[:, -self.fresh :]
        return self.rows.last_attention(call, self.rows.last_prompt(new), 0)

    def attn_text(self) -> Tensor:
        call, past = (self.tap or Tap()).call, self.valid.shape[1] - self.fresh
        index, exists = self.rows.text_after(self.valid)
        new = exists & (index >= past)
        return self.rows.text_attention(call, ((index - past).clamp(min=0), new), 0)


def evict(
    number: int,
    session: Session,
    cache: Any,
    state: State,
    moments: Sequence[Moment],
    layers: Sequence[int],
    length: int,
    taps: Mapping[int, Tap],
    mark: object,
) -> None:
    """Run step `number` on every layer of `layers` and rebuild the stages.

    moments: what the layers saw in this forward, empty when it brought no image; then it added
    `length` columns to every layer.
    """
    if cache is None:
        raise UnsupportedModel(
            "the site 'cache' needs a KV cache, but this forward runs without one: call the model "
            "with use_cache=True (gradient checkpointing switches it off), or leave the cache step "
            "out (mustdrop: decode=False)."
        )
    if torch.compiler.is_compiling():
        raise UnsupportedModel("the site 'cache' cannot run under torch.compile.")
    method, site = session.methods[number], session.recipe.steps[number].site
    stages = [_stage(state, i, cache, moments) for i in range(len(cache.layers))]
    changed = method.every_step
    reads = set(method.needs)  # behind the last drop every column is a survivor
    for i in layers:
        stage, moment = stages[i], seen_by(moments, i) if moments else None
        if stage is None:
            continue
        fresh = length if moment is None else moment.valid.shape[1]
        past = stage.valid.shape[1] - fresh
        final, rows = None, None
        if method.every_step:
            if moment is not None:
                stage = stages[i] = _annotate(stage, moment.notes(past))
            rows = None if stage.notes is None else rows_of_notes(stage.notes, stage.valid)
        elif moment is not None and moment is moments[-1] and reads == {"survivors"}:
            session.passed(number, sum(moment.rows.counts))
        elif moment is not None:
            final, rows = moments[-1].rows, replace(moment.rows, cols=moment.rows.cols + past)
        if rows is None:
            continue
        why = stuck(cache, i)
        if why is not None:
            if session.tokens(number, rows.counts, rows.original) != rows.counts:
                raise UnsupportedModel(why)
            session.passed(number, sum(rows.counts))
            continue
        source = CacheSource(cache.layers[i], rows, taps.get(i), stage.valid, fresh, final)
        ctx = Context(
            x=source.keys(),
            visual=rows.valid,
            counts=rows.counts,
            original=rows.original,
            source=rows.source,
            layout=rows.layout,
            parts=rows.parts,
            site=replace(site, layer=i),
            signals=Signals(source.makers(method.needs)),
            seed=session.recipe.seed,
        )
        plan = session.reduce(number, ctx, rows.samples)
        if plan is None:
            continue
        keep = rows.keep(plan, stage.valid.shape)
        index, filled, even = pack(keep, stage.valid, stage.dense, rows, plan)
        layer = cache.layers[i]  # copied, not compacted in place: that would free no memory
        layer.keys, layer.values = ops.gather_tokens(index, layer.keys, layer.values, axis=2)
        stages[i], changed = stage.pick(index, filled, even), True
    if changed:
        state.stages = _grouped(stages, mark)
        adopt(cache, state)


def seen_by(moments: Sequence[Moment], layer: int) -> Moment:
    """What `layer` saw; the first moment is of layer 0."""
    return [m for m in moments if m.layer <= layer][-1]


def _stage(state: State, i: int, cache: Any, moments: Sequence[Moment]) -> Stage | None:
    """The stage of layer i alone; one of its own where nothing was dropped so far."""
    stage, moment = state.stage(i), seen_by(moments, i) if moments else None
    if stage is not None:
        return replace(stage, start=i)
    if moment is None:
        return None
    past = physical_length(cache, i) - moment.valid.shape[1]
    before = columns_before(moment.origin, past)
    valid = torch.cat([moment.past_valid, moment.valid], 1)
    dense = moment.dense and bool(moment.past_valid.all())
    return Stage(i, valid, torch.cat([before, moment.origin], 1), dense=dense)


def _annotate(stage: Stage, notes: Tensor) -> Stage:
    """The stage with the notes of this forward's columns added to those it has."""
    if stage.notes is None:
        return replace(stage, notes=notes)
    old = stage.notes
    last = old[..., 0].max() + 1  # images of later turns get numbers of their own
    image = torch.where(notes[..., :1] >= 0, notes[..., :1] + last.clamp(min=0), -1)
    fresh = torch.cat([image, notes[..., 1:]], -1)
    return replace(stage, notes=torch.where(notes[..., :1] >= 0, fresh, old))


def _grouped(stages: Sequence[Stage | None], mark: object) -> list[Stage]:
    """Neighbouring layers with the same columns share one stage."""
    out: list[Stage] = []
    for stage in stages:
        if stage is None:
            continue
        if not out or not out[-1].same(stage):
            stage._mark = mark
            out.append(stage)
    return out
