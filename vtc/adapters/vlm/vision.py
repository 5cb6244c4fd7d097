"""Hooks on a vision tower: the `vision.<i>` sites, and what the tower knows for later sites.

Inside the tower dropped patches are gone. Behind it the grid is whole again, because every family
reshapes it (tiles, newlines, pixel shuffle, windows): dropped patches come back as zeros, the
projector's rows for them are set to zero, and the language model drops placeholders whose
embedding is all zero."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ...algorithms.projector import Projector
from ...context import Context
from ...errors import MissingSignal, UnsupportedModel
from ...hooks import Installed
from ...plan import Plan
from ...recipe import Step
from ...reducer import Rewriter, Selector
from ...session import Session
from ...versions import check_checkpointing
from ..attention import Overlay, Side, Tap, attention_of, refuse_maps, sides, takes_keywords
from ..clips import Clips, VideoUnits
from ..slot import Slot
from ..units import PREVIOUS_BLOCK_SIGNALS, GridUnits, PackedUnits, Units, fit_masks
from .edges import inside_the_picture
from .rows import Rows
from .tiles import packs_tiles
from .tower import (
    ENCODINGS,
    MOST,
    Encoding,
    Matched,
    Projected,
    Tower,
    arrangement,
    key_values,
    scores,
)

VISION_SIGNALS = PREVIOUS_BLOCK_SIGNALS | {"token_size", "tile"}

_NO_SIZES = (
    "image features were made in an earlier session or too long ago, so how many patches each of "
    "their tokens stands for is not known: encode and answer in one session, or use no merge and "
    "no mass inside the vision tower."
)

_PADDED = (
    "some patches of this batch are padding (images of several sizes in one tower call): a method "
    "that writes new tokens needs whole grids. Resize the images."
)

#: the videos that are being encoded
CLIPS: Slot[Clips | None] = Slot("vtc_clips", None)

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Vision:
    """The tower's part of one session. `asked`: what later sites want to know of its tokens."""

    def __init__(self, tower: Tower, session: Session, asked: frozenset[str]) -> None:
        self.tower, self.session = tower, session
        self.asked, self.closed = asked - {"projector"}, False
        steps = enumerate(session.recipe.steps)
        self.steps = {s.site.layer: n for n, s in steps if s.site.kind == "vision"}
        self.tapped = {tower.feature, tower.reader} if asked else set()
        for block, number in self.steps.items():
            if block and session.methods[number].needs & PREVIOUS_BLOCK_SIGNALS:
                self.tapped.add(block - 1)
        self._projector: Projector | None = None
        recipe = session.recipe.steps
        self.weighs = bool(self.steps) and any(s.mass or s.merge != "none" for s in recipe)
        self.keywords = takes_keywords(tower.blocks[0])

    def install(self, on: Installed) -> None:
        tower = self.tower
        on.add(self)
        if not tower.packed and hasattr(tower.base, "get_video_features"):
            # frames of a video reach a frame-wise tower as images: only the caller knows
            on.wrap(tower.base, "get_video_features", self.video)
            if tower.pools:
                on.wrap(tower.base, "apply_pooling", self.pooled)
        on.add(overlay := Overlay([tower.implementation]))
        overlay.put()
        on.before(tower.tower, self.before, keywords=True)
        on.after(tower.tower, self.after, always=True)
        for merger in tower.mergers:
            on.after(merger, self.projected, keywords=True)
        if not self.steps:
            return
        if packs_tiles(tower.base):
            pack = partial(inside_the_picture, lambda: self.mine()[-1].now if self.mine() else None)
            on.wrap(tower.base, "pack_image_features", pack)
        first = min(layer or 0 for layer in self.steps)
        for i, block in enumerate(tower.blocks):
            if i >= first:
                on.before(block, partial(self.block, i), keywords=True)
        if any(isinstance(self.session.methods[n], Rewriter) for n in self.steps.values()):
            for i, block in enumerate(tower.blocks[: tower.feature + 1]):
                if i >= first:
                    on.after(block, partial(self.left_block, i), first=True)

    def video(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Around the method that encodes videos."""
        names = tuple(inspect.signature(call).parameters)

        @wraps(call)  # generate looks at what it takes
        def encode(*args: Any, **kwargs: Any) -> Any:
            CLIPS.set(_clips(dict(zip(names, args, strict=False)) | kwargs))
            try:
                return call(*args, **kwargs)
            finally:
                CLIPS.set(None)

        return encode

    def pooled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Around the pooling of projected frames: what it makes are the tokens."""

        @wraps(call)
        def pool(features: Tensor) -> Tensor:
            out = call(features)
            encodings = self.mine()
            if CLIPS.get() is None or not encodings:
                return out
            encoding = encodings[-1]
            if encoding.shortened:
                out = torch.where(encoding.now.kept()[..., None], out, 0.0).to(out.dtype)
            made = out.numel() // out.shape[-1]
            call_made = Projected(None, features.shape, made, out.detach(), False, pooled=True)
            encoding.projected.append(call_made)
            return out

        return pool

    def remove(self) -> None:
        """Forget this session's runs of the tower."""
        self.closed = True
        ENCODINGS.set(tuple(e for e in ENCODINGS.get() if e.owner() is not self))

    def mine(self) -> list[Encoding]:
        return [e for e in ENCODINGS.get() if e.owner() is self]

    def used(self) -> None:
        """A forward has ended: what it read goes when the tower runs again."""
        for encoding in self.mine():
            encoding.used = True
            if self.asked <= encoding.tables.keys():
                encoding.slim()

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        names = inspect.signature(module.forward).parameters
        grids = (dict(zip(names, args, strict=False)) | kwargs).get("grid_thw")
        taps = {i: Tap() for i in self.tapped}
        encoding = Encoding(
            weakref.ref(self), taps, grids, CLIPS.get() or self._split(args, kwargs)
        )
        kept = (
            e
            for e in ENCODINGS.get()
            if (owner := e.owner()) is not None
            and not owner.closed
            and (owner is not self or not e.used)
        )
        ENCODINGS.set((*kept, encoding)[-MOST:])
        sides.set({id(self._attention(i)): Side(tap) for i, tap in encoding.taps.items()})

    def _split(self, args: Args, kwargs: Kwargs) -> Clips | None:
        """Videos, where a method was told that images are frames of videos."""
        told = {
            getattr(self.session.methods[n], "frames_per_video", None) for n in self.steps.values()
        }
        frames = next((n for n in told if n), None)
        if frames is None:
            return None
        pixels = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x)), None)
        images = 0 if pixels is None else pixels.shape[0]
        if not images or images % frames or self.tower.packed:
            raise UnsupportedModel(
                f"frames_per_video={frames}: the vision tower was given {images} images, which "
                f"are no whole videos of {frames} frames. Leave it out for models that take videos."
            )
        return Clips((frames,) * (images // frames))

    def _attention(self, i: int) -> nn.Module | None:
        return attention_of(self.tower.blocks[i])

    def after(self, module: nn.Module, args: Args, output: Any) -> None:
        """Whole grids again, in everything that the tower returns."""
        sides.set({})
        encodings = self.mine()
        if output is None or not encodings:
            return
        encoding = encodings[-1]
        if not all(side.arrived for side in encoding.replayed):
            raise UnsupportedModel(
                "attention of this vision tower gets no keyword arguments, so gradient "
                "checkpointing cannot replay mass or images that keep different numbers of tokens: "
                "switch it off for the tower, or use a fixed budget without mass."
            )
        if not encoding.shortened:
            return
        refuse_maps(getattr(output, "attentions", None))
        last = len(self.tower.blocks)
        if torch.is_tensor(getattr(output, "last_hidden_state", None)):
            output.last_hidden_state = _restore(encoding, last, output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:  # entry i leaves block i - 1
            output.hidden_states = tuple(
                _restore(encoding, i - 1, x) for i, x in enumerate(output.hidden_states)
            )

    def projected(self, module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        encodings = self.mine()
        if not torch.is_tensor(output) and torch.is_tensor(getattr(output, "last_hidden_state", 0)):
            new = self.projected(module, args, kwargs, output.last_hidden_state)
            if new is not None:
                output.last_hidden_state = new
            return None
        if not encodings or not torch.is_tensor(output):
            return None
        encoding, out = encodings[-1], output
        if encoding.clips is not None and self.tower.pools:
            return None  # its tokens are made by the pooling
        made = output.numel() // output.shape[-1]
        if encoding.shortened:
            out = _blank(encoding.now, output, made)
        if module is self.tower.projector:
            given, *rest = (*args, *kwargs.values())
            kept = given.detach() if "features" in self.asked else None
            encoding.projected.append(Projected(kept, given.shape, made, out.detach(), bool(rest)))
        return None if out is output else out

    # -------------------------------------------------------------- for the language model

    @property
    def last(self) -> Step:
        """The last step inside the tower; its mass goes on in the language model."""
        return self.session.recipe.steps[max(self.steps.values())]

    def match(self, x: Tensor, there: Tensor, wanted: bool) -> Matched | None:
        """What the tower knows of visual tokens x [R, N, D], of those that are `there` [R, N]; None
        when nobody needs it."""
        made = [e for e in self.mine() if e.projected]
        if not wanted and not any(e.shortened for e in made):
            return None
        return Matched(self.tower, made, x, there)

    def left(self, there: Tensor, rows: Rows, matched: Matched | None) -> Plan | None:
        """A plan that keeps what the tower kept, the tokens that are True in `there` [R, N]. Rows
        that lost everything keep their first token in it."""
        keep = there.clone()
        sized = any(e.now.size is not None for e in self.mine() if e.shortened)
        kept = None
        if torch.compiler.is_compiling():
            total = sum(sum(e.now.counts) for e in self.mine() if e.shortened)
            if not total:
                return None
            kept = (total // len(rows.counts),) * len(rows.counts)
        else:
            if self.weighs and not self.mine():
                raise MissingSignal(_NO_SIZES)
            if not sized and bool((keep == rows.valid).all()):
                return None
            keep[:, 0] |= ~keep.any(1)
        plan = Plan.from_mask(keep, kept)
        if not sized or matched is None:
            return plan
        size = matched["size"].gather(1, plan.index) * plan.slots
        if plan.kept == rows.counts and bool((size[plan.slots] == 1).all()):
            return None
        return replace(plan, size=size)

    def projector(self) -> Projector:
        """The projector as a function of single tokens; one object per session, as it caches."""
        calls = [call for e in self.mine() for call in e.projected]
        if not calls:
            raise MissingSignal("the projector did not run before this forward.")
        run, width = arrangement(self.tower, calls[-1])
        if self._projector is None or not self._projector.fits(self.tower.projector, width):
            self._projector = Projector(self.tower.projector, run, width)
        return self._projector

    # -------------------------------------------------------------- blocks

    def block(self, i: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        check_checkpointing(module)
        encoding = self.mine()[-1]
        x = args[0] if args else kwargs["hidden_states"]
        encoding.start(self.tower, x)
        if encoding.waiting is not None:
            x = self.leave(i, encoding, x)
        number = self.steps.get(i)
        if number is not None:
            x = self.reduce(number, i, encoding, x)
        if encoding.rewrite is not None:
            if i == encoding.first:
                _check_whole(args, kwargs)
            x = encoding.rewrite.before(i - encoding.first, x)
        units = encoding.now
        if encoding.lean is not None and encoding.lean[0] != i:
            encoding.lean = None
        if not encoding.shortened and encoding.lean is None:
            return None
        if encoding.shortened and isinstance(units, PackedUnits):
            _fit_packed(units, kwargs)
        elif encoding.shortened and isinstance(units, GridUnits):
            args = fit_masks(units, args, kwargs)
        self._ride(i, module, encoding, units, kwargs)
        if args:
            return (x, *args[1:]), kwargs
        kwargs["hidden_states"] = x
        return args, kwargs

    def reduce(self, number: int, i: int, encoding: Encoding, x: Tensor) -> Tensor:
        """Ask the method of step `number`, and move."""
        units = encoding.now
        step, method = self.session.recipe.steps[number], self.session.methods[number]
        makers = {
            "attn_cls": lambda: scores(self.tower, encoding, i - 1),
            "vision_keys": lambda: key_values(encoding, i - 1),
        }
        ctx = units.context(x, step.site, method.needs, makers, self.session.recipe.seed)
        samples = tuple(range(len(units.counts)))
        if isinstance(method, Rewriter):
            if not isinstance(units, GridUnits):  # packed towers are refused before
                raise UnsupportedModel(
                    f"{step.method!r} writes tokens of single images, not of the frames of a "
                    f"video: use a method that chooses tokens."
                )
            rewrite = encoding.rewrite = self.session.rewrite(number, ctx, samples)
            encoding.first = i
            encoding.states.append((i, units.after(rewrite.plan, 0.0)))
            return units.replace(x, rewrite.tokens)
        if isinstance(method, Selector):
            return self.select(number, i, encoding, ctx, x)
        plan = self.session.reduce(number, ctx, samples)
        if plan is None:
            return x
        return self.move(i, encoding, x, plan, units.after(plan, step.mass))

    def select(self, number: int, i: int, encoding: Encoding, ctx: Context, x: Tensor) -> Tensor:
        """Score before block i, which still sees everything; drop behind it."""
        units = encoding.now
        decision = self.session.decide(number, ctx, tuple(range(len(units.counts))))
        if decision.bias is not None:
            encoding.lean = (i, units.key_bias(decision.bias))
        if decision.plan.changes(ctx.counts):
            left = units.after(decision.plan, 0.0)
            if isinstance(left, VideoUnits):
                left.pack_in(decision.bins, decision.refill)
            encoding.waiting = (decision.plan, left)
        return x

    def leave(self, i: int, encoding: Encoding, x: Tensor) -> Tensor:
        """Drop what a selector left behind the block before block i."""
        assert encoding.waiting is not None
        plan, left = encoding.waiting
        encoding.waiting = None
        return self.move(i, encoding, x, plan, left)

    def move(self, i: int, encoding: Encoding, x: Tensor, plan: Plan, left: Any) -> Tensor:
        """x with the units that are `left` from block i on."""
        units = encoding.now
        if isinstance(units, VideoUnits) and units.uneven:
            encoding.dropped = units.restore(x, encoding.dropped)
        encoding.states.append((i, left))
        return units.shrink(x, plan, left)

    def left_block(self, i: int, module: nn.Module, args: Args, output: Any) -> Any:
        """Behind a block of a rewriter."""
        encoding = self.mine()[-1]
        if encoding.rewrite is None:
            return None
        out = encoding.rewrite.left(i - encoding.first, output)
        if i == self.tower.feature:
            encoding.rewrite = None
        return None if out is output else out

    def _ride(
        self, i: int, module: nn.Module, encoding: Encoding, units: Units, kwargs: Kwargs
    ) -> None:
        """Hand this block's attention its key bias and its padding."""
        bias, real = units.once("keys", None, partial(_keys, units))
        if encoding.lean is not None:
            bias = encoding.lean[1] if bias is None else bias + encoding.lean[1]
        side = Side(encoding.taps.get(i), bias, real, packed=units.packed)
        if isinstance(units, VideoUnits) and units.shortened:
            side.mask, side.segments = units.mask(), None if units.bins else units.lengths
        if bias is None and real is None and side.mask is None and side.segments is None:
            return
        sides.get()[id(self._attention(i))] = side
        if self.keywords:  # those that do not reach the attention are harmless
            kwargs["vtc"] = side
        if getattr(module, "gradient_checkpointing", False) and module.training:
            encoding.replayed.append(side)


def _clips(given: Kwargs) -> Clips | None:
    """The videos that a model's method is given: [B, frames, ...], or patches of all frames with a
    table of which become one token."""
    grids = given.get("video_grids")
    pixels = given.get("pixel_values_videos", given.get("pixel_values"))  # its name before 5.19
    if torch.is_tensor(grids):
        pooling = given["video_token_pooling"]
        if len(grids[:, 1:].unique(dim=0)) > 1:
            raise UnsupportedModel(
                f"videos of several grids {grids.tolist()} in one call: run them one by one."
            )
        grid = (int(grids[0, 1]), int(grids[0, 2]))
        return Clips(tuple(grids[:, 0].tolist()), pooling[: grid[0] * grid[1]].long(), grid)
    shape = pixels.shape if torch.is_tensor(pixels) else ()
    return Clips((shape[1],) * shape[0]) if len(shape) == 5 else None


def _check_whole(args: Args, kwargs: Kwargs) -> None:
    """Padding inside the tower is refused: written tokens would look at it."""
    for mask in (*args[1:], *kwargs.values()):
        if not torch.is_tensor(mask):
            continue
        whole = (mask >= 0).all() if mask.is_floating_point() else mask.all()
        if torch.compiler.is_compiling():
            torch._assert_async(whole, _PADDED)
        elif not bool(whole):
            raise UnsupportedModel(_PADDED)


def _keys(units: Units) -> tuple[Tensor | None, Tensor | None]:
    """Bias of every key, and which keys are no padding."""
    return units.bias(), units.columns() if isinstance(units, GridUnits) else None


def _fit_packed(units: PackedUnits, kwargs: Kwargs) -> None:
    """Rotary tables and segment lengths of the rows that are left."""
    tables, old = kwargs.get("position_embeddings"), kwargs["cu_seqlens"]
    if tables is not None:
        keep = units.rows_kept
        kwargs["position_embeddings"] = units.once(
            id(tables[0]), tables, lambda: tuple(t[keep()] for t in tables)
        )
    lengths, longest = units.once(id(old), old, partial(_segments, units, old))
    kwargs["cu_seqlens"] = lengths
    given = kwargs.get("max_seqlen")
    if given is not None:
        kwargs["max_seqlen"] = longest if torch.is_tensor(given) else int(longest)


def _segments(units: PackedUnits, cumulative: Tensor) -> tuple[Tensor, Tensor]:
    lengths = units.lengths(cumulative)
    return lengths, lengths.diff().max()


def _restore(encoding: Encoding, block: int, x: Any) -> Any:
    """The whole grid of what leaves `block`."""
    units = encoding.at(block)
    if not units.shortened or not torch.is_tensor(x):
        return x
    if isinstance(units, VideoUnits):
        return units.restore(x, encoding.dropped) if units.fits(x) else x
    if isinstance(units, PackedUnits):
        return units.restore_rows(x)
    if not isinstance(units, GridUnits):
        return x
    fits = x.ndim == 3 and x.shape[1] == units.index().shape[1]
    return units.restore(x) if fits else x


def _blank(units: Units, output: Tensor, made: int) -> Tensor:
    """Projected tokens of the whole grid, zero where a unit was dropped."""
    if isinstance(units, PackedUnits):
        whole = made == units.total
        return output if whole else units.restore(output)
    kept = units.kept()
    if made != kept.numel():
        raise UnsupportedModel(
            f"{kept.numel()} groups of patches became {made} projected tokens: dropping inside "
            f"this vision tower is not possible."
        )
    return torch.where(kept.reshape(*output.shape[:-1], 1), output, 0.0).to(output.dtype)
