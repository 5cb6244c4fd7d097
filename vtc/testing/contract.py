"""The contract suite: all checks that apply to a method, on tiny models, as cases to run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..budget import Keep
from ..errors import MissingSignal, UnsupportedModel, UnsupportedSite, VtcError, unknown
from ..reducer import Denoiser, Selector
from ..registry import REDUCERS
from . import checks, declared, families, plans
from .cells import FEW, FRAMED, SHARE, Cell, places
from .errors import ContractBroken
from .runs import family

REFUSALS = (UnsupportedModel, UnsupportedSite, MissingSignal)


@dataclass(frozen=True)
class Case:
    """One check of one method on one model: `check()` raises `ContractBroken` or returns."""

    name: str
    cell: Cell
    run: Callable[[], None] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name}-{self.cell}"

    def check(self) -> None:
        try:
            self.run()
        except ContractBroken as error:
            where = f"{self.cell.method!r} on {self.cell.family} at {self.cell.site}"
            raise ContractBroken(f"{where}, {self.name}: {error}") from error


def cases(
    method: str,
    *,
    quick: bool = False,
    models: Sequence[str] | None = None,
    keep: Keep | None = None,
    **params: Any,
) -> list[Case]:
    """The contracts of a registered method, one small case each.

    Args:
        method: registered name.
        quick: one model, and no check that only repeats another one with merging.
        models: names of `testing.FAMILIES` to try it on; by default three or four that differ.
        keep: share of tokens to keep in most cases, 0.25 by default, or "auto".
        params: hyper-parameters to test it with.

    What a model or a site does not offer is left out: `refusals` says what, and why.
    """
    cells, _ = _sorted_out(method, quick, models, keep, params)
    found = [
        Case("class_is_declared", cells[0], functools.partial(declared.class_is_declared, cells[0]))
    ]
    for cell in cells:
        found += [
            Case(name, cell, functools.partial(run, cell)) for name, run in _checks(cell, quick)
        ]
    return found


def refusals(
    method: str,
    *,
    quick: bool = False,
    models: Sequence[str] | None = None,
    keep: Keep | None = None,
    **params: Any,
) -> dict[str, str]:
    """What `cases` of the same arguments leaves out: "model at site" -> why."""
    return _sorted_out(method, quick, models, keep, params)[1]


def check_method(
    method: str,
    *,
    quick: bool = False,
    models: Sequence[str] | None = None,
    keep: Keep | None = None,
    **params: Any,
) -> int:
    """Run all `cases` and return how many there were; raise with all that fail, if any do."""
    found = cases(method, quick=quick, models=models, keep=keep, **params)
    failed = []
    for case in found:
        try:
            case.check()
        except Exception as error:  # whatever a method may raise
            failed.append(f"{case}: {type(error).__name__}: {error}")
    if failed:
        lines = "\n  ".join(failed)
        raise ContractBroken(f"{len(failed)} of {len(found)} cases fail:\n  {lines}")
    return len(found)


def _sorted_out(
    method: str,
    quick: bool,
    models: Sequence[str] | None,
    keep: Keep | None,
    params: dict[str, Any],
) -> tuple[list[Cell], dict[str, str]]:
    """Cells that run, and why the others do not."""
    cls = REDUCERS[method]
    if issubclass(cls, Selector | Denoiser) or cls.sites == {"dit"}:
        raise VtcError(
            f"{method!r} works inside the blocks of a video tower or of a diffusion transformer: "
            f"vtc.testing has contracts for methods at projector, decoder, vision and cache."
        )
    for name in models or ():
        if name not in families.FAMILIES:
            raise unknown("model of vtc.testing", name, families.FAMILIES)
    usual = FRAMED if cls.frames else FEW
    names = tuple(models) if models is not None else usual[:1] if quick else usual
    own: Keep = SHARE if "fixed" in cls.budgets else "auto"
    settings = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in params.items())
    cells, refused = [], {}
    for name in names:
        for at in places(method):
            cell = Cell(method, name, at, own if keep is None else keep, settings)
            why = _refused(cell)
            if why is None:
                cells.append(cell)
            else:
                refused[f"{name} at {cell.site}"] = why
    if not cells:
        lines = "\n  ".join(f"{where}: {why}" for where, why in refused.items())
        raise VtcError(f"no model of vtc.testing runs {method!r}:\n  {lines}")
    if "dit" in cls.sites:
        refused["diffusion transformers at dit.<i>"] = "vtc.testing has no contracts there"
    return cells, refused


@functools.cache
def _refused(cell: Cell) -> str | None:
    """Why a model does not run the method, from what `attach` or a forward says."""
    fam = family(cell.family)
    try:
        with cell.attach(fam.model, strict=False), torch.no_grad():
            fam.model(**fam.inputs)
    except REFUSALS as error:
        return str(error)
    except Exception:  # a mistake of the method: its cases tell
        return None
    return None


def _checks(cell: Cell, quick: bool) -> Iterator[tuple[str, Callable[[Cell], None]]]:
    """Names and checks that apply to a cell; the cheap and telling ones first."""
    yield "wrong_requests_are_refused", declared.wrong_requests_are_refused
    if not cell.writes:
        for check in (
            plans.plans_are_valid,
            plans.plan_reads_only,
            plans.plan_repeats,
            plans.plan_ignores_padding,
            plans.plan_of_a_row_ignores_other_rows,
        ):
            yield check.__name__, check
    yield "budget_is_exact", checks.budget_is_exact
    if not (cell.auto or cell.composite) and (cell.at or len(places(cell.method)) == 1):
        yield "number_of_tokens_is_exact", checks.number_of_tokens_is_exact
    if not cell.writes:
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            check = functools.partial(checks.keeping_everything_changes_no_bit, dtype=dtype)
            yield f"keeping_everything_changes_no_bit_{name}", check
    for check in (
        checks.text_is_never_touched,
        checks.sample_alone_equals_sample_in_batch,
        checks.same_seed_same_plan_and_global_generators_untouched,
        checks.detaching_restores_the_model,
        checks.sessions_survive_an_exception_inside_forward,
        checks.two_threads_equal_two_sequential_runs,
        checks.recipe_goes_through_yaml_and_back,
        checks.recipe_acts_like_the_arguments,
    ):
        yield check.__name__, check
    for merged in (False, True) if cell.merges and not quick else (False,):
        word = "_merged" if merged else ""
        for check in (checks.eager_equals_sdpa, checks.bfloat16_runs):
            yield f"{check.__name__}{word}", functools.partial(check, merged=merged)
        if not cell.writes:
            check = checks.loss_and_gradients_equal_those_of_masking
            yield f"{check.__name__}{word}", functools.partial(check, merged=merged)
            for attn in ("sdpa", "eager"):
                check = checks.dropping_equals_masking
                run = functools.partial(check, attn=attn, merged=merged)
                yield f"{check.__name__}_{attn}{word}", run
