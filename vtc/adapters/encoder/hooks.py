"""Hooks on the blocks of an encoder: shorten, keep masks and rotary tables in step, restore.

What the model itself pools is the short sequence. What a caller asks to see token by token
(`forward_features`, `forward_intermediates` and the like) gets its whole grid back: merged tokens
are copied to where they came from, dropped ones are zero. Where such a method pools as well, that
part reads what is left."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import MissingSignal, UnsupportedModel
from ...hooks import Installed
from ...plan import Plan
from ...reducer import Rewrite, Rewriter
from ...session import Session
from ..lone import first_units
from ..slot import Slot
from ..units import PREVIOUS_BLOCK_SIGNALS, GridUnits, restore
from . import pairs
from .reading import Reader

if TYPE_CHECKING:
    from .adapter import ImageEncoder

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass
class Run:
    """One forward through the blocks.

    Attributes:
        owner: key of the hooks that started it (not the hooks: they would outlive their session).
        units: patches that are left.
        plans: so far, for the way back to the whole grid.
        widths: tokens that each block's attention saw; inner: its MLP.
        busy: a block is running.
        readers: attention calls that a method will ask about, by block.
        counted: its FLOPs are in the report.
        waiting: what goes on from a block that was shortened inside, until the block returns.
        first, rewrite: a rewriter's first block and what it does around the blocks from there on;
            beside: FLOPs of that.
    """

    owner: Any
    units: GridUnits
    plans: list[Plan] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    inner: list[int] = field(default_factory=list)
    busy: bool = False
    readers: dict[int, Reader] = field(default_factory=dict)
    waiting: Tensor | None = None
    counted: bool = False
    first: int = 0
    rewrite: Rewrite | None = None
    beside: float = 0.0


_runs: Slot[tuple[Run, ...]] = Slot("vtc_encoder_runs", ())
#: whether the outermost call wants whole grids, and how many calls of the model are on their way
_whole: Slot[tuple[bool, int] | None] = Slot("vtc_encoder_whole", None)
#: the last whole grid that was returned, and the run that it is of
_made: Slot[tuple[weakref.ref[Tensor], Run] | None] = Slot("vtc_encoder_made", None)
#: height and width of the image that is being encoded
_images: Slot[torch.Size | None] = Slot("vtc_encoder_images", None)


class Hooks:
    """The hooks of one session."""

    def __init__(self, adapter: ImageEncoder, session: Session) -> None:
        self.adapter, self.facts, self.session = adapter, adapter.facts, session
        self.key = object()
        self.steps, self.inner = dict[int, int](), dict[int, int]()
        self.read: dict[int, int] = {}  # block whose attention is read -> step that asks
        for number, step in enumerate(session.recipe.steps):
            block, mlp = step.site.layer or 0, step.site.mlp
            (self.inner if mlp else self.steps)[block] = number
            if session.methods[number].needs & PREVIOUS_BLOCK_SIGNALS:
                self.read[block if mlp else block - 1] = number  # what has just run

    def install(self, on: Installed) -> None:
        facts, blocks = self.facts, self.facts.blocks
        on.add(self)
        on.before(facts.embed, self._seen)
        for i in self.read:
            attention: Any = blocks[i].attn
            on.before(attention, partial(self.called, i), keywords=True)
            if getattr(attention, "qkv", None) is not None:
                on.after(attention.qkv, partial(self.projected, i))
        for i, block in enumerate(blocks):
            on.before(block, partial(self.before, i), keywords=True)
        for i in self.inner:
            assert self.facts.branch is not None  # or the site would not be offered
            enter, leave = (getattr(blocks[i], name) for name in self.facts.branch)
            on.before(enter, partial(self.enter, i))
            on.after(leave, self.leave)
        for i, block in enumerate(blocks):
            # first, so that hooks of others see what really leaves a block
            on.after(block, partial(self.after, i), first=True)
        for attention in facts.padded:
            on.before(attention, self.pad, keywords=True)
        on.follow(facts.model, self._called, self._returned)
        for owner, name in facts.dense:
            on.wrap(owner, name, self._read_by_token)
        for owner, name in facts.pools:
            on.wrap(owner, name, self._pooling)
        if facts.pairs is not None:
            for module, name in facts.pairs.makers:
                on.wrap(module, name, partial(pairs.changed, self._pairs))

    def _seen(self, module: nn.Module, args: Args) -> None:
        _images.set(args[0].shape[-2:] if args and torch.is_tensor(args[0]) else None)

    def remove(self) -> None:
        """Forget the last run, when it or the session ends or another one starts."""
        _runs.set(tuple(r for r in _runs.get() if r.owner is not self.key))
        made = _made.get()
        if made is not None and made[1].owner is self.key:
            _made.set(None)

    def running(self) -> Run | None:
        return next((r for r in reversed(_runs.get()) if r.owner is self.key), None)

    def run(self) -> Run:
        run = self.running()
        if run is None:
            raise UnsupportedModel(
                "a block was called by itself: call the model, or detach the session first."
            )
        return run

    # -------------------------------------------------------------- calls from outside

    def _called(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The model's forward begins. Methods that it calls in turn give what is left."""
        self._begin(False)
        return args, kwargs

    def _returned(self, output: Any) -> Any:
        run, _ = self._end(output is not None)
        return output if run is None or output is None else self.give(run, output)

    def _read_by_token(self, original: Callable[..., Any]) -> Any:
        """A method of the model that starts a run, whose result is read token by token. Methods
        that it calls in turn do as it does."""

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._begin(True)
            output = None
            try:
                output = original(*args, **kwargs)
            finally:
                run, outermost = self._end(output is not None)
            if outermost and run is not None and run.units.shortened and torch.is_tensor(output):
                _made.set(None if torch.compiler.is_compiling() else (weakref.ref(output), run))
            return output

        return call

    def _begin(self, whole: bool) -> None:
        """A call begins; `whole`: its result is read token by token, if it is the outermost."""
        before = _whole.get()
        _whole.set((whole, 1) if before is None else (before[0], before[1] + 1))

    def _end(self, done: bool) -> tuple[Run | None, bool]:
        """A call returns, or was interrupted (not `done`): its run, and whether it was the
        outermost call."""
        whole, depth = _whole.get() or (False, 1)
        outermost = depth == 1
        _whole.set(None if outermost else (whole, depth - 1))
        run = self.running()
        if outermost:
            self.remove()
            counted = torch.compiler.is_compiling() or not done
            if run is not None and run.inner and not (run.counted or counted):
                self._count(run)
        return run, outermost

    @staticmethod
    def _gives_whole() -> bool:
        """Whether the outermost call's result is read token by token."""
        calls = _whole.get()
        return calls is not None and calls[0]

    # -------------------------------------------------------------- blocks

    def before(self, i: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        x: Tensor = args[0] if args else kwargs[self.facts.tokens]
        if i == 0:
            self._start(x)
        run = self.run()
        units = run.units
        if self._gives_whole() and units.shortened:
            x = _short(units, x)
        number = self.steps.get(i)
        if number is not None:
            x = self.reduce(number, i, run, x)
            units = run.units
        if run.rewrite is not None:
            x = run.rewrite.before(i - run.first, x)
        run.widths.append(x.shape[1])
        run.busy = True
        if not units.shortened:
            return None
        if any(torch.is_tensor(value) for value in args[1:]):
            raise UnsupportedModel(
                "tensors are passed to this block by position: they cannot be cut."
            )
        self._fit(units, x, kwargs)
        if args:
            return (x, *args[1:]), kwargs
        kwargs[self.facts.tokens] = x
        return args, kwargs

    def pad(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Bias and padding of keys [B, K], for attention that takes them apart from `attn_mask`."""
        units, dtype = self.run().units, args[0].dtype
        own = units.once(("mask", dtype), None, partial(_mask, units, dtype))
        if own is None:
            return None
        if kwargs.get("key_padding_mask") is not None:
            raise UnsupportedModel("a key_padding_mask is given to this attention already.")
        return args, {**kwargs, "key_padding_mask": own[:, 0, 0]}

    def give(self, run: Run, output: Any) -> Any:
        """Whole grids in what the model returns without pooling."""
        places = self.facts.unpooled
        if not run.units.shortened or not places:
            return output
        if torch.is_tensor(output):
            return restore(run.plans, output, places[0]) if 0 in places else output
        return tuple(
            restore(run.plans, x, places[i]) if i in places else x for i, x in enumerate(output)
        )

    def _pooling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A method that pools: of the whole grid that a dense method has just made it sees the
        tokens that are left."""

        @wraps(original)
        def pool(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            run, made = self.running(), _made.get()
            if self._gives_whole() and run is not None and run.units.shortened:
                x = _short(run.units, x)
            elif _whole.get() is None and made is not None and made[0]() is x:
                x = _short(made[1].units, x)
            return original(x, *args, **kwargs)

        return pool

    def _start(self, x: Tensor) -> None:
        if getattr(self.facts.checkpoints, "grad_checkpointing", False) and torch.is_grad_enabled():
            raise UnsupportedModel(
                "gradient checkpointing runs blocks again without the hooks' order: switch it off "
                "with model.set_grad_checkpointing(False)."
            )
        units = first_units(self.facts, x, _images.get())
        self.remove()
        _runs.set((*_runs.get(), Run(self.key, units)))

    def called(self, i: int, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Follow the attention of block i, if the step that reads it takes tokens away."""
        run = self.run()
        units = run.units
        if self.session.tokens(self.read[i], units.counts, units.original) != units.counts:
            run.readers[i] = Reader(module, args, kwargs)

    def projected(self, i: int, module: nn.Module, args: Args, output: Tensor) -> None:
        reader = self.run().readers.get(i)
        if reader is not None:
            wanted = self.session.methods[self.read[i]].needs & PREVIOUS_BLOCK_SIGNALS
            reader.projected(output, keys_only=wanted == {"vision_keys"})

    def enter(self, i: int, module: nn.Module, args: Args) -> Args | None:
        """Shorten what the MLP's branch of block i reads."""
        run = self.run()
        plans = len(run.plans)
        x = self.reduce(self.inner[i], i + 1, run, args[0])
        if len(run.plans) == plans:
            return None
        run.waiting = x
        return (x, *args[1:])

    def leave(self, module: nn.Module, args: Args, output: Tensor) -> Tensor | None:
        """The short sum x + branch(x) waits; the block adds nothing to what it still holds."""
        run = self.run()
        if run.waiting is None:
            return None
        run.waiting = run.waiting + output
        return output.new_zeros(1, 1, 1)

    def after(self, i: int, module: nn.Module, args: Args, output: Tensor) -> Tensor | None:
        run = self.run()
        if run.waiting is not None:
            output, run.waiting = run.waiting, None
        if run.rewrite is not None:
            output = run.rewrite.left(i - run.first, output)
        run.inner.append(output.shape[1])
        run.busy = False
        if i == self.adapter.depth - 1:
            run.beside, run.rewrite = run.rewrite.flops if run.rewrite else 0.0, None
            run.units.clear()  # tables and masks were for the blocks
            if not torch.compiler.is_compiling():
                self._count(run)
        if self._gives_whole() and run.units.shortened:
            return restore(run.plans, output, self.facts.prefix)
        return output

    def reduce(self, number: int, i: int, run: Run, x: Tensor) -> Tensor:
        """Ask the method of step `number`, and move."""
        units, prefix = run.units, self.facts.prefix
        step, method = self.session.recipe.steps[number], self.session.methods[number]
        reader = run.readers.pop(i - 1, None)

        def read() -> Reader:
            if reader is None:
                raise MissingSignal("the block before the site has not run in this forward.")
            return reader

        makers: dict[str, Callable[[], Tensor]] = {
            "attn_cls": lambda: self._attention(read(), units),
            "vision_keys": lambda: read().mean_key()[:, prefix:],
        }
        ctx = units.context(x, step.site, method.needs, makers, self.session.recipe.seed)
        samples = tuple(range(len(units.counts)))
        if isinstance(method, Rewriter):
            rewrite = run.rewrite = self.session.rewrite(number, ctx, samples)
            run.first = i
            run.plans.append(rewrite.plan)
            run.units = units.after(rewrite.plan, 0.0)
            return units.replace(x, rewrite.tokens)
        plan = self.session.reduce(number, ctx, samples)
        if plan is None:
            return x
        if plan.counts is not None and not self.facts.hides_padding:
            raise UnsupportedModel(
                f"{step.at}: images kept different numbers of tokens ({plan.counts}), but this "
                f"model pools all of them. Use a fixed budget."
            )
        run.plans.append(plan)
        run.units = units.after(plan, step.mass)
        return units.shrink(x, plan, run.units)

    def _attention(self, reader: Reader, units: GridUnits) -> Tensor:
        """[B, N] attention that patches get from the class token, or from all tokens without one,
        mean over heads."""
        query, key, prefix = reader.query(), reader.key(), self.facts.prefix
        mask = units.once(("mask", torch.float32), None, partial(_mask, units, torch.float32))
        scale = reader.scale
        if self.facts.cls:
            given = ops.qrow_scores(query[:, :, :1], key, scale, mask, prefix)
            return given[:, 0]
        total = torch.zeros(
            query.shape[0], key.shape[2] - prefix, device=key.device, dtype=torch.float32
        )
        blocks = query[:, :, prefix:].split(256, 2), units.real.split(256, 1)
        for block, real in zip(*blocks, strict=True):  # nothing N x N is held
            rows = ops.qrow_scores(block, key, scale, mask, prefix)
            total = total + (rows * real[..., None]).sum(1)
        return total / units.real.sum(1, keepdim=True)

    def _fit(self, units: GridUnits, x: Tensor, kwargs: Kwargs) -> None:
        """Rotary tables and masks of the tokens that are left."""
        rope = kwargs.get("rope")
        if rope is not None:
            kwargs["rope"] = units.once(id(rope), rope, partial(_tables, units, rope))
        given = kwargs.get("attn_mask")
        if given is not None:
            given = units.once(id(given), given, partial(self.facts.cut, given, units.index()))
        own = None
        if self.facts.bias_in_blocks:
            own = units.once(("mask", x.dtype), None, partial(_mask, units, x.dtype))
        if self.facts.pairs is not None:
            return self.facts.pairs.fit(units, kwargs, own)
        if own is not None:
            given = own if given is None else _both(given, own)
        if given is not None:
            kwargs["attn_mask"] = given

    def _pairs(self, bias: Tensor) -> Tensor:
        """What a block adds to the logits of all pairs, for the tokens that are left."""
        run = self.running()
        if run is None or not run.busy or not run.units.shortened:
            return bias
        own = run.units.once(("mask", bias.dtype), None, partial(_mask, run.units, bias.dtype))
        short = pairs.cut(run.units, bias)
        return short if own is None else short + own

    def _count(self, run: Run) -> None:
        run.counted = True
        self.adapter.count(self.session, run.units, run.widths, run.inner, run.beside)


def _short(units: GridUnits, x: Tensor) -> Tensor:
    """The tokens that are left, of a whole grid that `restore` made."""
    return ops.gather_rows(x, units.index())


def _tables(units: GridUnits, rope: Tensor) -> Tensor:
    """Rotary table [N, D] or [H, N, D] of the patches -> [B, 1 or H, K, D]."""
    if rope.ndim not in (2, 3):
        raise UnsupportedModel(f"rotary tables of shape {tuple(rope.shape)} cannot be shortened.")
    table = rope[None, None] if rope.ndim == 2 else rope[None]
    return ops.gather_tokens(units.source, table, axis=2)[0]


def _mask(units: GridUnits, dtype: torch.dtype) -> Tensor | None:
    """[B, 1, 1, K] added to the logits: mass * log(size), -inf for padding. None for neither."""
    bias, real = units.bias(), units.columns()
    if real is not None:
        hidden = torch.zeros(real.shape, device=real.device, dtype=torch.float32)
        hidden = hidden.masked_fill(~real, float("-inf"))
        bias = hidden if bias is None else bias + hidden
    return None if bias is None else bias[:, None, None].to(dtype)


def _both(given: Tensor, own: Tensor) -> Tensor:
    if given.dtype == torch.bool:
        return torch.where(given, own, float("-inf"))
    return given + own
