"""FlexDiT: roles, schedule and costs by hand; whole forwards against code that shares nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vtc
from vtc.errors import InvalidInput, InvalidRecipe, UnsupportedModel
from vtc.methods.flexdit import PRESETS
from vtc.modules.flexdit import Recovery, Schedule, SparseDense, nearest, pooled, roles, small_grid
from vtc.testing import dits

MIXING = ("dit", "original", "pixart", "latte")
#: a poolingformer, one group, a dense block
SHAPE: dict[str, Any] = {"poolingformers": 1, "group": (1, 1, 1, 0), "rate": (0.4, 0.8)}
DEPTH = 5
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("flexdit_*.yaml"))


def made(name: str, depth: int = DEPTH, **params: Any) -> tuple[nn.Module, vtc.Session]:
    """A model with a session whose recoveries pass sparse tokens on."""
    model = dits.make(name, depth)
    session = vtc.attach(model, "flexdit", **SHAPE | params)
    dice = torch.Generator().manual_seed(5)
    for parameter in session.modules["dit.0"].parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=dice)
    return model, session


@torch.no_grad()
def run(model: nn.Module, name: str, **options: Any) -> Tensor:
    return dits.call(model, dits.inputs(name, **options))


# ---------------------------------------------------------------------- whole forwards


def by_hand(model: Any, side: SparseDense, given: dict[str, Tensor], small: tuple[int, int]):
    """The forward of an original DiT as the paper writes it: masks, products, interpolation."""
    seen = torch.empty(0)

    def stem(block: nn.Module, args: Any) -> Any:
        nonlocal seen
        seen = args
        raise StopIteration

    handle = model.blocks[0].register_forward_pre_hook(stem)
    with pytest.raises(StopIteration):
        type(model).forward(model, **given)
    handle.remove()
    x, c = seen
    grid = [n // 2 for n in given["x"].shape[-2:]]
    kept, recoveries = x, iter(side.recoveries)
    for block, role in zip(model.blocks, side.roles, strict=True):
        m = block.adaLN_modulation(c)[:, None].chunk(6, -1)

        def read(z: Tensor, m: Any = m) -> Tensor:
            return F.layer_norm(z, z.shape[-1:], eps=1e-6) * (1 + m[1]) + m[0]

        other = None
        if role == "generate":
            kept = x
            image = x.transpose(1, 2).unflatten(2, grid)
            x = F.adaptive_avg_pool2d(image, small).flatten(2).transpose(1, 2)
            other = kept
        if role == "recover":
            other, weights = x, next(recoveries)
            up = F.interpolate(x.transpose(1, 2).unflatten(2, small), tuple(grid), mode="nearest")
            up = up.flatten(2).transpose(1, 2)
            x = up @ weights.w1.T + weights.b1 + kept @ weights.w2.T + weights.b2
        x = x + m[2] * attention(block.attn, read(x), read(x if other is None else other), role)
        z = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + m[4]) + m[3]
        x = x + m[5] * block.mlp(z)
    x = model.final(x).unflatten(1, grid).unflatten(-1, (2, 2, 8))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def attention(attn: Any, x: Tensor, other: Tensor, role: str) -> Tensor:
    """Softmax of scores; of ones in a poolingformer, as the paper's code has it."""
    q = attn.qkv(x).chunk(3, -1)[0].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    k, v = (
        t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for t in attn.qkv(other).chunk(3, -1)[1:]
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = torch.ones_like(scores) if role == "pool" else scores
    return attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (14, 6)])
def test_a_forward_is_the_one_of_the_paper(shape: tuple[int, int]):
    model, session = made("original", 8, group=(1, 1, 1, 0), modules=2, rate=(0.7, 0.7))
    with session:
        found = run(model, "original", shape=shape)
    sides = small_grid((shape[0] // 2, shape[1] // 2), 0.7)
    with torch.no_grad():
        given = dits.inputs("original", shape=shape)
        wanted = by_hand(model, session.modules["dit.0"], given, sides)
    assert session.modules["dit.0"].roles == roles(8, 1, 2, (1, 1, 1, 0), 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - run(model, "original", shape=shape)).abs().max() > 0.01


@pytest.mark.parametrize("name", MIXING)
def test_with_all_tokens_and_no_short_cut_it_is_the_model(name: str):
    model = dits.make(name, 6)
    dense = run(model, name)
    params: dict[str, Any] = {"poolingformers": 0, "group": (1, 1, 1, 0), "rate": (0.0, 0.0)}
    with vtc.attach(model, "flexdit", **params) as session:
        for recovery in session.modules["dit.0"].recoveries:
            recovery.w1.data, recovery.w2.data = recovery.w2.data, recovery.w1.data
        found = run(model, name)
    assert torch.equal(found, dense)


def test_a_new_group_of_closed_gates_changes_nothing():
    model: Any = dits.make("original", DEPTH)
    for block in model.blocks[1:4]:
        for parameter in block.adaLN_modulation.parameters():
            parameter.data.zero_()
    dense = run(model, "original")
    with vtc.attach(model, "flexdit", **SHAPE) as session:
        pooling = run(model, "original")
        order = session.modules["dit.0"].roles
    assert order == ("pool", "generate", "sparse", "recover", "dense")
    assert not torch.allclose(pooling, dense, atol=1e-3)
    for parameter in model.blocks[0].adaLN_modulation.parameters():
        parameter.data.zero_()
    dense = run(model, "original")
    with vtc.attach(model, "flexdit", **SHAPE):
        assert torch.equal(run(model, "original"), dense)


def test_sparse_blocks_are_passed_by_until_something_is_trained():
    model: Any = dits.make("original", 4)
    for parameter in model.blocks[2].adaLN_modulation.parameters():
        parameter.data.zero_()
    found = []
    params: dict[str, Any] = {"poolingformers": 0, "group": (1, 1, 1, 0)}
    with vtc.attach(model, "flexdit", **params) as session:
        for _ in range(2):
            found.append(run(model, "original"))
            model.blocks[1].mlp.fc1.weight.data.normal_()
        session.modules["dit.0"].recoveries[0].w1.data += 0.1
        found.append(run(model, "original"))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.parametrize("name", MIXING)
def test_samples_runs_and_halves_of_guidance_do_not_mix(name: str):
    model, session = made(name)
    with session:
        both = run(model, name)
        assert torch.isfinite(both).all()
        given = dits.inputs(name)
        one = {k: v[1:] if torch.is_tensor(v) else v for k, v in given.items()}
        with torch.no_grad():
            alone = dits.call(model, one)
            pair = dits.call(
                model, {k: torch.cat([v, v]) if torch.is_tensor(v) else v for k, v in given.items()}
            )
        torch.testing.assert_close(alone[0], both[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pair[:2], pair[2:], rtol=1e-4, atol=1e-4)
        for time in (0.9, 0.5, 0.1):
            run(model, name, time=time)
        assert torch.equal(run(model, name), both)
    assert not torch.equal(run(model, name), both)  # detached


def test_frames_are_pooled_alone_and_mixed_over_time():
    model, session = made("latte", rate=(0.75, 0.75))
    seen: list[tuple[int, ...]] = []
    blocks: Any = model.get_submodule("temporal_transformer_blocks")
    handles = [b.register_forward_hook(lambda m, a, out: seen.append(out.shape)) for b in blocks]
    with session:
        run(model, "latte")
    assert [(rows, frames) for rows, frames, _ in seen] == [
        (2 * n, 3) for n in (36, 9, 9, 36, 36)
    ]  # the last but one recovers
    for handle in handles:
        handle.remove()


def test_every_family_that_mixes_texts_or_turns_positions_is_refused():
    for name in ("sd3", "flux", "wan"):
        model = dits.make(name)
        with pytest.raises(UnsupportedModel, match=f"queries and keys apart.*this is {name}"):
            vtc.attach(model, "flexdit", **SHAPE)
        assert vtc.describe(model).methods["flexdit"].startswith("no: 'flexdit' asks")
    assert vtc.describe(dits.make("dit", depth=7)).methods["flexdit"] == "flexdit at dit.0"
    assert "smaller group=" in vtc.describe(dits.make("dit")).methods["flexdit"]


# ---------------------------------------------------------------------- training


def test_gradients_reach_the_new_weights_at_the_first_step():
    model = dits.make("dit", DEPTH)
    session = vtc.attach(model, "flexdit", **SHAPE)
    side = session.modules["dit.0"]
    dits.call(model.train(), dits.inputs("dit")).square().mean().backward()
    recovery = side.recoveries[0]
    assert not recovery.w1.any() and torch.equal(recovery.w2, torch.eye(32))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in side.parameters())
    ours = [p for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(ours) > 0.8 * len(list(model.parameters()))
    optimizer = torch.optim.AdamW([*model.parameters(), *side.parameters()], lr=1e-3)
    optimizer.step()
    assert recovery.w1.abs().max() > 0
    session.detach()


def test_a_mixed_batch_needs_one_interval():
    model, session = made("original", rate=(0.2, 0.8))
    given = dits.inputs("original")
    counts = []
    with session, torch.no_grad():
        for times in ((500.0, 624.0), (550.0, 560.0)):
            given["t"] = torch.tensor(times)
            dits.call(model, given)
            counts.append(session.stats()["flops"])
        assert counts[1] == 2 * counts[0]  # both at the middle of [4/8, 5/8)
        given["t"] = torch.tensor([500.0, 625.0])
        with pytest.raises(InvalidInput, match=r"0\.500 to 0\.625 noisy.*one of the 8 intervals"):
            dits.call(model, given)
    model, session = made("original", rate=(0.5, 0.5))
    with session, torch.no_grad():
        given["t"] = torch.tensor([10.0, 990.0])
        assert torch.isfinite(dits.call(model, given)).all()  # a static schedule mixes them


def test_draws_fill_one_interval_and_all_of_time():
    dice = torch.Generator().manual_seed(0)
    schedule = Schedule(0.6, 0.8)
    seen = [schedule.draw(16, dice) for _ in range(800)]
    assert all(len(set((t // 125).tolist())) == 1 for t in seen)
    shares = torch.bincount(torch.cat(seen) // 125, minlength=8) / (16 * 800)
    assert (shares - 1 / 8).abs().max() < 0.05
    for time in (0, 124, 125, 999):
        assert schedule.of_batch(time / 1000, time / 1000, True) == pytest.approx(
            schedule.pruned((time // 125 + 0.5) / 8)
        )
    odd = Schedule(0.6, 0.8, intervals=7)
    for _ in range(50):
        times = odd.draw(8, dice, 100) / 100
        odd.of_batch(float(times.max()), float(times.min()), True)


def test_weights_are_saved_and_read_where_they_fit(tmp_path: Path):
    model, session = made("dit")
    found, path = run(model, "dit"), tmp_path / "flex.safetensors"
    side = session.modules["dit.0"]
    side.save(path)
    assert "not trained" in session.report()
    session.detach()
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    model = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    again = vtc.attach(model, "flexdit", **SHAPE, weights=str(path))
    assert torch.equal(run(model, "dit"), found)
    assert "not trained" not in again.report()
    again.detach()
    with pytest.raises(InvalidInput, match="do not fit.*roles is"):
        vtc.attach(model, "flexdit", **SHAPE | {"group": (1, 0, 1, 0), "modules": 1}, weights=path)
    assert sum(p.numel() for p in side.parameters()) == 2 * (32**2 + 32)


# ---------------------------------------------------------------------- parts


def test_the_schedule_by_hand():
    clean, noisy = Schedule(0.2, 0.8), Schedule(0.2, 0.8, "noisy")
    assert [round(clean.pruned(t), 6) for t in (0, 0.25, 0.5, 1)] == [0.2, 0.2, 0.4, 0.8]
    assert [round(noisy.pruned(t), 6) for t in (0, 0.375, 0.75, 1)] == [0.2, 0.5, 0.8, 0.8]
    for schedule in (clean, noisy):
        sides = [small_grid((16, 9), schedule.pruned(t / 250)) for t in range(251)]
        cells = [h * w for h, w in sides]
        assert cells == sorted(cells, reverse=True)
        assert all(1 <= h <= 16 and 1 <= w <= 9 for h, w in sides)
    shares = (0.86, 0.61, 0.44)
    assert [small_grid((16, 16), r)[0] for r in shares] == [6, 10, 12]
    assert [small_grid((32, 32), r)[0] for r in (0.96, 0.90, *shares[:2])] == [6, 10, 12, 20]
    assert small_grid((12, 20), 0.8) == (5, 9) and small_grid((2, 3), 0.99) == (1, 1)


@pytest.mark.parametrize(
    ("grid", "small"), [((6, 6), (3, 2)), ((5, 7), (2, 3)), ((12, 20), (5, 9)), ((4, 4), (4, 4))]
)
def test_pooling_and_back(grid: tuple[int, int], small: tuple[int, int]):
    dice = torch.Generator().manual_seed(1)
    n, m = math.prod(grid), math.prod(small)
    plan = nearest(grid, small, 2, torch.device("cpu"))
    plan.check(torch.ones(2, n, dtype=torch.bool))
    same = torch.full((2, n, 3), 0.7)
    torch.testing.assert_close(pooled(same, grid, small), same[:, :m])
    torch.testing.assert_close(vtc.ops.restore(plan, same[:, :m]), same)
    y = torch.randn(2, m, 3, generator=dice)
    image = F.interpolate(y.transpose(1, 2).unflatten(2, small), grid, mode="nearest")
    assert torch.equal(vtc.ops.restore(plan, y), image.flatten(2).transpose(1, 2))
    x = torch.randn(2, n, 3, generator=dice)
    if not any(a % b for a, b in zip(grid, small, strict=True)):
        torch.testing.assert_close(pooled(x, grid, small).mean(1), x.mean(1))
    if grid == small:
        assert torch.equal(pooled(x, grid, small), x)


def test_roles_by_hand():
    xl = roles(28, 1, 4, (1, 3, 1, 1), 3)
    one = ("generate", "sparse", "sparse", "sparse", "recover", "dense")
    assert xl == ("pool", *one * 4, "dense", "dense", "dense")
    assert roles(28, 1, None, (1, 3, 1, 1), None) == xl
    assert roles(3, 2, 0, (1, 3, 1, 1), None) == ("pool", "pool", "dense")
    for wrong in ((27, 1, 4, (1, 3, 1, 1), 3), (20, 1, 4, (1, 3, 1, 1), None)):
        with pytest.raises(InvalidRecipe, match=f"do not make the {wrong[0]} blocks"):
            roles(*wrong)
    with pytest.raises(InvalidRecipe, match=r"no group of 6 blocks fits into this model of 6"):
        roles(6, 1, None, (1, 3, 1, 1), None)
    with pytest.raises(InvalidRecipe, match=r"a group is \(1, sparse, 1, dense\)"):
        roles(28, 1, 4, (2, 3, 1, 1), 0)


@pytest.mark.parametrize("rate", [(0.8, 0.6), (-0.1, 0.5), (0.5, 1.0)])
def test_a_rate_that_makes_no_sense(rate: tuple[float, float]):
    with pytest.raises(InvalidRecipe, match="not falling, such as"):
        vtc.attach(dits.make("dit"), "flexdit", rate=rate)


@pytest.mark.parametrize(
    "more", [{"until": "dit.3"}, {"noise": (0.5, 1.0)}], ids=["until", "noise"]
)
def test_it_takes_no_span(more: dict[str, Any]):
    with pytest.raises(InvalidRecipe, match="'flexdit' acts in all blocks"):
        vtc.attach(dits.make("dit", DEPTH), "flexdit", **SHAPE, **more)


@pytest.mark.parametrize("name", MIXING)
def test_half_precision(name: str):
    model = dits.make(name, DEPTH).to(torch.bfloat16)
    given = dits.inputs(name)
    halves = {
        k: v.to(torch.bfloat16) if torch.is_tensor(v) and v.ndim > 1 else v
        for k, v in given.items()
    }
    with vtc.attach(model, "flexdit", **SHAPE), torch.no_grad():
        found = dits.call(model, halves)
    with vtc.attach(dits.make(name, DEPTH), "flexdit", **SHAPE) as session:
        wanted = run(session.model, name)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


def test_recipes_go_to_yaml_and_back(tmp_path: Path):
    model = dits.make("dit", DEPTH)
    recipe = vtc.Recipe.build("flexdit", DEPTH, hold="noisy", **SHAPE)
    path = tmp_path / "r.yaml"
    recipe.dump(path)
    assert vtc.Recipe.load(path) == recipe
    with vtc.attach(model, path) as session:
        run(model, "dit")
    assert session.recipe == recipe


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_fit_the_depth_they_are_for(path: Path):
    name = next(n for n in ("pixart", "latte", "dit") if n in path.stem.replace("flexdit", "dit"))
    model = dits.make(name, 28, 8)
    dense = run(model, name, shape=(8, 8))
    with vtc.attach(model, path) as session:
        assert run(model, name, shape=(8, 8)).shape == dense.shape
    assert len(session.modules["dit.0"].roles) == 28


# ---------------------------------------------------------------------- what it costs


def multiply_adds(order: Sequence[str], c: int, n: int, m: int) -> float:
    """As the paper counts."""
    linear = {
        "pool": 10 * n,
        "generate": 10 * m + 2 * n,
        "sparse": 12 * m,
        "recover": 12 * n + 2 * m,
        "dense": 12 * n,
    }
    pairs = {"pool": 0, "generate": m * n, "sparse": m * m, "recover": m * n, "dense": n * n}
    return sum((linear[r] + 6) * c**2 + 2 * pairs[r] * c for r in order)


class Shapes(dits.Original):
    """Blocks alone: on the meta device, where timesteps are no numbers."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, x.new_zeros(len(x), x.shape[-1]))
        return x


#: preset -> depth, width, side, the paper's GMACs dense and with few tokens, how near we count
PUBLISHED = {
    "dit_xl_256": (28, 1152, 16, 118.64, 68.05, 0.002),
    "dit_xl_512": (28, 1152, 32, 525, 286, 0.011),
    "dit_xl_512_sparse": (28, 1152, 32, 525, 235, 0.011),
    "dit_b_256": (12, 768, 16, 23.01, 14.34, 0.011),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_cost_what_the_paper_says(preset: str):
    depth, c, side, dense, published, near = PUBLISHED[preset]
    n = side * side
    with torch.device("meta"):
        model = Shapes(depth, c).eval()
    with vtc.attach(model, "flexdit", preset=preset, hold="noisy") as session, torch.no_grad():
        image = torch.empty(1, 4, 2 * side, 2 * side, device="meta")
        model(image, torch.tensor([500.0]), torch.tensor([0]))
        stats, schedule = session.stats(), session.methods[0].schedule
    order = session.modules["dit.0"].roles
    m = [math.prod(small_grid((side, side), schedule.pruned(t / 250))) for t in range(251)]
    # two products are done where there are fewer tokens than the paper's code does them for
    saved = order.count("pool") * n * c**2 + order.count("recover") * (n - m[125]) * c**2
    assert stats["flops"] / 2 + saved == pytest.approx(multiply_adds(order, c, n, m[125]), rel=1e-9)
    assert multiply_adds(["dense"] * depth, c, n, n) == pytest.approx(1e9 * dense, rel=2e-3)
    mean = sum(multiply_adds(order, c, n, k) for k in m) / len(m)
    assert mean == pytest.approx(1e9 * published, rel=near)
    assert stats["flops_dense"] / 2 == multiply_adds(["dense"] * depth, c, n, n)


def test_the_preset_of_pixart_costs_what_the_paper_says_with_the_schedule_of_its_text():
    c, n, text = 1152, 256, 120
    values = PRESETS["pixart"]
    order = roles(28, *(values[k] for k in ("poolingformers", "modules", "group", "top")))
    schedule = Schedule(*values["rate"])

    def cost(m: int, order: Sequence[str]) -> float:
        """With cross-attention to the prompt, and without a modulation of each block's own."""
        total = multiply_adds(order, c, n, m)
        for role in order:
            here = m if role in ("generate", "sparse") else n
            total += 2 * (here + text) * c**2 + 2 * here * text * c - 6 * c**2
        return total

    mean = sum(
        cost(math.prod(small_grid((16, 16), schedule.pruned(t / 250))), order) for t in range(251)
    )
    assert cost(n, ["dense"] * 28) == pytest.approx(148.73e9, rel=0.004)
    assert mean / 251 == pytest.approx(91.62e9, rel=0.011)


def test_every_preset_is_a_choice_and_makes_its_model():
    for name, values in PRESETS.items():
        side = 12 if name == "dit_b_256" else 28
        order = roles(side, *(values.get(k) for k in ("poolingformers", "modules", "group", "top")))
        assert len(order) == side
        vtc.Recipe.build("flexdit", side, preset=name)


def test_new_weights_begin_as_a_short_cut():
    recovery = Recovery(4)
    dice = torch.Generator().manual_seed(2)
    sparse, dense = torch.randn(2, 4, 4, generator=dice), torch.randn(2, 9, 4, generator=dice)
    assert torch.equal(recovery(sparse, dense, (3, 3), (2, 2)), dense)
    with torch.no_grad():
        recovery.w1 += torch.eye(4)
        recovery.b1 += 1
    slots = [0, 0, 1, 0, 0, 1, 2, 2, 3]
    wanted = dense + sparse[:, slots] + 1
    torch.testing.assert_close(recovery(sparse, dense, (3, 3), (2, 2)), wanted)
