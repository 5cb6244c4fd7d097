"""ToMe on image encoders. The oracle never shortens anything: it keeps all tokens, gives every
member of a merged group the group's mean (duplicates attend like one token with log(size)), and
runs the blocks by their own modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from test_encoders import MODELS, images, made
from torch import Tensor, nn
from torch.nn import functional as F

import vtc
from vtc import ops
from vtc.draw import fates, overlay
from vtc.errors import InvalidBudget, InvalidRecipe, UnsupportedModel, UnsupportedSite
from vtc.reducer import Host
from vtc.session import Reduction
from vtc.testing.threads import in_threads

PATCHES = 48
PLACES = ("mlp", "block")
#: blocks whose MLP's branch is known, and those that the oracle can run by their modules
INSIDE = ("cls", "registers", "average", "map", "eva", "eva_bias", "differential")
PLAIN = ("cls", "registers", "average", "map")


def sources(trace: list[Reduction]) -> list[Tensor]:
    """After every step [B, N]: the group of each original patch, named by a number."""
    home = torch.arange(PATCHES).expand(3, -1)
    out = []
    for step in trace:
        assert step.plan is None or step.plan.assign is not None
        home = home if step.plan is None else step.plan.destination().gather(1, home)
        out.append(home)
    return out


def means(x: Tensor, groups: Tensor, prefix: int) -> Tensor:
    """x [B, prefix + N, D] with every patch replaced by the mean of its group."""
    rows = []
    for body, group in zip(x[:, prefix:], groups, strict=True):
        same = (group[:, None] == group[None]).to(body.dtype)
        rows.append(same @ body / same.sum(1, keepdim=True))
    return torch.cat([x[:, :prefix], torch.stack(rows)], 1)


def duplicates(model: Any, pixels: Tensor, trace: list[Reduction]) -> Tensor:
    """[B, prefix + N, D] after the last block of a plain ViT, before its norm."""
    prefix = model.num_prefix_tokens
    after = dict(zip((step.site for step in trace), sources(trace), strict=True))
    x = model._pos_embed(model.patch_embed(pixels))
    x = model.norm_pre(x)
    for i, block in enumerate(model.blocks):
        if f"vision.{i}" in after:
            x = means(x, after[f"vision.{i}"], prefix)
        x = x + block.ls1(block.attn(block.norm1(x)))
        if f"vision.{i}.mlp" in after:
            x = means(x, after[f"vision.{i}.mlp"], prefix)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PLAIN)
def test_merging_equals_duplicates(name: str, place: str) -> None:
    model: Any = made(name)
    prefix = model.num_prefix_tokens
    with torch.no_grad(), vtc.attach(model, "tome", r=5, place=place) as session:
        ours, dense = model(images()), model.forward_features(images())
    steps = list(session.trace)[: len(session.recipe.steps)]
    assert len(steps) == (4 if place == "mlp" else 3)
    with torch.no_grad():
        full = model.norm(duplicates(model, images(), steps))
        groups = sources(steps)[-1]
        first = torch.stack(
            [torch.tensor([g.tolist().index(s) for s in range(len(g.unique()))]) for g in groups]
        )
        short = torch.cat([full[:, :prefix], ops.gather_rows(full[:, prefix:], first)], 1)
        expected = model.forward_head(short)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense, full, rtol=1e-4, atol=1e-4)  # copies are where they came from


@pytest.mark.parametrize(
    "name, place",
    [*((n, "mlp") for n in INSIDE), *((n, "block") for n in (*INSIDE, "beit", "beit_shared"))],
)
def test_sizes_add_up_and_nothing_merged_changes_no_bit(name: str, place: str) -> None:
    model: Any = made(name)
    with torch.no_grad():
        before = model(images())
        with vtc.attach(model, "tome", r=0, place=place) as session:
            assert torch.equal(model(images()), before)
        assert all(step.plan is None for step in session.trace)
        with vtc.attach(model, "tome", r=7, place=place) as session:
            model(images())
    for number, step in enumerate(session.trace, 1):
        assert step.plan is not None and step.plan.size is not None
        assert step.plan.size.sum(1).tolist() == [PATCHES] * 3
        n = PATCHES - 7 * (number - 1)
        assert step.n_in == (n,) * 3 and step.n_out == (n - min(7, n // 2),) * 3
        x = torch.randn(3, step.n_out[0], 8)
        again = ops.apply(step.plan, ops.restore(step.plan, x))
        torch.testing.assert_close(again, x)  # merging undoes copying


def published(keys: Tensor, r: int) -> dict[int, int]:
    """The r merges of one image in plain loops: {token of A: token of B}."""
    unit = [key / key.norm() for key in keys]
    edges = []
    for a in range(1, len(unit), 2):
        cosines = [float(unit[a] @ unit[b]) for b in range(0, len(unit), 2)]
        best = max(range(len(cosines)), key=lambda j: cosines[j])
        edges.append((cosines[best], a, 2 * best))
    return {a: b for _, a, b in sorted(edges, key=lambda e: -e[0])[:r]}


@pytest.mark.parametrize("name", ["cls", "registers", "eva_bias"])
def test_pairs_are_those_of_plain_loops(name: str) -> None:
    model: Any = made(name)
    prefix, seen = model.num_prefix_tokens, []
    attention = model.blocks[0].attn

    def look(module: Any, args: Any, kwargs: Any) -> None:
        x, rope = args[0], kwargs.get("rope")
        b, n, _ = x.shape
        k = (module.k_proj(x) if hasattr(module, "k_proj") else module.qkv(x).chunk(3, -1)[1]).view(
            b, n, 2, -1
        )
        k = module.k_norm(k.transpose(1, 2))
        if rope is not None:
            sin, cos = rope.chunk(2, -1)
            body, turned = k[:, :, prefix:], torch.empty_like(k[:, :, prefix:])
            turned[..., ::2], turned[..., 1::2] = -body[..., 1::2], body[..., ::2]
            k = torch.cat([k[:, :, :prefix], body * cos + turned * sin], 2)
        seen.append(k.mean(1)[:, prefix:])

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad(), vtc.attach(model, "tome", r=9) as session:
        model(images())
    handle.remove()
    plan = session.trace[0].plan
    assert plan is not None and plan.assign is not None
    for row in range(3):
        merges = published(seen[0][row], 9)
        slots = plan.assign[row].tolist()
        assert sorted(set(range(PATCHES)) - set(plan.index[row].tolist())) == sorted(merges)
        assert all(slots[a] == slots[b] for a, b in merges.items())


@pytest.mark.parametrize(
    "r, merged",
    [
        (3, [3, 3, 3, 3]),
        ((4, -1.0), [8, 5, 2, 0]),
        ((5, 0.5), [2, 4, 6, 8]),  # 2.5 and 7.5 are 2 and 8 in released code
        ([4, 1.0], [0, 2, 5, 8]),
        ([5, 0, 2, 1], [5, 0, 2, 1]),
    ],
)
def test_schedules(r: Any, merged: list[int]) -> None:
    model: Any = made("cls")
    with torch.no_grad(), vtc.attach(model, "tome", r=r) as session:
        model(images())
    assert [step.n_in[0] - step.n_out[0] for step in session.trace] == merged


def test_a_share_is_reached_exactly_and_below_half_in_rounds() -> None:
    model: Any = made("cls")
    with torch.no_grad(), vtc.attach(model, "tome", keep=0.25) as session:
        model(images())
    assert [step.n_out[0] for step in session.trace] == [39, 30, 21, 12]
    with torch.no_grad(), vtc.attach(model, "tome_merge", keep=5, at="vision.1.mlp") as session:
        model(images())
    (step,) = session.trace
    assert step.n_out == (5, 5, 5) and step.plan is not None and step.plan.size is not None
    assert step.plan.size.sum(1).tolist() == [PATCHES] * 3 and step.plan.size.min() >= 1


@pytest.mark.parametrize("method", ["random", "divprune", "norm"])
@pytest.mark.parametrize("name", INSIDE)
def test_dropping_between_attention_and_mlp_equals_masking(name: str, method: str) -> None:
    """The tokens that go at vision.1.mlp are seen by the attention of block 1 and no later one."""
    model: Any = made(name)
    with torch.no_grad(), vtc.attach(model, method, keep=0.25, at="vision.1.mlp") as session:
        ours = model(images())
    prefix = model.num_prefix_tokens
    keep = torch.zeros(3, PATCHES, dtype=torch.bool).scatter(1, session.trace[-1].source, True)
    keep = torch.cat([torch.ones(3, prefix, dtype=torch.bool), keep], 1)
    mask = torch.where(keep, 0.0, float("-inf"))[:, None, None]

    def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attn_mask": mask}

    handles = [b.register_forward_pre_hook(hide, with_kwargs=True) for b in model.blocks[2:]]
    with torch.no_grad():
        full = model.forward_features(images())
        short = torch.stack([x[k] for x, k in zip(full, keep, strict=True)])
        expected = model.forward_head(short)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_those_of_duplicates(place: str) -> None:
    model: Any = made("average")
    with vtc.attach(model, "tome", r=5, place=place) as session:
        loss = model(images()).square().sum()
    got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    steps = list(session.trace)
    full = duplicates(model, images(), steps)
    groups = sources(steps)[-1]
    share = torch.stack([1 / F.one_hot(g).sum(0)[g] for g in groups])  # one vote per group
    pooled = (full * share[..., None]).sum(1) / share.sum(1, keepdim=True)
    expected = torch.autograd.grad(
        model.head(model.fc_norm(pooled)).square().sum(),
        list(model.parameters()),
        allow_unused=True,
    )
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    for ours, other in zip(got, expected, strict=True):
        assert (ours is None) == (other is None)
        if ours is not None:
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("place", PLACES)
def test_compiles_without_graph_breaks(place: str) -> None:
    model: Any = MODELS["cls"]().eval()
    with torch.no_grad(), vtc.attach(model, "tome", r=5, place=place):
        eager = model(images())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images())
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_alone_equals_in_a_batch_and_low_precision_runs() -> None:
    model: Any = made("cls")
    with torch.no_grad(), vtc.attach(model, "tome", r=6):
        together = model(images())
        alone = torch.cat([model(x[None]) for x in images()])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    low = MODELS["cls"]().eval().bfloat16()
    with torch.no_grad(), vtc.attach(low, "tome", r=6) as session:
        assert low(images().bfloat16()).isfinite().all()
    assert session.trace[-1].n_out == (PATCHES - 24,) * 3


def test_proportional_attention_can_be_switched_off() -> None:
    model: Any = made("cls")
    answers = []
    for on in (True, False):
        with torch.no_grad(), vtc.attach(model, "tome", r=6, prop_attn=on) as session:
            answers.append(model.forward_features(images()))
        assert {step.mass for step in session.recipe.steps} == {float(on)}
    assert (answers[0] - answers[1]).abs().max() > 1e-2


def test_pictures_follow_merged_patches_to_where_they_went() -> None:
    from PIL import Image

    model: Any = made("cls")
    with torch.no_grad(), vtc.attach(model, "tome", r=8) as session:
        model(images())
    last = fates(session.trace)[-1]
    groups = sources(list(session.trace))[-1][0]
    assert len(last.kept) == PATCHES - 32 and -1 not in last.home
    for place, home in enumerate(last.home):
        assert groups[place] == groups[home]
    picture = overlay(Image.new("RGB", (48, 64)), session.trace, stages="last")
    assert picture.width > 0


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"r": 5, "keep": 0.5}, InvalidBudget, "not both"),
        ({"keep": 12}, InvalidBudget, "give a share"),
        ({"r": -1}, InvalidRecipe, "whole numbers from 0"),
        ({"r": [1, 2]}, InvalidRecipe, "each of the 4 blocks"),
        ({"r": (4, 2.0)}, InvalidRecipe, "slope 2.0"),
        ({"r": 3, "at": "vision.2"}, InvalidRecipe, "knows its own sites"),
        ({"r": "13"}, InvalidRecipe, "is not int"),
        ({"merge": "nearest"}, InvalidRecipe, "'tome' merges every token itself: leave merge out"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        vtc.attach(made("cls"), "tome", **options)


def test_models_without_the_place_say_so() -> None:
    with pytest.raises(UnsupportedSite, match="no vision blocks"):
        vtc.REDUCERS["tome"]().parts(Host(4, frozenset({"projector"})), None)
    from test_encoders import TINY
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    model = partial(VisionTransformer, **TINY, block_fn=ResPostBlock)().eval()
    with pytest.raises(UnsupportedSite, match="place='mlp'"):
        vtc.attach(model, "tome", r=3, place="mlp")
    with vtc.attach(model, "tome", r=3) as session, torch.no_grad():
        model(images())
    assert [step.at for step in session.recipe.steps] == ["vision.1", "vision.2", "vision.3"]


def test_attention_of_a_block_that_was_shortened_inside_cannot_be_read_behind_it() -> None:
    steps = (vtc.Step("random", "vision.1.mlp", 0.5), vtc.Step("tome_merge", "vision.2", 0.25))
    with pytest.raises(UnsupportedModel, match="Use 'vision.2.mlp'"):
        vtc.attach(made("cls"), vtc.Recipe(steps))


def test_threads_do_not_mix() -> None:
    model: Any = made("cls")
    with torch.no_grad(), vtc.attach(model, "tome", r=6):
        expected = [model(x[None]) for x in images()]

        def work(x: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return [model(x[None]) for _ in range(5)]

        results = in_threads([partial(work, x) for x in images()])
    assert all(torch.equal(y, one) for one, ys in zip(expected, results, strict=True) for y in ys)
