"""zoo_prune: sensitivity against brute force and autograd, selection against a naive loop."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc import ops
from vtc.algorithms.projector import Projector
from vtc.context import Context, Layout, Signals, Site
from vtc.errors import InvalidInput, InvalidRecipe, UnsupportedModel
from vtc.methods.zoo_prune import ZooPrune
from vtc.plan import Plan

U, H, D, N = 64, 96, 48, 40
FULL = (576, 1024, 4096, 4096, 64)  # LLaVA-1.5-7B: tokens, U, H, D, directions
DENSE_PREFILL = 4.2e12  # MAC, of LLaVA-1.5-7B with 576 image tokens


class Normed(nn.Module):
    """norm -> Linear -> GELU -> Linear; the norm sees parts of the unit when it is narrower."""

    def __init__(self, norm: nn.Module, out: int = D) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = nn.Sequential(nn.Linear(U, H), nn.GELU(), nn.Linear(H, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x).reshape(-1, U))


def build(kind: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m.forward(x)  # noqa: E731
        if kind == "linear":
            return nn.Linear(U, D, bias=False), run
        if kind in ("llava", "silu", "wide"):
            act = nn.SiLU() if kind == "silu" else nn.GELU(approximate="tanh")
            out = 2 * H if kind == "wide" else D
            return nn.Sequential(nn.Linear(U, H), act, nn.Dropout(0.5), nn.Linear(H, out)), run
        norms = {
            "internvl": nn.LayerNorm(U),
            "qwen": nn.RMSNorm(U // 4, eps=1e-6),
            "qwen3": nn.LayerNorm(U // 4, eps=1e-6),
        }
        norm = norms[kind]
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        if kind != "internvl":
            run = lambda m, x: m.forward(x.reshape(-1, U // 4))  # noqa: E731
        return Normed(norm), run


def projector(kind: str) -> Projector:
    return Projector(*build(kind), U)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def units(n: int = N, seed: int = 1) -> Tensor:
    """Units of clearly different lengths."""
    return normal(n, U, seed=seed) * torch.linspace(0.3, 2, n)[:, None]


TWO_LAYERS = ("llava", "silu", "wide", "internvl", "qwen", "qwen3")
DIRECTIONS = ops.unit_directions(64, U, 0)


def context(
    p: Projector,
    features: Tensor,
    tile: Tensor | None = None,
    layout: Layout | None = None,
    visual: Tensor | None = None,
    seed: int = 0,
) -> Context:
    r, n = features.shape[:2]
    tile = torch.zeros(r, n, dtype=torch.long) if tile is None else tile
    visual = torch.ones(r, n, dtype=torch.bool) if visual is None else visual
    counts = tuple(visual.sum(1).tolist())
    with torch.no_grad():
        x = p(features.flatten(0, 1)).reshape(r, n, -1)
    x = torch.where((tile >= 0)[..., None], x, 0.1)
    made: dict[str, Callable[[], Any]] = {
        "features": lambda: torch.where((tile >= 0)[..., None], features, 0.0),
        "tile": lambda: tile,
        "projector": lambda: p,
    }
    source = torch.arange(n).expand(r, n)
    layouts, site = (layout,) * r, Site.parse("projector")
    return Context(x, visual, counts, counts, source, layouts, site, Signals(made), seed=seed)


def kept(plan: Plan, row: int = 0) -> list[int]:
    return plan.index[row, : plan.kept[row]].tolist()


def naive(z: Tensor, s: Tensor, k: int) -> list[int]:
    """Picks in order, straight from the paper: the whole minimum is recomputed every time."""
    hat = (s - s.min()) / (s.max() - s.min() + 1e-8)
    distance = 1 - F.cosine_similarity(z[:, None].double(), z[None].double(), dim=-1)
    picks = [int(hat.argmax())]
    while len(picks) < k:
        score = hat.double() * distance[:, picks].clamp(min=0).amin(1)
        score[picks] = float("-inf")
        picks.append(int(score.argmax()))
    return picks


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No test warns unless it says so; no test may move the global generator."""
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="zoo_prune")
        yield
    assert torch.equal(before, torch.get_rng_state())


# --------------------------------------------------------------------------------------------
# the projector


@pytest.mark.parametrize("kind", TWO_LAYERS)
def test_structure_is_found_by_running(kind: str) -> None:
    p = projector(kind)
    assert p.layers is not None and p.layers is p.layers
    norm, x = p.layers.norm, units()
    expected = {"internvl": (True, 1), "qwen": (False, 4), "qwen3": (True, 4)}.get(kind)
    assert (norm and (norm.center, norm.groups)) == expected
    assert (p.layers(x) - p(x)).abs().max() < 1e-5
    assert not any(m._forward_hooks for m in p.module.modules())
    assert not any(m.training for m in p.module.modules())  # its own double: dropout is off


class Odd(nn.Module):
    """Projectors that look like two layers and are not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.one, self.two = how, nn.Linear(U, H), nn.Linear(H, U)
        self.act: nn.Module = nn.Softmax(-1) if how == "softmax" else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.act(self.one(x)))
        return y + x if self.how == "residual" else y


@pytest.mark.parametrize("how", ["residual", "softmax"])
def test_other_projectors_are_not_taken_for_two_layers(how: str) -> None:
    with torch.random.fork_rng():
        p = Projector(Odd(how), lambda m, x: m.forward(x), U)
    assert p.layers is None
    x = units()
    auto = p.sensitivity(x, DIRECTIONS, 0.01)
    assert torch.equal(auto, p.sensitivity(x, DIRECTIONS, 0.01, "zoo"))


def test_projector_runs_in_the_dtype_of_its_input_and_fires_no_hook() -> None:
    module, run = build("internvl")
    module.bfloat16()
    fired: list[int] = []
    module.register_forward_hook(lambda *a: fired.append(1))
    p, x = Projector(module, run, U), units()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert p(x.to(dtype)).dtype == dtype
    copy = build("internvl")[0].bfloat16().double()
    assert (p(x.double()) - copy(x.double())).abs().max() < 1e-12
    assert not fired
    assert {t.dtype for t in module.parameters()} == {torch.bfloat16}
    with pytest.raises(InvalidInput, match=r"use \[n, 64\]"):
        p(x[:, 1:])


def test_changed_weights_are_noticed() -> None:
    p, x = projector("llava"), units()
    first = [p.sensitivity(x, DIRECTIONS, 0.01, m) for m in ("zoo", "algebraic", "jacobian")]
    wide = p(x.double())
    with torch.no_grad():
        p.module[3].weight.mul_(4)  # type: ignore[index]
        p.module[3].bias.mul_(4)  # type: ignore[index]
    again = [p.sensitivity(x, DIRECTIONS, 0.01, m) for m in ("zoo", "algebraic", "jacobian")]
    for old, new in zip(first, again, strict=True):
        assert torch.allclose(4 * old, new, rtol=1e-3)
    assert torch.allclose(p(x.double()), 4 * wide)


# --------------------------------------------------------------------------------------------
# sensitivity


def test_directions_are_unit_isotropic_and_seeded() -> None:
    u = ops.unit_directions(4096, 16, 5)
    assert torch.allclose(u.norm(dim=1), torch.ones(4096), atol=1e-6)
    assert torch.equal(u, ops.unit_directions(4096, 16, 5))
    assert not torch.equal(u, ops.unit_directions(4096, 16, 6))
    assert torch.equal(u[:7], ops.unit_directions(7, 16, 5))
    # 4096 samples of variance 1 / 16: four standard errors
    assert (u.T @ u / 4096 - torch.eye(16) / 16).abs().max() < 4 * 2**0.5 / 16 / 64
    assert u.mean(0).abs().max() < 4 * 0.25 / 64


@pytest.mark.parametrize("kind", TWO_LAYERS)
def test_modes_agree_with_autograd(kind: str) -> None:
    """Jacobians by autograd in fp64: S is mean ||J u||, the closed form its Frobenius norm."""
    p, x = projector(kind), units()
    module, run = build(kind)
    module.double().eval()
    row = torch.func.jacrev(lambda v: run(module, v[None])[0])
    jacobians = torch.stack([row(v) for v in x.double()])  # [N, D, U]
    pushed = torch.linalg.vector_norm(jacobians @ DIRECTIONS.double().T, dim=1)  # [N, m]
    for mode in ("zoo", "algebraic"):
        s = p.sensitivity(x, DIRECTIONS, 1e-2, mode)
        assert s.dtype == torch.float32 and s.shape == (N,)
        assert (s / pushed.mean(1) - 1).abs().max() < 2e-3  # O(h^2) at the shortest units
    exact = p.sensitivity(x, DIRECTIONS, 1e-2, "jacobian")
    frobenius = torch.linalg.matrix_norm(jacobians) / U**0.5
    assert (exact / frobenius - 1).abs().max() < 1e-4


@pytest.mark.parametrize("kind", TWO_LAYERS)
def test_algebraic_equals_naive(kind: str) -> None:
    p, x = projector(kind), units()
    naive_, algebraic = (p.sensitivity(x, DIRECTIONS, 0.01, m) for m in ("zoo", "algebraic"))
    assert (algebraic / naive_ - 1).abs().max() < 1e-4
    assert p.layers is not None  # in fp64 both are the same number
    layers, u = p.layers.to(torch.float64), DIRECTIONS.double()
    root = ops.triangular_root(layers.w2)
    a = ops.zoo_sensitivity(layers, root, x.double(), u, 0.01)
    b = ops.difference_sensitivity(layers, x.double(), u, 0.01)
    assert (a / b - 1).abs().max() < 1e-11


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import vtc_kernels.sensitivity as module

    p, x = projector("qwen"), units()
    whole = {m: p.sensitivity(x, DIRECTIONS, 0.01, m) for m in ("zoo", "algebraic")}

    def small(n: int, m: int, width: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
        for a, b in itertools.product(range(0, n, 7), range(0, m, 5)):
            yield slice(a, a + 7), slice(b, b + 5)

    monkeypatch.setattr(module, "_chunks", small)
    for mode, s in whole.items():
        assert torch.allclose(p.sensitivity(x, DIRECTIONS, 0.01, mode), s, rtol=1e-4)


def test_finite_difference_error_is_quadratic() -> None:
    p, x = projector("llava"), units().double()
    assert p.layers is not None
    layers, u = p.layers.to(torch.float64), DIRECTIONS.double()

    def jvp(point: Tensor, direction: Tensor) -> Tensor:
        return torch.func.jvp(layers, (point,), (direction.expand_as(point),))[1]

    exact = torch.stack([jvp(x, d).norm(dim=1) for d in u]).mean(0)
    error = [ops.difference_sensitivity(layers, x, u, h) - exact for h in (0.2, 0.1)]
    assert (error[0] / error[1]).median().sub(4).abs() < 0.1


def test_closed_form_is_the_limit_of_many_directions() -> None:
    p, x = projector("qwen"), units(8)
    exact = p.sensitivity(x, DIRECTIONS, 0.01, "jacobian").double()
    layers = p.layers
    assert layers is not None
    errors = []
    for m in (64, 16384):
        u = ops.unit_directions(m, U, 1)
        a = torch.func.vmap(lambda d: torch.func.jvp(layers, (x,), (d.expand_as(x),))[1])(u)
        squares = a.double().square().sum(-1)  # [m, n]
        spread = squares.std(0) / m**0.5
        assert ((squares.mean(0) - exact.square()).abs() < 5 * spread).all()
        errors.append((squares.mean(0) / exact.square() - 1).abs().mean())
    assert errors[1] < errors[0] / 4


def test_bias_and_scale() -> None:
    p, x = projector("llava"), units()
    s = p.sensitivity(x, DIRECTIONS, 0.01)
    ctx = context(p, x[None])
    before = kept(ZooPrune().plan(ctx, (10,)))
    with torch.no_grad():
        p.module[3].bias.add_(100.0)  # type: ignore[index]
    assert torch.equal(p.sensitivity(x, DIRECTIONS, 0.01), s)  # the algebra cancels it
    assert torch.allclose(p.sensitivity(x, DIRECTIONS, 0.01, "zoo"), s, rtol=0.05)
    with torch.no_grad():
        p.module[3].bias.sub_(100.0)  # type: ignore[index]
        for parameter in p.module[3].parameters():  # type: ignore[index]
            parameter.mul_(4)
    assert torch.allclose(p.sensitivity(x, DIRECTIONS, 0.01), 4 * s, rtol=1e-4)
    assert kept(ZooPrune().plan(context(p, x[None]), (10,))) == before


@pytest.mark.parametrize("kind", ["llava", "wide", "qwen"])
def test_full_rank_reproduces_and_low_rank_cuts(kind: str) -> None:
    p, x = projector(kind), units()
    for mode in ("zoo", "algebraic", "jacobian"):
        s = p.sensitivity(x, DIRECTIONS, 0.01, mode)
        full = p.sensitivity(x, DIRECTIONS, 0.01, mode, rank=1000)
        assert (full / s - 1).abs().max() < 1e-3
    low = [p.sensitivity(x, DIRECTIONS, 0.01, m, rank=12) for m in ("zoo", "algebraic")]
    assert (low[0] / low[1] - 1).abs().max() < 1e-3
    layers = p.layers
    assert layers is not None and (low[0] / s - 1).abs().max() > 1e-2
    left, singular, right = torch.linalg.svd(layers.w2)
    w2 = left[:, :12] * singular[:12] @ right[:12]
    left, singular, right = torch.linalg.svd(layers.w1)
    w1 = left[:, :12] * singular[:12] @ right[:12]
    cut = ops.TwoLayer(w1, layers.b1, layers.act, w2, layers.b2, layers.norm)
    expected = ops.difference_sensitivity(cut, x, DIRECTIONS, 0.01)
    assert (low[1] / expected - 1).abs().max() < 1e-3


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = [t.argsort().argsort().double() for t in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_half_precision_is_noisy_where_the_product_in_bf16_is_not() -> None:
    p = projector("llava")
    x = normal(192, U, seed=3)
    exact = p.sensitivity(x, DIRECTIONS, 0.01)
    half = p.sensitivity(x.half(), DIRECTIONS, 0.01, "zoo")
    low = p.sensitivity(x, DIRECTIONS, 0.01, "algebraic", product=torch.bfloat16)
    assert half.dtype == low.dtype == torch.float32
    assert spearman(low, exact) > 0.999 > spearman(half, exact)
    assert (low / exact - 1).abs().max() < 2e-3


def test_autocast_does_not_reach_the_sensitivity() -> None:
    p = projector("internvl")
    ctx = context(p, units()[None])
    plain = kept(ZooPrune(mode="zoo").plan(ctx, (12,)))
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(ZooPrune(mode="zoo").plan(ctx, (12,))) == plain
    with torch.inference_mode():
        assert kept(ZooPrune(mode="zoo").plan(ctx, (12,))) == plain
        ZooPrune(mode="jacobian").plan(ctx, (12,))


# --------------------------------------------------------------------------------------------
# cost, counted on the proportions of LLaVA-1.5-7B without storage


def counted_mac(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def meta_layers() -> tuple[ops.TwoLayer, Tensor, Tensor, Tensor]:
    n, width, hidden, out, m = FULL

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    w1, w2, b1, b2 = empty(hidden, width), empty(out, hidden), empty(hidden), empty(out)
    layers = ops.TwoLayer(w1, b1, nn.GELU().forward, w2, b2)
    root = empty(min(hidden, out), hidden)
    return layers, root, empty(n, width), empty(m, width)


def test_cost_at_the_size_of_llava() -> None:
    layers, root, x, u = meta_layers()
    n, width, hidden, out, m = FULL
    naive_ = counted_mac(lambda: ops.difference_sensitivity(layers, x, u, 0.01))
    assert naive_ == 2 * m * n * hidden * (width + out)
    algebraic = counted_mac(lambda: ops.zoo_sensitivity(layers, root, x, u, 0.01))
    first = (n + m) * width * hidden
    assert algebraic == first + m * n * hidden * out * 33 / 64
    assert algebraic <= 0.08 * DENSE_PREFILL
    products = torch.empty(1, hidden, hidden, device="meta")
    closed = counted_mac(lambda: ops.jacobian_sensitivity(layers, products, None, x))
    assert closed == n * hidden * (width + hidden)
    assert closed <= 0.01 * DENSE_PREFILL


# --------------------------------------------------------------------------------------------
# selection


@pytest.mark.parametrize("mode", ["zoo", "algebraic", "jacobian"])
@pytest.mark.parametrize("n", [40, 100])  # below and above D: with and without a Gram matrix
def test_selection_equals_the_naive_loop(mode: Any, n: int) -> None:
    p, x = projector("llava"), units(n)
    method, ctx = ZooPrune(mode=mode), context(p, x[None])
    s = method.sensitivity(ctx, x)
    picks = naive(ctx.x[0], s, n)
    assert picks[0] == int(s.argmax())
    assert picks[-1] == int(s.argmin())  # score 0: never before another token
    for k in (1, 2, 9, 20, n):
        plan = method.plan(ctx, (k,))
        plan.check(ctx.visual)
        assert kept(plan) == sorted(picks[:k])  # prefixes: nested in k


def test_rows_of_a_batch_are_their_own() -> None:
    p, x = projector("qwen"), torch.stack([units(seed=1), units(seed=2)])
    visual = torch.ones(2, N, dtype=torch.bool)
    visual[1, 30:] = False
    both = ZooPrune().plan(context(p, x, visual=visual), (9, 5))
    both.check(visual)
    assert both.kept == (9, 5)
    assert kept(both, 0) == kept(ZooPrune().plan(context(p, x[:1]), (9,)))
    assert kept(both, 1) == kept(ZooPrune().plan(context(p, x[1:, :30]), (5,)))


def test_order_of_tokens_does_not_matter() -> None:
    p, x = projector("llava"), units()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    plain = kept(ZooPrune().plan(context(p, x[None]), (12,)))
    moved = kept(ZooPrune().plan(context(p, x[order][None]), (12,)))
    assert sorted(order[moved].tolist()) == plain


def test_one_copy_of_duplicates() -> None:
    p, x = projector("llava"), units(20).repeat(2, 1)
    ctx = context(p, x[None])
    for k in (5, 12, 19):  # 20 distinct tokens, of which one has S^ = 0
        chosen = kept(ZooPrune().plan(ctx, (k,)))
        assert len({i % 20 for i in chosen}) == k


def test_sensitivity_alone() -> None:
    p, x = projector("llava"), units()
    ctx = context(p, x[None])
    method = ZooPrune(diversity=False)
    best = method.sensitivity(ctx, x).argsort(descending=True)[:7]
    assert kept(method.plan(ctx, (7,))) == sorted(best.tolist())


def test_linear_projector_warns_once_and_is_max_min_greedy() -> None:
    p, x = projector("linear"), units()
    ctx = context(p, torch.stack([x, x.flip(0)]))
    for method in (ZooPrune(), ZooPrune(mode="zoo", precision="fp16")):
        s = method.sensitivity(ctx, x)
        assert ((s.max() - s.min()) / s.mean() < 1e-3) == (method.precision == "fp32")
    with pytest.warns(UserWarning, match="Linear.*plain diversity selection") as seen:
        plan = ZooPrune().plan(ctx, (8, 8))
    assert len(seen) == 1
    first = torch.zeros(2, dtype=torch.long)
    expected = ops.maxmin_tokens(ctx.x, 8, ctx.visual, first=first).sort(1).values
    assert torch.equal(plan.index, expected)


@pytest.mark.parametrize(
    ("k", "sizes", "expected"),
    [
        (7, [5, 5, 5], [3, 2, 2]),
        (5, [1, 5, 5], [1, 2, 2]),
        (10, [1, 5, 5], [1, 5, 4]),
        (11, [1, 5, 5], [1, 5, 5]),
        (2, [4, 4, 4], [1, 1, 0]),
    ],
)
def test_budget_is_shared_evenly(k: int, sizes: list[int], expected: list[int]) -> None:
    from vtc.algorithms.tiles import share

    assert [n for _, n in share(k, [torch.zeros(n) for n in sizes])] == expected


def test_each_tile_and_frame_is_selected_alone() -> None:
    p, x = projector("llava"), units(36)
    tile = torch.arange(3).repeat_interleave(12)[None]
    plan = ZooPrune().plan(context(p, x[None], tile=tile), (10,))
    alone = [
        [12 * t + i for i in kept(ZooPrune().plan(context(p, x[None, 12 * t : 12 * t + 12]), (k,)))]
        for t, k in enumerate((4, 3, 3))
    ]
    assert kept(plan) == sum(alone, [])
    video = context(p, x[None], layout=Layout(3, 3, 4))
    assert kept(ZooPrune().plan(video, (10,))) == kept(plan)


def test_everything_is_kept_when_the_budget_allows() -> None:
    ctx = context(projector("qwen3"), units()[None])
    assert kept(ZooPrune().plan(ctx, (N,))) == list(range(N))


def test_seeds_choose_directions() -> None:
    p, x = projector("llava"), units()[None]
    plans = {seed: ZooPrune().plan(context(p, x, seed=seed), (12,)) for seed in (0, 1)}
    assert torch.equal(plans[0].index, ZooPrune().plan(context(p, x), (12,)).index)
    s = [ZooPrune().sensitivity(context(p, x, seed=seed), x[0]) for seed in (0, 1)]
    assert not torch.equal(*s)
    exact = [
        ZooPrune(mode="jacobian").sensitivity(context(p, x, seed=seed), x[0]) for seed in (0, 1)
    ]
    assert torch.equal(*exact)


# --------------------------------------------------------------------------------------------
# errors and torch.compile


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "exact"}, "mode='exact', use one of: auto zoo algebraic jacobian"),
        ({"precision": "bf16"}, "precision='bf16', use one of: fp32 fp16"),
        ({"directions": 0}, "directions=0, use a number of 1 or more"),
        ({"rank": 0}, "rank=0, use a number of 1 or more"),
        ({"step": 0.0}, "step=0.0, use a number of"),
        ({"step": float("nan")}, "step=nan"),
        ({"precision": "fp16"}, "precision='fp16' needs mode='zoo', not 'auto'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRecipe, match=words):
        ZooPrune(**options)


@pytest.mark.parametrize("options", [{"mode": "jacobian"}, {"mode": "algebraic"}, {"rank": 8}])
def test_closed_forms_need_two_layers(options: dict[str, Any]) -> None:
    ctx = context(projector("linear"), units()[None])
    with pytest.raises(UnsupportedModel, match="this one is: Linear. Use mode='zoo'"):
        ZooPrune(**options).plan(ctx, (4,))


def test_bad_features_are_refused() -> None:
    x = units()[None].clone()
    x[0, 3, 5] = float("nan")
    for kind in ("llava", "linear"):
        with pytest.raises(InvalidInput, match="not finite"):
            ZooPrune().plan(context(projector(kind), x), (4,))


@pytest.mark.parametrize("mode", ["zoo", "algebraic", "jacobian"])
def test_compiled_plan_is_the_plan(mode: Any) -> None:
    p, x = projector("qwen"), units()[None]
    method = ZooPrune(mode=mode, directions=8)
    ctx = context(p, x, layout=Layout(2, 4, 5))
    plain = method.plan(ctx, (9,))

    def index(features: Tensor, embeddings: Tensor) -> Tensor:
        made: dict[str, Any] = {"features": features, "projector": p, "tile": None}
        inside = Context(embeddings, ctx.visual, (N,), (N,), ctx.source, ctx.layout, ctx.site, made)
        return method.plan(inside, (9,)).index

    torch._dynamo.reset()
    compiled = torch.compile(index, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, ctx.x), plain.index)
    torch._dynamo.reset()


def test_registered_with_its_paper() -> None:
    assert vtc.REDUCERS["zoo_prune"] is ZooPrune
    assert ZooPrune.needs == {"projector", "features", "tile"}
    assert ZooPrune.default_at == "projector" and "2509.24837" in ZooPrune.paper


def test_packed_linear_weights_are_no_two_layers() -> None:
    """Quantised layers are still nn.Linear, but their weight is no matrix: differences remain."""

    class Packed(nn.Linear):
        def __init__(self, n: int, m: int) -> None:
            super().__init__(n, m)
            self.whole = self.weight.detach().clone()
            self.weight = nn.Parameter(torch.zeros(n * m // 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.whole.to(x.dtype), self.bias)

    with torch.random.fork_rng():
        module = nn.Sequential(Packed(8, 16), nn.GELU(), Packed(16, 12))
    projector = Projector(module, lambda m, x: m.forward(x), 8)
    assert projector.layers is None
    directions = ops.unit_directions(4, 8, 0, torch.device("cpu"))
    assert projector.sensitivity(torch.ones(3, 8), directions, 0.01).shape == (3,)


def test_the_users_module_is_left_alone_while_it_is_looked_at() -> None:
    """Other threads may train with it: no hook on it, and its dropout stays on."""
    with torch.random.fork_rng():
        layers = nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 12)
    module = nn.Sequential(*layers).train()
    seen: list[tuple[bool, int]] = []

    class Spy(nn.GELU):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((module[2].training, sum(len(m._forward_hooks) for m in module.modules())))
            return super().forward(x)

    module[1] = Spy()
    projector = Projector(module, lambda m, x: m.forward(x), 8)
    assert projector.layers is not None
    assert seen and all(training and hooks == 0 for training, hooks in seen)
    assert torch.equal(projector(torch.ones(2, 8)), projector(torch.ones(2, 8)))
