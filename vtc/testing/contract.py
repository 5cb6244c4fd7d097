"""The contract suite: all checks that apply to a method, on tiny models, as cases to run."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..budget import Keep
from ..errors import MissingSignal, UnsupportedModel, UnsupportedSite, VtcError, unknown
from ..reducer import Denoiser, Selector
from ..registry import REDUCERS
from . import checks, declared, families, plans
from .cells import FEW, FRAMED, SHARE, Cell, places
from .errors import ContractBroken
from .runs import family

if TYPE_CHECKING:
    from .diffusion import DitCell

REFUSALS = (UnsupportedModel, UnsupportedSite, MissingSignal)


@dataclass(frozen=True)
class Case:
    """One check of one method on one model: `check()` raises `ContractBroken` or returns."""

    name: str
    cell: Cell | DitCell
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
    cells, diffusing, _ = _sorted_out(method, quick, models, keep, params)
    first = [*cells, *diffusing][0]
    found = [Case("class_is_declared", first, functools.partial(declared.class_is_declared, first))]
    for cell in cells:
        found += [
            Case(name, cell, functools.partial(run, cell)) for name, run in _checks(cell, quick)
        ]
    for cell in diffusing:
        found += [
            Case(run.__name__, cell, functools.partial(run, cell)) for run in _dit_checks(cell)
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
    return _sorted_out(method, quick, models, keep, params)[-1]


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
) -> tuple[list[Cell], list[DitCell], dict[str, str]]:
    """Cells that run, and why the others do not."""
    cls = REDUCERS[method]
    if issubclass(cls, Selector | Denoiser):
        kind = "Selector" if issubclass(cls, Selector) else "Denoiser"
        raise VtcError(
            f"{method!r} is a {kind}, which acts inside blocks: vtc.testing has contracts for "
            f"methods that plan before them."
        )
    dits, usual_dits = _diffusion() if "dit" in cls.sites else ((), ())
    for name in models or ():
        if name not in (*families.FAMILIES, *dits):
            raise unknown("model of vtc.testing", name, (*families.FAMILIES, *dits))
    usual = FRAMED if cls.frames else FEW
    names = (*usual[:1], *usual_dits[:1]) if quick else (*usual, *usual_dits)
    own: Keep = SHARE if "fixed" in cls.budgets else "auto"
    settings = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in params.items())
    tried: list[Cell | DitCell] = []
    for name in names if models is None else models:
        if name in dits:
            from .diffusion import DitCell

            tried.append(DitCell(method, name, settings))
        elif cls.sites != {"dit"}:
            keeps = own if keep is None else keep
            tried += [Cell(method, name, at, keeps, settings) for at in places(method)]
    refused = {f"{c.family} at {c.site}": why for c in tried if (why := _refused(c)) is not None}
    if "dit" in cls.sites and not dits:
        refused["diffusion transformers at dit.<i>"] = "diffusers is not installed."
    good = [cell for cell in tried if _refused(cell) is None]
    if not good:
        lines = "\n  ".join(f"{where}: {why}" for where, why in refused.items())
        raise VtcError(f"no model of vtc.testing runs {method!r}:\n  {lines}")
    cells = [cell for cell in good if isinstance(cell, Cell)]
    return cells, [cell for cell in good if not isinstance(cell, Cell)], refused


def _diffusion() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of all diffusion transformers and of the usual ones; none without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return (), ()
    from . import diffusion, dits

    return tuple(dits.FAMILIES), diffusion.FEW


@functools.cache
def _refused(cell: Cell | DitCell) -> str | None:
    """Why a model does not run the method, from what `attach` or a forward says."""
    try:
        _once(cell)
    except REFUSALS as error:
        return str(error)
    except Exception:  # a mistake of the method: its cases tell
        return None
    return None


def _once(cell: Cell | DitCell) -> None:
    """One forward."""
    if not isinstance(cell, Cell):
        cell.once()
        return
    fam = family(cell.family)
    with cell.attach(fam.model, strict=False), torch.no_grad():
        fam.model(**fam.inputs)


def _dit_checks(cell: DitCell) -> Iterator[Callable[[DitCell], None]]:
    """Checks that apply at `dit.<i>`."""
    from . import diffusion

    yield from diffusion.CHECKS
    try:
        merges = cell.once()
    except Exception:  # a mistake of the method: its cases tell
        return
    if not merges:
        yield diffusion.dropping_equals_masking


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
