"""Hooks on the blocks of a diffusion transformer: shorten, keep rotary tables in step, restore."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import ops
from ...context import Context, Layout, Signals
from ...errors import InvalidInput, UnsupportedModel
from ...hooks import Installed
from ...plan import Plan
from ...recipe import Step
from ...reducer import Denoiser, Moment
from ...session import Session
from ..slot import Slot
from . import rotary
from .costs import Work
from .facts import Call, Part, bound, context_length, noise, prompt
from .inside import Inside, with_tokens
from .run import Run, Span
from .running import RunningBlock
from .timeline import Branch, Timelines

if TYPE_CHECKING:
    from .adapter import DiffusionTransformer

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
#: seeds of the calls of a run are this far apart
STRIDE = 7919


class Hooks:
    """The hooks of one session."""

    def __init__(self, adapter: DiffusionTransformer, session: Session) -> None:
        self.adapter, self.facts, self.session = adapter, adapter.facts, session
        self.steps: tuple[Step, ...] = session.recipe.steps
        self.denoiser: int | None = None
        self.spans, self.around = dict[int, int](), dict[int, int]()
        for number, (step, method) in enumerate(zip(self.steps, session.methods, strict=True)):
            if isinstance(method, Denoiser):
                self.denoiser = number
            else:
                (self.around if step.site.part else self.spans)[step.site.layer or 0] = number
        self._run: Slot[Run | None] = Slot("vtc_dit_run", None)
        self._timelines = Timelines()

    def install(self, on: Installed) -> None:
        facts, inside = self.facts, Inside(self)
        self.session.at_reset.append(self._forget)
        on.add(self)
        on.follow(self.adapter.model, self._called, self._returned)
        for i, part in enumerate(facts.parts):
            on.before(part.block, partial(self.before, i), keywords=True)
            on.after(part.block, partial(self.after, i), first=True)
            if part.over_time is not None:
                on.before(part.over_time, self._over_time, keywords=True)
            inside.install(i, part, on)
            if facts.rotary == "shared" and self.denoiser is None:
                rotary.install(part.attention, self._tables, on)
        if facts.end is not None:
            on.before(facts.end, self._finish)

    def remove(self) -> None:
        """Forget what is kept from call to call: the session ends."""
        self._run.set(None)
        self._timelines.clear()

    def _forget(self) -> None:
        """The run that the next call belongs to begins anew."""
        self._timelines.forget(self.session.stream_name)

    def running(self) -> Run | None:
        return self._run.get()

    def run(self) -> Run:
        run = self._run.get()
        if run is None:
            raise UnsupportedModel(
                "a block was called by itself: call the model, or detach the session first."
            )
        return run

    # -------------------------------------------------------------- one call of the model

    def _called(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The model's forward is one run."""
        self._begin(bound(self.adapter.model, args, kwargs))
        return args, kwargs

    def _returned(self, output: Any) -> Any:
        run = self.run()
        self._run.set(None)
        if output is None:
            self._forget()  # what is kept from call to call is not whole
        elif not torch.compiler.is_compiling():
            self._count(run)
        return output

    def _begin(self, call: Call) -> None:
        model, facts = self.adapter.model, self.facts
        refuse_caches(model)
        if getattr(model, "gradient_checkpointing", False) and torch.is_grad_enabled():
            raise UnsupportedModel(
                "gradient checkpointing runs blocks again without the hooks' order: switch it off "
                "with disable_gradient_checkpointing()."
            )
        sample = call.get(facts.sample)
        if not torch.is_tensor(sample) or sample.shape[0] == 0:
            raise InvalidInput(f"`{facts.sample}` holds no images: an empty batch, or none given.")
        if self.spans and any(call.get(name) is not None for name in CONTROLS):
            raise UnsupportedModel(
                f"residuals of a ControlNet ({', '.join(CONTROLS)}) are for all tokens: attach at "
                f"dit.<i>.attn, where blocks hand on all of them, or leave the ControlNet out."
            )
        if self.denoiser is not None and call.get("skip_layers"):
            raise UnsupportedModel(
                f"skip_layers leaves blocks out in calls with half of the batch, while "
                f"{self.steps[0].method!r} acts in all blocks, from call to call: sample without "
                f"skip_guidance_layers."
            )
        left_out, depth = call.get("skip_layers") or (), self.adapter.depth
        for step in (self.steps[n] for n in self.spans.values()):
            end = depth if step.end is None else step.end
            if all(i in left_out for i in range(min(end, depth - 1), depth)):
                raise UnsupportedModel(
                    f"skip_layers={list(left_out)} leaves out the blocks where the dropped tokens "
                    f"of {step.at} come back: give it until=, before a block that runs."
                )
        compiling = torch.compiler.is_compiling()
        if compiling and (self.denoiser is not None or any(s.noise != FULL for s in self.steps)):
            raise UnsupportedModel(
                "torch.compile cannot trace decisions that depend on the timestep: run the model "
                "uncompiled, or leave `noise` out."
            )
        most, least = FULL[::-1] if compiling else noise(facts, call)
        lasting = not (compiling or model.training)
        branch = self._branch(most, sample, prompt(call)) if lasting else Branch(calls=1)
        run = Run(facts.grid(call), len(sample), most, least, branch, context_length(call))
        self._run.set(run)
        if self.denoiser is not None:
            moment = Moment(
                most,
                least,
                branch.calls - 1,
                run.layout,
                len(facts.parts),
                self._seed(branch),
                branch.state.setdefault("method", {}),
                model.training,
            )
            run.passage = self.session.denoise(self.denoiser, moment)

    def _seed(self, branch: Branch) -> int:
        return self.session.recipe.seed + STRIDE * (branch.calls - 1)

    def _branch(self, most: float, sample: Tensor, about: Tensor | None) -> Branch:
        about = about if self.denoiser is not None else None  # others keep nothing to mix up
        return self._timelines.of(self.session.stream_name).step(most, sample, about)

    def _count(self, run: Run) -> None:
        """Tell the session what one forward took."""
        if not run.work:
            return  # the caller left all blocks out
        costs, frames = [self.adapter.costs[i] for i in run.work], run.frames
        whole, about = Work().at(run.layout.n // frames), (run.text, run.context, frames)
        used = sum(c.flops(w, *about) for c, w in zip(costs, run.work.values(), strict=True))
        dense = sum(c.flops(whole, *about) for c in costs)
        mean = frames * sum(work.mlp for work in run.work.values()) / len(costs)
        seen = (run.batch * 1.0, run.batch * mean, run.batch * mean)
        self.session.count(True, run.batch * dense, run.batch * used, seen)
        if self.denoiser is not None:
            self.session.passed(self.denoiser, run.batch * run.layout.n, run.batch * mean)

    # -------------------------------------------------------------- blocks

    def before(self, i: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        run, part = self.run(), self.facts.parts[i]
        given = x = args[0] if args else kwargs["hidden_states"]
        run.frames = len(x) // run.batch
        x = self._close(run, x, i)
        number = self.spans.get(i)
        if number is not None:
            x = self._open(number, run, x)
        text = kwargs.get("encoder_hidden_states")
        run.text = text.shape[1] if part.kind != "self" and torch.is_tensor(text) else 0
        text_of_block = run.branch.state.setdefault(("text", i), {})
        run.block = RunningBlock(i, part, text_of_block, Work())
        run.block.text = run.text if part.kind == "single" else 0
        run.block.given = _table(part, args, kwargs)
        skipped = run.passage is not None and run.passage.skips(i)
        if run.passage is not None and not skipped:
            x = run.passage.enter(run.block, x)
        n = 0 if skipped else x.shape[1]
        run.work[i] = run.block.work.at(n)
        run.entered = x
        args, kwargs = self._turn(run, args, kwargs)
        return None if x is given and not run.spans else with_tokens(args, kwargs, x)

    def after(self, i: int, module: nn.Module, args: Args, output: Any) -> Any:
        run = self.run()
        x = given = output[1] if isinstance(output, tuple) else output
        if run.passage is not None:
            x = run.passage.leave(i, x)
        if i == len(self.facts.parts) - 1 and self.facts.end is None:
            x = self._end(run, x)
        run.block = None
        if x is given:
            return None
        return (output[0], x) if isinstance(output, tuple) else x

    def _finish(self, module: nn.Module, args: Args) -> Args | None:
        """What follows the last block reads all tokens (Latte: the last block is one over time)."""
        run = self.run()
        if not run.spans and run.passage is None:
            return None
        return (self._end(run, args[0]), *args[1:])

    def _end(self, run: Run, x: Tensor) -> Tensor:
        x = self._close(run, x, len(self.facts.parts))
        return x if run.passage is None else run.passage.finish(x)

    def _over_time(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Latte's blocks over time are given the timestep of every token: [B N, 6 C]."""
        batch, rows, time = self.run().batch, len(args[0]), args[4]
        if len(time) == rows:
            return None
        time = time.unflatten(0, (batch, -1))[:, : rows // batch].flatten(0, 1)
        return (*args[:4], time, *args[5:]), kwargs

    # -------------------------------------------------------------- spans

    def _open(self, number: int, run: Run, x: Tensor) -> Tensor:
        plan = self.plan(number, run, x)
        if plan is None:
            return x
        step, source, rows = self.steps[number], run.places(plan), run.rows(plan)
        short = ops.apply(rows, x)
        end = len(self.facts.parts) if step.end is None else step.end
        run.spans.append(Span(rows, source, x, short, end))
        return short

    def plan(self, number: int, run: Run, x: Tensor) -> Plan | None:
        """What step `number` keeps of x; frames of a video keep the same places. None: all."""
        step = self.steps[number]
        if not _acts(step, run):
            self.session.passed(number, run.batch * x.shape[1])
            return None
        one = run.frames == 1
        seen = x if one else x.unflatten(0, (run.batch, run.frames)).mean(1)
        whole = run.layout if one else Layout(1, run.layout.height, run.layout.width)
        rows, count = seen.shape[:2]
        if count != whole.n and not run.spans:
            raise UnsupportedModel(
                f"{count} tokens enter this block, but the images have {whole.n}: are there other "
                f"tokens among them?"
            )
        plan = self.session.reduce(
            number,
            Context(
                seen,
                torch.ones(seen.shape[:2], dtype=torch.bool, device=seen.device),
                (count,) * rows,
                (whole.n,) * rows,
                run.sources(rows, count, seen.device),
                (whole,) * rows,
                step.site,
                Signals({}),
                run.noise,
                self._seed(run.branch),
                len(self.facts.parts),
            ),
            tuple(range(rows)),
        )
        if plan is not None and plan.counts is not None:
            raise UnsupportedModel(
                f"{step.at}: samples kept different numbers of tokens ({plan.counts}), which the "
                f"blocks of a diffusion transformer cannot take. Use a fixed budget."
            )
        return plan

    def _close(self, run: Run, x: Tensor, i: int) -> Tensor:
        """Bring tokens back before block i: each one takes the change of the token that stood for
        it, or stays as it was when it was dropped."""
        while run.spans and run.spans[-1].end <= i:
            span = run.spans.pop()
            x = ops.restore(span.plan, x - span.short, span.whole)
        return x

    # -------------------------------------------------------------- rotary tables

    def _tables(self) -> rotary.Shared | None:
        run = self._run.get()
        return None if run is None else run.rotated

    def _turn(self, run: Run, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Arguments of a block with the rotary tables of the tokens that are left."""
        if self.facts.rotary == "none":
            return args, kwargs
        each = self.facts.rotary == "each"
        run.tables = args[3] if each else kwargs["image_rotary_emb"]
        run.rotated = None
        if each and args[2].ndim == 4 and (run.spans or run.passage is not None):
            raise UnsupportedModel(
                "every token has a timestep of its own in this call: tokens cannot be dropped, nor "
                "left out of a part of a block."
            )
        if not run.spans:
            return args, kwargs
        source = run.spans[-1].source
        if not each:
            run.rotated = rotary.Shared(run.tables, run.text, source)
            return args, {**kwargs, "image_rotary_emb": None}
        return (*args[:3], rotary.each(source, run.tables)), kwargs


FULL = (0.0, 1.0)
#: arguments that add to what leaves blocks
CONTROLS = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


def _acts(step: Step, run: Run) -> bool:
    """Whether the images are as noisy as the step asks."""
    low, high = step.noise
    most, least = low <= run.noise <= high, low <= run.least <= high
    if most != least or (run.least < low and run.noise > high):
        raise InvalidInput(
            f"{step.at}: samples of this batch are {run.least:.3f} to {run.noise:.3f} noisy, and "
            f"the step acts from {low} to {high}: give samples of one timestep."
        )
    return most


def _table(part: Part, args: Args, kwargs: Kwargs) -> Tensor | None:
    """[B, 6 D] modulation of blocks that hold a table of their own (PixArt, Latte)."""
    table = getattr(part.block, "scale_shift_table", None)
    if table is None or part.modulation is not None or table.ndim != 2:
        return None
    time = kwargs["timestep"] if "timestep" in kwargs else args[4]
    return (table[None] + time.reshape(len(time), *table.shape)).flatten(1)


def refuse_caches(model: Any) -> None:
    """Caches of diffusers skip blocks, and remember outputs of other tokens."""
    if getattr(model, "is_cache_enabled", False):
        raise UnsupportedModel(
            "a cache of diffusers is enabled on this model, which skips blocks by itself: call "
            "disable_cache() first, or use it alone."
        )
    if getattr(model, "_is_cached", False):  # what cache-dit calls it
        raise UnsupportedModel(
            "cache-dit is enabled on this model, which skips blocks by itself: call "
            "cache_dit.disable_cache(pipeline) first, or use it alone."
        )
