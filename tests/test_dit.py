"""Diffusion transformers: the contracts of tokens that are dropped and come back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc.context import Layout
from vtc.errors import (
    InvalidBudget,
    InvalidInput,
    InvalidRecipe,
    UnsupportedModel,
    UnsupportedSite,
)
from vtc.methods.pooled import cells
from vtc.testing import diffusion, ditref, dits
from vtc.testing.diffusion import DitCell, run
from vtc.testing.threads import in_threads

TOLERANCE = 1e-4
FAMILIES = list(dits.FAMILIES)
METHODS = ("random", "grid", "norm", "divprune", "pooled", "tomesd")
DROPPING = ("random", "grid", "norm", "divprune")
over_families = pytest.mark.parametrize("family", FAMILIES)
over_methods = pytest.mark.parametrize("method", METHODS)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@over_families
@over_methods
def test_keeping_everything_changes_nothing(family: str, method: str) -> None:
    diffusion.keeping_everything_changes_no_bit(DitCell(method, family))


@over_families
@pytest.mark.parametrize("method", DROPPING)
def test_dropping_is_masking(family: str, method: str) -> None:
    diffusion.dropping_equals_masking(DitCell(method, family))


@over_families
def test_spans_inside_each_other(family: str) -> None:
    model, given = dits.make(family), dits.inputs(family)
    steps = (
        vtc.Step("random", "dit.0", 0.5, until="dit.3"),
        vtc.Step("norm", "dit.1", 0.25, until="dit.2"),
    )
    with vtc.attach(model, vtc.Recipe(steps)) as session:
        short = run(model, given)
    outer, inner = session.trace
    n = outer.layout[0].n if outer.layout[0] else 0
    keeps = [
        torch.zeros(2, n, dtype=torch.bool).scatter_(1, r.source, True) for r in (outer, inner)
    ]
    if family == "latte":
        keeps = [keep.repeat_interleave(3, 0) for keep in keeps]
    assert not (keeps[1] & ~keeps[0]).any() and keeps[1].sum() == keeps[0].sum() / 2
    with ditref.masked(model, family, [(0, 3, keeps[0]), (1, 2, keeps[1])]):
        close(short, run(model, given))


@pytest.mark.parametrize("method", ["pooled", "tomesd"])
def test_merged_tokens_hand_their_change_to_all_members(method: str) -> None:
    """Against matrices and plain calls of the blocks."""
    model, given = dits.make("original"), dits.inputs("original")
    with vtc.attach(model, method, keep=0.25, at="dit.1", until="dit.3") as session:
        short = run(model, given)
    plan = session.trace[-1].plan
    assert plan is not None and plan.assign is not None
    with torch.no_grad():
        x, c = _embedded(model, given)
        x = model.blocks[0](x, c)
        one_hot = F.one_hot(plan.assign, plan.m).float()  # [B, N, K]
        mean = (one_hot / one_hot.sum(1, keepdim=True)).transpose(1, 2)
        y = start = mean @ x
        for block in model.blocks[1:3]:
            y = block(y, c)
        x = model.blocks[3](x + one_hot @ (y - start), c)
        close(short, _finished(model, given, x))


def test_merging_around_attention() -> None:
    model, given = dits.make("original"), dits.inputs("original")
    with vtc.attach(model, "tomesd", keep=0.5, at="dit.1.attn") as session:
        short = run(model, given)
    plan = session.trace[-1].plan
    assert plan is not None and plan.assign is not None
    with torch.no_grad():
        x, c = _embedded(model, given)
        x = model.blocks[0](x, c)
        block = model.blocks[1]
        s1, k1, g1, s2, k2, g2 = block.adaLN_modulation(c)[:, None].chunk(6, -1)
        one_hot = F.one_hot(plan.assign, plan.m).float()
        mean = (one_hot / one_hot.sum(1, keepdim=True)).transpose(1, 2)
        x = x + g1 * (one_hot @ block.attn(mean @ (block.norm1(x) * (1 + k1) + s1)))
        x = x + g2 * block.mlp(block.norm2(x) * (1 + k2) + s2)
        for block in model.blocks[2:]:
            x = block(x, c)
        close(short, _finished(model, given, x))


def _embedded(model: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens and conditioning as the first block gets them."""
    seen: list[Any] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args))
    model(**given)
    handle.remove()
    return seen[0]


def _finished(model: Any, given: dict[str, Any], x: Tensor) -> Tensor:
    """The model's output where these tokens leave the last block."""
    handle = model.blocks[-1].register_forward_hook(lambda m, args, out: x)
    out = model(**given)
    handle.remove()
    return out


@over_families
def test_the_most_similar_merge_into_cells_that_are_drawn(family: str) -> None:
    model, given = dits.make(family), dits.inputs(family)
    with vtc.attach(model, "tomesd", keep=0.5, at="dit.1") as session:
        run(model, given)
    seen: list[Tensor] = []
    block = ditref.blocks(model)[1]

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    run(model, given)
    handle.remove()
    x = seen[0]
    if family == "latte":
        x = x.unflatten(0, (2, 3)).mean(1)
    plan, layout = session.trace[-1].plan, session.trace[-1].layout[0]
    assert plan is not None and plan.assign is not None and layout is not None
    frames, side = layout.frames, 6
    merged = [set(range(layout.n)) - set(row) for row in plan.index.tolist()]
    place = torch.arange(layout.n)
    cell = place // 36 * 9 + place % 36 // side // 2 * 3 + place % side // 2
    half = layout.n // 2
    for row, gone in enumerate(merged):
        assert len(gone) == half
        into = {int(plan.index[row, plan.assign[row, i]]) for i in gone}
        assert len({int(cell[i]) for i in into}) == len(into)  # one destination a cell
    shared = [set(row) for row in plan.index.tolist()]
    always = shared[0] & shared[1]
    assert len({int(cell[i]) for i in always}) == 9 * frames  # rows share their destinations
    unit = F.normalize(x.float(), dim=-1)
    for row, gone in enumerate(merged):
        into = sorted({int(plan.index[row, plan.assign[row, i]]) for i in gone})
        for i in gone:
            own = float(unit[row, i] @ unit[row, int(plan.index[row, plan.assign[row, i]])])
            assert own >= float((unit[row, into] @ unit[row, i]).max()) - 1e-5


@over_families
@over_methods
def test_budgets_are_exact_and_seeds_repeat(family: str, method: str) -> None:
    diffusion.budget_is_exact_and_seeds_repeat(DitCell(method, family))
    model, given = dits.make(family), dits.inputs(family)
    found, k = [], 40 if family == "wan" else 13
    for seed in (3, 4):
        with vtc.attach(model, method, keep=k, at="dit.1", seed=seed):
            found.append(run(model, given))
    assert torch.equal(*found) == (method not in ("random", "tomesd"))


@over_families
@over_methods
def test_a_sample_alone_is_that_of_the_batch(family: str, method: str) -> None:
    diffusion.sample_alone_equals_sample_in_batch(DitCell(method, family))


@over_families
@pytest.mark.parametrize("shape", [(12, 20), (14, 10)])
def test_grids_that_are_not_square(family: str, shape: tuple[int, int]) -> None:
    if family == "dit":
        pytest.skip("DiTTransformer2DModel makes square images of any tokens")
    model, given = dits.make(family, side=20), dits.inputs(family, shape=shape)
    if family == "sd3":
        model = dits.make(family)
    for method in ("pooled", "tomesd"):
        with vtc.attach(model, method, keep=0.5, at="dit.1") as session:
            assert run(model, given).isfinite().all()
        layout = session.trace[-1].layout[0]
        assert layout is not None and (layout.height, layout.width) == tuple(s // 2 for s in shape)


@over_families
def test_bfloat16_and_gradients(family: str) -> None:
    model, given = dits.make(family), dits.inputs(family)
    with vtc.attach(model, "tomesd", keep=0.5, at="dit.1"):
        dits.call(model, given).square().mean().backward()
    first, middle = ditref.blocks(model)[0], ditref.blocks(model)[1]
    for block in (first, middle):
        grads = [p.grad for p in ditref.attention(block).parameters() if p.grad is not None]
        assert grads and any(grad.abs().sum() > 0 for grad in grads)
    with vtc.attach(model.bfloat16(), "pooled", keep=0.25, at="dit.1", until="dit.3"):
        assert run(model, dits.halved(given)).isfinite().all()


@over_families
def test_nothing_is_left_behind(family: str) -> None:
    model, given = dits.make(family), dits.inputs(family)
    dense, before = run(model, given), state_of(model)
    with vtc.attach(model, "random", keep=0.5, at=["dit.1", "dit.2.attn"]):
        assert not torch.equal(run(model, given), dense)
    assert state_of(model) == before
    with pytest.raises(InvalidBudget), vtc.attach(model, "tomesd", keep=2):
        run(model, given)
    assert state_of(model) == before and torch.equal(run(model, given), dense)


def state_of(model: Any) -> dict[str, Any]:
    return {
        name: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_two_threads(family: str) -> None:
    model = dits.make(family)
    givens = [dits.inputs(family, seed=seed, time=t) for seed, t in ((1, 0.3), (2, 0.9))]
    with vtc.attach(model, "pooled", keep=0.25, at="dit.1", noise=(0.5, 1.0)):
        alone = [run(model, given) for given in givens]
        jobs = [lambda g=given: [run(model, g) for _ in range(3)] for given in givens]
        for expected, found in zip(alone, in_threads(jobs), strict=True):
            assert all(torch.equal(out, expected) for out in found)


@pytest.mark.parametrize("family", ["dit", "sd3", "wan"])
def test_compiled_without_graph_breaks(family: str) -> None:
    model, given = dits.make(family), dits.inputs(family)
    with vtc.attach(model, "pooled", keep=0.25, at="dit.1", until="dit.3"):
        plain = run(model, given)
        torch._dynamo.reset()
        fast = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            close(dits.call(fast, given), plain)
    with vtc.attach(model, "pooled", keep=0.25, at="dit.1", noise=(0.5, 1.0)):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="timestep"), torch.no_grad():
            dits.call(torch.compile(model, backend="eager", fullgraph=True), given)


# ---------------------------------------------------------------------- time


def test_noise_says_when_a_step_acts() -> None:
    model = dits.make("dit")
    with vtc.attach(model, "pooled", keep=0.25, at="dit.1", noise=(0.5, 1.0)) as session:
        for time, acts in ((0.9, True), (0.5, True), (0.49, False), (0.0, False)):
            given = dits.inputs("dit", time=time)
            run(model, given)
            assert session.stats()["sites"][0]["tokens_out"] == (18 if acts else 72)
            session._tokens["dit.1"] = [0, 0]
        given["timestep"] = torch.tensor([900.0, 100.0])
        with pytest.raises(InvalidInput, match=r"0.100 to 0.900 noisy.* one timestep"):
            run(model, given)
        given["timestep"] = torch.tensor([1200.0, 100.0])
        with pytest.raises(InvalidInput, match="100 to 1200: dit models are given 0"):
            run(model, given)


def test_draws_change_from_step_to_step_and_repeat_from_run_to_run() -> None:
    model = dits.make("dit")
    with vtc.attach(model, "random", keep=0.5, at="dit.1", seed=5) as session:
        runs = []
        for _ in range(2):
            for time in (1.0, 0.6, 0.2):
                run(model, dits.inputs("dit", time=time))
            runs.append([session.trace[i].source for i in (-3, -2, -1)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])
    assert torch.equal(runs[0][0][0], runs[0][0][1])  # guidance pairs keep the same places


# ---------------------------------------------------------------------- what is refused


HALF: dict[str, Any] = {"method": "random", "keep": 0.5}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"method": "fastv", "keep": 0.5}, UnsupportedSite, "no site 'decoder|works at decoder"),
        (HALF, UnsupportedSite, "no site 'projector'.*its sites are dit"),
        ({**HALF, "at": "dit.9"}, UnsupportedSite, "it has dit.0 to dit.3"),
        ({"method": "random", "keep": 0, "at": "dit.1"}, InvalidBudget, "at least 1"),
        ({**HALF, "at": "dit.2", "until": "dit.1"}, InvalidRecipe, "the second behind"),
        ({**HALF, "at": "dit.1", "until": "dit.7"}, InvalidRecipe, "this model has 4 blocks"),
        ({**HALF, "at": "dit.1", "noise": (0.5, 0.5)}, InvalidRecipe, "least, most"),
        ({**HALF, "at": "dit.1", "mass": 1.0}, UnsupportedModel, "mass and scope"),
        ({**HALF, "at": "projector", "until": "dit.2"}, InvalidRecipe, "not for 'projector'"),
        ({"method": "pooled"}, InvalidRecipe, "needs a budget"),
    ],
)  # fmt: skip
def test_wrong_requests(options: dict[str, Any], error: type[Exception], says: str) -> None:
    model = dits.make("dit")
    before = state_of(model)
    with pytest.raises(error, match=says):
        vtc.attach(model, **options)
    assert state_of(model) == before


def test_spans_that_cross_are_refused() -> None:
    steps = (vtc.Step("random", "dit.0", 0.5, until="dit.2"), vtc.Step("norm", "dit.1", 0.25))
    with pytest.raises(InvalidRecipe, match="reaches beyond the end 2"):
        vtc.attach(dits.make("dit"), vtc.Recipe(steps))


def test_wrong_calls() -> None:
    model, given = dits.make("dit"), dits.inputs("dit")
    with vtc.attach(model, "random", keep=0.5, at="dit.1", strict=False):
        with pytest.raises(InvalidInput, match="no images"):
            run(model, dits.inputs("dit", batch=0))
        with pytest.raises(UnsupportedModel, match="called by itself"):
            model.transformer_blocks[0](torch.zeros(1, 36, 32), timestep=torch.zeros(1))
        with pytest.raises(UnsupportedModel, match="already attached"):
            vtc.attach(model, "random", keep=0.5, at="dit.2")
        model.enable_gradient_checkpointing()
        with pytest.raises(UnsupportedModel, match="gradient checkpointing"):
            dits.call(model, given)
        model.disable_gradient_checkpointing()
        nan = given | {"hidden_states": torch.full((2, 4, 12, 12), torch.nan)}
        with pytest.raises(InvalidInput, match="not finite|NaN"):
            run(model, nan)


def test_caches_of_diffusers_are_refused() -> None:
    model, given = dits.make("flux"), dits.inputs("flux")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedModel, match="disable_cache"):
        vtc.attach(model, "random", keep=0.5, at="dit.1")
    model.disable_cache()
    with vtc.attach(model, "random", keep=0.5, at="dit.1"):
        run(model, given)


def test_pipelines_are_attached_by_their_transformer(tmp_path: Path) -> None:
    class Pipe:
        transformer = dits.make("dit")

    with vtc.attach(Pipe(), "random", keep=0.5, at="dit.1") as session:
        run(Pipe.transformer, dits.inputs("dit"))
    assert session.model is Pipe.transformer
    assert "dit.0" in str(vtc.describe(Pipe()))

    class Two(Pipe):
        transformer_2 = Pipe.transformer

    with pytest.raises(UnsupportedModel, match="two denoisers"):
        vtc.attach(Two(), "random", keep=0.5, at="dit.1")
    with pytest.raises(UnsupportedModel, match="no torch module"):
        vtc.attach(object(), "random", keep=0.5, at="dit.1")


def test_recipes_round_trip(tmp_path: Path) -> None:
    step = vtc.Step("pooled", "dit.1", 0.25, until="dit.3", noise=(0.5, 1.0))
    recipe = vtc.Recipe((step, vtc.Step("tomesd", "dit.3.attn", 0.5)))
    recipe.dump(tmp_path / "r.yaml")
    assert vtc.Recipe.load(tmp_path / "r.yaml") == recipe
    with pytest.raises(InvalidRecipe, match="noise"):
        vtc.Recipe.load({"steps": [{"method": "pooled", "at": "dit.1", "keep": 0.5, "noise": [1]}]})


# ---------------------------------------------------------------------- FLOPs


@over_families
def test_counted_flops_are_those_that_torch_counts(family: str) -> None:
    """Of the blocks; embeddings and the last layer are no block. Torch counts per module."""
    model, given = dits.make(family), dits.inputs(family, batch=1)

    def counted() -> float:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused attention of CPUs
            run(model, given)
        table = counter.get_flop_counts()
        names = [
            n
            for n in table
            if n.split(".")[-2:-1] and n.split(".")[-1].isdigit() and n.count(".") == 2
        ]
        return sum(sum(table[n].values()) for n in names)

    dense = counted()
    with vtc.attach(model, "pooled", keep=0.25, at="dit.1", until="dit.3") as session:
        short = counted()
    stats = session.stats()
    assert stats["flops_dense"] == pytest.approx(dense, rel=0.02)
    assert stats["flops"] == pytest.approx(short, rel=0.02)


def test_deep_copies_of_a_patched_model_are_free() -> None:
    model, given = dits.make("dit"), dits.inputs("dit")
    dense = run(model, given)
    with vtc.attach(model, "random", keep=0.5, at="dit.1"):
        run(model, given)
    assert torch.equal(run(copy.deepcopy(model), given), dense)


@pytest.mark.parametrize(("height", "width", "k"), [(8, 8, 16), (6, 10, 13), (5, 7, 35), (3, 9, 1)])
def test_cells_of_a_coarser_grid(height: int, width: int, k: int) -> None:
    centres, cell, weight = cells(Layout(1, height, width), k)
    assert len(centres) == k and set(cell.tolist()) == set(range(k))
    assert centres.tolist() == sorted(centres.tolist()) and cell[centres].tolist() == [*range(k)]
    place = torch.stack(
        [torch.arange(height * width) // width, torch.arange(height * width) % width]
    )
    for i in range(k):
        own = place[:, cell == i]
        box = own.amax(1) - own.amin(1) + 1
        assert int(box.prod()) == own.shape[1]  # a rectangle
        assert (place[:, centres[i]] - own.float().mean(1)).abs().max() <= 0.5
        assert weight[cell == i].sum() == pytest.approx(1.0)
    if (height, width, k) == (8, 8, 16):
        want = F.adaptive_avg_pool2d(torch.arange(64.0).view(1, 1, 8, 8), 4).flatten()
        got = torch.zeros(16).index_add(0, cell, weight * torch.arange(64.0))
        torch.testing.assert_close(got, want)


def calls_of_runs(session: vtc.Session, model: Any, times: tuple[float, ...]) -> list[Tensor]:
    for time in times:
        run(model, dits.inputs("dit", time=time))
    return [entry.source for entry in list(session.trace)[-len(times) :]]


def test_a_run_begins_when_the_scheduler_or_the_user_says_so() -> None:
    """Runs of one step look like branches of guidance: only then does it matter."""

    class Pipe:
        transformer = dits.make("dit")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()

    pipe = Pipe()
    with vtc.attach(pipe, "random", keep=0.5, at="dit.1") as session:
        pipe.scheduler.set_timesteps(3)
        first = calls_of_runs(session, pipe.transformer, (1.0, 0.5))
        calls_of_runs(session, pipe.transformer, (0.5,))
        pipe.scheduler.set_timesteps(3)
        assert session.trace[-1].site == "dit.1"
        again = calls_of_runs(session, pipe.transformer, (0.5, 0.2))
        session.reset()
        third = calls_of_runs(session, pipe.transformer, (0.2, 0.1))
    for found in (again, third):
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
    assert "set_timesteps" not in vars(pipe.scheduler)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("HunyuanVideoTransformer3DModel", "forward of flux.*with img_ids"),
        ("ChromaTransformer2DModel", "forward of flux.*without attention_mask"),
        ("FluxControlNetModel", "forward of flux.*without controlnet_cond"),
        ("SD3ControlNetModel", "forward of sd3.*without controlnet_cond"),
        ("WanVACETransformer3DModel", "forward of wan.*without control_hidden_states"),
    ],
)
def test_models_of_like_blocks_but_other_arguments_are_refused(name: str, says: str) -> None:
    """Theirs are masks, controls, or results in another order."""
    options: dict[str, Any] = {"num_layers": 1}
    if "Wan" in name:
        options["vace_layers"] = [0]
    elif "SD3" not in name:
        options["num_single_layers"] = 1
    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    with pytest.raises(UnsupportedModel, match=says):
        vtc.attach(model, "random", keep=0.5, at="dit.0")


def test_control_nets_need_all_tokens() -> None:
    model, given = dits.make("sd3"), dits.inputs("sd3")
    given["block_controlnet_hidden_states"] = [torch.zeros(2, 36, 32)]
    session = vtc.attach(model, "random", keep=0.5, at="dit.1", strict=False)
    with session, pytest.raises(UnsupportedModel, match="ControlNet"):
        run(model, given)
    with vtc.attach(model, "random", keep=0.5, at="dit.1.attn"):
        assert run(model, given).isfinite().all()


def test_blocks_that_a_call_leaves_out() -> None:
    model, given = dits.make("sd3"), dits.inputs("sd3")
    with vtc.attach(model, "random", keep=0.5, at="dit.1", until="dit.2") as session:
        run(model, given | {"skip_layers": [3]})
        assert 0 < session.stats()["flops"] < session.stats()["flops_dense"]
    for place in ({"at": "dit.1"}, {"at": "dit.1", "until": "dit.3"}):
        with vtc.attach(model, "random", keep=0.5, **place):
            run(model, given)
            with pytest.raises(UnsupportedModel, match="before a block that runs"):
                run(model, given | {"skip_layers": [3]})


def test_fused_projections() -> None:
    model, given = dits.make("dit"), dits.inputs("dit")
    with vtc.attach(model, "random", keep=1.0, at="dit.1") as session:
        run(model, given)
    apart = session.stats()["flops_dense"]
    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
    with vtc.attach(model, "random", keep=1.0, at="dit.1") as session:
        run(model, given)
    assert session.stats()["flops_dense"] == apart
    with pytest.raises(UnsupportedModel, match="unfuse_qkv_projections"):
        vtc.attach(model, "flexdit", group=(1, 0, 1, 0))
