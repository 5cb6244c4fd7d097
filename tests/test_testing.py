"""`vtc.testing` lets good methods pass and catches bad ones, saying what is wrong with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from vtc import testing
from vtc.errors import MissingSignal, UnknownName
from vtc.plan import Plan
from vtc.reducer import Scorer, top_k

K = tuple[int, ...]


class Good(Scorer):
    """Keeps the tokens that are least like the mean token of their image."""

    paper: ClassVar[str] = "baseline"
    sites: ClassVar[frozenset[str]] = frozenset({"projector"})

    def score(self, ctx: vtc.Context) -> Tensor:
        x = ctx.x.float()
        there = ctx.visual[..., None]
        mean = (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        return -torch.cosine_similarity(x, mean, dim=-1)


class TooFew(Good):
    def plan(self, ctx: vtc.Context, k: K) -> Plan:
        return super().plan(ctx, tuple(max(1, n - 1) for n in k))


class IgnoresKeep(Good):
    def plan(self, ctx: vtc.Context, k: K) -> Plan:
        return super().plan(ctx, tuple(n // 2 for n in ctx.counts))


class MixesRows(Good):
    def score(self, ctx: vtc.Context) -> Tensor:
        return (ctx.x.float() - ctx.x.float().mean((0, 1))).norm(dim=-1)


class GlobalRandom(Good):
    def score(self, ctx: vtc.Context) -> Tensor:
        return torch.rand(ctx.x.shape[:2])


class Sticky(Good):
    seen: ClassVar[dict[str, Tensor]] = {}

    def score(self, ctx: vtc.Context) -> Tensor:
        return self.seen.setdefault(f"{ctx.site} {tuple(ctx.x.shape)}", super().score(ctx))


class Counting(Good):
    calls: ClassVar[list[int]] = []

    def score(self, ctx: vtc.Context) -> Tensor:
        self.calls.append(1)
        return super().score(ctx) * (-1) ** len(self.calls)


class Unsorted(Good):
    def plan(self, ctx: vtc.Context, k: K) -> Plan:
        plan = super().plan(ctx, k)
        return replace(plan, index=plan.index.flip(1))


class Twice(Good):
    def plan(self, ctx: vtc.Context, k: K) -> Plan:
        plan = super().plan(ctx, k)
        return replace(plan, index=torch.cat([plan.index[:, :1], plan.index[:, :-1]], 1))


class InPlace(Good):
    def score(self, ctx: vtc.Context) -> Tensor:
        ctx.x.div_(ctx.x.norm(dim=-1, keepdim=True))
        return super().score(ctx)


class ReadsPadding(Good):
    def score(self, ctx: vtc.Context) -> Tensor:
        x = ctx.x.float()
        return -torch.cosine_similarity(x, x.mean(1, keepdim=True), dim=-1)


class KeepsPadding(Good):
    def plan(self, ctx: vtc.Context, k: K) -> Plan:
        return top_k(ctx.x.float().norm(dim=-1), torch.ones_like(ctx.visual), k)


class NoPlan(Good):
    def plan(self, ctx: vtc.Context, k: K) -> Any:
        return super().plan(ctx, k).index


class Uncited(Good):
    paper = "Good tokens, 2024"


#: a bad method -> the check that has to notice, and what it says to the author
MUTANTS: dict[type[Good], tuple[str, str]] = {
    TooFew: ("plans_are_valid", r"keeps \(15, 15, 15\) tokens a row, the budget is k=\(16, 16, 16"),
    IgnoresKeep: ("plans_are_valid", r"keeps \(32, 32, 32\) tokens a row, the budget is k=\(16"),
    MixesRows: ("plan_of_a_row_ignores_other_rows", "keeps other tokens of row 0 when it is alone"),
    GlobalRandom: ("plan_reads_only", r"global random state: draw with vtc\.ops\.hash_uniform"),
    Sticky: ("plan_of_a_row_ignores_other_rows", "come in another order.*keep no state between"),
    Counting: ("plan_repeats", "another answer for the same context the second time: keep no"),
    Unsorted: ("plans_are_valid", r"must ascend; Plan\.from_mask does that"),
    Twice: ("plans_are_valid", "a token is there twice"),
    InPlace: ("plan_reads_only", r"writes into ctx\.x in place: work on a copy"),
    ReadsPadding: ("plan_ignores_padding", r"depends on padding: where ctx\.visual is False"),
    KeepsPadding: ("plan_ignores_padding", "depends on padding"),
    NoPlan: ("plans_are_valid", r"plan returned Tensor, not a vtc\.Plan"),
    Uncited: ("class_is_declared", "give title, year and an address"),
}


@pytest.fixture
def register() -> Iterator[Any]:
    """Registers a class as a frozen dataclass under its name, until the end of the test."""
    names: list[str] = []

    def add(cls: type) -> str:
        names.append(f"test_testing_{cls.__name__.lower()}")
        own = {"__doc__": cls.__doc__ or "Keeps some tokens.", "__module__": cls.__module__}
        vtc.register(names[-1])(dataclass(frozen=True)(type(cls.__name__, (cls,), own)))
        return names[-1]

    yield add
    for name in names:
        del vtc.REDUCERS._items[name]


def test_a_good_method_passes_all(register: Any) -> None:
    name = register(Good)
    found = testing.cases(name, quick=True)
    assert testing.check_method(name, quick=True) == len(found) > 20
    assert len({str(case) for case in found}) == len(found)
    assert testing.refusals(name, quick=True) == {}
    wide = testing.cases(name, models=["llava", "qwen3_vl"])
    assert {case.cell.family for case in wide} == {"llava", "qwen3_vl"}
    assert len(wide) > 2 * len(found)  # with merging too


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda cls: cls.__name__)
def test_a_bad_method_is_caught_and_told_why(mutant: type[Good], register: Any) -> None:
    check, words = MUTANTS[mutant]
    found = testing.cases(register(mutant), quick=True)
    case = next(case for case in found if case.name == check)
    with pytest.raises(testing.ContractBroken, match=f"(?s){words}") as caught:
        case.check()
    assert str(caught.value).startswith(f"{case.cell.method!r} on llava at projector, {check}: ")


@pytest.mark.parametrize(
    ("mutant", "check", "words"),
    [
        (TooFew, "budget_is_exact", r"means \[16, 16, 16\] tokens.* but \[15, 15, 15\] were kept"),
        (MixesRows, "sample_alone_equals_sample_in_batch", "other tokens in a padded batch"),
        (GlobalRandom, "same_seed_same_plan_and_global_generators_untouched", "random state moved"),
    ],
)
def test_runs_of_whole_models_catch_them_too(
    mutant: type[Good], check: str, words: str, register: Any
) -> None:
    found = testing.cases(register(mutant), quick=True)
    with pytest.raises(testing.ContractBroken, match=words):
        next(case for case in found if case.name == check).check()


def test_all_failures_are_told_together(register: Any) -> None:
    with pytest.raises(testing.ContractBroken) as caught:
        testing.check_method(register(Unsorted), quick=True)
    text = str(caught.value)
    assert " cases fail:\n  plans_are_valid-test_testing_unsorted-llava-default: " in text
    assert "budget_is_exact" in text and "class_is_declared" not in text


class Needy(Good):
    """Keeps what the CLS token looks at; mistral3 cannot tell."""

    sites: ClassVar[frozenset[str]] = frozenset({"projector", "decoder"})
    needs: ClassVar[frozenset[str]] = frozenset({"attn_cls"})

    def score(self, ctx: vtc.Context) -> Tensor:
        return ctx.signals["attn_cls"]


class Nowhere(Good):
    def plan(self, ctx: vtc.Context, k: K) -> Plan:
        raise MissingSignal("this method is never happy.")


def test_what_a_model_does_not_offer_is_left_out_and_said(register: Any) -> None:
    name = register(Needy)
    models = ("llava", "mistral3")
    assert {case.cell.family for case in testing.cases(name, models=models)} == {"llava"}
    told = testing.refusals(name, models=models)
    assert set(told) == {"mistral3 at projector", "mistral3 at decoder.1"}
    assert all("several images into one sequence" in why for why in told.values())
    with pytest.raises(vtc.VtcError, match=r"(?s)no model of vtc\.testing runs.*never happy"):
        testing.cases(register(Nowhere))


def test_wrong_questions() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'random'"):
        testing.cases("rando")
    with pytest.raises(UnknownName, match=r"unknown model of vtc\.testing 'lava'"):
        testing.cases("random", models=["lava"])
    with pytest.raises(vtc.VtcError, match="'toca' is a Denoiser, which acts inside blocks"):
        testing.cases("toca")


def test_methods_of_diffusion_transformers(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = testing.cases("tomesd", quick=True)  # it merges: masking says nothing about it
    names = {case.name for case in found}
    assert {case.cell.family for case in found} == {"dit"} and len(found) == 6
    assert "dropping_equals_masking" not in names and "bfloat16_and_gradients" in names

    class Drawing(GlobalRandom):
        sites = frozenset({"dit"})
        default_at = "dit.0"

    found = testing.cases(register(Drawing), models=["flux"])
    dropped = next(case for case in found if case.name == "dropping_equals_masking")
    dropped.check()
    with pytest.raises(testing.ContractBroken, match="on flux at dit.<i>.* gave another output"):
        next(case for case in found if case.name.startswith("budget_is_exact")).check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = testing.refusals("random", quick=True)
    assert told == {"diffusion transformers at dit.<i>": "diffusers is not installed."}
