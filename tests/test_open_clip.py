"""Visual towers of open_clip: dropping equals masking, zero-shot scores and dense outputs included.

The oracle runs the blocks of the untouched model one by one on whole grids, with the dropped tokens
masked in every attention behind the drop, poolers included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vtc
from vtc.errors import InvalidRecipe, UnsupportedModel, UnsupportedSite
from vtc.testing.threads import in_threads

open_clip = pytest.importorskip("open_clip", reason="image encoders need the extra 'vision'")

TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
VISION: dict[str, Any] = {
    "image_size": (64, 48),
    "patch_size": 8,
    "width": 32,
    "head_width": 16,
    "layers": 4,
}
POOLER: dict[str, Any] = {"attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
DECODER = TEXT | {"attn_pooler_heads": 2, "width": 16}
DROP = 2  # the block before which tokens go


def clip(**vision: Any) -> nn.Module:
    return open_clip.CLIP(16, VISION | vision, TEXT)


def custom(**vision: Any) -> nn.Module:
    return open_clip.CustomTextCLIP(16, VISION | vision, TEXT)


def coca(**vision: Any) -> nn.Module:
    text = TEXT | {"embed_cls": True, "output_tokens": True, "width": 16}
    return open_clip.CoCa(16, DECODER, text, VISION | POOLER | vision)


def trunk(name: str, pool: str, proj: str = "linear") -> nn.Module:
    own = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 160}
    return open_clip.CustomTextCLIP(16, own, TEXT)


MODELS: dict[str, partial[Any]] = {
    "clip": partial(clip),
    "layer_scale": partial(clip, ls_init_value=0.5, final_ln_after_pool=True),
    "average": partial(clip, pool_type="avg"),
    "own_attention": partial(
        clip,
        qk_norm=True,
        scale_heads=True,
        scale_attn_inner=True,
        scale_attn=True,
        scale_fc=True,
    ),
    "custom_text": partial(custom, no_ln_pre=True),
    "coca": partial(coca, attentional_pool=True),
    "parallel": partial(coca, attentional_pool="parallel", width=16, head_width=8),
    "cascade": partial(coca, attentional_pool="cascade", width=16, head_width=8),
    "trunk_token": partial(trunk, "test_vit", "token"),
    "trunk_average": partial(trunk, "test_vit2", "avg", "mlp"),
    "trunk_map": partial(trunk, "test_vit3", ""),
}
NATIVE = [name for name in MODELS if "trunk" not in name]
#: models that pool the class token, or all tokens by attention
WEIGHED = ["clip", "layer_scale", "own_attention", "coca", "parallel", "cascade", "trunk_token"]
METHODS = ("random", "norm", "divprune", "cls_rows", "key_lengths")


@pytest.fixture(autouse=True, scope="module")
def methods_that_read_signals() -> Iterator[None]:
    """One method for each signal, and one that lets images keep different numbers."""

    @vtc.register("cls_rows")
    @dataclass(frozen=True)
    class ClsRows(vtc.Scorer):
        sites, needs = frozenset({"vision"}), frozenset({"attn_cls"})

        def score(self, ctx: Any) -> Tensor:
            return ctx.signals["attn_cls"]

    @vtc.register("key_lengths")
    @dataclass(frozen=True)
    class KeyLengths(vtc.Scorer):
        sites, needs = frozenset({"vision"}), frozenset({"vision_keys"})

        def score(self, ctx: Any) -> Tensor:
            return ctx.signals["vision_keys"].norm(dim=-1)

    @vtc.register("above_mean")
    @dataclass(frozen=True)
    class AboveMean(vtc.Method):
        sites, budgets = frozenset({"vision"}), frozenset({"auto"})

        def plan(self, ctx: Any, k: tuple[int, ...]) -> vtc.Plan:
            length = ctx.x.norm(dim=-1)
            return vtc.Plan.from_mask(length > length.mean(1, keepdim=True))

    yield
    for name in ("cls_rows", "key_lengths", "above_mean"):
        del vtc.REDUCERS._items[name]


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for title, parameter in model.named_parameters():
        flat = parameter.ndim and parameter.std() == 0  # fresh tables and biases
        if flat or "text_projection" in title:  # CoCa leaves it without values
            nn.init.normal_(parameter, std=0.3)
    return model


made = cache(fresh)


@cache
def images(name: str, batch: int = 3) -> Tensor:
    size = (160, 160) if "trunk" in name else (64, 48)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@cache
def words() -> Tensor:
    return torch.randint(1, 49, (4, 8), generator=torch.Generator().manual_seed(2))


def blocks_of(visual: Any) -> Any:
    return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks


def prefix_of(visual: Any) -> int:
    return visual.trunk.num_prefix_tokens if hasattr(visual, "trunk") else 1


# ---------------------------------------------------------------- oracle


@contextmanager
def masks(modules: Any, hidden: Tensor, heads: int) -> Iterator[None]:
    """What is -inf in `hidden` [B, N] is masked as a key of multi-head attention in `modules`.
    `hidden` may hold other numbers, which are added to the logits."""

    def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = hidden[:, None, None]  # timm broadcasts it, open_clip does not
        if heads:
            mask = mask.expand(-1, heads, args[0].shape[1], -1).flatten(0, 1)
        return args, {**kwargs, "attn_mask": mask}

    handles = [m.register_forward_pre_hook(hide, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def oracle(
    visual: Any, pictures: Tensor, hidden: Tensor, change: Any = None
) -> tuple[Tensor, Tensor]:
    """(image features, tokens before the pooling [B, N, D]) with `hidden` [B, N] added to the
    logits of every attention behind the drop; `change` is done to the tokens at the drop."""
    blocks, wrapped = blocks_of(visual), hasattr(visual, "trunk")
    handles = []
    if change is not None:
        handles = [blocks[DROP].register_forward_pre_hook(lambda _, args: (change(args[0]),))]
    keep = hidden.isfinite()
    try:
        if wrapped:
            with masks(blocks[DROP:], hidden, 0):
                full = visual.trunk.forward_features(pictures)
            left = [visual.trunk.forward_head(x[k][None]) for x, k in zip(full, keep, strict=True)]
            return visual.head(torch.cat(left)), full
        with masks(blocks[DROP:], hidden, 2):
            full = visual.transformer(visual._embeds(pictures))
        poolers = [p.attn for p in (visual.attn_pool, contrastive(visual)) if p is not None]
        with masks(poolers, hidden, 2):
            left = [full] if poolers else [x[k][None] for x, k in zip(full, keep, strict=True)]
            pooled = torch.cat([visual._pool(x)[0] for x in left])
        return pooled @ visual.proj, full
    finally:
        for handle in handles:
            handle.remove()


def contrastive(visual: Any) -> Any:
    """The second pooler, where it reads patches."""
    parallel = getattr(visual, "attn_pool_type", "") == "parallel"
    return visual.attn_pool_contrastive if parallel else None


def hidden_of(session: vtc.Session, prefix: int) -> Tensor:
    """[B, N] zero for what the last reduction kept, prefix included, else -inf."""
    entry = session.trace[-1]
    assert entry.plan is not None
    patches = torch.full((len(entry.n_in), entry.n_in[0]), float("-inf"))
    return F.pad(patches.scatter(1, entry.source, 0.0), (prefix, 0))


# ---------------------------------------------------------------- dropping


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_dropping_equals_masking(name: str, method: str) -> None:
    model, pictures = made(name), images(name)
    at = f"vision.{DROP}"
    with torch.no_grad(), vtc.attach(model, method, keep=0.25, at=at, seed=3) as session:
        ours = model.encode_image(pictures, normalize=False)
        hidden = hidden_of(session, prefix_of(model.visual))
        scores = zero_shot(model, pictures)
    n = hidden.shape[1] - prefix_of(model.visual)
    assert hidden.isfinite().sum(1).tolist() == [prefix_of(model.visual) + n // 4] * 3
    with torch.no_grad():
        expected, _ = oracle(model.visual, pictures, hidden)
        text = F.normalize(model.encode_text(words()), dim=-1)
    close(ours, expected)
    close(scores, 100 * F.normalize(expected, dim=-1) @ text.mT)


def zero_shot(model: Any, pictures: Tensor) -> Tensor:
    image = model.encode_image(pictures, normalize=True)
    return 100 * image @ model.encode_text(words(), normalize=True).mT


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_visual_tower_alone_is_the_same(name: str) -> None:
    model, pictures = made(name), images(name)
    with torch.no_grad():
        with vtc.attach(model, "norm", keep=0.25, at="vision.1"):
            whole = model.encode_image(pictures, normalize=False)
        with vtc.attach(model.visual, "norm", keep=0.25, at="vision.1") as session:
            alone = model.visual(pictures)
            assert torch.equal(model.encode_image(pictures, normalize=False), whole)
    assert torch.equal(alone[0] if isinstance(alone, tuple) else alone, whole)
    assert "image encoder" in session.report()


@pytest.mark.parametrize("name", MODELS)
def test_keeping_all_is_bit_equal_and_nothing_is_left(name: str) -> None:
    model, pictures = fresh(name), images(name)
    before, names = model.encode_image(pictures), traces(model)
    with vtc.attach(model, "random", keep=1.0, at="vision.1"):
        assert torch.equal(model.encode_image(pictures), before)
    with (
        pytest.raises(RuntimeError, match="boom"),
        vtc.attach(model, "random", keep=0.5, at="vision.1", mass=1.0),
    ):
        assert not torch.equal(model.encode_image(pictures), before)
        raise RuntimeError("boom")
    assert torch.equal(model.encode_image(pictures), before)
    assert traces(model) == names


def traces(model: nn.Module) -> list[Any]:
    """Attributes and hooks of every module."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()
    ]
    assert not any(a or b for a, b, _ in hooks)
    return hooks


def test_an_exception_inside_the_forward_leaves_nothing() -> None:
    model = fresh("coca")
    before = model.encode_image(images("coca"))

    def fail(*_: Any) -> None:
        raise RuntimeError("boom")

    handle = model.visual.transformer.resblocks[3].register_forward_pre_hook(fail)
    with (
        pytest.raises(RuntimeError, match="boom"),
        vtc.attach(model, "random", keep=9, at="vision.1"),
    ):
        model.encode_image(images("coca"))
    handle.remove()
    traces(model)
    assert torch.equal(model.encode_image(images("coca")), before)


# ---------------------------------------------------------------- merging, mass, padding


def merged(x: Tensor, plan: Any, prefix: int) -> Tensor:
    """Every token becomes the mean of its slot."""
    slot = F.one_hot(plan.assign).float()
    mean = (slot * plan.weight[..., None]).mT @ x[:, prefix:]
    return torch.cat([x[:, :prefix], slot @ mean], 1)


@pytest.mark.parametrize("merge", ["nearest", "none"])
@pytest.mark.parametrize("name", WEIGHED)
def test_mass_equals_copies(name: str, merge: Any) -> None:
    """With mass 1 a token stands for its copies: the oracle runs them all, and masks lost ones."""
    model, pictures = made(name), images(name)
    visual, prefix = model.visual, prefix_of(model.visual)
    at, threshold = f"vision.{DROP}", {"merge_threshold": -1.0} if merge == "nearest" else {}
    options: dict[str, Any] = {"merge": merge, "mass": 1.0, "seed": 3, **threshold}
    with torch.no_grad(), vtc.attach(model, "random", keep=0.25, at=at, **options) as session:
        ours = model.encode_image(pictures, normalize=False)
        plan: Any = session.trace[-1].plan
    if merge == "nearest":
        assert plan.assign.min() == 0 and plan.size.max() > 2

        def change(x: Tensor) -> Tensor:
            return merged(x, plan, prefix)

        hidden = torch.zeros(3, prefix + plan.n)
    else:  # kept tokens weigh as much as those that were nearest to them

        def change(x: Tensor) -> Tensor:
            return x

        hidden = hidden_of(session, prefix)
        bias = torch.zeros(3, plan.n).scatter(1, plan.index, plan.size.log())
        hidden = hidden + F.pad(bias, (prefix, 0))
    with torch.no_grad():
        expected, _ = oracle(visual, pictures, hidden, change)
    close(ours, expected)


@pytest.mark.parametrize("method", ["random", "tome_merge"])
@pytest.mark.parametrize("name", ["clip", "layer_scale", "own_attention", "coca"])
def test_merging_between_attention_and_mlp(name: str, method: str) -> None:
    model, pictures = made(name), images(name)
    visual, merge = model.visual, {} if vtc.REDUCERS[method].merging else {"merge": "nearest"}
    options: dict[str, Any] = {"keep": 0.5, "at": f"vision.{DROP}.mlp", "mass": 1.0, **merge}
    with torch.no_grad(), vtc.attach(model, method, **options) as session:
        ours = model.encode_image(pictures, normalize=False)
        dense = model.forward_intermediates(pictures)["image_intermediates"]
        plan: Any = session.trace[-1].plan

    def change(module: Any, args: Any) -> tuple[Tensor]:  # the branch of the MLP reads it too
        held.append(merged(args[0], plan, 1) - args[0])
        return (args[0] + held[-1],)

    held: list[Tensor] = []
    block = visual.transformer.resblocks[DROP]
    handles = [
        block.ln_2.register_forward_pre_hook(change),
        block.register_forward_hook(lambda module, args, output: output + held[-1]),
    ]
    try:
        with torch.no_grad():
            expected, _ = oracle(visual, pictures, torch.zeros(3, 49))
            whole = visual.forward_intermediates(pictures)["image_intermediates"]
    finally:
        for handle in handles:
            handle.remove()
    close(ours, expected)
    for got, right in zip(dense, whole, strict=True):
        close(got, right)


@pytest.mark.parametrize("name", ["clip", "own_attention", "coca", "parallel", "trunk_token"])
def test_images_that_keep_different_numbers(name: str) -> None:
    """The padding of a batch is hidden from blocks and poolers, mass included."""
    model, pictures = made(name), images(name)
    options: dict[str, Any] = {"keep": "auto", "at": f"vision.{DROP}"}
    with torch.no_grad(), vtc.attach(model, "above_mean", **options) as session:
        dropped = model.encode_image(pictures, normalize=False)
        hidden = hidden_of(session, 1)
        dense = model.visual.forward_intermediates(pictures)
        assert len(set(session.trace[-1].n_out)) > 1
    with torch.no_grad():
        close(dropped, oracle(model.visual, pictures, hidden)[0])
    close(F.normalize(dense["image_features"], dim=-1), F.normalize(dropped, dim=-1))
    assert torch.equal(dense["image_intermediates"][-1].ne(0).any(1).flatten(1), hidden[:, 1:] == 0)
    options |= {"merge": "nearest", "mass": 0.7}
    with torch.no_grad(), vtc.attach(model, "above_mean", **options) as session:
        together = model.encode_image(pictures)
        assert len(set(session.trace[-1].n_out)) > 1
        close(torch.cat([model.encode_image(x[None]) for x in pictures]), together)


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any operator returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(x):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("mass", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_quadratic_in_tokens_is_stored(dtype: torch.dtype, mass: float) -> None:
    """Without mass: from the end of the block before to the drop. With mass: from there to the
    end of the pooler (torch's own attention without a mask, and merging, are not our matter)."""
    big = {"image_size": (192, 192), "patch_size": 4, "width": 8, "head_width": 4, "layers": 2}
    model: Any = coca(**big, attentional_pool=True, mlp_ratio=1.0).eval().to(dtype)
    before, block = model.visual.transformer.resblocks
    pooler, watch, seen = model.visual.attn_pool, Largest(), list[tuple[int, ...]]()

    def look(module: Any, args: Any, kwargs: Any) -> None:
        assert kwargs.get("attn_mask") is None and kwargs["key_padding_mask"].dtype == dtype
        seen.append(tuple(kwargs["key_padding_mask"].shape))

    def start(*_: Any) -> None:
        watch.__enter__()

    def end(*_: Any) -> None:
        watch.__exit__(None, None, None)

    with torch.no_grad(), vtc.attach(model, "cls_rows", keep=1600, at="vision.1", mass=mass):
        if mass:
            handles = [block.ln_1.register_forward_pre_hook(start)]
            handles += [pooler.register_forward_hook(end)]
            for attention in (block.attn, pooler.attn):
                handles.append(attention.register_forward_pre_hook(look, with_kwargs=True))
        else:
            handles = [before.register_forward_hook(start)]
            handles += [block.ln_1.register_forward_pre_hook(end)]
        model.encode_image(torch.randn(1, 3, 192, 192, dtype=dtype))
        for handle in handles:
            handle.remove()
    assert seen == [(1, 1601), (1, 1601)] * bool(mass)
    assert 1601 * 8 <= watch.numbers < 1601 * 1601 // 10


@pytest.mark.parametrize("square", ["every image alike", "own for every head"])
def test_a_mask_that_is_given_is_cut_and_kept(square: str) -> None:
    """Some hook of the user's masks pairs of tokens: this is merged with mass."""
    model, pictures = made("clip"), images("clip")
    generator = torch.Generator().manual_seed(4)
    shape = (49, 49) if square == "every image alike" else (6, 49, 49)
    given = torch.randn(shape, generator=generator)

    def give(module: nn.Module, args: Any, kwargs: Any) -> Any:
        old = kwargs.get("attn_mask")
        return args, {**kwargs, "attn_mask": given if old is None else old + given}

    blocks = model.visual.transformer.resblocks[DROP:]
    handles = [b.register_forward_pre_hook(give, with_kwargs=True) for b in blocks]
    at = f"vision.{DROP}"
    try:
        with torch.no_grad(), vtc.attach(model, "random", keep=0.5, at=at, mass=1.0) as session:
            ours = model.encode_image(pictures)
            plan: Any = session.trace[-1].plan
    finally:
        for handle in handles:
            handle.remove()
    bias = F.pad(torch.zeros(3, 48).scatter(1, plan.index, plan.size.log()), (1, 0))
    hidden = hidden_of(session, 1) + bias
    handles = []
    try:
        with torch.no_grad(), masks(blocks, hidden, 2):
            handles = [b.register_forward_pre_hook(give, with_kwargs=True) for b in blocks]
            expected = model.encode_image(pictures)
    finally:
        for handle in handles:
            handle.remove()
    close(ours, expected)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["clip", "own_attention"])
def test_signals_equal_what_attention_computes(name: str) -> None:
    model: Any = made(name)
    attention = model.visual.transformer.resblocks[0].attn
    seen: dict[str, Tensor] = {}

    @vtc.register("signals_of_this_test")
    @dataclass(frozen=True)
    class Both(vtc.Scorer):
        sites, needs = frozenset({"vision"}), frozenset({"attn_cls", "vision_keys"})

        def score(self, ctx: Any) -> Tensor:
            seen.update(cls=ctx.signals["attn_cls"], keys=ctx.signals["vision_keys"])
            return seen["cls"]

    def look(module: Any, args: Any) -> None:
        x = args[0]
        q, k, v = (
            F.linear(x, module.in_proj_weight, module.in_proj_bias)
            .unflatten(-1, (3, 2, 16))
            .permute(2, 0, 3, 1, 4)
        )
        if name == "own_attention":
            q, k = module.ln_q(q), module.ln_k(k)
            seen["row"] = (q[:, :, :1] @ k.mT / 4).softmax(-1).mean(1)[:, 0]
        else:
            weights = nn.MultiheadAttention.forward(module, x, x, x)[1]
            assert weights is not None
            seen["row"] = weights[:, 0]
        seen["own"] = k.mean(1)

    handle = attention.register_forward_pre_hook(look)
    try:
        with torch.no_grad(), vtc.attach(model, "signals_of_this_test", keep=9, at="vision.1"):
            model.encode_image(images(name))
    finally:
        handle.remove()
        del vtc.REDUCERS._items["signals_of_this_test"]
    torch.testing.assert_close(seen["cls"], seen["row"][:, 1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen["keys"], seen["own"][:, 1:], rtol=1e-5, atol=1e-6)


def test_two_steps() -> None:
    """The second reads its signal from a block that has mass on its keys."""
    model: Any = made("clip")
    recipe = vtc.Recipe(
        (vtc.Step("cls_rows", "vision.1", 0.5, mass=1.0), vtc.Step("cls_rows", "vision.3", 12))
    )
    with torch.no_grad(), vtc.attach(model, recipe) as session:
        together = model.encode_image(images("clip"))
        alone = torch.cat([model.encode_image(x[None]) for x in images("clip")])
    close(together, alone)
    assert session.trace[1].n_in == (24, 24, 24) and session.trace[1].n_out == (12, 12, 12)


# ---------------------------------------------------------------- dense outputs


@pytest.mark.parametrize("name", MODELS)
def test_dense_outputs_have_whole_grids_and_pooled_ones_read_what_is_left(name: str) -> None:
    model, pictures = made(name), images(name)
    with torch.no_grad():
        plain = model.forward_intermediates(pictures)
    with torch.no_grad(), vtc.attach(model, "norm", keep=0.25, at=f"vision.{DROP}") as session:
        ours = model.forward_intermediates(pictures)
        once = F.normalize(model.encode_image(pictures, normalize=False), dim=-1)
        lines = model.visual.forward_intermediates(
            pictures, output_fmt="NLC", stop_early=True, indices=[0, DROP]
        )
        hidden = hidden_of(session, 0)
    grids, expected = ours["image_intermediates"], plain["image_intermediates"]
    assert [g.shape for g in grids] == [g.shape for g in expected]
    assert torch.equal(grids[DROP - 1], expected[DROP - 1])  # before the drop nothing changes
    kept = grids[-1].ne(0).any(1).flatten(1)
    assert torch.equal(kept, hidden.isfinite())
    close(ours["image_features"], once)
    assert lines["image_intermediates"][1].shape[:2] == hidden.shape


@pytest.mark.parametrize("pool", ["tok", "avg", "none"])
@pytest.mark.parametrize("after", [True, False])
def test_tokens_that_nobody_pools_are_whole(pool: str, after: bool) -> None:
    torch.manual_seed(0)
    vision = {"pool_type": pool, "output_tokens": True, "final_ln_after_pool": after}
    visual: Any = open_clip.CLIP(16, VISION | vision, TEXT).eval().visual
    with torch.no_grad():
        plain = visual(images("clip"))
        with vtc.attach(visual, "random", keep=0.25, at=f"vision.{DROP}") as session:
            pooled, tokens = visual(images("clip"))
            dense = visual.forward_intermediates(images("clip"))
        hidden = hidden_of(session, 1)
        expected, full = oracle(visual, images("clip"), hidden)
    assert [pooled.shape, tokens.shape] == [x.shape for x in plain]
    assert dense["image_features"].shape == pooled.shape
    keep = hidden.isfinite()
    own = full if after else visual.ln_post(full)
    if pool == "none":
        assert keep.shape == tokens.shape[:2] and not pooled[~keep].any()
        close(pooled[keep], expected.flatten(0, 1))
    else:
        close(pooled, expected)
        keep, own = keep[:, 1:], own[:, 1:]
    close(tokens[keep], own[keep])
    assert not tokens[~keep].any()


def test_an_unpooled_model_of_timm_gives_whole_grids() -> None:
    timm: Any = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=0, global_pool="").eval()
    with torch.no_grad(), vtc.attach(model, "random", keep=0.25, at="vision.1") as session:
        out = model(images("trunk_token"))
    keep = hidden_of(session, 1).isfinite()
    assert out.shape == (3, 101, 64) and torch.equal(out.ne(0).any(-1), keep)


@pytest.mark.parametrize("name", ["coca", "parallel", "cascade"])
def test_captions_read_the_pooled_tokens(name: str) -> None:
    """CoCa with images and text: the decoder's logits, against the decoder of the oracle."""
    model: Any = made(name)
    pictures, text = images(name), words()[:3]
    with torch.no_grad(), vtc.attach(model, "divprune", keep=0.25, at=f"vision.{DROP}") as session:
        ours = model(pictures, text)
        hidden = hidden_of(session, 1)
        shapes = [x.shape for x in model.visual(pictures)]
    with torch.no_grad():
        assert [x.shape for x in model.visual(pictures)] == shapes
        _, full = oracle(model.visual, pictures, hidden)
        attentions = [p.attn for p in (model.visual.attn_pool, contrastive(model.visual)) if p]
        with masks(attentions, hidden, 2):
            _, tokens = model.visual._pool(full)
        _, own = model._encode_text(text)
        expected = model.text_decoder(tokens, own[:, :-1])
    close(ours["logits"], expected)


# ---------------------------------------------------------------- how it runs


@pytest.mark.parametrize("name", ["clip", "coca", "trunk_average"])
def test_alone_equals_in_a_batch_and_in_threads(name: str) -> None:
    model, pictures = made(name), images(name)
    options: dict[str, Any] = {"keep": 0.25, "at": "vision.1", "mass": 1.0}
    with torch.no_grad(), vtc.attach(model, "divprune", **options):
        together = model.encode_image(pictures)
        alone = torch.cat([model.encode_image(x[None]) for x in pictures])

        def work(x: Tensor) -> Tensor:
            with torch.no_grad():
                return [model.encode_image(x[None]) for _ in range(5)][-1]

        results = in_threads([partial(work, x) for x in pictures])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(results), alone)


@pytest.mark.parametrize("name", ["clip", "own_attention", "coca"])
def test_gradients_equal_those_of_masking(name: str) -> None:
    model: Any = fresh(name).train()
    ours, theirs = images(name).clone().requires_grad_(), images(name).clone().requires_grad_()
    at = f"vision.{DROP}"
    with vtc.attach(model, "random", keep=0.5, at=at, mass=1.0) as session:
        model.encode_image(ours, normalize=False).square().sum().backward()
        plan: Any = session.trace[-1].plan
    weights = [p.grad.clone() for p in model.visual.parameters() if p.grad is not None]
    model.zero_grad()
    bias = F.pad(torch.zeros(3, 48).scatter(1, plan.index, plan.size.log()), (1, 0))
    oracle(model.visual, theirs, hidden_of(session, 1) + bias)[0].square().sum().backward()
    expected = [p.grad for p in model.visual.parameters() if p.grad is not None]
    assert ours.grad is not None and theirs.grad is not None and ours.grad.abs().sum() > 0
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for got, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["clip", "own_attention", "coca", "trunk_token"])
def test_low_precision(name: str) -> None:
    low, pictures = fresh(name).bfloat16(), images(name)
    options: dict[str, Any] = {"keep": 0.5, "at": "vision.1", "merge": "nearest", "mass": 1.0}
    with torch.no_grad(), vtc.attach(low, "norm", **options):
        out = low.encode_image(pictures.bfloat16())
    high = fresh(name)
    with torch.no_grad(), vtc.attach(high, "norm", **options), torch.autocast("cpu"):
        mixed = high.encode_image(pictures)
    with torch.no_grad(), vtc.attach(high, "norm", **options):
        exact = high.encode_image(pictures)
    assert out.dtype == torch.bfloat16
    for x in (out, mixed):
        assert F.cosine_similarity(x.float(), exact).min() > 0.95


@pytest.mark.parametrize("name", ["clip", "own_attention", "coca", "trunk_average"])
def test_compile_without_graph_breaks(name: str) -> None:
    model: Any = fresh(name).visual
    options: dict[str, Any] = {"keep": 0.25, "at": "vision.1", "mass": 1.0}
    with torch.no_grad(), vtc.attach(model, "divprune", **options):
        eager = model(images(name))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images(name))
    for got, right in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize("name", MODELS)
def test_describe(name: str) -> None:
    text = str(vtc.describe(made(name)))
    assert "(adapter image_encoder)" in text and "vision.1" in text and "attn_cls" in text
    assert "divprune" in text and "image encoder without a language model" in text


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: clip(layers=(1, 1, 1, 1), image_size=64), "ModifiedResNet: a convolutional tower"),
        (lambda: trunk("test_convnext", "avg"), "the trunk of this visual tower is ConvNeXt"),
        (lambda: trunk("xcit_nano_12_p8_224", "avg"), "XCABlock also needs H, W"),
        (lambda: clip(scaled_cosine_attn=True), "scaled cosine attention"),
        (lambda: coca(), "its .visual alone is supported"),
    ],
)
def test_other_towers_are_refused_by_reason(make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        vtc.attach(make(), "random", keep=0.5)


def test_sequences_in_front_of_the_batch_are_refused() -> None:
    model: Any = fresh("clip")
    model.visual.transformer.batch_first = False
    with pytest.raises(UnsupportedModel, match="batch_first=True"):
        vtc.attach(model, "random", keep=0.5)


def test_errors() -> None:
    model: Any = made("average")
    with pytest.raises(UnsupportedSite, match="image encoder without a language model"):
        vtc.attach(model, "random", keep=0.5, at="projector")
    with pytest.raises(UnsupportedSite, match="vision.0 to vision.3"):
        vtc.attach(model, "random", keep=0.5, at="vision.9")
    with pytest.raises(UnsupportedModel, match="pools all of them"):
        vtc.attach(model, "mustdrop_merge", keep="auto", at="vision.1")
    with pytest.raises(InvalidRecipe, match="renumber"):
        vtc.attach(model, "random", keep=0.5, at="vision.1", positions="renumber")
    with vtc.attach(model, "random", keep=0.5, at="vision.1", strict=False):
        for again in (model, model.visual):
            with pytest.raises(UnsupportedModel, match="already attached"):
                vtc.attach(again, "random", keep=0.5, at="vision.1")
        model.set_grad_checkpointing(True)
        with pytest.raises(UnsupportedModel, match="gradient checkpointing"):
            model.encode_image(images("average"))
        with torch.no_grad():
            model.encode_image(images("average"))
        model.set_grad_checkpointing(False)


def test_patch_dropout_is_refused_while_it_drops() -> None:
    model: Any = clip(patch_dropout=0.5)
    with vtc.attach(model, "random", keep=0.5, at="vision.1"):
        model.eval().encode_image(images("clip"))
        with pytest.raises(UnsupportedModel, match="patch dropout"):
            model.train().encode_image(images("clip"))


def test_masks_of_blocks_that_cannot_be_cut_are_refused() -> None:
    model: Any = made("own_attention")

    def give(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attn_mask": torch.zeros(49, 49)}

    handle = model.visual.transformer.resblocks[1].register_forward_pre_hook(give, with_kwargs=True)
    try:
        with (
            pytest.raises(UnsupportedModel, match="cannot be cut"),
            vtc.attach(model, "random", keep=0.5, at="vision.1"),
        ):
            model.encode_image(images("clip"))
    finally:
        handle.remove()
