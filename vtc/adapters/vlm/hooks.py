"""The hooks of one session on one Hugging Face model.

Outer model: how many output rows are wanted. Base model: which placeholders are visual. Text model:
the `projector` site, and outputs back at full length. Decoder layers: the `decoder.<i>` sites, and
masks, positions and rotary tables that fit each layer's own columns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import ops
from ...context import Context, Signals
from ...errors import InvalidInput, UnsupportedModel
from ...hooks import Installed
from ...plan import Plan
from ...recipe import Step
from ...reducer import Rewriter
from ...session import Session
from ...versions import cache_argument, cache_in, cache_of, check_checkpointing
from ..attention import Call, Overlay, Side, Tap, refuse_maps
from ..slot import Memo, Slot
from .cache import Moment, evict, seen_by
from .cache_kinds import Prints, check_layers, check_shorter, is_static
from .columns import Stage, State, adopt, columns_before, physical_length, state_of
from .deepstack import Deepstack
from .fitting import Fitting
from .grids import Grids
from .masks import gather_rows, gather_tables, per_token, real_columns, restore, returns_all
from .rows import Rows, find_rows, pack
from .signals import ATTENTION_SIGNALS, PREVIOUS_LAYER_SIGNALS, ROTATED_SIGNALS, SignalSource
from .tiles import TILES, note_tiles, packs_tiles
from .tower import TOWER_SIGNALS
from .vision import Vision

if TYPE_CHECKING:
    from .adapter import HfDecoder

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

#: `mm_token_type_ids` of transformers: 0 text, 1 image, 2 video
VIDEO_TYPE = 2
#: rows of logits that the outer model was asked for; 0 = all
_WANTED: Slot[int] = Slot("vtc_logits_to_keep", 0)
#: tokens of one projected image or tile, in raster order; 0 = unknown
_TILE: Slot[int] = Slot("vtc_tile", 0)
#: images and tokens of each that the projector made since the last forward, call by call
_MADE: Slot[tuple[tuple[int, int], ...]] = Slot("vtc_made", ())
#: grids of the tower's last runs: images, then videos
_GRIDS: Slot[tuple[list[Any], ...]] = Slot("vtc_grids", ())
#: grids of whole videos, where the tower may be given their frames one by one
_VIDEOS: Slot[tuple[Any, ...]] = Slot("vtc_videos", ())


@dataclass
class Forward(Memo):
    """State of one forward of the base model; gone when it returns.

    `valid`, `origin`, `dense`, `length` describe the sequence as it is now: real columns [B, L],
    where they came from [B, L], whether all are real, L. `places` are its positions [.., B, L] and
    `lower` [.., B, L] by how much steps that renumber have moved them (`gone` [.., B]: what comes
    later); `real` are the real columns of the whole sequence, `whole` its positions; `index` maps
    it to the text model's own columns, `drops` to the columns before any reduction. `moments`: what
    the layers saw. `part` [B, L]: which sample of its row a column is of; `refusal`: why nothing
    can be dropped.
    """

    owner: object
    mark: object  # identity of this forward; safe to copy, unlike the forward itself
    visual: Tensor | None
    is_video: Tensor | None
    grids: dict[str, list[tuple[int, int, int]]]
    state: State | None
    previous: Forward | None
    wanted: int
    features: int = 0
    told: bool = False  # the grids are arguments of this forward
    asked: Tensor | None = None  # position ids that the caller gave
    alone: bool = False  # the caller gave neither a mask nor a cache
    follows: bool = False  # positions go on from the forward before, which may have counted padding
    part: Tensor | None = None
    refusal: str | None = None
    unpadded: Tensor | None = None  # [B, L] positions without the padding that the model counts
    given: dict[str, Tensor] = field(default_factory=dict)  # ready masks by kind, from outside
    rows: Rows | None = None
    entry: Rows | None = None  # the rows before any reduction
    valid: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    origin: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    dense: bool = True
    past_valid: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    past_dense: bool = True
    length: int = 0
    index: Tensor | None = None
    places: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    real: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    whole: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    lower: Tensor | None = None
    gone: Tensor | None = None
    width: int = 0  # columns before any reduction
    text_length: int = 0
    text_past: int = 0
    drops: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    deep: Deepstack | None = None
    beside: float = 0.0  # FLOPs of a method that writes tokens
    taps: dict[int, Tap] = field(default_factory=dict)
    sides: list[Side] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def renumber(self) -> None:
        """Close the gaps of everything that this forward has dropped so far. Where positions have
        axes, what is left counts as text: all axes go on in equal steps from the first real
        column."""
        _, index, filled = self.drops[-1]
        kept = (self.valid & filled).long().cumsum(1)
        if self.whole.ndim == 3:
            first = self.real.long().argmax(1).expand(len(self.whole), -1)[..., None]
            fresh = self.whole.gather(2, first) + kept - 1
            self.lower = self.places - fresh
            self.gone = self.whole[..., -1] - fresh[..., -1]
            return
        rank = self.real.long().cumsum(1)
        self.lower = rank.gather(1, index) - kept
        self.gone = rank[:, -1] - kept[:, -1]

    def before(self, stage: Stage) -> Tensor | None:
        """[B] by how much a stage's positions were lower before this forward."""
        ours = stage.made_by(self.mark) and self.gone is not None and stage.shift is not None
        return stage.shift - self.gone if ours else stage.shift  # type: ignore[operator]

    def positions(self, stage: Stage | None) -> Tensor:
        """Position ids of the sequence as it is now, for the layers of `stage`."""
        lower = None if stage is None else self.before(stage)
        lower = None if lower is None else lower[..., None]
        if self.lower is not None:
            lower = self.lower if lower is None else self.lower + lower
        return self.places if lower is None else self.places - lower

    def remember(self, layer: int) -> None:
        """What the layers from `layer` on see."""
        if self.rows is not None:
            seen = Moment(layer, self.rows, self.valid, self.past_valid, self.origin, self.dense)
            self.moments.append(seen)


_FORWARD: Slot[Forward | None] = Slot("vtc_forward", None)


class Hooks:
    """Bound methods are the hooks; the only lasting state is on cache objects."""

    def __init__(self, adapter: HfDecoder, session: Session) -> None:
        self.a, self.session = adapter, session
        self.steps, self.methods = session.recipe.steps, session.methods
        kinds = [step.site.kind for step in self.steps]
        self.before = kinds.index("projector") if "projector" in kinds else None
        self.writes = self.before is not None and isinstance(self.methods[self.before], Rewriter)
        self.inside = {
            s.site.layer: n for n, s in enumerate(self.steps) if s.site.kind == "decoder"
        }
        self.tapped = {
            layer - 1
            for layer, n in self.inside.items()
            if layer and self.methods[n].needs & PREVIOUS_LAYER_SIGNALS
        }
        self.rotated = {
            layer - 1
            for layer, n in self.inside.items()
            if layer and self.methods[n].needs & ROTATED_SIGNALS
        }
        self.fitting = Fitting(adapter, bool(self.rotated))
        self.cache, self.prints = kinds.index("cache") if "cache" in kinds else None, Prints()
        self.evicts_always = self.cache is not None and self.methods[self.cache].every_step
        self.cache_taps = self.cache is not None and bool(
            self.methods[self.cache].needs & ATTENTION_SIGNALS
        )
        self.frames = any(m.frames for m in self.methods)
        needs = [frozenset(m.needs) & TOWER_SIGNALS for m in self.methods]
        at = {
            kind: frozenset().union(*(n for n, k in zip(needs, kinds, strict=True) if k == kind))
            for kind in kinds
        }
        self.later = at.get("decoder", frozenset()) | at.get("cache", frozenset())
        self.known = self.later | at.get("projector", frozenset())
        self.vision = None
        if adapter.tower is not None and (self.known or "vision" in kinds):
            self.vision = Vision(adapter.tower, session, self.known)

    def install(self, on: Installed) -> None:
        a = self.a
        mass = any(step.mass for step in self.steps)
        if mass or any(m.needs & ATTENTION_SIGNALS for m in self.methods):
            on.add(overlay := Overlay([a.implementation]))
            overlay.put()
        if a.tower is not None:
            on.before(a.tower.tower, self.tower_before, keywords=True)
            on.after(a.tower.projector, self.projected)
            if self.vision is not None:
                self.vision.install(on)
        if a.model is not a.base:
            on.before(a.model, self.outer_before, keywords=True)
            on.after(a.model, self.outer_after, always=True)
        on.before(a.base, self.base_before, keywords=True)
        on.after(a.base, self.base_after, always=True)
        on.before(a.text, self.text_before, keywords=True)
        on.after(a.text, self.text_after)
        if self.frames and hasattr(a.base, "get_video_features"):
            on.wrap(a.base, "get_video_features", self.encode_videos)
        if packs_tiles(a.base):
            on.wrap(a.base, "pack_image_features", note_tiles)
        special = any(map(a.reach, range(a.depth))) or "flash" in a.implementation
        if self.inside or mass or special or self.cache is not None:
            for i, layer in enumerate(a.layers):
                on.before(layer, partial(self.layer_before, i), keywords=True)

    # -------------------------------------------------------------- outer model and base model

    def outer_before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        named = dict(zip(self.a.outer_arguments, args, strict=False)) | kwargs
        rows = named.get("logits_to_keep", 0)
        rows = rows if isinstance(rows, int) and named.get("labels") is None else 0
        _WANTED.set(rows)

    def outer_after(self, module: nn.Module, args: Args, output: Any) -> None:
        _WANTED.set(0)

    def base_before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        self.session.installed.settle()
        named = dict(zip(self.a.base_arguments, args, strict=False)) | kwargs
        ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
        tokens: Any = ids if ids is not None else embeds
        cache: Any = cache_of(named)
        state = state_of(cache)
        if state is None and cache is not None and tokens is not None:
            self.prints.check(cache, tokens.shape[1], named.get("attention_mask"))
        visual = is_video = None
        if _has_features(named) and (ids is not None or embeds is not None):
            visual, is_video = self.a.find_visual(ids, embeds)
            kinds = named.get("mm_token_type_ids")
            if is_video is not None and torch.is_tensor(kinds) and kinds.shape == visual.shape:
                is_video = kinds == VIDEO_TYPE  # some families fill videos with image placeholders
        grids: dict[str, list[tuple[int, int, int]]] = {
            kind: [tuple(grid) for grid in named[f"{kind}_grid_thw"].tolist()]
            for kind in ("image", "video")
            if visual is not None
            and torch.is_tensor(named.get(f"{kind}_grid_thw"))
            and not torch.compiler.is_compiling()
        }
        told = bool(grids)
        if visual is not None and not told:
            grids |= dict(zip(("image", "video"), _GRIDS.get(), strict=False))
        inside = (_FORWARD.get(), _WANTED.get())
        forward = Forward(self, object(), visual, is_video, grids, state, *inside, told=told)
        _FORWARD.set(forward)
        forward.asked = named.get("position_ids")
        forward.alone = named.get("attention_mask") is None and cache_of(named) is None
        if state is None or cache is None or tokens is None:
            return None
        if state.last_position is not None and named.get("position_ids") is None:
            # A hand-written loop: the model would count positions from the shortened cache.
            undone = state.total - int(cache.get_seq_length())
            steps = torch.arange(1, tokens.shape[1] + 1, device=state.last_position.device)
            kwargs["position_ids"] = state.last_position - undone + steps
            forward.follows = True
        return args, kwargs

    def base_after(self, module: nn.Module, args: Args, output: Any) -> None:
        forward = self.current()
        if forward is not None:
            _FORWARD.set(forward.previous)
            _GRIDS.set(())
            if not torch.compiler.is_compiling():
                TILES.set(())
                _MADE.set(())
                _VIDEOS.set(())
            if forward.state is not None:
                forward.state.inside = False
            if self.vision is not None and forward.visual is not None:
                self.vision.used()

    def tower_before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """`generate` encodes images first and hands no grids on: remember them from there."""
        grid = kwargs.get("grid_thw")
        if torch.is_tensor(grid) and not torch.compiler.is_compiling():
            _GRIDS.set((*_GRIDS.get(), [tuple(g) for g in grid.tolist()])[-2:])

    def encode_videos(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`get_video_features` that remembers the grids it is called with."""
        names = tuple(inspect.signature(method).parameters)

        @wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            named = dict(zip(names, args, strict=False)) | kwargs
            grid = named.get("video_grid_thw", named.get("video_grids"))
            if torch.is_tensor(grid) and not torch.compiler.is_compiling():
                _VIDEOS.set(tuple(tuple(g) for g in grid.tolist()))
            return method(*args, **kwargs)

        return called

    def projected(self, module: nn.Module, args: Args, output: Any) -> None:
        if not torch.is_tensor(output):
            return
        _TILE.set(output.shape[-2] if output.ndim == 3 else 0)
        if output.ndim == 3 and not torch.compiler.is_compiling():
            _MADE.set((*_MADE.get(), (output.shape[0], output.shape[1]))[-2:])
        f = self.current()
        if f is not None:
            f.features += output.numel() // output.shape[-1]

    def current(self) -> Forward | None:
        forward = _FORWARD.get()
        return forward if forward is not None and forward.owner is self else None

    # -------------------------------------------------------------- text model: the projector

    def text_before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        f, embeds = self.current(), kwargs.get("inputs_embeds")
        if f is None or embeds is None or (f.state is None and f.visual is None):
            return None
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        check_layers(cache)
        b, length, _ = embeds.shape
        past = physical_length(cache)
        f.length = f.width = length
        f.text_past = past
        state = f.state = f.state or State()
        first = state.stage(0)
        start = past + (first.gap if first is not None and past else 0)
        columns = torch.arange(length, device=embeds.device).expand(b, length) + start
        f.origin = columns
        state.inside = True
        written = past if is_static(cache) else None
        f.past_valid, f.valid = real_columns(mask, past, f.origin, first, written)
        f.real = f.valid
        f.dense, f.past_dense = _all(f.valid, mask), _all(f.past_valid, mask)
        positions = kwargs.get("position_ids")
        self.fitting.count(f, positions, start, first)
        if f.visual is not None and f.alone and f.asked is not None:
            self.fitting.part(f, f.asked, kwargs.get("use_cache"))
        if positions is None:  # what the model would count itself, were the sequence whole
            positions = columns
        state.last_position = positions[..., -1:].expand(*positions.shape[:-2], b, 1)
        f.places = f.whole = positions
        state.total = length + (0 if cache is None else int(cache.get_seq_length()))
        if f.visual is not None:
            scope = self.steps[-1].scope  # those of the tower, which know no prompts, come first
            f.rows = f.entry = find_rows(
                f.visual,
                f.is_video,
                f.grids if f.told else _with_videos(f.grids, f.is_video),
                scope,
                _TILE.get(),
                f.features,
                () if torch.compiler.is_compiling() else _MADE.get(),
                self.frames,
                TILES.get(),
                self.a.find_newlines(f.visual, embeds),
                f.part,
            )
        self.fitting.take(f, mask, cache)
        changed = first is not None
        if f.rows is not None and self.vision is None:
            f.remember(0)
        elif f.rows is not None and self.vision is not None:
            changed |= self.leave_tower(f, self.vision, kwargs, past)
        if f.rows is not None and self.before is not None and self.writes:
            self.rewrite(self.before, f, f.rows, kwargs, past)
            changed = True
        elif f.rows is not None and self.before is not None:
            plan = self.reduce(self.before, f, f.rows, _shown(kwargs))
            carried = {n: v for n, v in f.rows.carried.items() if n in self.later}
            f.rows = replace(f.rows, carried=carried)
            if plan is not None:
                self.shrink_inputs(f, plan, kwargs, past, self.steps[self.before])
                changed = True
        self.renumber("projector", f, -1, past)
        if changed:
            kwargs["position_ids"] = f.positions(state.stage(0))
        index = f.drops[-1][1] if f.drops else None
        if index is None and first is not None:
            first.extend(past, f.valid, f.origin, f.dense, f.mark)
        if changed:
            embeds = kwargs["inputs_embeds"]
            kwargs["attention_mask"] = self.fitting.text(f, mask, past, embeds, cache)
        deep = Deepstack.among(kwargs) if self.inside and f.entry is not None else None
        if deep is not None and min(i or 0 for i in self.inside) <= max(deep.features):
            # The model would add them by full-length places: `layer_before` adds them instead.
            f.deep, changed = deep, True
            deep.take_out(kwargs)
        f.text_length = f.length
        return (args, kwargs) if changed else None

    def rewrite(self, number: int, f: Forward, rows: Rows, kwargs: Kwargs, past: int) -> None:
        """Let the method of step `number` write tokens of its own instead of the visual ones."""
        ctx = self.context(number, f, rows, _shown(kwargs), {})
        rewrite = self.session.rewrite(number, ctx, rows.samples)
        f.rows = replace(rows, carried={})  # scores of tokens that are gone
        self.shrink_inputs(f, rewrite.plan, kwargs, past, self.steps[number])
        assert f.rows is not None
        kwargs["inputs_embeds"] = f.rows.put(kwargs["inputs_embeds"], rewrite.tokens)
        f.beside = rewrite.flops
        deep = Deepstack.among(kwargs)
        if deep is not None:  # of tokens that are gone
            deep.take_out(kwargs)

    def leave_tower(self, f: Forward, vision: Vision, kwargs: Kwargs, past: int) -> bool:
        """Take over what the tower knows of its tokens, and drop those it dropped."""
        assert f.rows is not None
        x = f.rows.take(kwargs["inputs_embeds"])
        there = f.rows.valid & ~vision.tower.lost(x)
        matched = vision.match(x, there, bool(self.known))
        if matched is not None:
            carried = {name: matched[name] for name in sorted(vision.asked)}
            f.rows = replace(f.rows, carried=carried)
        f.remember(0)
        plan = vision.left(there, f.rows, matched) if vision.steps else None
        if plan is None:
            return False
        empty = None if torch.compiler.is_compiling() else ~there.any(1)
        self.shrink_inputs(f, plan, kwargs, past, vision.last, empty)
        self.renumber("vision", f, -1, past)
        return True

    def shrink_inputs(
        self,
        f: Forward,
        plan: Plan,
        kwargs: Kwargs,
        past: int,
        step: Step,
        empty: Tensor | None = None,
    ) -> None:
        """Apply a plan to everything the text model is called with but the mask."""
        cache = cache_of(kwargs)
        assert f.state is not None
        check_shorter(cache)
        deep = Deepstack.among(kwargs)
        if deep is not None:
            deep.check(plan)
        embeds = kwargs["inputs_embeds"]
        keep, index, moved = self.shrink(f, plan, embeds, -1, past, step, empty)
        for name in per_token(kwargs, embeds.shape[:2]):
            kwargs[name] = gather_rows(kwargs[name], index)
        kwargs["inputs_embeds"] = moved
        if deep is not None:
            deep.cut(keep, index, f.valid).put(kwargs)
        if cache is not None:
            adopt(cache, f.state)

    def text_after(self, module: nn.Module, args: Args, output: Any) -> Any:
        f = self.current()
        if f is None:
            return None
        if not all(side.arrived for side in f.sides):
            raise UnsupportedModel(
                "attention of this language model gets no keyword arguments, so it can be neither "
                "read nor given mass: use methods without attention signals, and mass=0."
            )
        maps = getattr(output, "attentions", None)
        if maps and f.state is not None and any(stage.moved for stage in f.state.stages):
            refuse_maps(maps)
        cache = cache_in(output)
        if cache is not None and f.state is not None and f.state.stages and state_of(cache) is None:
            adopt(cache, f.state)
        if self.cache is not None and (
            f.rows is not None or (self.evicts_always and cache is not None)
        ):
            self.evict(f, self.cache, cache)
        if not torch.compiler.is_compiling():
            self.account(f)
            if cache is not None and f.state is not None and (f.drops or self.cache is not None):
                self.prints.add(cache, f.state)
        if not f.drops or f.entry is None:
            return None
        if f.entry.only_text_in_last(f.wanted) and not returns_all(output):
            return None
        return restore(output, f.drops, f.entry.width, self.a.depth)

    def account(self, f: Forward) -> None:
        """Tell the session about this forward."""
        if f.entry is None:
            return self.session.count(False)
        widths = [f.entry.width] * self.a.depth
        dense = self.a.prefill_flops(widths)
        for layer, index, _ in f.drops:
            start = max(layer, 0)
            widths[start:] = [index.shape[1]] * (self.a.depth - start)
        used = self.a.prefill_flops(widths) if f.drops else dense
        batch, depth = f.valid.shape[0], self.a.depth
        enter = [0] * depth  # every image was dropped whole
        if f.rows is not None:
            enter = [sum(seen_by(f.moments, layer).rows.counts) for layer in range(depth)]
        leave = [*enter[1:], enter[-1]]
        visual = (float(len(f.entry.counts)), sum(enter) / depth, sum(leave) / depth)
        return self.session.count(True, batch * dense, batch * used + f.beside, visual)

    def refuse(self, f: Forward, step: Step) -> None:
        """Sequences that cannot be shortened."""
        assert f.state is not None
        why = f.refusal or self.a.too_long(f.state.total)
        if f.part is not None and any(s.positions == "renumber" for s in self.steps):
            why = "positions='renumber' counts one prompt per row, and this row packs several."
        if why:
            raise UnsupportedModel(f"{step.at}: {why}")

    def evict(self, f: Forward, number: int, cache: Any) -> None:
        """The `cache` site."""
        if f.refusal:
            raise UnsupportedModel(f"{self.steps[number].at}: {f.refusal}")
        state = f.state or state_of(cache)
        if state is not None:
            evict(
                number,
                self.session,
                cache,
                state,
                f.moments,
                self.a.cached_layers,
                f.length,
                f.taps,
                f.mark,
            )

    # -------------------------------------------------------------- decoder layers

    def layer_before(self, i: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        f = self.current()
        if f is None or f.state is None:
            return None
        check_checkpointing(module)
        hidden = args[0] if args else kwargs["hidden_states"]
        before, cache = hidden, cache_of(kwargs)
        if f.deep is not None:
            hidden = f.deep.add(i, hidden)
        number = self.inside.get(i)
        if number is not None and f.rows is not None:
            plan = self.reduce(number, f, f.rows, hidden, i, kwargs)
            if plan is not None:
                hidden = self.shrink_hidden(f, plan, hidden, i, kwargs)
        if number is not None:
            self.renumber(self.steps[number].at, f, i, physical_length(cache, i))
        stage = f.state.stage(i)
        changed = hidden is not before
        if stage is not None:
            changed |= self.align(i, stage, f, hidden, kwargs)
        tap = None
        if (i in self.tapped or self.cache_taps) and (f.rows is not None or self.evicts_always):
            tap = f.taps[i] = Tap()
            if i in self.rotated and f.unpadded is not None:
                tap.unpadded = self.probe(i, hidden, f.unpadded)
        bias = None if stage is None else stage.bias
        if tap is not None or bias is not None:
            kwargs["vtc"] = side = Side(tap, bias)
            f.sides.append(side)
            changed = True
        if not changed:
            return None
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def probe(self, i: int, hidden: Tensor, places: Tensor) -> Call:
        """Queries and keys of layer i as they were at other positions; values are not mixed."""
        layer, tap = self.a.layers[i], Tap()
        layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=self.a.rotary(i, hidden, places),
            attention_mask=None,
            vtc=Side(tap=tap, probe=True),
            **cache_argument(layer.self_attn.forward, None),
        )
        return tap.call

    def shrink_hidden(
        self, f: Forward, plan: Plan, hidden: Tensor, i: int, kwargs: Kwargs
    ) -> Tensor:
        cache = cache_of(kwargs)
        check_shorter(cache)
        past = physical_length(cache, i)
        step = self.steps[self.inside[i]]
        keep, index, moved = self.shrink(f, plan, hidden, i, past, step)
        if f.deep is not None:
            f.deep = f.deep.cut(keep, index, f.valid)
        f.index = index if f.index is None else f.index.gather(1, index)
        f.clear()
        if cache is not None and f.state is not None:
            adopt(cache, f.state)
        return moved

    def align(self, i: int, stage: Stage, f: Forward, hidden: Tensor, kwargs: Kwargs) -> bool:
        """Make mask, positions and rotary tables of layer i fit its own columns."""
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        past, changed = physical_length(cache, i), False
        if "flash" in self.a.implementation and kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = None  # gaps would be read as packed sequences
            changed = True
        if stage.start == 0 and f.index is None:
            if self.a.reach(i) is not None and self.a.kinds[i] not in f.given:
                kwargs["attention_mask"] = self.fitting.fresh(i, f, stage, hidden, cache)
                changed = True
            return changed
        if not stage.made_by(f.mark) and f.gone is not None:
            stage.shift = f.gone if stage.shift is None else stage.shift + f.gone
        stage.extend(past, f.valid, f.origin, f.dense, f.mark)
        if f.index is not None:  # this forward dropped tokens inside the language model
            index, ids = f.index, kwargs.get("position_ids")
            if ids is not None:
                gather = partial(ops.gather_columns, index, (ids, -1))
                (kwargs["position_ids"],) = f.once(("ids", id(ids)), ids, gather)
            for name in per_token(kwargs, (len(index), f.text_length)):
                x = kwargs[name]
                kwargs[name] = f.once((name, id(x)), x, partial(gather_rows, x, index))
        given = kwargs.get("position_embeddings")
        kwargs["position_embeddings"] = self.tables(f, stage, hidden, given)
        kwargs["attention_mask"] = self.fitting.layer(i, f, stage, past, hidden, mask, cache)
        return True

    def tables(self, f: Forward, stage: Stage | None, hidden: Tensor, given: Any) -> Any:
        """Rotary tables of the sequence as it is now, for the layers of `stage`; `given`: those of
        the text model."""
        if stage is None or (stage.start == 0 and f.index is None):
            return given
        if stage.shift is not None:
            turn = partial(self.a.text.rotary_emb, hidden, f.positions(stage))
            return f.once(("turn", stage.start), None, turn)
        if given is None or f.index is None:
            return given
        key = ("rope", id(given if torch.is_tensor(given) else given[0]))
        return f.once(key, given, partial(gather_tables, given, f.index))

    # -------------------------------------------------------------- deciding and moving

    def renumber(self, at: str, f: Forward, site: int, past: int) -> None:
        """Close the gaps that are there when the steps at `at` have acted, where one of them says
        so and whether or not it dropped any; from decoder layer `site` on (-1: before the first).
        """
        wanted = [s for s in self.steps if s.positions == "renumber" and at in (s.at, s.site.kind)]
        if not wanted or not f.drops or f.state is None:
            return
        old = f.state.stage(max(site, 0))
        assert old is not None
        shift = f.before(old)
        old.extend(past, f.valid, f.origin, f.dense, f.mark)
        f.renumber()
        assert f.gone is not None
        shift = f.gone if shift is None else shift + f.gone
        f.state.add(replace(old, start=max(site, 0), shift=shift), f.mark)
        if site >= 0 and f.index is None:  # the text model's own tables hold no longer
            f.index = _arange_like(f.valid)
        f.clear()

    def reduce(
        self,
        number: int,
        f: Forward,
        rows: Rows,
        x: Tensor,
        layer: int = 0,
        kwargs: Kwargs | None = None,
    ) -> Plan | None:
        """Ask the method of step `number` which tokens of x [B, L, D] stay."""
        step, kwargs = self.steps[number], kwargs or {}
        if x.shape[0] == 0:
            raise InvalidInput(f"{step.at}: empty batch.")
        tap, shift = f.taps.get(layer - 1), 0
        if not self.cache_taps:
            f.taps.pop(layer - 1, None)
        if tap is not None:
            cache = cache_of(kwargs)
            seen = physical_length(cache, layer - 1) if is_static(cache) else tap.call.key.shape[2]
            shift = seen - x.shape[1]
        stage = f.state.stage(layer) if f.state else None
        source = SignalSource(
            x=x,
            rows=rows,
            valid=f.valid,
            norm=getattr(self.a.text, "norm", None),
            vision=self.vision,
            tap=tap,
            shift=shift,
            layer=self.a.layers[layer],
            tables=partial(self.tables, f, stage, x, kwargs.get("position_embeddings")),
            stage=stage,
            dense=f.dense,
            origin=f.origin,
            reach=self.a.reach(layer),
        )
        makers = source.makers(self.methods[number].needs)
        ctx = self.context(number, f, rows, x, makers, layer)
        return self.session.reduce(number, ctx, rows.samples)

    def context(
        self,
        number: int,
        f: Forward,
        rows: Rows,
        x: Tensor,
        makers: Mapping[str, Callable[[], Tensor]],
        layer: int = 0,
    ) -> Context:
        """What the method of step `number` sees of x [B, L, D]."""
        return Context(
            x=rows.take(x),
            visual=rows.valid,
            counts=rows.counts,
            original=rows.original,
            source=rows.source,
            layout=rows.layout,
            parts=rows.parts,
            site=self.steps[number].site,
            signals=Signals(makers),
            seed=self.session.recipe.seed,
            depth=self.a.depth,
            history=tuple(seen_by(f.moments, i).rows.counts for i in range(layer)),
        )

    def shrink(
        self,
        f: Forward,
        plan: Plan,
        x: Tensor,
        site: int,
        past: int,
        step: Step,
        empty: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Move x [B, L, D], open the stage of decoder layer `site` (-1: before the first), and
        update the forward's bookkeeping. `empty` [R]: rows that keep nothing, whatever the plan
        says; they end here.

        Returns keep [B, L], the packed index [B, K] and the moved x [B, K, D].
        """
        assert f.rows is not None and f.state is not None
        self.refuse(f, step)
        layer = max(site, 0)
        keep = f.rows.keep(plan, f.valid.shape, empty)
        index, filled, even = pack(keep, f.valid, f.dense, f.rows, plan)
        dense = f.dense and even
        rows = f.rows.after(plan, index, step.mass)
        if empty is not None:
            rows = rows.without(empty)
        was = f.origin
        moved, valid, origin, f.places = ops.gather_columns(
            index, (x, -2), (f.valid, -1), (f.origin, -1), (f.places, -1)
        )
        f.part, f.unpadded = (
            None if line is None else line.gather(1, index) for line in (f.part, f.unpadded)
        )
        valid = valid & filled
        if plan.weight is not None:  # merged tokens are written over the token they sit on
            moved = rows.put(moved, ops.apply(plan, f.rows.take(x)))
        old = f.state.stage(layer)
        past_valid = f.past_valid if old is None else old.valid[:, :past]
        past_origin = columns_before(was, past) if old is None else old.origin[:, :past]
        bias = rows.bias(*index.shape)
        if past and (bias is not None or (old is not None and old.bias is not None)):
            blank = past_origin.new_zeros(past_origin.shape, dtype=torch.float)
            head = blank if old is None or old.bias is None else old.bias[:, :past]
            tail = blank.new_zeros(index.shape) if bias is None else bias
            bias = torch.cat([head, tail], 1)
        notes = None
        if old is not None and old.notes is not None:
            text = old.notes.new_full((*index.shape, old.notes.shape[-1]), -1)
            notes = torch.cat([old.notes[:, :past], text], 1)
        shift = None if old is None else f.before(old)
        stage = Stage(
            layer,
            torch.cat([past_valid, valid], 1),
            torch.cat([past_origin, origin], 1),
            bias,
            dense=dense and (f.past_dense if old is None else old.dense),
            gap=(0 if old is None else old.gap) + f.length - index.shape[1],
            notes=notes,
            part=f.part,
        )
        f.state.add(stage, f.mark)
        total = f.drops[-1][1].gather(1, index) if f.drops else index
        filled = f.drops[-1][2].gather(1, index) & filled if f.drops else filled
        f.drops.append((site, total, filled))
        f.rows = rows if rows.counts else None
        f.valid, f.origin, f.dense, f.length = valid, origin, dense, index.shape[1]
        f.lower = None if f.lower is None else f.lower.gather(1, index)
        if f.gone is not None:
            shift = f.gone if shift is None else shift + f.gone
        stage.shift = shift
        f.remember(layer)
        return keep, index, moved


def _has_features(named: Kwargs) -> bool:
    """Image features come with this call. A generated or drafted token may be the placeholder id
    as well, so placeholders are believed only then."""
    ready = named.get("mm_encoder_outputs") or {}
    ready = ready.values() if isinstance(ready, dict) else [ready]
    pixels = (v for k, v in named.items() if k.startswith("pixel_values"))
    return any(v is not None for v in (*ready, *pixels))


def _shown(kwargs: Kwargs) -> Tensor:
    """Embeddings [B, L, D] as methods at the projector see them."""
    deep, embeds = Deepstack.among(kwargs), kwargs["inputs_embeds"]
    return embeds if deep is None else deep.shown(embeds)


def _with_videos(grids: Grids, is_video: Tensor | None) -> Grids:
    """The grids with those of whole videos, where the prompt has any. One list alone is theirs,
    whatever it was taken for."""
    videos = _VIDEOS.get()
    if not videos or (is_video is not None and not bool(is_video.any())):
        return grids
    return {"video": videos} | ({"image": grids["image"]} if len(grids) > 1 else {})


def _all(valid: Tensor, mask: Any) -> bool:
    """Every column is real, as far as the host can know while torch.compile traces."""
    if mask is None or not valid.numel():
        return True
    return False if torch.compiler.is_compiling() else bool(valid.all())


def _arange_like(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(x.shape)
