"""Image encoders of timm: dropping equals masking, dense outputs get their grid back, nothing is
left behind. The oracle is the untouched model with the dropped tokens masked in its attention."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from vtc.adapters.encoder import hooks
from vtc.errors import (
    InvalidRecipe,
    MissingSignal,
    NothingReduced,
    UnsupportedModel,
    UnsupportedSite,
)
from vtc.session import adapter_for
from vtc.testing.threads import in_threads

timm = pytest.importorskip("timm", reason="image encoders need the extra 'vision'")

from timm.models import vision_transformer as vit  # noqa: E402
from timm.models.beit import Beit  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

TINY: dict[str, Any] = {
    "img_size": (64, 48),
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
}
TINY["num_classes"] = 5
MODELS: dict[str, partial[Any]] = {
    "cls": partial(VisionTransformer, **TINY),
    "registers": partial(VisionTransformer, **TINY, reg_tokens=3, init_values=0.1, qk_norm=True),
    "average": partial(VisionTransformer, **TINY, class_token=False, global_pool="avg"),
    "map": partial(VisionTransformer, **TINY, class_token=False, global_pool="map"),
    "eva": partial(Eva, **TINY, use_rot_pos_emb=True, use_abs_pos_emb=False, global_pool="token"),
    "eva_bias": partial(
        Eva, **TINY, use_rot_pos_emb=True, qkv_fused=False, num_reg_tokens=2, global_pool="token"
    ),
    "beit": partial(Beit, **TINY, use_rel_pos_bias=True, init_values=0.1, global_pool="token"),
    "beit_shared": partial(Beit, **TINY, use_shared_rel_pos_bias=True),
    "parallel": partial(VisionTransformer, **TINY, block_fn=vit.ParallelScalingBlock),
    "side_by_side": partial(VisionTransformer, **TINY, block_fn=vit.ParallelThingsBlock),
    "differential": partial(VisionTransformer, **TINY, attn_layer="diff", qk_norm=True),
}
METHODS = ("random", "grid", "norm", "divprune")
#: attention of a class token, or what tokens receive without one, can be read
READABLE = ("cls", "registers", "average", "map", "eva", "eva_bias")
DROP = 2  # the block before which tokens go
PATCHES = 48


@cache
def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # fresh ones hardly attend, and heads and tables are zero
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
        elif parameter.std() == 0:
            nn.init.normal_(parameter, std=0.3)
    return model


@cache
def images() -> Tensor:
    return torch.randn(3, 3, 64, 48, generator=torch.Generator().manual_seed(1))


@contextmanager
def masked(model: Any, keep: Tensor, bias: Tensor | None = None) -> Iterator[None]:
    """The untouched model, whose blocks from `DROP` on see the tokens `keep` [B, N] only."""
    mask = torch.where(keep, 0.0, float("-inf"))
    mask = (mask if bias is None else mask + bias)[:, None, None]

    def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if "shared_rel_pos_bias" not in kwargs:
            return args, {**kwargs, "attn_mask": mask}
        given = kwargs["shared_rel_pos_bias"]
        return args, {"shared_rel_pos_bias": mask if given is None else mask + given}

    handles = [b.register_forward_pre_hook(hide, with_kwargs=True) for b in model.blocks[DROP:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept(session: vtc.Session, prefix: int) -> Tensor:
    """[B, N] tokens that the last reduction kept, prefix included."""
    entry = session.trace[-1]
    assert entry.plan is not None
    keep = torch.zeros(3, PATCHES, dtype=torch.bool).scatter(1, entry.source, True)
    return torch.cat([torch.ones(3, prefix, dtype=torch.bool), keep], 1)


def trace_of(model: Any) -> set[str]:
    return {n for n in vars(model) if not n.startswith("_")}


@pytest.mark.parametrize(
    "name, method", [*product(MODELS, METHODS), *product(READABLE, ["fastervlm"])]
)
def test_dropping_equals_masking(name: str, method: str) -> None:
    model: Any = made(name)
    at = f"vision.{DROP}"
    with torch.no_grad(), vtc.attach(model, method, keep=0.25, at=at, seed=3) as session:
        ours, dense = model(images()), model.forward_features(images())
        keep = kept(session, model.num_prefix_tokens)
    assert keep.sum(1).tolist() == [model.num_prefix_tokens + 12] * 3
    with torch.no_grad(), masked(model, keep):
        full = model.forward_features(images())
        short = torch.stack([x[k] for x, k in zip(full, keep, strict=True)])
        expected = model.forward_head(short)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert dense.shape == full.shape
    torch.testing.assert_close(dense[keep], full[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_keeping_all_is_bit_equal_and_nothing_is_left(name: str) -> None:
    model: Any = made(name)
    before, names = model(images()), trace_of(model)
    with vtc.attach(model, "random", keep=1.0, at="vision.1"):
        assert torch.equal(model(images()), before)
    with (
        pytest.raises(RuntimeError, match="boom"),
        vtc.attach(model, "random", keep=0.5, at="vision.1"),
    ):
        model(images())
        raise RuntimeError("boom")
    assert torch.equal(model(images()), before)
    assert trace_of(model) == names
    left = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert left == []


@pytest.mark.parametrize("name", [n for n in MODELS if "eva" not in n])
def test_merge_and_mass_carry_the_dropped_tokens(name: str) -> None:
    """Duplicates merge without a trace: mass makes one token stand for its copies."""
    model: Any = MODELS[name]().eval()
    nn.init.zeros_(model.pos_embed)  # so that copies are the same
    one = images()[:, :, :8, :8].repeat(1, 1, 8, 6)
    with torch.no_grad():
        full = model(one)
        with vtc.attach(model, "grid", keep=0.25, at="vision.1", merge="nearest", mass=1.0):
            short = model(one)
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cls", "registers", "eva"])
def test_dense_outputs_have_whole_grids(name: str) -> None:
    model: Any = made(name)
    shapes = [t.shape for t in model.forward_intermediates(images())[1]]
    plain = model.forward_intermediates(images(), indices=[0])[1][0]
    with torch.no_grad(), vtc.attach(model, "norm", keep=0.25, at=f"vision.{DROP}") as session:
        last, grids = model.forward_intermediates(images())
        keep = kept(session, 0).reshape(3, 1, 8, 6)
        once = model(images())
    assert [g.shape for g in grids] == shapes and last.shape[1] == PATCHES + model.num_prefix_tokens
    assert torch.equal(grids[0], plain)  # before the drop nothing changes
    assert grids[-1].ne(0).any(1, keepdim=True).eq(keep).all()
    with torch.no_grad(), vtc.attach(model, "norm", keep=0.25, at=f"vision.{DROP}"):
        assert torch.equal(model(images()), once)


def test_two_steps_and_cls_scores() -> None:
    """The class row of the block before the site, against its own softmax."""
    model: Any = made("registers")
    seen: dict[str, Tensor] = {}
    attention = model.blocks[0].attn

    def look(module: Any, args: Any) -> None:
        b, n, _ = args[0].shape
        qkv = module.qkv(args[0]).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4)
        q, k = module.q_norm(qkv[0]), module.k_norm(qkv[1])
        seen["cls"] = (q[:, :, :1] @ k.mT * module.scale).softmax(-1).mean(1)[:, 0, 4:]

    handle = attention.register_forward_pre_hook(look)
    with torch.no_grad():
        model(images())
    handle.remove()

    @vtc.register("cls_rows_of_this_test")
    @dataclass(frozen=True)
    class Rows(vtc.Scorer):
        sites, needs = frozenset({"vision"}), frozenset({"attn_cls"})

        def score(self, ctx: Any) -> Tensor:
            return ctx.signals["attn_cls"]

    try:
        recipe = vtc.Recipe(
            (vtc.Step("cls_rows_of_this_test", "vision.1", 0.5), vtc.Step("random", "vision.3", 12))
        )
        with torch.no_grad(), vtc.attach(model, recipe) as session:
            model(images())
    finally:
        del vtc.REDUCERS._items["cls_rows_of_this_test"]
    first, second = session.trace
    best = seen["cls"].argsort(dim=1, descending=True, stable=True)[:, :24].sort(1).values
    assert torch.equal(first.source, best) and second.n_out == (12, 12, 12)
    assert session.stats()["sites"][1]["tokens_out"] == 36


def test_alone_equals_in_a_batch_and_in_threads() -> None:
    model: Any = made("cls")
    with torch.no_grad(), vtc.attach(model, "divprune", keep=0.25, at="vision.1"):
        together = model(images())
        alone = torch.cat([model(x[None]) for x in images()])

        def work(x: Tensor) -> Tensor:
            with torch.no_grad():
                return model(x[None])

        results = in_threads([partial(work, x) for x in images()])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(results), alone)


def test_gradients_and_low_precision() -> None:
    model: Any = made("average")
    x = images().clone().requires_grad_()
    with vtc.attach(model, "random", keep=0.5, at="vision.1", mass=1.0):
        model(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    low = MODELS["average"]().eval().bfloat16()
    with (
        torch.no_grad(),
        vtc.attach(low, "norm", keep=0.5, at="vision.1", merge="nearest", mass=1.0),
    ):
        assert low(images().bfloat16()).dtype == torch.bfloat16


def test_compile_without_graph_breaks() -> None:
    model: Any = MODELS["cls"]().eval()
    with torch.no_grad(), vtc.attach(model, "divprune", keep=0.25, at="vision.1"):
        eager = model(images())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images())
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name, words",
    [
        ("xcit_nano_12_p16_224", "also needs H, W|num_prefix_tokens"),
        ("cait_xxs24_224", "attn.proj_l"),
        ("convit_tiny", "attn.pos_proj|num_prefix_tokens"),
        ("deepseek_vit_412m_enc", "gives its tokens on as a grid"),
        ("swin_tiny_patch4_window7_224", "list of blocks"),
        ("convnext_tiny", "list of blocks"),
    ],
)
def test_other_models_are_refused_by_name_and_reason(name: str, words: str) -> None:
    if not timm.is_model(name):
        pytest.skip("this version of timm does not have it")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    with pytest.raises(UnsupportedModel, match=words):
        vtc.attach(model, "random", keep=0.5)


def test_tables_of_pairs_are_left_alone() -> None:
    """The cut bias is an attribute of the instance while the session lives, and no longer."""
    model: Any = made("beit")
    attention = model.blocks[0].attn
    before = attention._get_rel_pos_bias()
    with torch.no_grad(), vtc.attach(model, "random", keep=0.5, at="vision.1") as session:
        model(images())
        assert torch.equal(attention._get_rel_pos_bias(), before)  # nothing runs: all pairs
        assert session.trace[-1].n_out == (24, 24, 24)
    assert "_get_rel_pos_bias" not in vars(attention)
    bias = before.detach()
    assert bias.shape == (1, 2, 49, 49) and bias.std() > 0.1


@pytest.mark.parametrize("name", ["beit", "beit_shared"])
def test_biases_of_pairs_compile_and_learn(name: str) -> None:
    model: Any = made(name)
    with vtc.attach(model, "grid", keep=0.25, at="vision.1", mass=1.0):
        model(images()).square().sum().backward()
        with torch.no_grad():
            eager = model(images())
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images())
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    tables = [p for n, p in model.named_parameters() if "bias_table" in n]
    assert tables and all(p.grad is not None and p.grad.abs().sum() > 0 for p in tables)
    model.zero_grad()


def test_a_model_that_returns_tokens_returns_all_of_them() -> None:
    model: Any = VisionTransformer(**{**TINY, "num_classes": 0}, global_pool="").eval()
    with torch.no_grad(), vtc.attach(model, "random", keep=0.25, at=f"vision.{DROP}") as session:
        ours, keep = model(images()), kept(session, 1)
    with torch.no_grad(), masked(model, keep):
        full = model(images())
    assert ours.shape == full.shape == (3, PATCHES + 1, 32)
    torch.testing.assert_close(ours[keep], full[keep], rtol=1e-4, atol=1e-4)


def test_nothing_outlives_the_model() -> None:
    model = MODELS["cls"]().eval()
    gone = weakref.ref(model)
    with torch.no_grad(), vtc.attach(model, "random", keep=0.5, at="vision.1") as session:
        model(images())
    del model, session
    gc.collect()
    assert gone() is None and hooks._runs.get() == ()


def test_signals_that_a_block_cannot_give_are_refused() -> None:
    for name, words in (("beit", "bias per pair"), ("differential", "difference of two")):
        adapter = adapter_for(made(name))
        assert adapter.sites()["vision.1"] == {"token_size", "tile", "vision_keys"}
        assert words in adapter.refusals()["attn_cls"]
    with pytest.raises(MissingSignal, match="no attention module of its own"):
        vtc.attach(made("parallel"), "tome", r=2)


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
        with pytest.raises(UnsupportedModel, match="already attached"):
            vtc.attach(model, "random", keep=0.5, at="vision.1")
        model.set_grad_checkpointing(True)
        with pytest.raises(UnsupportedModel, match="gradient checkpointing"):
            model(images())
        model.set_grad_checkpointing(False)
    with pytest.raises(NothingReduced), vtc.attach(model, "random", keep=0.5, at="vision.1") as s:
        s.count(True)  # a forward that met no block


# ---------------------------------------------------------------------- how a model is called


@pytest.mark.parametrize("method", ["random", "tome"])
@pytest.mark.parametrize("name", ["average", "map", "cls"])
def test_forward_and_head_of_features_give_what_a_call_gives(name: str, method: str) -> None:
    model: Any = made(name)
    options: dict[str, Any] = {"r": 6} if method == "tome" else {"keep": 0.5, "at": "vision.1"}
    with torch.no_grad(), vtc.attach(model, method, **options):
        called = model(images())
        assert torch.equal(model.forward(images()), called)
        whole = model.forward_features(images())
        assert whole.shape[1] == PATCHES + model.num_prefix_tokens
        torch.testing.assert_close(model.forward_head(whole), called)
    assert vars(model).get("forward") is None


def test_an_interrupted_forward_leaves_nothing_behind() -> None:
    """KeyboardInterrupt passes by the hooks of torch that are always called."""
    model: Any = made("cls")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        plain = model.forward_intermediates(images(), intermediates_only=True)
    with torch.no_grad(), vtc.attach(model, "tome", r=6):
        expected = model(images())
        for part in (model.blocks[2].mlp, model.blocks[2], model.norm):
            handle = part.register_forward_pre_hook(stop)
            for call in (model, model.forward_features):
                with pytest.raises(KeyboardInterrupt):
                    call(images())
            handle.remove()
            grids = model.forward_intermediates(images(), intermediates_only=True)
            assert [g.shape for g in grids] == [g.shape for g in plain]
            assert torch.equal(model(images()), expected)
    with torch.no_grad():
        again = model.forward_intermediates(images(), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_hooks_of_others_see_what_leaves_a_block() -> None:
    model: Any = made("cls")
    seen: list[Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda *a: seen.append(a[2]))
    after = model.blocks[1].register_forward_hook(lambda m, a, out: out * 0)
    with torch.no_grad(), vtc.attach(model, "tome", r=6):
        zeroed = model(images())
    after.remove()
    with torch.no_grad(), vtc.attach(model, "tome", r=6):
        assert not torch.equal(model(images()), zeroed)
    handle.remove()
    assert [x.shape[1] for x in seen] == [PATCHES + 1 - 12] * 2


def test_stopping_early_is_counted_and_idle_steps_are_told() -> None:
    model: Any = made("cls")
    with torch.no_grad(), vtc.attach(model, "random", keep=0.5, at="vision.1") as session:
        model.forward_intermediates(images(), indices=[1], stop_early=True)
    assert session.stats()["prefills"] == 1 and session.stats()["flops"] > 0
    with (
        pytest.raises(NothingReduced, match="vision.3"),
        torch.no_grad(),
        vtc.attach(model, "random", keep=0.5, at="vision.3"),
    ):
        model.forward_intermediates(images(), indices=[1], stop_early=True)


def test_a_block_by_itself_and_masks_of_pairs() -> None:
    model: Any = made("cls")
    mask = torch.ones(PATCHES + 1, PATCHES + 1, dtype=torch.bool).tril()
    mask[:, 0] = True
    with torch.no_grad(), vtc.attach(model, "random", keep=0.5, at="vision.2") as session:
        with pytest.raises(UnsupportedModel, match="called by itself"):
            model.blocks[1](torch.zeros(1, PATCHES + 1, 32))
        full = model.forward_features(images(), attn_mask=mask)
        planes = model.forward_features(images(), attn_mask=mask[None, None])
    assert torch.equal(full, planes) and session.trace
    keep = kept(session, 1)
    with torch.no_grad(), vtc.attach(model, "random", keep=0.5, at="vision.2"):
        dense = model.forward_features(images())
    assert not torch.allclose(dense[keep], full[keep], atol=1e-3)


def test_compiled_models_are_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedModel, match="attach to the module that was compiled"):
        vtc.attach(torch.compile(MODELS["cls"]()), "tome", r=2)


def test_a_method_without_a_place_is_told_where() -> None:
    with pytest.raises(UnsupportedSite, match="Say where, for instance at='vision.1'"):
        vtc.attach(made("cls"), "divprune", keep=0.5)
    with pytest.raises(UnsupportedSite, match="where the MLP of these blocks begins"):
        vtc.attach(made("beit"), "random", keep=0.5, at="vision.1.mlp")
    with pytest.raises(UnsupportedSite, match="no decoder layers"):
        vtc.attach(made("cls"), "mustdrop", keep=0.5)


def test_mass_that_is_given_holds_and_zero_switches_it_off() -> None:
    model: Any = made("cls")
    for options, mass in (({}, 1.0), ({"mass": 0.0}, 0.0), ({"mass": 0.5}, 0.5)):
        with vtc.attach(model, "tome", r=3, strict=False, **options) as session:
            assert {step.mass for step in session.recipe.steps} == {mass}
