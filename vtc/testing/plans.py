"""What `plan(ctx, k)` of a method promises, on contexts that real models made for it.

A plan is a pure function of what `ctx` says: these checks call it again with more padding, other
numbers there, rows alone or in another order, and other budgets."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..context import SIGNALS, Context, Signals
from ..plan import Plan
from .cells import Cell
from .checks import global_generators
from .errors import ContractBroken, require
from .runs import family

Row = tuple[list[int], list[int], Tensor]  # kept tokens, where each goes, with which weight


@dataclass(frozen=True)
class Seen:
    """What one step of a forward asked of its method."""

    method: Any
    ctx: Context
    k: tuple[int, ...]
    auto: bool

    @property
    def at(self) -> str:
        return f"at {self.ctx.site}"

    def plan(self, ctx: Context | None = None, k: tuple[int, ...] | None = None) -> Plan:
        with torch.no_grad():
            plan = self.method.plan(self.ctx if ctx is None else ctx, self.k if k is None else k)
        if isinstance(plan, Plan):
            return plan
        raise ContractBroken(f"plan returned {type(plan).__name__}, not a vtc.Plan.")


@functools.cache
def contexts(cell: Cell) -> tuple[Seen, ...]:
    """Every context of a prefill, with the signals that the method declares."""
    fam, seen = family(cell.family), []
    with cell.attach(fam.model) as session, torch.no_grad():

        def look(number: int, ctx: Context, k: tuple[int, ...]) -> Plan:
            step, method = session.recipe.steps[number], session.methods[number]
            names = [name for name in (*method.needs, "token_size") if name in ctx.signals]
            auto = step.keep == "auto" and method.left(ctx.counts) is None
            seen.append(Seen(method, _copied(ctx, names), k, auto))
            first = torch.arange(ctx.x.shape[1], device=ctx.x.device)[None]
            few = tuple(max(1, n // 2) for n in k) if auto else k
            budget = torch.tensor(few, device=ctx.x.device)[:, None]
            return Plan.from_mask(ctx.visual & (first < budget), few)  # whatever the method says

        session._plan = look
        fam.model(**fam.inputs)
    require(bool(seen), "the method was never asked for a plan.")
    return tuple(seen)


def plans_are_valid(cell: Cell) -> None:
    """Form, and exactly k[r] tokens a row for several k."""
    for seen in contexts(cell):
        for k in _budgets(seen):
            _check_plan(seen, seen.plan(k=k), k)


def plan_reads_only(cell: Cell) -> None:
    """`ctx` and the global random state stay what they were."""
    for seen in contexts(cell):
        ctx = _copied(seen.ctx, list(seen.ctx.signals))
        before = global_generators()
        seen.plan(ctx)
        require(
            global_generators() == before,
            f"plan {seen.at} draws from the global random state: draw with "
            f"vtc.ops.hash_uniform(ctx.source, ctx.seed).",
        )
        for name, old, new in _tensors(seen.ctx, ctx):
            says = f"plan {seen.at} writes into {name} in place: work on a copy."
            require(torch.equal(old, new), says)


def plan_repeats(cell: Cell) -> None:
    """Also after a call on something else, and by a new object of the same parameters."""
    for seen in contexts(cell):
        first = seen.plan()
        says = (
            f"plan {seen.at} gives another answer for the same context the second time: keep no "
            f"state between calls and draw by ctx.seed."
        )
        _alike(seen.plan(), first, says)
        seen.plan(replace(seen.ctx, x=seen.ctx.x.flip(1).neg()))
        _alike(seen.plan(), first, says)
        fresh = replace(seen, method=replace(seen.method))
        says = f"plan {seen.at} of a new object with the same parameters differs."
        _alike(fresh.plan(), first, says)


def plan_ignores_padding(cell: Cell) -> None:
    """More columns where `ctx.visual` is False, and other numbers in those that are there."""
    for seen in contexts(cell):
        ctx, n = _padded(seen.ctx, 3), seen.ctx.x.shape[1]
        plan, expected = seen.plan(ctx), seen.plan()
        says = (
            f"plan {seen.at} depends on padding: where ctx.visual is False the numbers mean "
            f"nothing, so mask them before any mean, maximum or ranking over a row."
        )
        require(int(plan.index.max()) < n, says)
        cut = {
            name: None if (old := getattr(plan, name)) is None else old[:, :n]
            for name in ("assign", "weight")
        }
        _alike(replace(plan, n=n, **cut), expected, says)


def plan_of_a_row_ignores_other_rows(cell: Cell) -> None:
    """A row alone, and all rows in reverse order."""
    for seen in contexts(cell):
        whole, rows = seen.plan(), len(seen.ctx.counts)
        back = list(range(rows))[::-1]
        turned = seen.plan(_rows(seen.ctx, back), tuple(seen.k[r] for r in back))
        for r in range(rows):
            n = seen.ctx.counts[r]
            alone = seen.plan(_rows(seen.ctx, [r], n), (seen.k[r],))
            says = (
                f"plan {seen.at} keeps other tokens of row {r} {{}}: every row is an image of its "
                f"own. Do not compute over the batch dimension, and keep no state between calls."
            )
            kept = _row(whole, r, n)
            require(_same(_row(alone, 0, n), kept), says.format("when it is alone"))
            other = _row(turned, back.index(r), n)
            require(_same(other, kept), says.format("when the rows come in another order"))


# --------------------------------------------------------------------------------------------


def _budgets(seen: Seen) -> Iterator[tuple[int, ...]]:
    """The budget of the run, one token, all but one, and different ones in every row."""
    counts = seen.ctx.counts
    yield seen.k
    if not seen.auto and "fixed" in seen.method.budgets:
        yield tuple(1 for _ in counts)
        yield tuple(max(1, n - 1) for n in counts)
        yield tuple(max(1, n // (2 + r)) for r, n in enumerate(counts))


def _check_plan(seen: Seen, plan: Plan, k: tuple[int, ...]) -> None:
    rows, n = seen.ctx.visual.shape
    says = f"plan {seen.at}: index has the type {plan.index.dtype}, expected torch.int64."
    require(plan.index.dtype == torch.int64, says)
    says = f"plan {seen.at} is {tuple(plan.index.shape)} of {plan.n} tokens, ctx.x has {(rows, n)}."
    require(plan.index.ndim == 2 and (plan.rows, plan.n) == (rows, n), says)
    if not seen.auto:
        require(
            plan.kept == k,
            f"plan {seen.at} keeps {plan.kept} tokens a row, the budget is k={k}: exactly k[r] "
            f"have to stay.",
        )
    for r in range(rows):
        kept = plan.index[r, : plan.kept[r]].tolist()
        says = f"plan {seen.at}, row {r} keeps {kept}: "
        require(len(set(kept)) == len(kept), says + "a token is there twice.")
        require(kept == sorted(kept), says + "they must ascend; Plan.from_mask does that.")
        require(kept[0] >= 0 and kept[-1] < n, says + f"they must be in [0, {n}).")
        require(bool(seen.ctx.visual[r, kept].all()), says + "ctx.visual is False at some.")
    for name in ("assign", "weight", "size"):
        given, wide = getattr(plan, name), plan.m if name == "size" else n
        says = f"plan {seen.at}: {name} must be {(rows, wide)}."
        require(given is None or tuple(given.shape) == (rows, wide), says)
    require(
        plan.weight is None or plan.assign is not None,
        f"plan {seen.at} has a weight but no assign: say where each token goes.",
    )


def _axes(name: str) -> list[str]:
    """Names of the axes of a signal, as its description gives them."""
    found = re.match(r"\[([^\]]*)\]", SIGNALS[name])
    return found[1].replace(" ", "").split(",") if found else []


def _copied(ctx: Context, names: list[str]) -> Context:
    """The same with tensors of its own and with these signals alone."""
    made = {name: _clone(ctx.signals[name]) for name in names}
    return replace(
        ctx,
        x=ctx.x.clone(),
        visual=ctx.visual.clone(),
        source=ctx.source.clone(),
        signals=_signals(made),
    )


def _clone(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def _signals(made: dict[str, Any]) -> Signals:
    return Signals({name: functools.partial(_given, value) for name, value in made.items()})


def _given(value: Any) -> Any:
    return value


def _tensors(a: Context, b: Context) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in ("x", "visual", "source"):
        yield f"ctx.{name}", getattr(a, name), getattr(b, name)
    for name in a.signals:
        if torch.is_tensor(a.signals[name]):
            yield f"ctx.signals[{name!r}]", a.signals[name], b.signals[name]


def _rows(ctx: Context, rows: list[int], n: int | None = None) -> Context:
    """Some rows of a context, of the first `n` tokens each."""
    signals = {}
    for name in ctx.signals:
        value: Any = ctx.signals[name]
        axes = _axes(name)
        if axes:
            value = value[rows]
            value = value.narrow(axes.index("N"), 0, n) if n and "N" in axes else value
        signals[name] = value
    return replace(
        ctx,
        x=ctx.x[rows, :n],
        visual=ctx.visual[rows, :n],
        source=ctx.source[rows, :n],
        counts=tuple(ctx.counts[r] for r in rows),
        original=tuple(ctx.original[r] for r in rows),
        layout=tuple(ctx.layout[r] for r in rows),
        history=tuple(tuple(layer[r] for r in rows) for layer in ctx.history),
        signals=_signals(signals),
    )


def _padded(ctx: Context, more: int) -> Context:
    """Longer rows; what stands on padding is large and different everywhere."""
    rows, n = ctx.visual.shape
    visual = torch.cat([ctx.visual, ctx.visual.new_zeros(rows, more)], 1)
    signals = {}
    for name in ctx.signals:
        value: Any = ctx.signals[name]
        if "N" in _axes(name):
            axis = _axes(name).index("N")
            value = _noisy(value.movedim(axis, 1), visual, more).movedim(1, axis)
        signals[name] = value
    source = torch.cat([ctx.source, ctx.source.new_zeros(rows, more)], 1)
    x = _noisy(ctx.x, visual, more)
    return replace(ctx, x=x, visual=visual, source=source, signals=_signals(signals))


def _noisy(value: Tensor, visual: Tensor, more: int) -> Tensor:
    """[R, N, ...] longer by `more`, with noise where `visual` [R, N + more] is False."""
    rows, _, *rest = value.shape
    longer = torch.cat([value, value.new_zeros(rows, more, *rest)], 1)
    if not value.is_floating_point():
        return longer
    dice = torch.Generator().manual_seed(0)
    noise = 10 * torch.randn(longer.shape, generator=dice).to(value)
    return torch.where(visual.view(*visual.shape, *[1] * len(rest)), longer, noise)


def _row(plan: Plan, r: int, n: int) -> Row:
    """Kept tokens of a row, where its n tokens go, and with which weight."""
    goes_to = plan.destination()[r, :n]
    weight = torch.ones(n) if plan.weight is None else plan.weight[r, :n].float()
    return plan.index[r, : plan.kept[r]].tolist(), goes_to.tolist(), weight * (goes_to >= 0)


def _same(a: Row, b: Row) -> bool:
    return a[:2] == b[:2] and torch.allclose(a[2], b[2], rtol=0, atol=1e-5)


def _alike(plan: Plan, expected: Plan, says: str) -> None:
    rows = plan.rows == expected.rows
    n = expected.n
    require(
        rows and all(_same(_row(plan, r, n), _row(expected, r, n)) for r in range(plan.rows)), says
    )
