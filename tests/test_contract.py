"""What every registered method promises on every model family; a method joins by registration.

The numbers in the headings are those of the design: 1 identity, 2 budget, 3 text, 4 dropping equals
masking, 5 batches, 6 attention backends, 7 determinism, 8 bfloat16, 9 detaching, 10 threads,
12 gradients, 13 recipes.  The checks are those of `vtc.testing`.  Each (method, family, site)
either keeps all of them or is refused with the error that `refusal` says; methods that compare
frames are tried on the families that differ in where frames are.  Methods that write new tokens
have nothing that could be masked or kept whole (1, 4 and 12): `test_lookupvit_method` compares them
with a tower that runs on resized tokens, `test_langdc` with a language model that is handed the
same embeddings.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import InvalidInput, MissingSignal, UnsupportedModel, UnsupportedSite
from vtc.reducer import Selector
from vtc.testing import checks, declared, families, plans
from vtc.testing.cells import FEW, FRAMED, Cell, host, places
from vtc.testing.runs import (
    choices,
    family,
    generate,
    reduce,
    reduced,
    same,
    state_of,
)

#: families where scores of the vision tower cannot be told to the visual tokens, and why
NO_TOWER_SCORES = {"mistral3": "several images into one sequence"}
#: families that do not know the grid of an image at the projector
NO_GRID = ("llava_next", "llava_onevision", "mistral3", "molmo2")
#: families whose video tokens are pooled: no projector input belongs to one of them
POOLED = ("llava_onevision", "molmo2")
#: methods that decide themselves how many tokens stay, with parameters that make them act
AUTO: dict[str, dict[str, Any]] = {
    "mustdrop_merge": {"threshold": 0.0},
    "lookupvit": {"grid": (2, 3)},
    "langdc": {"base": (1, 2), "pool": (2, 2), "clip_frames": 2, "max_len": 3},
}
#: parameters of the others without which a budget does not hold everywhere
PARAMS: dict[str, dict[str, Any]] = {
    "dycoke_cache": {"first": 0},
    "dycoke": {"first": 0},
    "mustdrop_cache": {"first": 1},
}
#: methods that act on what another one did
BEHIND = {"mustdrop_cache": ("random", "decoder.2")}


def cell(method: str, family: str, at: str | None) -> Cell:
    """A method with what it needs to act."""
    params = (AUTO | PARAMS).get(method, {})
    keep: Any = "auto" if method in AUTO else 0.25
    return Cell(method, family, at, keep, tuple(params.items()), BEHIND.get(method))


TOWER = {"attn_cls", "vision_keys", "cls_rank", "tile", "features"}


def refusal(case: Cell) -> tuple[str, type[Exception], str] | None:
    """When a combination is refused ("attach" or "run"), with which error and words."""
    inside = "vision" in case.cls.sites
    if case.composite and inside and case.family == "mistral3":
        return "attach", UnsupportedSite, "no site 'vision.1'|no vision blocks"
    tower = case.cls.sites == {"vision"}
    if case.writes and tower and host(case.family).rotary_tower:
        return "attach", UnsupportedModel, "no place of their own in this vision tower"
    if case.writes and tower and case.family in POOLED:
        return "run", UnsupportedModel, "not of the frames of a video"
    methods = [vtc.REDUCERS[step.method] for step in case.recipe().steps]
    sites = {step.site.kind for step in case.recipe().steps}
    if case.family in POOLED and any("features" in m.needs for m in methods):
        return (
            "run",
            MissingSignal,
            "pooled behind the projector|not a square grid|reads more than the tower.s tokens",
        )
    words = NO_TOWER_SCORES.get(case.family)
    if "vision" in sites and case.family == "mistral3":
        return "attach", UnsupportedSite, "read more than the tokens"
    if words and ("vision" in sites or any(TOWER & m.needs for m in methods)):
        return "run", MissingSignal, words
    if case.method == "mustdrop_merge" and "projector" in sites and case.family in NO_GRID:
        return "run", InvalidInput, "grid of image 0 is not known"
    if case.method == "langdc" and case.family in NO_GRID:
        return "run", InvalidInput, "grid of image 0 .* is not known here"
    return None


TOWER = {"attn_cls", "vision_keys", "cls_rank", "tile", "features"}

#: methods that act on videos alone, behind the block at their site: tests/test_stts.py
SELECTING = {m for m in vtc.REDUCERS if issubclass(vtc.REDUCERS[m], Selector)}
#: methods for diffusion transformers, which have contracts of their own
DIFFUSING = {m for m in vtc.REDUCERS if vtc.REDUCERS[m].sites == {"dit"}}
PLAIN = [m for m in vtc.REDUCERS if m not in SELECTING | DIFFUSING]


def tried(method: str) -> tuple[str, ...]:
    """Families to try it on: all, or those that differ in where the frames of a video are."""
    return FRAMED if vtc.REDUCERS[method].frames else families.usable()


def sites(method: str) -> list[str | None]:
    """Where to try it: what acts behind another method stays where it is."""
    return [None] if method in BEHIND else places(method)


ALL = [cell(m, f, at) for m in PLAIN for f in tried(m) for at in sites(m)]
REFUSED = [case for case in ALL if refusal(case)]
CASES = [case for case in ALL if not refusal(case)]
CHOOSING = [case for case in CASES if not case.writes]
SOME = [case for case in CASES if case.family in FEW or case.method == "random"]
COUNTED = [
    case
    for case in CASES
    if not (case.auto or case.behind or case.composite)
    and (case.at or len(places(case.method)) == 1)
]
over = functools.partial(pytest.mark.parametrize, "case", ids=str)
MERGING = [
    (case, merged) for case in CASES for merged in (False, True) if case.merges or not merged
]
#: for what the masked reference has said of every cell before, with either kind of attention:
#: every method on some families, one method on all, and all that writes tokens
SAMPLE = [pair for pair in MERGING if pair[0] in SOME or pair[0] not in CHOOSING]
both = functools.partial(
    pytest.mark.parametrize,
    "case,merged",
    ids=lambda x: str(x) if isinstance(x, Cell) else ["plain", "merged"][x],
)


# --------------------------------------------------------------------------------------------
# refusals and the files of the methods


@over(argvalues=REFUSED)
def test_refused_combinations_say_why_and_leave_no_trace(case: Cell) -> None:
    fam = families.make(case.family)
    when, error, words = refusal(case) or pytest.fail("not refused")
    generate(fam.model, fam.inputs)
    before = state_of(fam.model)
    with pytest.raises(error, match=words):
        session = case.attach(fam.model)
        assert when == "run", "attach should have refused"
        with session:
            generate(fam.model, fam.inputs)
    assert state_of(fam.model) == before


def test_every_method_runs_somewhere() -> None:
    assert {case.method for case in CASES} == set(PLAIN)
    assert {case.family for case in CASES} == set(families.usable())


@pytest.mark.parametrize("method", vtc.REDUCERS)
def test_method_files_are_short_and_cited(method: str) -> None:
    cls = vtc.REDUCERS[method]
    module = sys.modules[cls.__module__]
    source = inspect.getsource(module)
    assert len(source.splitlines()) <= 150
    assert source.count("@register(") == 1
    assert Path(inspect.getfile(cls)).stem == method
    cited = re.compile(r"arxiv\.org/abs/\d{4}\.\d{4,5}")
    if cls.paper == "baseline":
        assert cls.default_at
    else:
        assert cited.search(cls.paper)
        assert cited.search(module.__doc__ or "")
    assert re.search(r"arxiv\.org/abs|[Bb]aseline|floor", module.__doc__ or "")


# --------------------------------------------------------------------------------------------
# 1, 2, 3: identity, budget, text


@over(argvalues=CHOOSING)
def test_keeping_everything_changes_no_bit(case: Cell) -> None:
    checks.keeping_everything_changes_no_bit(case, torch.float32)


@over(argvalues=[case for case in SOME if case in CHOOSING])
def test_keeping_everything_changes_no_bit_of_bfloat16(case: Cell) -> None:
    checks.keeping_everything_changes_no_bit(case, torch.bfloat16)


@over(argvalues=CASES)
def test_budget_is_exact(case: Cell) -> None:
    checks.budget_is_exact(case)


@over(argvalues=COUNTED)
def test_number_of_tokens_is_exact(case: Cell) -> None:
    checks.number_of_tokens_is_exact(case)


@over(argvalues=CASES)
def test_text_is_never_touched(case: Cell) -> None:
    checks.text_is_never_touched(case)


PURE = (
    plans.plans_are_valid,
    plans.plan_reads_only,
    plans.plan_repeats,
    plans.plan_ignores_padding,
    plans.plan_of_a_row_ignores_other_rows,
)


@over(argvalues=[case for case in CHOOSING if case.family in FEW])
def test_a_plan_is_a_pure_function_of_its_row(case: Cell) -> None:
    for check in PURE:
        check(case)


@pytest.mark.parametrize("method", PLAIN)
def test_wrong_requests_are_refused(method: str) -> None:
    if method in BEHIND:
        pytest.skip("it takes a recipe alone")
    wrong = cell(method, "llava", None)
    declared.class_is_declared(wrong)
    declared.wrong_requests_are_refused(wrong)


# --------------------------------------------------------------------------------------------
# 4: dropping equals masking


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@both(argvalues=[pair for pair in MERGING if pair[0] in CHOOSING])
def test_dropping_equals_masking(case: Cell, attn: str, merged: bool) -> None:
    checks.dropping_equals_masking(case, attn, merged)


# --------------------------------------------------------------------------------------------
# 5, 6, 7, 8: the same answer however it is computed


@over(argvalues=CASES)
def test_sample_alone_equals_sample_in_batch(case: Cell) -> None:
    checks.sample_alone_equals_sample_in_batch(case)


@both(argvalues=SAMPLE)
def test_eager_equals_sdpa(case: Cell, merged: bool) -> None:
    checks.eager_equals_sdpa(case, merged)


@over(argvalues=CASES)
def test_same_seed_same_plan_and_global_generators_untouched(case: Cell) -> None:
    checks.same_seed_same_plan_and_global_generators_untouched(case)


def test_another_seed_draws_other_tokens() -> None:
    case = cell("random", "llava", "projector")
    other = reduce(case, family("llava"), seed=4)
    assert choices(other) != choices(reduced(case))
    assert [r.n_out for r in other.trace] == [r.n_out for r in reduced(case).trace]


@both(argvalues=SAMPLE)
def test_bfloat16_runs(case: Cell, merged: bool) -> None:
    checks.bfloat16_runs(case, merged)


# --------------------------------------------------------------------------------------------
# 9: detaching


@over(argvalues=SOME)
def test_detach_restores_the_model(case: Cell) -> None:
    checks.detaching_restores_the_model(case)


@over(argvalues=SOME)
def test_session_survives_an_exception_inside_forward(case: Cell) -> None:
    checks.sessions_survive_an_exception_inside_forward(case)


# --------------------------------------------------------------------------------------------
# 10: threads


@over(argvalues=[case for case in SOME if case.family == FEW[0] or case.method == "random"])
def test_two_threads_equal_two_sequential_runs(case: Cell) -> None:
    checks.two_threads_equal_two_sequential_runs(case)


@pytest.mark.parametrize("method", PLAIN)
def test_sessions_on_two_models_end_in_any_order(method: str) -> None:
    before = state_of(family("llava").model)["functions"]
    cases = [cell(method, "llava", None)]
    cases.append(cell(method, "internvl" if cases[0].writes else "qwen2_5_vl", None))
    sessions = [case.attach(family(case.family).model, **case.merged()) for case in cases]
    generate(family("llava").model, family("llava").inputs)
    sessions[0].detach()
    other = family(cases[1].family)
    late = generate(other.model, other.inputs)
    sessions[1].detach()
    assert same(late.logits, reduced(cases[1], "sdpa", True).logits)
    assert state_of(family("llava").model)["functions"] == before


# --------------------------------------------------------------------------------------------
# 12: gradients


@both(argvalues=[pair for pair in MERGING if pair[0] in SOME and pair[0] in CHOOSING])
def test_loss_and_gradients_equal_those_of_masking(case: Cell, merged: bool) -> None:
    checks.loss_and_gradients_equal_those_of_masking(case, merged)


# --------------------------------------------------------------------------------------------
# 13: recipes


@pytest.mark.parametrize("method", PLAIN)
def test_recipe_goes_through_yaml_and_back(method: str, tmp_path: Path) -> None:
    more = {"merge": "nearest", "merge_threshold": 0.25, "mass": 0.5, "scope": "sample"}
    for at in sites(method):
        case = cell(method, "llava", at)
        for options in ({}, more if case.merges and method not in BEHIND else {}):
            options = {k: v for k, v in options.items() if k != "merge" or case.drops}
            if case.site.startswith("vision") and not case.composite:
                options.pop("scope", None)  # the tower knows no prompts
            checks.recipe_goes_through_yaml_and_back(case, seed=7, **options)
            recipe = case.recipe(seed=7, **options)
            path = tmp_path / "recipe.yaml"
            assert path.write_text(recipe.dump()) and recipe.dump(path) == path.read_text()
            for source in (path, str(path)):
                assert vtc.Recipe.load(source) == recipe


@pytest.mark.parametrize("method", PLAIN)
def test_recipe_file_acts_like_the_arguments(method: str, tmp_path: Path) -> None:
    case = cell(method, "llava", None)
    checks.recipe_acts_like_the_arguments(case)
    fam = family("llava")
    path = tmp_path / "recipe.yaml"
    case.recipe().dump(path)
    with vtc.attach(fam.model, path):
        run = generate(fam.model, fam.inputs)
    assert same(run.logits, reduced(case).logits)
