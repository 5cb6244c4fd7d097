"""attach(): check everything, install hooks, hand back a Session that reports and undoes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import torch
from torch import Tensor, nn

from . import ops, versions
from .budget import Keep
from .context import SIGNALS, Context, Layout, Part, Site
from .errors import (
    InvalidInput,
    InvalidRecipe,
    MissingSignal,
    NothingReduced,
    UnsupportedModel,
    UnsupportedSite,
)
from .hooks import Installed, sessions_on
from .plan import Plan
from .recipe import Recipe, Step
from .reducer import (
    Decision,
    Denoiser,
    Host,
    Moment,
    Passage,
    Rewrite,
    Rewriter,
    Selector,
    Trained,
)
from .registry import ADAPTERS, REDUCERS


class Adapter(Protocol):
    """Knows one kind of model: where its tokens are, what it can tell of them, how to move them."""

    name: str
    depth: int
    #: what the FLOPs of a report are of
    counts: str

    @classmethod
    def matches(cls, model: nn.Module) -> str | None:
        """None when this adapter fits, else what it looked for and did not find."""
        ...

    def __init__(self, model: nn.Module) -> None: ...

    def sites(self) -> dict[str, frozenset[str]]:
        """Site -> signals offered there."""
        ...

    def host(self) -> Host:
        """What composite methods may ask."""
        ...

    def refusals(self) -> dict[str, str]:
        """Kind of site or signal -> why this model does not offer it."""
        ...

    def check(self, recipe: Recipe) -> None:
        """Raise when the model cannot run this recipe."""
        ...

    def blocks(self, site: Site) -> Sequence[nn.Module]:
        """From the block behind a site to the last one whose output is read."""
        ...

    def install(self, session: Session) -> None:
        """Put hooks in place through `session.installed`, which takes them away again."""
        ...


@dataclass(frozen=True)
class Reduction:
    """One step in one forward: what came in, what stayed."""

    site: str
    method: str
    n_in: tuple[int, ...]
    n_out: tuple[int, ...]
    seconds: float
    plan: Plan | None
    source_in: Tensor
    layout: tuple[Layout | None, ...]
    samples: tuple[int, ...]
    parts: tuple[Sequence[Part], ...] = ()

    @property
    def source(self) -> Tensor:
        """[R, M] place of each kept token on its image's original grid."""
        return self.source_in if self.plan is None else self.source_in.gather(1, self.plan.index)


class Session:
    """A recipe living on a model. Use it as a context manager, or call `detach()`.

    Attributes:
        trace: the last reductions (at most 256), newest last.
        modules: site -> weights of the method there, for methods that bring some; train them, save
            them.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, recipe: Recipe, strict: bool) -> None:
        self.model, self.adapter, self.recipe = model, adapter, recipe
        self.methods = tuple(step.build() for step in recipe.steps)
        with torch.device("cpu"):  # from where methods move them, whatever the default device is
            self.modules: dict[str, Any] = {
                step.at: method.build(adapter.blocks(step.site))
                for step, method in zip(recipe.steps, self.methods, strict=True)
                if isinstance(method, Trained)
            }
        self.trace: deque[Reduction] = deque(maxlen=256)
        self._losses: list[Tensor] = []
        self._strict = strict
        self._lock = threading.Lock()
        self._stream: ContextVar[Hashable | None] = ContextVar("vtc_stream", default=None)
        self._tokens: dict[str, list[float]] = {step.at: [0, 0] for step in recipe.steps}
        self._seconds = dict.fromkeys(self._tokens, 0.0)
        self._fired = dict.fromkeys(self._tokens, 0)
        self._forwards = self._prefills = 0
        self._flops = [0.0, 0.0]
        self._visual = [0.0, 0.0, 0.0]
        #: called by `reset`; adapters add what forgets
        self.at_reset: list[Callable[[], None]] = []
        #: what is on the model while this session lives
        self.installed = Installed(self)
        try:
            adapter.install(self)
            for step, method in zip(recipe.steps, self.methods, strict=True):
                if isinstance(method, Rewriter):
                    blocks = adapter.blocks(step.site)
                    method.install(self.modules[step.at], blocks, self.installed)
            self.installed.seal(model)
        except BaseException:
            self.installed.remove()
            raise

    def reduce(self, number: int, ctx: Context, samples: tuple[int, ...]) -> Plan | None:
        """Run step `number` on `ctx`. None: every token stays and nothing needs to be touched."""
        step = self.recipe.steps[number]
        if not ctx.counts or ctx.x.shape[1] == 0:
            raise InvalidInput(f"{step.at}: no visual tokens to reduce (empty batch?).")
        told = self.tokens(number, ctx.counts, ctx.original)
        k, auto = ctx.counts if told is None else told, told is None
        if torch.compiler.is_compiling():
            if auto:
                raise UnsupportedModel(
                    f"{step.at}: under torch.compile the number of tokens must be fixed, but "
                    f"{step.method!r} has keep='auto'. Give a share or a number."
                )
            return None if k == ctx.counts else self._plan(number, ctx, k)
        started = time.perf_counter()
        plan = None
        if auto or k != ctx.counts:
            before = self.recipe.steps[number - 1].site.kind if number else None
            if before != ctx.site.kind:
                _check_finite(step.at, ctx.x)
            plan = self._plan(number, ctx, k)
            plan.check(ctx.visual)
            if not plan.changes(ctx.counts):
                plan = None
        self._record(step, ctx, samples, plan, time.perf_counter() - started)
        return plan

    def tokens(
        self, number: int, counts: tuple[int, ...], original: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """How many of `counts` step `number` keeps; None where that depends on the tokens."""
        step = self.recipe.steps[number]
        if step.keep == "auto":
            return self.methods[number].left(counts)
        return tuple(step.budget.tokens(n, o) for n, o in zip(counts, original, strict=True))

    def rewrite(self, number: int, ctx: Context, samples: tuple[int, ...]) -> Rewrite:
        """Begin step `number`, of a `Rewriter`, on `ctx`; also where no token is saved."""
        step, method = self.recipe.steps[number], self.methods[number]
        if torch.compiler.is_compiling():
            return method.start(self.modules[step.at], ctx)
        started = time.perf_counter()
        _check_finite(step.at, ctx.x)
        rewrite: Rewrite = method.start(self.modules[step.at], ctx)
        rewrite.plan.check(ctx.visual)
        self._record(step, ctx, samples, rewrite.plan, time.perf_counter() - started)
        return rewrite

    def denoise(self, number: int, moment: Moment) -> Passage:
        """Begin step `number`, of a `Denoiser`, on one forward of a diffusion transformer."""
        return self.methods[number].start(self.modules.get(self.recipe.steps[number].at), moment)

    def decide(self, number: int, ctx: Context, samples: tuple[int, ...]) -> Decision:
        """Run step `number`, of a `Selector`, on `ctx`; also where every token stays."""
        step, method = self.recipe.steps[number], self.methods[number]
        if torch.compiler.is_compiling():
            raise UnsupportedModel(
                f"{step.at}: {step.method!r} keeps different numbers of tokens in every frame, "
                f"which torch.compile cannot trace. Run the model uncompiled."
            )
        started = time.perf_counter()
        _check_finite(step.at, ctx.x)
        k = self.tokens(number, ctx.counts, ctx.original) or ctx.counts
        decision: Decision = method.decide(self.modules[step.at], ctx, k)
        decision.plan.check(ctx.visual)
        seconds = time.perf_counter() - started
        acted = any(grid is not None and grid.frames > 1 for grid in ctx.layout)
        self._record(step, ctx, samples, decision.plan, seconds, acted)
        if decision.loss is not None:
            with self._lock:
                self._losses.append(decision.loss)
        return decision

    def take_loss(self) -> Tensor | float:
        """Sum of what methods in training add to the loss, since it was last asked for."""
        with self._lock:
            losses, self._losses = self._losses, []
        return (
            sum(losses, start=torch.zeros((), dtype=torch.float32, device="cpu")) if losses else 0.0
        )

    def starts_with(self, scheduler: Any) -> None:
        """A run begins whenever this scheduler is given its timesteps."""

        def begin(original: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(original)
            def call(*args: Any, **kwargs: Any) -> Any:
                self.reset()
                return original(*args, **kwargs)

            return call

        self.installed.wrap(scheduler, "set_timesteps", begin)

    @contextmanager
    def stream(self, name: Hashable) -> Iterator[None]:
        """Calls of the model inside belong to the run of a sampler that `name` says, whatever
        thread they are made in. For pictures that are denoised in turns by a method that keeps
        something from step to step (`toca`, `duca`, `scheduled_cache`):

            for t in timesteps:
                for name, picture in pictures.items():
                    with session.stream(name):
                        picture.step(model(picture.latents, t), t)

        What is kept of a name is freed by `reset()` inside its `with`, or by the session's end.
        """
        before = self._stream.set(name)
        try:
            yield
        finally:
            self._stream.reset(before)

    @property
    def stream_name(self) -> Hashable | None:
        """What the innermost `stream` around this call says; None without one."""
        return self._stream.get()

    def reset(self) -> None:
        """Forget what methods keep from call to call: a new run of a sampler begins. Needed only
        where timesteps cannot tell, as with runs of a single step. Inside `stream` it is about the
        run of that name, else about the one without a name of this thread."""
        for forget in self.at_reset:
            forget()

    def _record(
        self,
        step: Step,
        ctx: Context,
        samples: tuple[int, ...],
        plan: Plan | None,
        seconds: float,
        acted: bool = True,
    ) -> None:
        out = ctx.counts if plan is None else plan.kept
        entry = Reduction(
            str(ctx.site),
            step.method,
            ctx.counts,
            out,
            seconds,
            plan,
            ctx.source,
            ctx.layout,
            samples,
            ctx.parts,
        )
        with self._lock:
            self.trace.append(entry)
            self._fired[step.at] += acted
            self._tokens[step.at][0] += sum(ctx.counts)
            self._tokens[step.at][1] += sum(out)
            self._seconds[step.at] += seconds

    def passed(self, number: int, tokens: float, left: float | None = None) -> None:
        """Step `number` had its turn at that many tokens; `left`: of which it passed so many on,
        all of them where there was nothing to decide."""
        at = self.recipe.steps[number].at
        with self._lock:
            before, after = self._tokens[at]
            self._fired[at] += 1
            self._tokens[at] = [before + tokens, after + (tokens if left is None else left)]

    def _plan(self, number: int, ctx: Context, k: tuple[int, ...]) -> Plan:
        step = self.recipe.steps[number]
        plan = self.methods[number].plan(ctx, k)
        if not plan.changes(ctx.counts):
            return plan  # nothing was dropped, so nothing can be taken in
        sized = "token_size" in ctx.signals
        size = ctx.signals["token_size"] if sized else None
        average = step.merge == "nearest"
        if average or (step.mass and plan.size is None):  # a method that merges has counted itself
            return ops.absorb(plan, ctx.x, ctx.visual, size, step.merge_threshold, average)
        if plan.size is None and size is not None:
            return replace(plan, size=size.gather(1, plan.index))
        return plan

    def count(
        self,
        prefill: bool,
        dense: float = 0.0,
        used: float = 0.0,
        visual: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        """Called by adapters once per forward.

        dense, used: FLOPs of the language model. visual: images, and visual tokens that enter and
        that leave its layers, each summed over images and averaged over layers.
        """
        with self._lock:
            self._visual = [a + b for a, b in zip(self._visual, visual, strict=True)]
            self._forwards += 1
            self._prefills += prefill
            self._flops[0] += dense
            self._flops[1] += used

    def stats(self) -> dict[str, Any]:
        """Totals since attach, as plain data."""
        with self._lock:
            sites = [
                {
                    "site": step.at,
                    "method": step.method,
                    "tokens_in": self._tokens[step.at][0],
                    "tokens_out": self._tokens[step.at][1],
                    "seconds": self._seconds[step.at],
                    "runs": self._fired[step.at],
                }
                for step in self.recipe.steps
            ]
            dense, used = self._flops
            images, enter, leave = self._visual
            return {
                "sites": sites,
                "prefills": self._prefills,
                "flops_dense": dense,
                "flops": used,
                "visual_tokens": enter / images if images else 0.0,
                "visual_tokens_leaving": leave / images if images else 0.0,
            }

    def report(self) -> str:
        """Tokens in and out per site, FLOPs of the language model's prefill, time of the method."""
        stats = self.stats()
        rows = [("site", "method", "tokens in", "out", "kept", "method ms")]
        for row in stats["sites"]:
            n_in, n_out = row["tokens_in"], row["tokens_out"]
            kept = f"{n_out / n_in:.1%}" if n_in else "-"
            numbers = (f"{n_in:.0f}", f"{n_out:.0f}", kept, f"{1e3 * row['seconds']:.2f}")
            rows.append((row["site"], row["method"], *numbers))
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{a:<{wide[0]}}  {b:<{wide[1]}}  "
            + "  ".join(f"{n:>{w}}" for n, w in zip(rest, wide[2:], strict=True))
            for a, b, *rest in rows
        ]
        noted = zip(self.recipe.steps, self.methods, strict=True)
        notes = ((s, m.note(self.modules[s.at])) for s, m in noted if isinstance(m, Trained))
        lines += [f"{step.method}: {note}" for step, note in notes if note]
        if stats["flops_dense"]:
            saved = 1 - stats["flops"] / stats["flops_dense"]
            change = f"{saved:.0%} saved" if saved >= 0 else f"{-saved:.0%} more"
            lines.append(
                f"{self.adapter.counts}: {stats['flops_dense'] / 1e9:.3g} -> "
                f"{stats['flops'] / 1e9:.3g} GFLOPs ({change}, "
                f"without the methods' own work) in {stats['prefills']} run(s)"
            )
            inside, leaving = stats["visual_tokens"], stats["visual_tokens_leaving"]
            more = f"; {leaving:.1f} counted as they leave a layer, the budget that papers report"
            lines.append(
                f"visual tokens per image or video, mean over its layers: {inside:.1f} processed"
                f"{'' if leaving == inside else more}"
            )
        return "\n".join(lines)

    def detach(self) -> None:
        """Remove every hook. Raises `NothingReduced` when the model ran but a step never did."""
        self._remove()
        idle = [at for at, runs in self._fired.items() if not runs]
        if self._strict and self._forwards and idle:
            chosen = {s.at: m for s, m in zip(self.recipe.steps, self.methods, strict=True)}
            if isinstance(chosen[idle[0]], Selector):
                raise NothingReduced(
                    f"the model ran {self._forwards} forward(s), but no video was seen at "
                    f"{idle[0]}, and images are not touched there. A model that is given frames as "
                    f"images needs frames_per_video; attach(..., strict=False) allows images alone."
                )
            raise NothingReduced(
                f"the model ran {self._forwards} forward(s), but nothing was reduced at "
                f"{', '.join(idle)}: no visual tokens were seen there. Were images passed to the "
                f"model? Use attach(..., strict=False) for text-only runs."
            )

    def _remove(self) -> None:
        self._losses = []
        self.installed.remove()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedModel(
            "a vtc session lives on one model in one process and cannot be copied or pickled: "
            "give its recipe on (session.recipe), and attach it there."
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.detach()
        else:
            self._remove()


def _check_finite(at: str, x: Tensor) -> None:
    wide = torch.float32 if x.dtype == torch.float16 else None
    if not bool(torch.isfinite(x.sum(dtype=wide))):  # one pass, nothing stored
        raise InvalidInput(f"{at}: the visual tokens contain NaN or infinities; check the images.")


def attach(
    model: Any,
    method: str | Recipe | Step | Mapping[str, Any] | Path,
    *,
    keep: Keep | None = None,
    at: str | Sequence[str] | None = None,
    schedule: Mapping[int, float | int] | None = None,
    merge: Literal["none", "nearest"] = "none",
    mass: float | None = None,
    seed: int | None = None,
    strict: bool = True,
    **params: Any,
) -> Session:
    """Make `model` process fewer visual tokens, without editing it.

    Args:
        model: any supported model (`vtc.describe(model)` tells what it offers), or a pipeline of
            diffusers with a transformer.
        method: name of a registered method (`vtc list`), or a whole recipe (object, mapping,
            path of a YAML file) instead of the arguments below.
        keep: share (float) or number (int) of visual tokens that stay, per image; "auto" for
            methods that decide by thresholds of their own.
        at: site, or several; default: where the method's paper puts it.
        schedule: {decoder layer: keep} instead of keep and at.
        merge: "nearest" averages each dropped token into its most similar kept token.
        mass: 0 to 1, strength of log(tokens stood for) on the attention logits of kept tokens; 0
            unless the method has one of its own (ToMe).
        seed: for methods that draw, 0 by default. The global random state is never touched.
        strict: raise at the end of the session if the model ran but a step never acted.
        params: merge_threshold, positions, scope, and until and noise in diffusion transformers
            (see `vtc.Step`), and the method's own hyper-parameters.

    Example:
        with vtc.attach(model, "divprune", keep=0.25) as session:
            out = model.generate(**inputs)
        print(session.report())
    """
    pipeline, model = model, module_of(model)
    versions.check(model)
    adapter = adapter_for(model)
    if isinstance(method, str) and method in REDUCERS:
        recipe = Recipe.build(
            method,
            adapter.depth,
            keep,
            at,
            schedule,
            seed or 0,
            adapter.host(),
            merge=merge,
            **({} if mass is None else {"mass": mass}),
            **params,
        )
    elif isinstance(method, str) and not method.endswith((".yaml", ".yml")):
        raise REDUCERS.unknown(method)
    else:
        changed = keep is not None or at is not None or schedule is not None
        if changed or merge != "none" or mass is not None or params or seed is not None:
            raise InvalidRecipe("a recipe already says keep, at, merge, mass, seed: give it alone.")
        if isinstance(method, Step):
            recipe = Recipe((method,))
        else:
            recipe = method if isinstance(method, Recipe) else Recipe.load(method)
    check(adapter, recipe)
    session = Session(model, adapter, recipe, strict)
    scheduler = getattr(pipeline, "scheduler", None)
    try:
        if pipeline is not model and hasattr(scheduler, "set_timesteps"):
            session.starts_with(scheduler)
    except BaseException:
        session._remove()
        raise
    return session


def detach(model: Any) -> bool:
    """End every session on this model (or pipeline) without its handle, as after a notebook's cell
    was run twice. Unlike `Session.detach` it does not ask whether every step acted.

    Returns: whether there was one.
    """
    sessions = sessions_on(module_of(model).modules())
    for session in sessions:
        session._remove()
    return bool(sessions)


def module_of(model: Any) -> nn.Module:
    """The model, that of a pipeline of transformers, or the denoiser of one of diffusers."""
    if isinstance(model, nn.Module):
        return model
    whole = getattr(model, "model", None)
    if isinstance(whole, nn.Module) and hasattr(model, "task"):  # a pipeline of transformers
        return whole
    inner, second = getattr(model, "transformer", None), getattr(model, "transformer_2", None)
    if not isinstance(inner, nn.Module):
        raise UnsupportedModel(
            f"{type(model).__name__} is no torch module, no pipeline of transformers with a "
            f"`model`, and no diffusion pipeline with a `transformer`: give the module itself."
        )
    if second is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} has two denoisers: attach to .transformer and to "
            f".transformer_2, one session each."
        )
    return inner


def adapters_for(model: nn.Module) -> dict[str, str | None]:
    """Adapter name -> None when it fits this model, else what it did not find."""
    return {name: ADAPTERS[name].matches(model) for name in ADAPTERS}


def adapter_for(model: nn.Module) -> Adapter:
    """The one adapter that fits; none or two is an error that says why."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise UnsupportedModel(
            f"{type(model).__name__} is compiled: attach to the module that was compiled, before "
            f"or after torch.compile."
        )
    found = adapters_for(model)
    fits = [name for name, reason in found.items() if reason is None]
    if len(fits) != 1:
        looked = "; ".join(f"{name}: {reason or 'fits'}" for name, reason in found.items())
        what = "no adapter fits" if not fits else "several adapters fit"
        raise UnsupportedModel(
            f"{what} {type(model).__module__}.{type(model).__name__}.{_part_that_fits(model)} "
            f"Looked for: {looked}"
        )
    _refuse_shards(model)
    return ADAPTERS[fits[0]](model)


def _part_that_fits(model: nn.Module) -> str:
    """What to attach to instead of a wrapper of somebody else."""
    if type(model).__module__.partition(".")[0] in versions.LIBRARIES.keys() - {"torch"}:
        return ""
    for path, part in model.named_modules():
        if 0 < len(path.split(".")) <= 3 and None in adapters_for(part).values():
            return f" It holds a {type(part).__name__} that one fits: attach to its part {path!r}."
    return ""


def _refuse_shards(model: nn.Module) -> None:
    """Weights of which this process has a part: hooks would see parts of tokens, or of heads."""
    for path, parameter in model.named_parameters():
        if type(parameter).__name__ in ("DTensor", "FlatParameter"):
            raise UnsupportedModel(
                f"{path} is sharded over processes (tp_plan or FSDP), which a session does not "
                f"know: use DistributedDataParallel, device_map on one process, or attach to the "
                f"model as it was before."
            )


def ranges(sites: Iterable[str]) -> str:
    """`vision.0 to vision.11, projector`."""
    runs: dict[tuple[str, str], list[str]] = {}
    for site in map(Site.parse, sites):
        runs.setdefault((site.kind, site.part), []).append(str(site))
    return ", ".join(s[0] if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in runs.values())


def _say_where(cls: Any, sites: Iterable[str]) -> str:
    """A place for a method that was attached without one."""
    fits = [site for site in sites if Site.parse(site).kind in cls.sites]
    there = next((site for site in fits if site.endswith(".1")), next(iter(fits), None))
    return "" if there is None else f" Say where, for instance at={there!r}."


def check(adapter: Adapter, recipe: Recipe) -> None:
    """Everything that can be refused before the model is touched."""
    offered, refused = adapter.sites(), adapter.refusals()
    taken = [step.site.kind for step in recipe.steps]
    for step in recipe.steps:
        cls = REDUCERS[step.method]
        if issubclass(cls, Rewriter) and taken.count(step.site.kind) > 1:
            raise InvalidRecipe(
                f"{step.method!r} at {step.at!r} writes the tokens of all blocks behind it: no "
                f"other step can act at {step.site.kind}.<i>."
            )
        if issubclass(cls, Rewriter | Denoiser) and step.site.part:
            before = replace(step.site, part="")
            raise UnsupportedSite(
                f"{step.method!r} acts before a block, not inside one as {step.at!r} is: use "
                f"at={str(before)!r}."
            )
        if issubclass(cls, Denoiser) and (len(recipe.steps) > 1 or step.at != cls.default_at):
            raise InvalidRecipe(
                f"{step.method!r} acts in all blocks: it stands alone in a recipe, at "
                f"{cls.default_at!r}."
            )
        kinds = ", ".join(sorted(cls.sites))
        if step.site.kind not in cls.sites:
            raise UnsupportedSite(f"{step.method!r} works at {kinds}, not at {step.at!r}.")
        if step.at not in offered:
            kind, part = step.site.kind, step.site.part
            same = [s for s in map(Site.parse, offered) if (s.kind, s.part) == (kind, part)]
            inside = refused.get(f"{kind}.<i>.{part}") if part else None
            why = refused.get(step.at) or inside or refused.get(step.site.kind)
            if same:
                more = f" ({why})" if why else ""
                why = (
                    f"it has {same[0]} to {same[-1]}{more}. A recipe written for another depth? "
                    f"Methods attached by name scale their layers"
                )
            raise UnsupportedSite(
                f"this {adapter.name} model has no site {step.at!r}: {why or 'unknown'}. "
                f"It has: {ranges(offered)}.{'' if same else _say_where(cls, offered)}"
            )
        missing = cls.needs - offered[step.at]
        if missing:
            detail = "; ".join(f"{m} ({refused.get(m) or SIGNALS[m]})" for m in sorted(missing))
            raise MissingSignal(
                f"{step.method!r} at {step.at!r} needs {detail}, which this model does not offer "
                f"there. Offered: {', '.join(sorted(offered[step.at])) or 'none'}."
            )
        step.build()
    adapter.check(recipe)
