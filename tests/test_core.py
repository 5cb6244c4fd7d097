"""The parts that need no model: plans, budgets, registries, recipes, token movement, methods.

Every method has one example here whose answer is worked out by hand.
"""

from __future__ import annotations

import math
import random as python_random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import vtc_kernels
from torch import Tensor

import vtc
from vtc import ops, registry
from vtc.budget import Budget, parse_schedule
from vtc.context import Layout, Signals, Site
from vtc.errors import InvalidBudget, InvalidInput, InvalidPlan, InvalidRecipe, UnknownName
from vtc.plan import Plan
from vtc.recipe import Recipe, Step
from vtc.reducer import Scorer, top_k
from vtc.registry import Registry

ROOT = Path(vtc.__file__).parents[1]
HEAVY = ("transformers", "timm", "open_clip", "triton", "diffusers", "torchvision", "matplotlib")


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def bools(*rows: str) -> Tensor:
    """[R, N] from strings such as "1101"."""
    return torch.tensor([[c == "1" for c in row] for row in rows])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- plans


def test_plan_from_mask_with_equal_counts():
    plan = Plan.from_mask(bools("0101", "1100"))
    assert plan.index.tolist() == [[1, 3], [0, 1]]
    assert plan.counts is None and plan.kept == (2, 2) and (plan.rows, plan.n, plan.m) == (2, 4, 2)
    assert plan.slots.all()
    assert plan.destination().tolist() == [[-1, 0, -1, 1], [0, 1, -1, -1]]


def test_plan_from_mask_with_ragged_counts():
    keep = bools("10110", "01000")
    plan = Plan.from_mask(keep)
    assert plan.index.tolist() == [[0, 2, 3], [1, 1, 1]]
    assert plan.kept == (3, 1)
    assert plan.slots.tolist() == [[True] * 3, [True, False, False]]
    assert plan.destination().tolist() == [[0, -1, 1, 2, -1], [-1, 0, -1, -1, -1]]
    assert torch.equal(plan.keep_mask(), keep)
    given = Plan.from_mask(keep, (3, 1))
    assert torch.equal(given.index, plan.index) and given.counts == plan.counts


@pytest.mark.parametrize("ragged", [False, True])
def test_plan_then_equals_one_after_the_other(ragged: bool):
    first = Plan.from_mask(bools("110111", "101100" if ragged else "101111"))
    second = Plan.from_mask(bools("10011", "01100") if ragged else bools("01001", "11000"))
    both = first.then(second)
    x = noise(2, 6, 3)
    twice = ops.apply(second, ops.apply(first, x))
    once = ops.apply(both, x)
    for row, kept in enumerate(both.kept):
        assert torch.equal(once[row, :kept], twice[row, :kept])
    assert both.n == 6 and both.kept == second.kept
    kept = both.destination() >= 0
    assert torch.equal(kept, both.keep_mask())


def test_plan_then_multiplies_weights_and_carries_sizes():
    x = torch.tensor([[[1.0], [3.0], [10.0], [20.0]]])
    first = Plan(
        ids([0, 2, 3]),
        4,
        assign=ids([0, 0, 1, 2]),
        weight=torch.tensor([[0.5, 0.5, 1.0, 1.0]]),
        size=torch.tensor([[2.0, 1.0, 1.0]]),
    )
    pair = Plan(ids([0, 2]), 3, assign=ids([0, 0, 1]), weight=torch.tensor([[2 / 3, 1 / 3, 1.0]]))
    both = first.then(pair)
    assert both.index.tolist() == [[0, 3]] and both.assign.tolist() == [[0, 0, 0, 1]]
    assert torch.allclose(both.weight, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1.0]]))
    assert torch.allclose(ops.apply(both, x), torch.tensor([[[14 / 3], [20.0]]]))
    assert both.size.tolist() == [[2.0, 1.0]]
    sized = Plan(ids([0]), 3, size=torch.tensor([[4.0]]))
    assert first.then(sized).size.tolist() == [[4.0]]
    dropped = first.then(Plan(ids([1, 2]), 3))
    assert dropped.assign.tolist() == [[-1, -1, 0, 1]]
    assert ops.apply(dropped, x).flatten().tolist() == [10.0, 20.0]


def test_plan_then_refuses_another_length():
    with pytest.raises(InvalidPlan, match="first plan keeps 2, second reads 3"):
        Plan(ids([0, 1]), 3).then(Plan(ids([0]), 3))


def test_restore_copies_merged_tokens_back_and_leaves_lost_ones_their_residual():
    y = torch.tensor([[[5.0], [7.0]]])
    plan = Plan(ids([0, 2]), 4)
    assert ops.restore(plan, y).flatten().tolist() == [5, 0, 7, 0]
    residual = torch.arange(4.0).reshape(1, 4, 1)
    assert ops.restore(plan, y, residual).flatten().tolist() == [5, 1, 9, 3]
    merged = Plan(ids([0, 2]), 4, assign=ids([0, 1, 1, -1]))
    assert ops.restore(merged, y).flatten().tolist() == [5, 7, 7, 0]
    ragged = Plan.from_mask(bools("101", "010"))
    out = ops.restore(ragged, torch.tensor([[[1.0], [2.0]], [[3.0], [99.0]]]))
    assert out[..., 0].tolist() == [[1, 0, 2], [0, 3, 0]]


def test_plan_check_accepts_ragged_rows_and_names_what_is_wrong():
    valid = bools("11110", "11000")
    Plan.from_mask(bools("10110", "01000")).check(valid)
    bad = {
        "one row per context row": Plan(ids([0, 1]), 5),
        r"in \[0, 5\)": Plan(ids([0, 5], [0, 1]), 5),
        "at least one token": Plan(torch.zeros(2, 0, dtype=torch.long), 5),
        "ascend strictly": Plan(ids([1, 0], [0, 1]), 5),
        "padding": Plan(ids([0, 4], [0, 1]), 5),
    }
    for words, plan in bad.items():
        with pytest.raises(InvalidPlan, match=words):
            plan.check(valid)
    with pytest.raises(InvalidPlan, match="ascend strictly"):
        Plan(ids([2, 2], [0, 1]), 5).check(valid)
    with pytest.raises(InvalidPlan, match=r"in \[0, 5\)"):
        Plan(ids([-1, 2], [0, 1]), 5).check(valid)


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("keep", "available", "original", "k"),
    [
        (0.25, 64, 64, 16),
        (0.25, 32, 64, 16),  # a share of what there was at first
        (0.5, 7, 7, 4),  # 3.5 goes up
        (0.1, 4, 4, 1),  # never none
        (0.9, 10, 64, 10),  # never more than there is
        (1.0, 9, 9, 9),
        (8, 64, 64, 8),
        (100, 64, 64, 64),
        (1, 5, 5, 1),
    ],
)
def test_budget(keep: float | int, available: int, original: int, k: int):
    assert Budget(keep).tokens(available, original) == k


def test_budget_in_words():
    assert (str(Budget(64)), str(Budget(0.25)), str(Budget(1 / 3))) == (
        "64 tokens",
        "0.25",
        "0.3333",
    )


def test_schedule_is_sorted_and_never_grows():
    out = parse_schedule({8: 0.25, 2: 0.5})
    assert list(out.items()) == [(2, Budget(0.5)), (8, Budget(0.25))]
    assert parse_schedule({0: 9, 3: 9})[3] == Budget(9)
    assert list(parse_schedule({2: 0.5, 4: 16, 6: 0.25, 8: 8})) == [2, 4, 6, 8]
    for wrong, words in (
        ({}, "schedule is empty"),
        ({2: 0.25, 8: 0.5}, "cannot grow"),
        ({2: 8, 4: 0.5, 6: 9}, "cannot grow"),
        ({-1: 0.5}, "layer -1"),
        ({True: 0.5}, "layer True"),
        ({"2": 0.5}, "layer '2'"),
        ({2: 0}, "at least 1"),
    ):
        with pytest.raises(InvalidBudget, match=words):
            parse_schedule(wrong)


# ---------------------------------------------------------------------- registries


@dataclass(frozen=True)
class First(Scorer):
    """Keeps the first tokens."""

    strength: float = 1.0
    level: int = 0

    sites: ClassVar[frozenset[str]] = frozenset({"projector"})


class Entry(SimpleNamespace):
    name: str

    def load(self) -> Any:
        return self.item


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """A registry whose built-in package has no files, and one foreign entry point."""
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Entry(name="mine", item=First, group=group)]
    )
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda path: [])
    return Registry("method", "vtc.methods", "vtc.reducers")


def test_registry_loads_entry_points_at_the_first_look_up(empty: Registry[Any]):
    assert empty._items == {}
    assert "mine" in empty and empty["mine"] is First and list(empty) == ["mine"]
    assert len(empty) == 1
    with pytest.raises(UnknownName, match=r"unknown method 'mina'. Did you mean 'mine'\?"):
        empty["mina"]


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[Any]]:
    """A registry of a package with two files, the second of which `steps` may hold up."""
    package = tmp_path / "vtc_test_rooms"
    package.mkdir()
    for name in ("__init__", "first", "second"):
        (package / f"{name}.py").write_text(
            f"from vtc_test_steps import add, step\nadd('{name}')\nstep('{name}')\n"
            if name != "__init__"
            else ""
        )
    found: Registry[Any] = Registry("thing", "vtc_test_rooms")

    def add(name: str) -> None:
        found.add(name)(type(name, (), {"__module__": f"vtc_test_rooms.{name}"}))

    steps: Any = SimpleNamespace(add=add, step=lambda name: None)
    monkeypatch.setitem(sys.modules, "vtc_test_steps", steps)
    monkeypatch.syspath_prepend(tmp_path)
    yield found
    for name in [name for name in sys.modules if name.startswith("vtc_test_rooms")]:
        del sys.modules[name]


def test_a_second_thread_waits_for_the_whole_registry(
    foreign: Registry[Any], monkeypatch: pytest.MonkeyPatch
):
    inside, go_on = threading.Event(), threading.Event()

    def step(name: str) -> None:
        if name == "first":
            assert "first" in foreign  # a module may look up what is there so far
            inside.set()
            go_on.wait(20)

    monkeypatch.setattr(sys.modules["vtc_test_steps"], "step", step)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(list, foreign)
        assert inside.wait(20)
        two = pool.submit(list, foreign)
        with pytest.raises(TimeoutError):
            two.result(0.2)
        go_on.set()
        assert one.result(20) == two.result(20) == ["first", "second"]


def test_an_import_that_failed_fails_again_and_can_be_mended(
    foreign: Registry[Any], monkeypatch: pytest.MonkeyPatch
):
    def step(name: str) -> None:
        if name == "second":
            raise ImportError("no module named 'nowhere'")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["vtc_test_steps"], "step", step)
        for _ in range(2):
            with pytest.raises(ImportError, match="nowhere"):
                foreign["first"]
    assert list(foreign) == ["first", "second"]


def test_registry_refuses_a_second_class_of_one_name(empty: Registry[Any]):
    assert empty.add("mine")(First) is First
    assert empty.add("mine")(First) is First  # the same one again, as a reload does
    with pytest.raises(vtc.VtcError, match="'mine' is registered twice: by .*First and by .*Step"):
        empty.add("mine")(Step)


@pytest.mark.parametrize("name", ["Big", "9lives", "a-b", "", "a b"])
def test_registry_refuses_odd_names(name: str, empty: Registry[Any]):
    with pytest.raises(vtc.VtcError, match="lower-case letters"):
        empty.add(name)


def test_the_groups_of_entry_points_are_fixed():
    assert registry.REDUCERS._group == "vtc.reducers"


# ---------------------------------------------------------------------- recipes


@pytest.fixture
def first() -> Iterator[str]:
    """A registered method with parameters, gone afterwards."""
    vtc.register("test_core_first")(First)
    yield "test_core_first"
    del vtc.REDUCERS._items["test_core_first"]


def test_recipe_round_trip_leaves_defaults_out(first: str, tmp_path: Path):
    recipe = Recipe(
        (
            Step("fastv", "decoder.2", 0.25, mass=0.5, params={"pool": "max"}),
            Step(first, "projector", 64, merge="nearest", merge_threshold=0.5, params={"level": 2}),
        ),
        seed=7,
    )
    assert [step.at for step in recipe.steps] == ["projector", "decoder.2"]
    assert recipe.to_dict() == {
        "steps": [
            {
                "method": first,
                "at": "projector",
                "keep": 64,
                "merge": "nearest",
                "merge_threshold": 0.5,
                "params": {"level": 2},
            },
            {
                "method": "fastv",
                "at": "decoder.2",
                "keep": 0.25,
                "mass": 0.5,
                "params": {"pool": "max"},
            },
        ],
        "seed": 7,
    }
    path = tmp_path / "r.yaml"
    text = recipe.dump(path)
    assert Recipe.load(path) == Recipe.load(text) == Recipe.load(recipe.to_dict()) == recipe
    plain = Recipe((Step("random", "projector", 0.5),))
    assert plain.to_dict() == {"steps": [{"method": "random", "at": "projector", "keep": 0.5}]}
    assert isinstance(Recipe.load(plain.dump()).steps[0].keep, float)
    assert isinstance(Recipe.load(recipe.dump()).steps[0].keep, int)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"strength": "1"}, "strength: '1' is not float"),
        ({"strength": True}, "strength: True is not float"),
        ({"level": 1.0}, "level: 1.0 is not int"),
        ({"level": False}, "level: False is not int"),
    ],
)
def test_parameters_have_strict_types(first: str, params: dict[str, object], words: str):
    with pytest.raises(InvalidRecipe, match=words):
        Step(first, "projector", 4, params=params).build()


def test_an_int_is_a_float_parameter(first: str):
    assert Step(first, "projector", 4, params={"strength": 2}).build().strength == 2


# ---------------------------------------------------------------------- top_k


def test_top_k_ties_signed_zeros_and_infinities():
    inf = math.inf
    every = bools("11111")
    equal = torch.ones(1, 5)
    assert top_k(equal, every, (3,)).index.tolist() == [[0, 1, 2]]
    zeros = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert top_k(zeros, every, (2,)).index.tolist() == [[0, 1]]
    ends = torch.tensor([[-inf, 1.0, inf, inf, -inf]])
    assert top_k(ends, every, (2,)).index.tolist() == [[2, 3]]
    assert top_k(ends, every, (4,)).index.tolist() == [[0, 1, 2, 3]]


def test_top_k_with_padding_and_ragged_budgets():
    score = torch.tensor([[1.0, 3.0, 2.0, 9.0], [4.0, 5.0, 6.0, 7.0]])
    plan = top_k(score, bools("1110", "1111"), (1, 3))
    assert plan.kept == (1, 3)
    assert plan.index.tolist() == [[1, 1, 1], [1, 2, 3]]
    nan = torch.tensor([[1.0, 2.0, math.nan]])
    assert top_k(nan, bools("110"), (1,)).index.tolist() == [[1]]  # NaN on padding is nobody's
    with pytest.raises(InvalidInput, match="scores contain NaN"):
        top_k(nan, bools("111"), (1,))


def test_top_k_keeps_real_tokens_that_score_minus_infinity():
    score = torch.tensor([[-math.inf, -math.inf, -math.inf]])
    plan = top_k(score, bools("110"), (2,))
    plan.check(bools("110"))
    assert plan.index.tolist() == [[0, 1]]


# ---------------------------------------------------------------------- ops

#: kept: 0 (along x) and 3 (along y); token 1 is near 0, 2 is at 45 degrees, 4 points away
FAN = torch.tensor([[[2.0, 0.0], [4.0, 1.0], [1.0, 1.1], [0.0, 3.0], [-1.0, -1.0]]])
EVERY = torch.ones(1, 5, dtype=torch.bool)


def test_absorb_averages_each_dropped_token_into_its_nearest():
    plan = ops.absorb(Plan(ids([0, 3]), 5), FAN, EVERY, None, -1.0, True)
    # 4 has the same cosine with both: the lower slot
    assert plan.assign.tolist() == [[0, 0, 1, 1, 0]]
    assert plan.size.tolist() == [[3, 2]]
    assert torch.allclose(plan.weight, torch.tensor([[1 / 3, 1 / 3, 0.5, 0.5, 1 / 3]]))
    assert torch.allclose(ops.apply(plan, FAN), torch.tensor([[[5 / 3, 0.0], [0.5, 2.05]]]))


def test_absorb_leaves_out_what_is_below_the_threshold():
    plan = ops.absorb(Plan(ids([0, 3]), 5), FAN, EVERY, None, 0.9, True)
    assert plan.assign.tolist() == [[0, 0, -1, 1, -1]]
    assert plan.size.tolist() == [[2, 1]]
    assert torch.allclose(ops.apply(plan, FAN), torch.tensor([[[3.0, 0.5], [0.0, 3.0]]]))


def test_absorb_weighs_by_size():
    size = torch.tensor([[1.0, 3.0, 2.0, 2.0, 1.0]])
    plan = ops.absorb(Plan(ids([0, 3]), 5), FAN, EVERY, size, 0.5, True)
    assert plan.size.tolist() == [[4, 4]]
    assert torch.allclose(ops.apply(plan, FAN), torch.tensor([[[3.5, 0.75], [0.5, 2.05]]]))


def test_absorb_without_average_only_counts():
    plan = ops.absorb(Plan(ids([0, 3]), 5), FAN, EVERY, None, 0.5, False)
    assert plan.size.tolist() == [[2, 2]] and plan.assign is None and plan.weight is None
    assert torch.equal(ops.apply(plan, FAN), FAN[:, [0, 3]])


def test_absorb_ignores_padding_and_keeps_the_weights_of_the_method():
    valid = bools("11110")
    plan = ops.absorb(Plan(ids([0, 3]), 5), FAN, valid, None, -1.0, True)
    assert plan.assign.tolist() == [[0, 0, 1, 1, -1]] and plan.size.tolist() == [[2, 2]]
    own = Plan(
        ids([0, 3]), 5, assign=ids([0, 0, -1, 1, -1]), weight=torch.tensor([[1.0, 0.25, 0, 1, 0]])
    )
    merged = ops.absorb(own, FAN, valid, None, -1.0, True)
    assert merged.assign.tolist() == [[0, 0, 1, 1, -1]]
    assert torch.allclose(merged.weight[0, :4], torch.tensor([1.0, 0.25, 0.5, 0.5]))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("broadcast", [False, True])
def test_gather_columns_equals_torch_gather(lead: tuple[int, ...], broadcast: bool):
    b, n, d, k = 2, 7, 5, 4
    index = torch.randint(0, n, (b, k), generator=torch.Generator().manual_seed(1))
    x = noise(*lead, 1 if broadcast else b, n, d)
    wide = index[..., None].expand(*lead, b, k, d)
    expected = x.expand(*lead, b, n, d).gather(-2, wide)
    flat = x[..., 0]  # positions: the token axis is the last one
    both = ops.gather_columns(index, (x, -2), (flat, -1))
    assert torch.equal(both[0], expected) and torch.equal(both[1], expected[..., 0])


# ---------------------------------------------------------------------- vtc_kernels


def test_segments_are_in_slot_order():
    order, offsets = vtc_kernels.segments(ids([1, -1, 0, 1], [0, 0, -1, 0]), 2)
    assert order.tolist() == [2, 0, 3, 4, 5, 7, 0, 0]
    assert offsets.tolist() == [0, 1, 3, 6, 6, 8]


def test_hash_uniform_is_a_function_of_index_and_seed():
    n = 20000
    index = torch.arange(n)
    state, python_state = torch.get_rng_state(), python_random.getstate()
    x = vtc_kernels.hash_uniform(index, 3)
    assert torch.equal(torch.get_rng_state(), state) and python_random.getstate() == python_state
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() < 1
    assert torch.equal(vtc_kernels.hash_uniform(index.flip(0), 3), x.flip(0))
    assert torch.equal(vtc_kernels.hash_uniform(index[5:6], 3), x[5:6])
    share = torch.histc(x, 10, 0, 1) / n
    assert (share - 0.1).abs().max() < 0.01
    neighbours = torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1]
    other = torch.corrcoef(torch.stack([x, vtc_kernels.hash_uniform(index, 4)]))[0, 1]
    assert abs(neighbours) < 0.03 and abs(other) < 0.03
    assert x.unique().numel() > 0.99 * n
    for seed in (-1, 2**40, 0):
        drawn = vtc_kernels.hash_uniform(index, seed)
        assert drawn.min() >= 0 and drawn.max() < 1


# ---------------------------------------------------------------------- the package


def probe(statement: str) -> set[str]:
    """Heavy packages that `statement` imports into a fresh interpreter."""
    code = f"import sys\n{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "model_zoo")]
    code = f"import sys\nsys.path[:0] = {paths!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name for name in HEAVY if f"'{name}'" in done.stdout.splitlines()[-1]}


def test_importing_is_light():
    assert probe("import vtc") == set()
    assert probe("from vtc import *") <= {"triton"}  # operators are registered with their kernels
    used = "import vtc\nlist(vtc.REDUCERS)\nvtc.Recipe.build('divprune', 8, 0.5)"
    assert probe(used) <= {"triton"}


def test_the_probe_notices_a_heavy_import():
    fake = "import types\nsys.modules['timm'] = types.ModuleType('timm')\nimport vtc"
    assert probe(fake) == {"timm"}


def test_public_names_are_there():
    for name in vtc.__all__:
        assert getattr(vtc, name) is not None
    assert set(vtc.__all__) <= set(dir(vtc))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = vtc.atach


def test_layout_of_the_repository():
    for folder in ("kernels", "model_zoo"):
        if not (ROOT / folder).is_dir():
            pytest.skip("an installed package has no such folders")
        assert not (ROOT / folder / "__init__.py").exists(), folder
    files = sorted((ROOT / "vtc" / "methods").glob("*.py"))
    assert len(files) > 8
    for file in files:
        assert len(file.read_text().splitlines()) <= 150, file.name


# ---------------------------------------------------------------------- methods by hand


def context(
    x: Tensor,
    *,
    counts: tuple[int, ...] | None = None,
    layout: Layout | None = None,
    site: str = "decoder.2",
    seed: int = 0,
    **signals: Tensor,
) -> vtc.Context:
    """A context of right-padded rows."""
    r, n = x.shape[:2]
    counts = counts or (n,) * r
    return vtc.Context(
        x=x,
        visual=torch.arange(n) < torch.tensor(counts)[:, None],
        counts=counts,
        original=counts,
        source=torch.arange(n).expand(r, n),
        layout=(layout,) * r,
        site=Site.parse(site),
        signals=Signals({name: lambda value=value: value for name, value in signals.items()}),
        seed=seed,
    )


def method(name: str, **params: Any) -> Any:
    return vtc.REDUCERS[name](**params)


def kept(plan: Plan) -> list[list[int]]:
    return [row[:n] for row, n in zip(plan.index.tolist(), plan.kept, strict=True)]


def test_random_ranks_by_the_hash_of_the_place():
    ctx = context(torch.zeros(2, 9, 1), seed=5)
    score = method("random").score(ctx)
    assert torch.equal(score[0], vtc_kernels.hash_uniform(torch.arange(9), 5))
    best = sorted(range(9), key=lambda i: -score[0, i].item())[:4]
    assert kept(method("random").plan(ctx, (4, 4))) == [sorted(best)] * 2


@pytest.mark.parametrize(
    ("layout", "k", "answer"),
    [
        (Layout(1, 4, 4), 4, [5, 7, 13, 15]),  # rows 1 and 3, columns 1 and 3
        (Layout(1, 4, 4), 5, [5, 7, 12, 14, 15]),  # 2 of row 1, 3 of row 3
        (Layout(2, 2, 4), 4, [5, 7, 13, 15]),  # one line of each frame
        (None, 4, [2, 6, 10, 14]),
        (Layout(1, 8, 8), 4, [2, 6, 10, 14]),  # tokens are missing already
    ],
)
def test_grid(layout: Layout | None, k: int, answer: list[int]):
    ctx = context(torch.zeros(1, 16, 1), layout=layout)
    assert kept(method("grid").plan(ctx, (k,))) == [answer]


def test_grid_spreads_a_budget_below_the_number_of_lines_over_all_frames():
    ctx = context(torch.zeros(1, 16, 1), layout=Layout(4, 2, 2))
    first, second = kept(method("grid").plan(ctx, (2,)))[0]
    assert first < 8 <= second, "both tokens are in one half of the video"


def test_norm():
    x = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [6.0, 0.0], [-4.0, -4.0]]])
    ctx = context(x)
    assert torch.allclose(method("norm").score(ctx), torch.tensor([[5.0, 1.0, 6.0, 32**0.5]]))
    assert kept(method("norm").plan(ctx, (2,))) == [[2, 3]]


def test_divprune():
    # directions 0, 10, 90 and 200 degrees: 200 is the most isolated, then 10 is farthest from it
    # (170 degrees; 0 is 160, 90 is 110), then 90 (80 from 10), then 0
    angles = torch.tensor([0.0, 10.0, 90.0, 200.0]).deg2rad()
    x = torch.stack([angles.cos(), angles.sin()], -1)[None] * torch.tensor([[[3.0]]])
    for k, answer in ((1, [3]), (2, [1, 3]), (3, [1, 2, 3])):
        assert kept(method("divprune").plan(context(x), (k,))) == [answer]
    ragged = context(torch.cat([x, x]), counts=(4, 3))  # of 0, 10 and 90 it is 90, then 0
    assert kept(method("divprune").plan(ragged, (3, 2))) == [[1, 2, 3], [0, 2]]


def test_fastv():
    attention = torch.tensor([[[0.4, 0.1, 0.2, 0.3], [0.0, 0.6, 0.2, 0.1]]])  # [R, H, N]
    ctx = context(torch.zeros(1, 4, 1), attn_last=attention)
    assert torch.allclose(method("fastv").score(ctx), torch.tensor([[0.2, 0.35, 0.2, 0.2]]))
    assert kept(method("fastv", pool="max").plan(ctx, (2,))) == [[0, 1]]
    assert method("fastv").places(32, None) == {"decoder.2": 0.5}
    assert method("fastv").places(32, 64) == {"decoder.2": 64}


def test_pdrop():
    places = method("pdrop").places(32, None)
    assert list(places) == ["decoder.8", "decoder.16", "decoder.24"]
    assert list(places.values()) == pytest.approx([0.5, 0.25, 0.125])
    assert list(method("pdrop").places(4, 0.001).values()) == pytest.approx([0.1, 0.01, 0.001])
    attention = torch.tensor([[[0.4, 0.1, 0.2], [0.0, 0.6, 0.3]]])
    ctx = context(torch.zeros(1, 3, 1), attn_ahead=attention)
    assert torch.allclose(method("pdrop").score(ctx), torch.tensor([[0.2, 0.35, 0.25]]))


def test_visionzip():
    x = torch.tensor([[[1.0], [10.0], [100.0], [1000.0], [10000.0], [100000.0]]])
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.0]])
    keys = torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [0, 1], [0, 1], [0.1, 1]]])
    ctx = context(x, site="projector", attn_cls=scores, vision_keys=keys, tile=torch.zeros(1, 6))
    # 4 tokens, half of them contextual: 1 and 3 are dominant; 0, 2, 4, 5 are left, every second
    # of them is a target (0 and 4); 2 goes to 0, 5 goes to 4
    plan = method("visionzip", contextual=0.5).plan(ctx, (4,))
    plan.check(ctx.visual)
    assert kept(plan) == [[0, 1, 3, 4]]
    assert plan.assign.tolist() == [[0, 1, 0, 2, 3, 3]]
    assert ops.apply(plan, x).flatten().tolist() == [101, 10, 1000, 110000]
    assert plan.size.tolist() == [[2, 1, 1, 2]]
    # one target: token = target + mean of the three that are assigned to it
    plan = method("visionzip", contextual=0.34).plan(ctx, (3,))
    assert kept(plan) == [[0, 1, 3]]
    merged = ops.apply(plan, x).flatten()
    assert torch.allclose(merged, torch.tensor([1 + 110100 / 3, 10.0, 1000.0]))
    assert plan.size.tolist() == [[4, 1, 1]]
    assert kept(method("visionzip", contextual=0.0).plan(ctx, (2,))) == [[1, 3]]


def test_dart():
    def unit(*degrees: float) -> Tensor:
        angle = torch.tensor(degrees).deg2rad()
        return torch.stack([angle.cos(), angle.sin()], -1)[None]

    visual = unit(0, 20, 170, 80, 260)
    keys = torch.tensor([[[5.0, -5.0], [1, 0], [0, 2], [-3, 0], [0, 0]]])  # token 0 is the pivot
    text = unit(45, 90)
    ctx = context(
        torch.zeros(1, 5, 2),
        keys=keys,
        text_keys=torch.tensor([[[0.5, 0], [0, 4.0]]]),  # text token 1 (90 degrees) is the pivot
        text_mask=bools("11"),
        normed=visual * 3,
        text_normed=text,
    )
    dart = method("dart", visual_pivots=1, text_pivots=1)
    # farthest from 0 degrees: 170; farthest from 90 degrees of what is left: 260
    assert kept(dart.plan(ctx, (3,))) == [[0, 2, 4]]
    # an odd number of additions: the later pivot gets the additional one, first 260, then 20
    assert kept(dart.plan(ctx, (4,))) == [[0, 1, 2, 4]]
    assert kept(dart.plan(ctx, (2,))) == [[0, 4]]
    assert kept(dart.plan(ctx, (1,))) == [[0]]
