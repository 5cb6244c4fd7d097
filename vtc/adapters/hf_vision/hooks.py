"""Hooks on an image encoder of transformers: shorten, keep masks and rotary tables in step.

Whatever pools inside the model sees the short sequence. What the model hands to its caller token
by token is a whole grid again: merged tokens are where they came from, dropped ones are zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ...errors import UnsupportedModel
from ...hooks import Installed
from ...plan import Plan
from ...reducer import Rewrite, Rewriter
from ...session import Session
from ...versions import check_checkpointing
from ..attention import (
    Overlay,
    Side,
    Tap,
    attention_of,
    refuse_maps,
    sides,
    takes_keywords,
    weighed,
)
from ..lone import ROTARY, first_units
from ..slot import Slot
from ..units import PREVIOUS_BLOCK_SIGNALS, GridUnits, fit_masks, fit_table, restore

if TYPE_CHECKING:
    from .adapter import HfImageEncoder

#: methods of dual encoders that run the image encoder without calling the model
METHOD = "get_image_features"

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass
class Run:
    """One call of the model, or of a part of it that holds the blocks.

    Attributes:
        owner: the hooks that follow it.
        outer: what was called from outside; where it returns, grids are made whole.
        as_tuple: the caller wants a tuple.
        before: what went with attention modules when it started.
        patches: height and width of the grid that the embedding has made.
        units: patches that are left, None before the first block.
        plans: (block, plan) so far.
        taps: attention calls of the blocks that a method reads.
        sides: what was handed to attention functions.
        replayed: those of blocks that gradient checkpointing runs again.
        widths: tokens that each block saw.
        first, rewrite: a rewriter's first block and what it does around the blocks from there on;
            beside: FLOPs of that.
    """

    owner: Any
    outer: Any
    as_tuple: bool
    before: dict[int, Side]
    patches: tuple[int, int] | None = None
    units: GridUnits | None = None
    plans: list[tuple[int, Plan]] = field(default_factory=list)
    taps: dict[int, Tap] = field(default_factory=dict)
    sides: list[Side] = field(default_factory=list)
    replayed: list[Side] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    first: int = 0
    rewrite: Rewrite | None = None
    beside: float = 0.0

    def whole(self, block: int, x: Tensor) -> Tensor:
        """The whole grid of tokens that `block` saw or made."""
        assert self.units is not None
        return restore([p for first, p in self.plans if first <= block], x, self.units.prefix)


_runs: Slot[tuple[Run, ...]] = Slot("vtc_hf_vision_runs", ())


class Hooks:
    """The hooks of one session."""

    def __init__(self, adapter: HfImageEncoder, session: Session) -> None:
        self.adapter, self.facts, self.session = adapter, adapter.facts, session
        steps = session.recipe.steps
        self.steps = {s.site.layer or 0: n for n, s in enumerate(steps)}
        self.tapped = {
            block - 1
            for block, number in self.steps.items()
            if session.methods[number].needs & PREVIOUS_BLOCK_SIGNALS
        }
        self.rewrites = any(isinstance(m, Rewriter) for m in session.methods)
        rides = any(s.mass or s.keep == "auto" for s in steps) and not self.rewrites  # all even
        self.keywords = takes_keywords(self.facts.blocks[0])
        self.overlaid = [self.facts.implementation] if rides or self.tapped else []

    def install(self, on: Installed) -> None:
        facts = self.facts
        on.add(overlay := Overlay(self.overlaid))
        overlay.put()
        on.after(facts.embedding, self._embedded)
        for i, block in enumerate(facts.blocks):
            on.before(block, partial(self.before, i), keywords=True)
        if self.rewrites:
            for i, block in enumerate(facts.blocks):
                on.after(block, partial(self.after, i), first=True)
        on.after(facts.blocks[-1], self._poison)
        for model in facts.path:
            on.follow(model, partial(self.enter, model, model), partial(self.leave, model))
        outermost = facts.path[0]
        if hasattr(outermost, METHOD):
            enter, leave = partial(self.enter, METHOD, outermost), partial(self.leave, METHOD)
            on.follow(outermost, enter, leave, METHOD)

    # -------------------------------------------------------------- calls from outside

    def run(self) -> Run | None:
        return next((r for r in _runs.get() if r.owner is self), None)

    def enter(
        self, outer: Any, model: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """`outer`, which is `model` or a method of it, begins. Start a run, unless one is on its
        way. Results are named in it, for `leave` to find."""
        if self.run() is not None:
            return args, kwargs
        named = kwargs.get("return_dict")
        if named is None:
            named = not isinstance(model, PreTrainedModel) or model.config.return_dict
        if not named:
            kwargs = {**kwargs, "return_dict": True}
        _runs.set((*_runs.get(), Run(self, outer, not named, sides.get())))
        return args, kwargs

    def leave(self, outer: Any, output: Any) -> Any:
        """End the run that `outer` has started; whole grids in what it returns."""
        run = self.run()
        if run is None or run.outer is not outer:
            return output
        _runs.set(tuple(r for r in _runs.get() if r is not run))
        sides.set(run.before)
        if output is None:  # an exception is on its way
            return None
        if run.units is not None:
            if not torch.compiler.is_compiling():
                self.adapter.count(self.session, run.units, run.widths, run.widths, run.beside)
            if run.plans:
                self._check(run)
                output = self._whole(run, output)
        return output.to_tuple() if run.as_tuple else output

    def _embedded(self, module: nn.Module, args: Args, output: Tensor) -> None:
        run = self.run()
        if run is not None:
            run.patches = (output.shape[-2], output.shape[-1])

    # -------------------------------------------------------------- blocks

    def before(self, i: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        run = self.run()
        if run is None:  # somebody calls a block by itself
            return None
        check_checkpointing(module)
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        if i == 0:
            self._start(run, x)
        number = self.steps.get(i)
        if number is not None:
            x = self.reduce(number, i, run, x)
        if run.rewrite is not None:
            if i == run.first:
                _check_plain(self.session.recipe.steps[self.steps[i]].method, args, kwargs)
            x = run.rewrite.before(i - run.first, x)
        run.widths.append(x.shape[1])
        self._ride(i, module, run, kwargs)
        units = run.units
        assert units is not None
        if units.shortened:
            args = self._fit(units, args, kwargs)
        if args:
            return (x, *args[1:]), kwargs
        kwargs["hidden_states"] = x
        return args, kwargs

    def after(self, i: int, module: nn.Module, args: Args, output: Any) -> Any:
        """Behind a block of a rewriter."""
        run = self.run()
        if run is None or run.rewrite is None:
            return None
        output = run.rewrite.left(i - run.first, output)
        if i == len(self.facts.blocks) - 1:
            run.beside, run.rewrite = run.rewrite.flops, None
        return output

    def _start(self, run: Run, x: Tensor) -> None:
        if run.units is not None:
            raise UnsupportedModel("the blocks run twice in one call: their tokens get mixed up.")
        run.units = first_units(self.facts, x, run.patches)

    def reduce(self, number: int, i: int, run: Run, x: Tensor) -> Tensor:
        """Ask the method of step `number`, and move."""
        units = run.units
        assert units is not None
        step, method = self.session.recipe.steps[number], self.session.methods[number]
        makers: dict[str, Callable[[], Tensor]] = {
            "attn_cls": lambda: self._weights(run, units, i - 1),
            "vision_keys": lambda: units.per_unit(run.taps[i - 1].call.key).mean(2),
        }
        ctx = units.context(x, step.site, method.needs, makers, self.session.recipe.seed)
        samples = tuple(range(len(units.counts)))
        if isinstance(method, Rewriter):
            rewrite = run.rewrite = self.session.rewrite(number, ctx, samples)
            run.first = i
            run.plans.append((i, rewrite.plan))
            run.units = units.after(rewrite.plan, 0.0)
            return units.replace(x, rewrite.tokens)
        plan = self.session.reduce(number, ctx, samples)
        if plan is None:
            return x
        if plan.counts is not None and torch.is_grad_enabled():
            raise UnsupportedModel(
                f"{step.at}: images kept different numbers of tokens ({plan.counts}). Whether the "
                f"model pools all of them is only known without gradients: run it under "
                f"torch.no_grad(), or use a fixed budget."
            )
        run.plans.append((i, plan))
        run.units = units.after(plan, step.mass)
        return units.shrink(x, plan, run.units)

    def _weights(self, run: Run, units: GridUnits, block: int) -> Tensor:
        given = weighed(run.taps[block].call, self.facts.cls, units.columns())
        return units.take(given[..., None])[..., 0]

    def _ride(self, i: int, module: nn.Module, run: Run, kwargs: Kwargs) -> None:
        """Hand this block's attention its tap, its key bias and its padding."""
        units = run.units
        assert units is not None
        bias, real = units.once("keys", None, lambda: (units.bias(), units.columns()))
        tap = run.taps.setdefault(i, Tap()) if i in self.tapped else None
        if tap is None and bias is None and real is None:
            return
        side = Side(tap, bias, real)
        run.sides.append(side)
        sides.set({**sides.get(), id(attention_of(module)): side})
        if self.keywords:  # those that do not reach the attention are harmless
            kwargs["vtc"] = side
        if getattr(module, "gradient_checkpointing", False) and module.training:
            run.replayed.append(side)

    def _fit(self, units: GridUnits, args: Args, kwargs: Kwargs) -> Args:
        """Masks and rotary tables of the tokens that are left."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and not torch.is_tensor(mask):
            raise UnsupportedModel(
                f"an attention mask of kind {type(mask).__name__} cannot be shortened: load the "
                f"model with attn_implementation='sdpa'."
            )
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = units.once(
                id(tables[0]), tables, lambda: tuple(fit_table(units, t) for t in tables)
            )
        return fit_masks(units, args, kwargs)

    def _poison(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Padding of images that keep fewer tokens leaves the blocks as NaN, so that a model which
        pools it is found out. Whole grids do not contain it."""
        run = self.run()
        real = None if run is None or run.units is None else run.units.columns()
        if real is None:
            return None
        if isinstance(output, tuple):
            return (output[0].masked_fill(~real[..., None], float("nan")), *output[1:])
        return output.masked_fill(~real[..., None], float("nan"))

    # -------------------------------------------------------------- results

    def _check(self, run: Run) -> None:
        """Make sure that mass and padding were in force, and will be when blocks are replayed."""
        if not all(side.seen for side in run.sides):
            raise UnsupportedModel(
                "mass or padding did not reach the attention of this model: was its attention "
                "implementation changed after attach? Attach again."
            )
        bare = [side for side in run.replayed if not side.arrived]
        if any(side.bias is not None or side.real is not None for side in bare):
            raise UnsupportedModel(
                "attention of this model gets no keyword arguments, so gradient checkpointing "
                "cannot replay mass: switch it off, or use mass=0."
            )

    def _whole(self, run: Run, output: Any) -> Any:
        """Whole grids in everything that is returned token by token; the rest must be pooled."""
        last = len(self.facts.blocks) - 1
        if torch.is_tensor(output):
            tokens = output.ndim == 3
            return run.whole(last, output) if tokens else self._pooled(run, "output", output)
        if not isinstance(output, ModelOutput):
            raise UnsupportedModel(
                f"a {type(output).__name__} was returned: tokens are only found in outputs with "
                f"names. Call it with return_dict=True."
            )
        for name, value in list(output.items()):
            if name.startswith("text_"):
                continue
            if name == "last_hidden_state":
                value = run.whole(last, value)
            elif name == "hidden_states":  # the last one leaves the last block
                start = last - len(value) + 1
                value = tuple(
                    x if x is None else run.whole(max(i, 0), x) for i, x in enumerate(value, start)
                )
            elif name == "attentions":
                refuse_maps(value)
            elif isinstance(value, ModelOutput):
                value = self._whole(run, value)
            else:
                self._pooled(run, name, value)
            output[name] = value
        return output

    def _pooled(self, run: Run, name: str, value: Any) -> Any:
        """Make sure that a result was pooled, and not from padding."""
        if not torch.is_tensor(value):
            return value
        if value.ndim > 2:
            raise UnsupportedModel(
                f"{type(self.facts.path[0]).__name__} returns {name} of shape "
                f"{tuple(value.shape)}, made token by token: what it is for dropped tokens is not "
                f"known. Use keep=1.0, or the encoder without this head."
            )
        units = run.units
        if units is not None and units.columns() is not None and bool(value.isnan().any()):
            raise UnsupportedModel(
                f"images kept different numbers of tokens ({units.counts}), but {name} of this "
                f"model pools all of them. Use a fixed budget, or one image at a time."
            )
        return value


def _check_plain(method: str, args: Args, kwargs: Kwargs) -> None:
    """Refuse what speaks of tokens that a rewriter has replaced."""
    if kwargs.get("position_embeddings") is not None:
        raise UnsupportedModel(f"{method!r} {ROTARY}")
    if kwargs.get("attention_mask", args[1] if len(args) > 1 else None) is not None:
        raise UnsupportedModel(
            f"{method!r} writes new tokens, which have no place of their own in the attention mask "
            f"(or bias) that these blocks are given: call the model without a mask, use one "
            f"without such a bias, or a method that chooses tokens."
        )
