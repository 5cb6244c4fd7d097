"""mustdrop: its three steps against slow loops and eager attention, the whole against masking."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vtc
from vtc import ops
from vtc.context import Context, Layout, Signals, Site
from vtc.errors import InvalidBudget, InvalidInput, InvalidRecipe, UnsupportedSite
from vtc.methods.mustdrop import PRESETS
from vtc.methods.mustdrop_cache import MustDropCache
from vtc.methods.mustdrop_filter import MustDropFilter
from vtc.methods.mustdrop_merge import MustDropMerge
from vtc.plan import Plan
from vtc.reducer import Host
from vtc.session import Reduction
from vtc.testing import families, maskref, oracle, towerref, trace

TOLERANCE = 1e-4  # fp32 logits, standard deviation about 1
EXACT = 1e-6  # attention rows
WIDTH = 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def context(
    x: Tensor,
    counts: tuple[int, ...],
    layout: tuple[Layout | None, ...],
    at: str = "vision.1",
    **signals: Tensor,
) -> Context:
    r, n = x.shape[:2]
    steps = torch.arange(n).expand(r, n)
    visual = steps < torch.tensor(counts)[:, None]
    made: dict[str, Callable[[], Tensor]] = {k: (lambda v=v: v) for k, v in signals.items()}
    site = Site.parse(at)
    return Context(x, visual, counts, counts, steps, layout, site, Signals(made))


def grid(*layouts: tuple[int, int, int], seed: int = 0, spread: float = 1.0) -> Context:
    """Images of these grids; neighbours look alike when `spread` is small."""
    made = tuple(Layout(*shape) for shape in layouts)
    counts = tuple(layout.n for layout in made)
    x = normal(len(made), max(counts), WIDTH, seed=seed) * spread + normal(1, 1, WIDTH, seed=99)
    return context(x, counts, made)


def kept(plan: Plan, row: int = 0) -> list[int]:
    return plan.index[row, : plan.kept[row]].tolist()


def sizes(plan: Plan, row: int = 0) -> list[float]:
    assert plan.size is not None
    return plan.size[row, : plan.kept[row]].tolist()


# --------------------------------------------------------------------------------------------
# local spatial merging


def slow_windows(layout: Layout, side: int = 3) -> list[list[int]]:
    out = []
    for frame in range(layout.frames):
        for top in range(0, layout.height - side + 1, side):
            for left in range(0, layout.width - side + 1, side):
                out.append(
                    [
                        (frame * layout.height + top + i) * layout.width + left + j
                        for i in range(side)
                        for j in range(side)
                    ]
                )
    return out


def slow_similarity(x: Tensor, window: list[int]) -> float:
    """Mean cosine over the ordered pairs of different tokens, one by one."""
    values = [
        float(F.cosine_similarity(x[a].double(), x[b].double(), dim=0))
        for a in window
        for b in window
        if a != b
    ]
    assert len(values) == len(window) * (len(window) - 1)
    return sum(values) / len(values)


def slow_merge(x: Tensor, layout: Layout, number: int) -> tuple[list[int], Tensor, list[float]]:
    """Places, values and sizes after the `number` most similar windows were merged."""
    windows = slow_windows(layout)
    ranked = sorted(windows, key=lambda w: -slow_similarity(x, w))[:number]
    gone = {place for window in ranked for place in window[:-1]}
    mean = {window[-1]: x[window].mean(0) for window in ranked}
    places = [p for p in range(layout.n) if p not in gone]
    values = torch.stack([mean.get(p, x[p]) for p in places])
    return places, values, [9.0 if p in mean else 1.0 for p in places]


SHAPES = [(1, 6, 6), (1, 7, 8), (1, 3, 9), (2, 6, 3), (3, 5, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_equals_a_slow_loop(shape: tuple[int, int, int]) -> None:
    ctx = grid(shape, spread=0.7)
    layout = Layout(*shape)
    similar = [slow_similarity(ctx.x[0], w) for w in slow_windows(layout)]
    ranked = sorted(similar, reverse=True)
    for number in range(1, len(similar)):
        threshold = (ranked[number - 1] + ranked[number]) / 2
        plan = MustDropMerge(threshold=threshold).plan(ctx, ctx.counts)
        places, values, size = slow_merge(ctx.x[0], layout, number)
        assert kept(plan) == places and len(places) == layout.n - 8 * number
        assert sizes(plan) == size
        assert (ops.apply(plan, ctx.x)[0] - values).abs().max() <= 1e-5
        plan.check(ctx.visual)


@pytest.mark.parametrize("threshold", [-1.0, 0.4, 0.6, 0.8])
def test_merge_preserves_the_sum_of_tokens(threshold: float) -> None:
    ctx = grid((1, 24, 24), (1, 12, 15), (2, 7, 8), spread=0.6)
    plan = MustDropMerge(threshold=threshold).plan(ctx, ctx.counts)
    out = ops.apply(plan, ctx.x)
    if plan.size is None:
        assert plan.kept == ctx.counts
        return
    for row, count in enumerate(ctx.counts):
        n = plan.kept[row]
        total = (plan.size[row, :n, None] * out[row, :n]).sum(0)
        assert (total - ctx.x[row, :count].sum(0)).abs().max() <= 1e-3
        assert plan.size[row].sum() == count
        assert set(sizes(plan, row)) <= {1.0, 9.0}
        assert (count - n) % 8 == 0 and sizes(plan, row).count(9.0) == (count - n) // 8


def test_merge_extremes() -> None:
    ctx = grid((1, 24, 24))
    same = MustDropMerge(threshold=1.01).plan(ctx, ctx.counts)
    assert kept(same) == list(range(576)) and torch.equal(ops.apply(same, ctx.x), ctx.x)
    everything = MustDropMerge(threshold=-1.0).plan(ctx, ctx.counts)
    assert everything.kept == (64,) and set(sizes(everything)) == {9.0}
    assert kept(everything) == [w[-1] for w in slow_windows(Layout(1, 24, 24))]


def test_constant_windows_merge_to_themselves() -> None:
    layout, x = Layout(1, 6, 6), normal(1, 36, WIDTH)
    for window in slow_windows(layout)[1:3]:
        x[0, window] = x[0, window[0]].clone()
    plan = MustDropMerge(threshold=0.999).plan(context(x, (36,), (layout,)), (36,))
    assert plan.kept == (20,)
    out, places = ops.apply(plan, x)[0], kept(plan)
    assert (out - x[0, places]).abs().max() <= 1e-6
    lonely = [slot for slot, size in enumerate(sizes(plan)) if size == 1]
    assert torch.equal(out[lonely], x[0, places][lonely])


def test_windows_are_ranked_by_planted_similarity() -> None:
    layout = Layout(1, 6, 9)
    windows = slow_windows(layout)
    x, order = torch.empty(1, 54, WIDTH), [4, 0, 5, 2, 1, 3]
    for rank, number in enumerate(order):  # the later, the less alike
        centre = normal(WIDTH, seed=number)
        x[0, windows[number]] = centre + 0.3 * (rank + 1) * normal(9, WIDTH, seed=10 + number)
    for taken in range(1, 7):
        plan = MustDropMerge().plan(context(x, (54,), (layout,)), (54 - 8 * taken,))
        merged = [p for p, size in zip(kept(plan), sizes(plan), strict=True) if size == 9]
        assert merged == sorted(windows[number][-1] for number in order[:taken])


def test_batch_min_is_the_released_code() -> None:
    ctx = grid((1, 9, 9), (1, 9, 9), (1, 9, 9), spread=0.6, seed=3)
    similar = [[slow_similarity(x, w) for w in slow_windows(Layout(1, 9, 9))] for x in ctx.x]
    threshold = sorted(s for image in similar for s in image)[13]
    qualify = [sum(s >= threshold for s in image) for image in similar]
    assert len(set(qualify)) > 1 and min(qualify) > 0
    plan = MustDropMerge(threshold=threshold).plan(ctx, ctx.counts)
    assert plan.kept == tuple(81 - 8 * q for q in qualify)
    least = MustDropMerge(threshold=threshold, batch="min").plan(ctx, ctx.counts)
    assert least.kept == (81 - 8 * min(qualify),) * 3
    for row in range(3):
        assert kept(least, row) == slow_merge(ctx.x[row], Layout(1, 9, 9), min(qualify))[0]


def test_images_of_a_batch_do_not_mix() -> None:
    shapes = [(1, 7, 8), (1, 3, 3), (2, 6, 6)]
    ctx = grid(*shapes, spread=0.6)
    plan = MustDropMerge(threshold=0.7).plan(ctx, ctx.counts)
    out = ops.apply(plan, ctx.x)
    for row, shape in enumerate(shapes):
        n = Layout(*shape).n
        alone = context(ctx.x[row : row + 1, :n], (n,), (Layout(*shape),))
        single = MustDropMerge(threshold=0.7).plan(alone, (n,))
        assert kept(plan, row) == kept(single)
        assert torch.equal(out[row, : plan.kept[row]], ops.apply(single, alone.x)[0])


def test_a_grid_without_a_whole_window_stays() -> None:
    ctx = grid((1, 2, 9), (3, 5, 2))
    assert MustDropMerge(threshold=-1.0).plan(ctx, ctx.counts).kept == ctx.counts


def test_token_sizes_weigh_the_mean_and_add_up() -> None:
    base = grid((1, 6, 7), spread=0.5)
    size = 1 + (uniform(1, 42) * 5).floor()
    ctx = context(base.x, base.counts, base.layout, token_size=size)
    plan = MustDropMerge(threshold=-1.0).plan(ctx, ctx.counts)
    out = ops.apply(plan, ctx.x)[0]
    for window in slow_windows(Layout(1, 6, 7)):
        slot = kept(plan).index(window[-1])
        share = size[0, window] / size[0, window].sum()
        assert plan.size is not None and plan.size[0, slot] == size[0, window].sum()
        assert (out[slot] - (share[:, None] * ctx.x[0, window]).sum(0)).abs().max() <= 1e-5
    alone = [p for p in kept(plan) if p % 7 == 6]
    assert [sizes(plan)[kept(plan).index(p)] for p in alone] == size[0, alone].tolist()


@pytest.mark.parametrize("k", range(4, 36))
def test_fixed_budget_is_exact_and_cuts_the_last_window(k: int) -> None:
    ctx = grid((1, 6, 6), spread=0.5, seed=4)
    layout = Layout(1, 6, 6)
    plan = MustDropMerge().plan(ctx, (k,))
    assert plan.kept == (k,) and plan.size is not None and plan.size.sum() == 36
    plan.check(ctx.visual)
    full, rest = divmod(36 - k, 8)
    expected = sorted([9.0] * full + [rest + 1.0] * (rest > 0))
    assert sorted(s for s in sizes(plan) if s > 1) == expected
    ranked = sorted(slow_windows(layout), key=lambda w: -slow_similarity(ctx.x[0], w))
    gone = {p for window in ranked[:full] for p in window[:-1]}
    left = [p for p in range(36) if p not in gone]
    if rest:
        part = [p for p in left if p not in kept(plan)]
        assert len(part) == rest and set(part) <= set(ranked[full])
        slot = kept(plan).index(ranked[full][-1])
        mean = ctx.x[0, [*part, ranked[full][-1]]].mean(0)
        assert (ops.apply(plan, ctx.x)[0, slot] - mean).abs().max() <= 1e-5
    else:
        assert kept(plan) == left


def test_budgets_and_grids_that_cannot_be() -> None:
    ctx = grid((1, 6, 6), (1, 7, 7))
    with pytest.raises(InvalidBudget, match=r"3 tokens asked of image 0.* 4 windows .* 4 of 36"):
        MustDropMerge().plan(ctx, (3, 20))
    assert MustDropMerge().plan(ctx, (4, 17)).kept == (4, 17)
    with pytest.raises(InvalidBudget, match="at least 17 of 49"):
        MustDropMerge().plan(ctx, (20, 16))
    for layout in (None, Layout(1, 5, 6)):
        with pytest.raises(InvalidInput, match="the grid of image 1 is not known"):
            MustDropMerge().plan(context(ctx.x, ctx.counts, (ctx.layout[0], layout)), ctx.counts)
    with pytest.raises(InvalidRecipe, match="window=1"):
        MustDropMerge(window=1)


# --------------------------------------------------------------------------------------------
# the filter


def ranks(n: int, seed: int = 0) -> Tensor:
    """`cls_rank` of one tower image: 0, 1/n, 2/n, ... in an order of its own."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return torch.argsort(order).double() / n


def asked(attention: Tensor, rank: Tensor | None = None, counts: tuple[int, ...] = ()) -> Context:
    """The filter's context for `attn_text` [R, T, N]."""
    r, _, n = attention.shape
    rank = torch.stack([ranks(n, row) for row in range(r)]) if rank is None else rank
    return context(
        normal(r, n, WIDTH),
        counts or (n,) * r,
        (None,) * r,
        "decoder.3",
        attn_text=attention,
        cls_rank=rank,
    )


def peaked(r: int, t: int, n: int, seed: int = 0) -> Tensor:
    """Rows of a softmax in which visual tokens share 60%."""
    return 0.6 * (3 * normal(r, t, n, seed=seed)).softmax(-1)


def slow_rule(attention: Tensor, rank: Tensor, tau_g: float, tau_i: float, key: float) -> list[int]:
    """The paper's rule for one image, attention [T, N]."""
    total = float(attention.double().sum())
    out = []
    for j in range(attention.shape[1]):
        column = attention[:, j].double()
        weak = float(column.sum()) < tau_g * total and float(column.max()) < tau_i
        if float(rank[j]) < key or not weak:
            out.append(j)
    return out


TAUS = [(0.02, 0.01), (0.011, 0.01), (0.1, 0.05), (0.001, 0.2), (1.0, 0.02), (0.05, 1.0)]


@pytest.mark.parametrize(("tau_g", "tau_i"), TAUS)
def test_filter_is_the_papers_rule(tau_g: float, tau_i: float) -> None:
    attention = peaked(3, 7, 60)
    ctx = asked(attention)
    method = MustDropFilter(tau_g=tau_g, tau_i=tau_i)
    plan = method.plan(ctx, ctx.counts)
    plan.check(ctx.visual)
    for row in range(3):
        expected = slow_rule(attention[row], ctx.signals["cls_rank"][row], tau_g, tau_i, 0.08)
        assert kept(plan, row) == expected  # ascending: order preserved


@pytest.mark.parametrize("n", [1, 5, 12, 13, 24, 25, 50, 64, 75, 100, 175, 300, 400, 575, 576])
def test_key_set_has_the_size_of_the_paper(n: int) -> None:
    """Tokens of the key set alone survive when everything else is weak."""
    ctx = asked(torch.full((1, 3, n), 0.6 / n))
    plan = MustDropFilter(tau_g=1.0, tau_i=1.0).plan(ctx, ctx.counts)
    if n == 1:
        assert plan.kept == (1,)
        return
    size = -(-8 * n // 100)
    best = ctx.signals["cls_rank"][0].argsort()[:size].sort().values
    assert kept(plan) == best.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"tau_g": 1.0, "tau_i": 0.0},
        {"tau_g": 0.0, "tau_i": 1.0},
        {"tau_g": 0.3, "tau_i": 0.0},
        {"tau_g": 1.0, "tau_i": 1.0, "key": 1.0},
    ],
    ids=str,
)
def test_settings_that_filter_nothing(options: dict[str, float]) -> None:
    ctx = asked(peaked(2, 5, 30), counts=(30, 17))
    plan = MustDropFilter(**options).plan(ctx, ctx.counts)
    assert plan.kept == (30, 17) and kept(plan, 1) == list(range(17))


def test_kept_sets_are_nested_and_monotone_in_both_thresholds() -> None:
    ctx = asked(peaked(2, 6, 80, seed=2))
    steps = (0.0, 0.001, 0.01, 0.03, 0.1, 0.4, 1.0)
    grown = {
        (g, i): [
            set(kept(MustDropFilter(tau_g=g, tau_i=i).plan(ctx, ctx.counts), row))
            for row in range(2)
        ]
        for g in steps
        for i in steps
    }
    shrunk = 0
    for g, i in grown:
        for h, j in grown:
            if h >= g and j >= i:
                for less, more in zip(grown[h, j], grown[g, i], strict=True):
                    assert less <= more
                    shrunk += less < more
    assert shrunk


@pytest.mark.parametrize("key", [0.0, 0.08, 0.5])
def test_key_tokens_are_never_dropped(key: float) -> None:
    ctx = asked(peaked(2, 6, 50))
    method = MustDropFilter(tau_g=1.0, tau_i=1.0, key=key)
    plan = method.plan(ctx, ctx.counts)
    number = max(1, math.ceil(key * 50))
    assert plan.kept == (number, number)  # never nothing at all
    for row in range(2):
        keys = (ctx.signals["cls_rank"][row] < key).nonzero()[:, 0].tolist()
        assert set(keys) <= set(kept(plan, row))
        for k in range(len(keys) or 1, 50):
            fixed = MustDropFilter(key=key).plan(ctx, (k, k))
            assert set(keys) <= set(kept(fixed, row))


@pytest.mark.parametrize("tau_g", [0.011, 0.03, 0.1, 0.5, 1.0])
def test_few_tokens_pass_the_global_test(tau_g: float) -> None:
    for attention in (peaked(1, 6, 200), torch.full((1, 6, 200), 0.6 / 200)):
        ctx = asked(attention, rank=torch.full((1, 200), 0.99))
        plan = MustDropFilter(tau_g=tau_g, tau_i=1.0, key=0.0).plan(ctx, ctx.counts)
        assert plan.kept[0] <= max(1, math.floor(1 / tau_g))


@pytest.mark.parametrize(("tau_g", "tau_i"), TAUS)
def test_exact_budget_meets_the_rule_where_they_agree(tau_g: float, tau_i: float) -> None:
    ctx = asked(peaked(3, 7, 60, seed=5))
    method = MustDropFilter(tau_g=tau_g, tau_i=tau_i)
    rule = method.plan(ctx, ctx.counts)
    exact = method.plan(ctx, rule.kept)
    assert [kept(exact, row) for row in range(3)] == [kept(rule, row) for row in range(3)]
    for k in (1, 7, 30, 59):
        plan = method.plan(ctx, (k, k, 60))
        assert plan.kept == (k, k, 60)
        for row in range(2):
            less, more = sorted([set(kept(plan, row)), set(kept(rule, row))], key=len)
            assert less <= more


def test_images_have_thresholds_of_their_own() -> None:
    """The second image is hardly looked at: with one threshold for both it would vanish."""
    attention = peaked(2, 6, 40)
    attention[1] *= 1e-3
    attention[1, :, 25:] = 0.5  # padding must not count
    ctx = asked(attention, counts=(40, 25))
    method = MustDropFilter(tau_g=0.03, tau_i=0.5)
    plan = method.plan(ctx, ctx.counts)
    alone = asked(attention[1:, :, :25], ctx.signals["cls_rank"][1:, :25])
    assert kept(plan, 1) == kept(method.plan(alone, alone.counts))
    again = alone.signals["attn_text"] * 1e3
    same = asked(again, ctx.signals["cls_rank"][1:, :25])
    assert kept(plan, 1) == kept(method.plan(same, same.counts))
    assert max(kept(plan, 1)) < 25


def test_absent_text_rows_change_nothing() -> None:
    ctx = asked(peaked(2, 6, 40))
    longer = asked(F.pad(ctx.signals["attn_text"], (0, 0, 0, 4)), ctx.signals["cls_rank"])
    method = MustDropFilter(tau_g=0.03, tau_i=0.05)
    a, b = method.plan(ctx, ctx.counts), method.plan(longer, ctx.counts)
    assert [kept(a, r) for r in (0, 1)] == [kept(b, r) for r in (0, 1)]


def test_without_text_behind_the_image_nothing_is_weak() -> None:
    ctx = asked(torch.zeros(1, 1, 40))
    assert MustDropFilter().plan(ctx, ctx.counts).kept == (40,)
    keys = (ctx.signals["cls_rank"][0] < 0.08).nonzero()[:, 0].tolist()
    plan = MustDropFilter().plan(ctx, (10,))
    assert set(keys) <= set(kept(plan)) and plan.kept == (10,)


def test_best_key_tokens_stay_when_there_is_no_room_for_all() -> None:
    attention = 1e-3 * peaked(1, 4, 100, seed=7)
    ctx = asked(attention)
    keys = (ctx.signals["cls_rank"][0] < 0.08).nonzero()[:, 0].tolist()
    share, single = attention[0].double().sum(0), attention[0].double().amax(0)
    score = (share / (0.001 * share.sum())).maximum(single / 0.001)
    best = sorted(sorted(keys, key=lambda j: -float(score[j]))[:3])
    assert kept(MustDropFilter().plan(ctx, (3,))) == best


def test_key_tokens_are_ranked_as_finely_as_the_others() -> None:
    """Thresholds of 1 make scores of 1 / N and below."""
    attention = 0.6 * normal(1, 4, 576).softmax(-1)
    ctx = asked(attention)
    keys = (ctx.signals["cls_rank"][0] < 0.08).nonzero()[:, 0].tolist()
    share = attention[0].double().sum(0)
    score = (share / share.sum()).maximum(attention[0].double().amax(0))
    best = sorted(sorted(keys, key=lambda j: -float(score[j]))[:20])
    assert kept(MustDropFilter(tau_g=1.0, tau_i=1.0).plan(ctx, (20,))) == best


@pytest.mark.parametrize("name", ["tau_g", "tau_i", "key"])
def test_thresholds_are_shares(name: str) -> None:
    for value in (-0.1, 1.1):
        with pytest.raises(InvalidRecipe, match=f"{name}={value}, use 0 to 1"):
            MustDropFilter(**{name: value})


# --------------------------------------------------------------------------------------------
# the cache policy


def test_cache_keeps_survivors_behind_the_first_layers() -> None:
    survivors = uniform(2, 20) < 0.4
    survivors[1, 15:] = False
    for layer, first in [(0, 2), (1, 2), (2, 2), (7, 2), (0, 0)]:
        ctx = context(
            normal(2, 20, WIDTH), (20, 15), (None,) * 2, f"decoder.{layer}", survivors=survivors
        )
        plan = MustDropCache(first=first).plan(ctx, ctx.counts)
        stay = ctx.visual if layer < first else survivors
        assert [kept(plan, r) for r in (0, 1)] == [row.nonzero()[:, 0].tolist() for row in stay]
    with pytest.raises(InvalidRecipe, match="first=-1"):
        MustDropCache(first=-1)


# --------------------------------------------------------------------------------------------
# the composite as data


def build(depth: int, keep: Any = None, host: Host | None = None, **params: Any) -> vtc.Recipe:
    return vtc.Recipe.build("mustdrop", depth, keep, host=host or Host(depth), **params)


def layers_of(recipe: vtc.Recipe) -> list[int | None]:
    return [step.site.layer for step in recipe.steps if step.site.kind == "decoder"]


@pytest.mark.parametrize(
    ("depth", "after"),
    [
        (4, [0, 1, 2]),
        (6, [0, 1, 2, 3]),
        (8, [1, 2, 3, 4]),
        (24, [2, 5, 8, 11]),
        (28, [2, 5, 9, 12]),
        (32, [2, 6, 10, 14]),
        (40, [3, 8, 13, 18]),
    ],
)
def test_layers_scale_with_the_depth(depth: int, after: list[int]) -> None:
    recipe = build(depth)
    assert [step.at for step in recipe.steps] == [
        "vision.1",
        *(f"decoder.{layer + 1}" for layer in after),
        "cache",
    ]
    assert [step.method for step in recipe.steps] == [
        "mustdrop_merge",
        *["mustdrop_filter"] * len(after),
        "mustdrop_cache",
    ]
    assert recipe.steps[-1].build().first == after[0]
    assert all(step.keep == "auto" for step in recipe.steps)
    assert recipe.steps[0].build() == MustDropMerge(threshold=0.8, window=3)


@pytest.mark.parametrize("depth", range(1, 81))
def test_layers_of_every_depth_ascend_and_end_before_the_last(depth: int) -> None:
    if depth < 2:
        with pytest.raises(InvalidBudget, match="mustdrop .* has 1"):
            build(depth)
        return
    layers = layers_of(build(depth))
    assert layers and layers == sorted(set(layers)) and layers[0] >= 1 and layers[-1] < depth
    if depth >= 7:
        exact = [math.floor(p * depth / 32 + 0.5) for p in (2, 6, 10, 14)]
        assert layers == [layer + 1 for layer in exact]


@pytest.mark.parametrize(
    ("preset", "taus"),
    [
        (None, (0.001, 0.001)),
        (192, (0.001, 0.001)),
        (128, (0.0012, 0.001)),
        (64, (0.011, 0.01)),
    ],
)
def test_presets_are_the_papers_thresholds(preset: int | None, taus: tuple[float, float]) -> None:
    for keep in (None, "auto"):
        recipe = build(32, keep, preset=preset)
        filters = [s.build() for s in recipe.steps if s.method == "mustdrop_filter"]
        assert filters == [MustDropFilter(*taus, key=0.08)] * 4
    assert set(PRESETS) == {192, 128, 64}


def test_thresholds_of_your_own() -> None:
    for options, taus in [
        ({"tau_g": 0.005, "tau_i": 0.001}, (0.005, 0.001)),
        ({"tau_g": 0.005}, (0.005, 0.001)),
        ({"preset": 64, "tau_i": 0.3}, (0.011, 0.3)),
    ]:
        steps = build(32, **options).steps
        filters = [s.build() for s in steps if s.method == "mustdrop_filter"]
        assert filters == [MustDropFilter(*taus, key=0.08)] * 4


def test_keep_is_what_the_last_filter_leaves() -> None:
    filters = [s.keep for s in build(32, 64).steps if s.method == "mustdrop_filter"]
    assert filters == [128, 102, 81, 64]
    shares = [s.keep for s in build(32, 0.25).steps if s.method == "mustdrop_filter"]
    assert shares == pytest.approx([0.5, 0.25 * 2 ** (2 / 3), 0.25 * 2 ** (1 / 3), 0.25])
    assert [s.keep for s in build(32, 0.8).steps][1:4] == [1.0, 1.0, pytest.approx(1.0)]
    assert build(32, 1.0).steps[0].params == {"least": 1.0}
    for keep in (0, -3, 1.5, 0.0, True, "half"):
        with pytest.raises(InvalidBudget):
            build(32, keep)


def test_what_cannot_go_together() -> None:
    for keep in (0.5, 64, 1.0):
        for own in ({"preset": 64}, {"tau_g": 0.01}, {"tau_i": 0.01}):
            with pytest.raises(InvalidBudget, match=r"an exact budget: give one of them"):
                build(32, keep, **own)
    model = family("llava").model
    for options in ({"at": "decoder.2", "keep": 0.5}, {"schedule": {2: 0.5}}, {"at": "cache"}):
        with pytest.raises(InvalidRecipe, match="knows its own sites: give neither at nor sched"):
            vtc.attach(model, "mustdrop", **options)
    oracle.refuse_hooks(model, oracle.text_model(model))


@pytest.mark.parametrize(
    "wrong",
    [{"preset": 256}, {"preset": "64"}, {"vision": "no"}, {"decode": 2}, {"tau_g": "all"}],
    ids=str,
)
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidRecipe, match=name):
        vtc.attach(family("llava").model, "mustdrop", strict=False, **wrong).detach()


def test_switches() -> None:
    kinds = {
        ("vision",): {"mustdrop_filter", "mustdrop_cache"},
        ("decode",): {"mustdrop_merge", "mustdrop_filter"},
        ("prefill",): {"mustdrop_merge"},
        ("prefill", "decode"): {"mustdrop_merge"},
        ("vision", "decode"): {"mustdrop_filter"},
    }
    for off, methods in kinds.items():
        recipe = build(32, **dict.fromkeys(off, False))
        assert {step.method for step in recipe.steps} == methods
    for off in (("vision", "prefill"), ("vision", "prefill", "decode")):
        with pytest.raises(InvalidBudget, match="every stage is switched off"):
            build(32, **dict.fromkeys(off, False))


def test_rotary_towers_merge_at_the_projector() -> None:
    recipe = build(32, host=Host(32, None, rotary_tower=True))
    assert recipe.steps[0].at == "projector"
    with vtc.attach(family("qwen2_5_vl").model, "mustdrop", strict=False) as session:
        assert session.recipe.steps[0].at == "projector"


@pytest.mark.parametrize("form", ["mapping", "step", "recipe"])
def test_a_step_cannot_be_a_composite(form: str) -> None:
    step = vtc.Step("mustdrop", "vision.1", 0.5)
    data = {"steps": [{"method": "mustdrop", "at": "vision.1", "keep": 0.5}]}
    given = {"mapping": data, "step": step, "recipe": vtc.Recipe((step,))}[form]
    with pytest.raises(InvalidRecipe, match=r"made of several steps: use vtc\.attach\(model, 'mu"):
        vtc.attach(family("llava").model, given)


def test_no_other_model_than_those_with_the_site() -> None:
    fam = families.make("mistral3")
    with pytest.raises(UnsupportedSite, match=r"no site 'vision\.1'.*vision=False"):
        vtc.attach(fam.model, "mustdrop", keep=0.25)
    square = families.make("mistral3", images_per_row=(1, 1, 1))
    inputs = square.single(2)
    with vtc.attach(fam.model, "mustdrop", keep=0.25, vision=False) as session:
        got = generate(fam, inputs, 6)
    compare(fam, session.trace, inputs, *got)


# --------------------------------------------------------------------------------------------
# on models


@functools.cache
def family(name: str, attn: str = "sdpa") -> families.Family:
    return families.make(name, attn)


@functools.cache
def reference(name: str, attn: str = "sdpa") -> families.Family:
    """The same weights in a model that no session ever touches."""
    return families.make(name, attn)


def generate(
    fam: families.Family, inputs: families.Inputs, steps: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    with torch.no_grad():
        out = fam.model.generate(
            **inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True
        )
    return out.logits, out.sequences[:, inputs["input_ids"].shape[1] :]


def worst(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@contextmanager
def masking(
    fam: families.Family, seen: Iterable[Reduction], inputs: families.Inputs
) -> Iterator[trace.Masks]:
    """What the reference has to mask; inside, its vision tower masks too."""
    seen = list(seen)
    masks = trace.masks(seen, fam.visual(inputs))
    sites = [r.site for r in seen if r.site.startswith("vision")]
    if not sites:
        yield masks
        return
    drops = trace.tower_reductions(seen, sites.count(sites[0]))
    with towerref.masked_tower(fam, drops):
        gone = towerref.zero_columns(fam, inputs)
    masks.keep["projector"] = ~gone
    with towerref.masked_tower(fam, drops):
        yield masks


def compare(
    ref: families.Family,
    seen: Iterable[Reduction],
    inputs: families.Inputs,
    logits: Iterable[Tensor],
    tokens: Tensor,
) -> trace.Masks:
    with masking(ref, seen, inputs) as masks:
        assert masks.evict and any(not bool(keep.all()) for keep in masks.keep.values())
        expected, greedy = oracle.run(
            ref,
            inputs,
            keep=masks.keep,
            mix=masks.mix,
            evict=masks.evict,
            steps=tokens.shape[1],
        )
    assert torch.equal(tokens, greedy)
    assert worst(logits, expected) <= TOLERANCE
    return masks


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", ["batch", "alone"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_decoding_equals_the_masked_dense_model(name: str, rows: str, attn: str) -> None:
    fam, ref = family(name, attn), reference(name, attn)
    inputs = fam.inputs if rows == "batch" else fam.single(1)
    recipe = vtc.Recipe.build("mustdrop", 4, 0.25, host=vtc.session.adapter_for(fam.model).host())
    merge = vtc.Step("mustdrop_merge", recipe.steps[0].at, "auto", params={"threshold": 0.0})
    with vtc.attach(fam.model, vtc.Recipe((merge, *recipe.steps[1:]))) as session:
        got = generate(fam, inputs, 16)
    compare(ref, session.trace, inputs, *got)


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_5_vl"])
def test_thresholds_equal_the_masked_dense_model(name: str) -> None:
    fam, ref = family(name), reference(name)
    params = {"tau_g": 0.03, "tau_i": 0.05}
    steps = [vtc.Step("mustdrop_filter", f"decoder.{i}", "auto", params=params) for i in (1, 3)]
    cache = vtc.Step("mustdrop_cache", "cache", "auto", params={"first": 1})
    with vtc.attach(fam.model, vtc.Recipe((*steps, cache))) as session:
        got = generate(fam, fam.inputs, 6)
    compare(ref, session.trace, fam.inputs, *got)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_beams_equal_the_masked_model(name: str) -> None:
    fam, ref = family(name), reference(name)
    options = {"num_beams": 3, "output_logits": True, "return_dict_in_generate": True}
    with (
        torch.no_grad(),
        vtc.attach(fam.model, "mustdrop", keep=0.25, vision=False) as session,
    ):
        got = fam.model.generate(**fam.inputs, max_new_tokens=8, **options)
    masks = trace.masks(session.trace, fam.visual().repeat_interleave(3, 0))
    with torch.no_grad(), maskref.masked(ref.model, masks.keep, evict=masks.evict):
        expected = ref.model.generate(**fam.inputs, max_new_tokens=8, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert worst(got.logits, expected.logits) <= TOLERANCE


def eager_choice(
    name: str, layer: int, tau_g: float, tau_i: float
) -> tuple[list[list[int]], list[float]]:
    """Kept places of every image from complete attention maps, and margins to the thresholds."""
    ref = reference(name, "eager")
    visual, valid = ref.visual(), ref.inputs["attention_mask"].bool()
    with torch.no_grad():
        whole = ref.model(**ref.inputs, output_attentions=True).attentions[layer].mean(1)
        tower = towerref.parts(ref.model)[0]
        maps = tower(ref.inputs["pixel_values"], output_attentions=True).attentions
    inner = maps[3].mean(1)  # both read the features behind or in front of the last block
    score = inner[:, 0, 1:] if name == "llava" else inner.mean(1)
    out, margins = [], []
    for image, (sample, columns) in enumerate(trace.rows_of(visual)):
        last = int(visual[sample].nonzero().max())
        text = [c for c in range(last + 1, visual.shape[1]) if valid[sample, c]]
        rows = whole[sample, text][:, columns]
        size = math.ceil(0.08 * len(columns))
        key = set(score[image].topk(size).indices.tolist())
        share, single = rows.sum(0), rows.amax(0)
        margins += (share / share.sum() - tau_g).abs().tolist() + (single - tau_i).abs().tolist()
        weak = (share < tau_g * share.sum()) & (single < tau_i)
        out.append([j for j in range(len(columns)) if j in key or not weak[j]])
    return out, margins


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_filter_equals_the_rule_on_full_eager_attention(name: str, attn: str) -> None:
    fam, (tau_g, tau_i) = family(name, attn), (0.03, 0.05)
    step = vtc.Step("mustdrop_filter", "decoder.2", "auto", params={"tau_g": tau_g, "tau_i": tau_i})
    with vtc.attach(fam.model, step) as session, torch.no_grad():
        fam.model(**fam.inputs)
    expected, margins = eager_choice(name, 1, tau_g, tau_i)
    assert min(margins) > EXACT  # no decision hangs on rounding
    (reduction,) = session.trace
    got = [reduction.source[r, :n].tolist() for r, n in enumerate(reduction.n_out)]
    assert got == expected and all(
        n < m for n, m in zip(reduction.n_out, reduction.n_in, strict=True)
    )


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_5_vl"])
def test_thresholds_that_filter_nothing_change_no_bit(name: str) -> None:
    fam = family(name)
    plain = generate(fam, fam.inputs, 6)
    params = {"tau_g": 1.0, "tau_i": 0.0}
    steps = [vtc.Step("mustdrop_filter", f"decoder.{i}", "auto", params=params) for i in (1, 2, 3)]
    where = "projector" if name == "qwen2_5_vl" else "vision.1"
    merge = vtc.Step("mustdrop_merge", where, "auto", params={"threshold": 1.01})
    cache = vtc.Step("mustdrop_cache", "cache", "auto", params={"first": 0})
    with vtc.attach(fam.model, vtc.Recipe((merge, *steps, cache))) as session:
        got = generate(fam, fam.inputs, 6)
    assert len(session.trace) >= 4 and all(r.n_in == r.n_out for r in session.trace)
    assert all(torch.equal(a, b) for a, b in zip(got[0], plain[0], strict=True))


def test_text_and_system_tokens_are_never_touched() -> None:
    fam = family("llava")
    seen: list[Tensor] = []
    layers = oracle.text_model(fam.model).layers
    look = layers[1].register_forward_pre_hook(
        lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    inputs = fam.single(1)
    step = vtc.Step("mustdrop_filter", "decoder.1", 0.25)
    with torch.no_grad():
        fam.model(**inputs)
        look.remove()
        session = vtc.attach(fam.model, step)
        look = layers[1].register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        fam.model(**inputs)
    look.remove()
    session.detach()
    left = trace.masks(session.trace, fam.visual(inputs)).keep[1][0]
    assert left[~fam.visual(inputs)[0]].all() and left.sum() < len(left)
    assert torch.equal(seen[1][0], seen[0][0, left])


def test_composed_plans_track_original_places() -> None:
    fam = family("qwen2_5_vl")
    with vtc.attach(fam.model, "mustdrop", keep=0.25, vision=False) as session, torch.no_grad():
        fam.model(**fam.inputs)
    steps = [r for r in session.trace if r.site.startswith("decoder")]
    assert [r.site for r in steps] == ["decoder.1", "decoder.2", "decoder.3"]
    whole: Plan | None = None
    ids = [list(range(n)) for n in steps[0].n_in]
    for reduction in steps:
        assert reduction.plan is not None
        whole = reduction.plan if whole is None else whole.then(reduction.plan)
        ids = [[row[j] for j in kept(reduction.plan, r)] for r, row in enumerate(ids)]
        assert [kept(whole, r) for r in range(len(ids))] == ids
        got = [reduction.source[r, :n].tolist() for r, n in enumerate(reduction.n_out)]
        assert got == ids
    for reduction in session.trace:
        if reduction.site.startswith("cache"):
            got = [reduction.source[r, :n].tolist() for r, n in enumerate(reduction.n_out)]
            assert got == ids


@pytest.fixture
def deep(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> families.Family:
    monkeypatch.setitem(families.TEXT, "num_hidden_layers", request.param)
    return families.make("llava")


def text_length(fam: families.Family, inputs: families.Inputs) -> int:
    return int((~fam.visual(inputs) & inputs["attention_mask"].bool()).sum())


@pytest.mark.parametrize("deep", [4, 8, 32], indirect=True)
def test_cache_lengths_after_the_prefill(deep: families.Family) -> None:
    inputs = deep.single(1)
    depth = len(oracle.text_model(deep.model).layers)
    first = {4: 0, 8: 1, 32: 2}[depth]
    with (
        torch.no_grad(),
        vtc.attach(deep.model, "mustdrop", keep=0.25, vision=False) as session,
    ):
        cache = deep.model(**inputs).past_key_values
    length, text = inputs["input_ids"].shape[1], text_length(deep, inputs)
    final = text + sum(session.trace[-1].n_out)
    assert final == text + 2 * 16 < length
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == [length] * first + [final] * (depth - first)
    assert [layer.values.shape[2] for layer in cache.layers] == lengths
    assert cache.get_seq_length() == length


@pytest.mark.parametrize("deep", [8], indirect=True)
def test_deeper_model_equals_the_masked_dense_model(deep: families.Family) -> None:
    with vtc.attach(deep.model, "mustdrop", keep=0.25, vision=False) as session:
        got = generate(deep, deep.inputs, 8)
    masks = compare(deep, session.trace, deep.inputs, *got)
    assert min(masks.evict) == 1 and set(masks.keep) == {2, 3, 4, 5}


@pytest.mark.parametrize("deep", [32], indirect=True)
def test_report_shows_both_averages(deep: families.Family) -> None:
    params = {"tau_g": 0.03, "tau_i": 0.05}
    filters = [
        vtc.Step("mustdrop_filter", f"decoder.{i}", "auto", params=params) for i in (3, 7, 11, 15)
    ]
    merge = vtc.Step("mustdrop_merge", "vision.1", "auto", params={"threshold": -1.0})
    with vtc.attach(deep.model, vtc.Recipe((merge, *filters))) as session:
        generate(deep, deep.inputs, 3)
    n0, n1, n2, n3, n4 = (sum(r.n_out) / 3 for r in session.trace if not r.site.startswith("cache"))
    assert n0 == 32 and n0 > n1
    leaving = (2 * n0 + 4 * n1 + 4 * n2 + 4 * n3 + 18 * n4) / 32
    through = (3 * n0 + 4 * n1 + 4 * n2 + 4 * n3 + 17 * n4) / 32
    stats = session.stats()
    assert stats["visual_tokens_leaving"] == pytest.approx(leaving)
    assert stats["visual_tokens"] == pytest.approx(through)
    report = session.report()
    assert f"{through:.1f} processed; {leaving:.1f} counted as they leave a layer" in report


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_steps_written_to_yaml_act_alike(name: str) -> None:
    fam = family(name)
    with vtc.attach(fam.model, "mustdrop", keep=0.25) as session:
        got = generate(fam, fam.inputs, 4)
    again = vtc.Recipe.load(session.recipe.dump())
    assert again == session.recipe
    with vtc.attach(fam.model, again) as second:
        same = generate(fam, fam.inputs, 4)
    assert all(torch.equal(a, b) for a, b in zip(got[0], same[0], strict=True))
    assert [r.n_out for r in second.trace] == [r.n_out for r in session.trace]


@pytest.mark.parametrize("options", [{"keep": 8}, {"preset": 64}, {"tau_g": 0.1}])
def test_budgets_without_the_prefill_stage_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidBudget, match="belong to the prefill stage"):
        vtc.Recipe.build("mustdrop", 32, prefill=False, **options)


@pytest.mark.parametrize("keep", [1, 40, 60, 64, 500, 0.5, 0.9, 1.0])
def test_exact_budgets_hold_however_much_could_be_merged(keep: float | int) -> None:
    """Every window qualifies, and the merge still stops at the budget."""
    fam = family("llava")
    recipe = vtc.Recipe.build("mustdrop", families.LAYERS, keep)
    merge = recipe.steps[0]
    eager = dataclasses.replace(merge, params={**merge.params, "threshold": -1.0})
    with (
        vtc.attach(fam.model, vtc.Recipe((eager, *recipe.steps[1:]))) as session,
        torch.no_grad(),
    ):
        fam.model(**fam.inputs, use_cache=True)
    wanted = min(keep, 64) if isinstance(keep, int) else round(64 * keep)
    last = [r for r in session.trace if r.site.startswith("decoder")][-1]
    assert last.n_out == (wanted,) * 3
    merged = session.trace[0]
    assert all(n == 64 - 8 * min(4, (64 - wanted) // 8) for n in merged.n_out)


def test_misplaced_keys_of_a_recipe_are_explained() -> None:
    step = {"method": "mustdrop_merge", "at": "vision.1", "keep": "auto", "window": 2}
    with pytest.raises(InvalidRecipe, match=r"write it as params: \{window: 2\}"):
        vtc.Recipe.load({"steps": [step]})
    with pytest.raises(InvalidRecipe, match="'positions' belongs inside a step"):
        vtc.Recipe.load({"steps": [], "positions": "renumber"})
    with pytest.raises(InvalidRecipe, match="mustdrop_merge, mustdrop_filter, mustdrop_cache"):
        vtc.Recipe.load({"steps": [{"method": "mustdrop", "keep": 64}]})
