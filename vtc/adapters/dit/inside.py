"""Calls inside a block: its attention, its MLP, the block as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import UnsupportedModel
from ...hooks import Installed
from . import rotary
from .facts import Part
from .run import Run
from .running import RunningBlock, attend_to

if TYPE_CHECKING:
    from .hooks import Hooks

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
#: linears of an attention that make queries, keys and values of its tokens
PROJECTIONS = ("to_q", "to_k", "to_v", "qkv")
What = Literal["attention", "mlp"]
#: as in `Part.norms`
PARTS: tuple[What, What] = ("attention", "mlp")


class Inside:
    """Wraps what has to be asked inside blocks, and nothing else."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks, self.facts = hooks, hooks.facts

    def install(self, i: int, part: Part, on: Installed) -> None:
        passing = self.hooks.denoiser is not None
        if passing or i in self.hooks.around:
            on.wrap(part.attention, "forward", partial(self._attention, i))
        if not passing:
            return
        on.wrap(part.mlp, "forward", self._mlp)
        on.wrap(part.block, "forward", partial(self._skip, i))
        for what, norm in zip(PARTS, part.norms, strict=True):
            if norm is not None:
                on.wrap(norm, "forward", partial(self._normed, what))
        if part.over_time is not None:
            on.wrap(part.over_time, "forward", partial(self._skip, i))
        for name in PROJECTIONS:
            linear = getattr(part.attention, name, None)
            if linear is not None:
                on.after(linear, partial(self._projected, name))
        if part.modulation is not None:
            on.after(part.modulation, self._modulated)

    def _projected(self, name: str, module: nn.Module, args: Args, output: Tensor) -> None:
        run = self.hooks.running()
        if run is not None and run.block is not None:
            run.block.projected[name] = output

    def _modulated(self, module: nn.Module, args: Args, output: Tensor) -> None:
        run = self.hooks.running()
        if run is not None and run.block is not None:
            run.block.given = output

    def _skip(self, i: int, original: Callable[..., Any]) -> Any:
        """A block that a passage leaves out hands on what it is given."""

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            run = self.hooks.run()
            if run.passage is None or not run.passage.skips(i):
                return original(*args, **kwargs)
            x = args[0] if args else kwargs["hidden_states"]
            return x if self.facts.parts[i].kind == "self" else (kwargs["encoder_hidden_states"], x)

        return call

    def _normed(self, what: What, original: Callable[..., Any]) -> Any:
        """A norm in front of a part of a block is given what that part reads."""

        @wraps(original)
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            run = self.hooks.running()
            if run is None or run.block is None or run.passage is None:
                return original(x, *args, **kwargs)
            index = run.block.reads(what, run.passage)
            return original(x if index is None else ops.gather_rows(x, index), *args, **kwargs)

        return call

    def _read(self, what: What, run: Run, block: RunningBlock, x: Tensor) -> Tensor:
        """Tokens x of the image that came to a part of a block, those alone that it reads."""
        assert run.passage is not None
        index = block.reads(what, run.passage)
        done = block.part.norms[PARTS.index(what)] is not None
        n = block.work.tokens if index is None or not done else index.shape[1]
        if x.shape[1] != n:
            raise UnsupportedModel(
                f"{x.shape[1]} tokens come to the {what} of block {block.index} instead of {n}: is "
                f"it called in chunks (set_chunk_feed_forward)? Switch that off."
            )
        return x if index is None or done else ops.gather_rows(x, index)

    # -------------------------------------------------------------- attention

    def _attention(self, i: int, original: Callable[..., Any]) -> Any:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            run = self.hooks.run()
            block = run.block
            assert block is not None
            x = args[0] if args else kwargs["hidden_states"]
            calls = _Calls(block, "attention", original, x[:, : block.text], args, kwargs)
            block.run_attention = calls
            own = x[:, block.text :]
            if run.passage is not None:
                block.work.queries = block.work.keys = 0  # unless it asks
                own = self._read("attention", run, block, own)
                return calls.with_text(run.passage.attention(block, own))
            return calls.with_text(self._around(self.hooks.around[i], run, block, own, calls))

        return call

    def _around(
        self, number: int, run: Run, block: RunningBlock, x: Tensor, calls: _Calls
    ) -> Tensor:
        """The attention alone on fewer tokens, chosen by what enters the block."""
        assert run.entered is not None
        plan = self.hooks.plan(number, run, run.entered)
        if plan is None:
            return block.attend(x)
        before, places = run.rotated, run.places(plan)
        if self.facts.rotary == "each":
            calls.args = (*calls.args[:3], rotary.each(places, run.tables))
        elif self.facts.rotary == "shared":
            calls.kwargs = {**calls.kwargs, "image_rotary_emb": None}
            run.rotated = rotary.Shared(run.tables, run.text, places)
        rows = run.rows(plan)
        out = ops.restore(rows, block.attend(ops.apply(rows, x)))
        run.rotated = before
        return out

    # -------------------------------------------------------------- MLP

    def _mlp(self, original: Callable[..., Any]) -> Any:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            run = self.hooks.run()
            block = run.block
            if run.passage is None or block is None:
                return original(*args, **kwargs)
            x = args[0]
            calls = _Calls(block, "mlp", original, x[:, : block.text], args, kwargs)
            block.run_mlp = calls
            block.work.mlp = 0
            own = self._read("mlp", run, block, x[:, block.text :])
            return calls.with_text(run.passage.mlp(block, own))

        return call


class _Calls:
    """One call of a module of a block, on tokens of the image; the prompt goes along."""

    def __init__(
        self,
        block: RunningBlock,
        what: str,
        original: Callable[..., Any],
        front: Tensor,
        args: Args,
        kwargs: Kwargs,
    ) -> None:
        self.block, self.what, self.original = block, what, original
        self.front, self.args, self.kwargs = front, args, kwargs

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        block = self.block
        if other is not None and hasattr(block.part.attention, "qkv"):
            return attend_to(block.part.attention, x, other)
        args, kwargs = with_tokens(self.args, self.kwargs, _joined(self.front, x))
        if other is not None:
            kwargs = {**kwargs, "encoder_hidden_states": other}
        out = self.original(*args, **kwargs)
        if isinstance(out, tuple):
            if len(out) != 2:
                raise UnsupportedModel(
                    f"the attention of block {block.index} gives {len(out)} results (an image "
                    f"prompt adapter?): only the image's and the prompt's tokens are understood."
                )
            block.kept[self.what] = out[1]
            return out[0]
        if block.text:
            block.kept[self.what] = out[:, : block.text]
        return out[:, block.text :]

    def with_text(self, out: Tensor) -> Any:
        """The output with that of the prompt, of this call or, where it was left out, of an earlier
        one."""
        block = self.block
        joint = block.part.kind == "joint" and self.what == "attention"
        if not joint and not block.text:
            return out
        if self.what not in block.kept:
            raise UnsupportedModel(
                f"the {self.what} of block {block.index} was left out before it ever ran in this "
                f"run of the sampler."
            )
        kept = block.kept[self.what]
        return (out, kept) if joint else torch.cat([kept, out], 1)


def with_tokens(args: Args, kwargs: Kwargs, x: Tensor) -> tuple[Args, Kwargs]:
    """Arguments of a call with other tokens."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def _joined(front: Tensor, x: Tensor) -> Tensor:
    return torch.cat([front, x], 1) if front.shape[1] else x
