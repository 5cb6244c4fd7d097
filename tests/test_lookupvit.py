"""LookupViT: what holds without trained weights, then the two small models on Fashion-MNIST."""

from __future__ import annotations

import gzip
import json
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vtc.errors import InvalidInput
from vtc.modules.lookup_side import LookupSide
from vtc.modules.lookupvit import LookupBlock, LookupViT, LookupViTConfig, resize_matrix

GRIDS = [(1, 1), (2, 2), (3, 3), (3, 4), (5, 2), (6, 6)]


def shake(module: nn.Module, scale: float = 0.2, seed: int = 0) -> Any:
    """Random weights large enough that nothing is nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)
    return module


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**changes: Any) -> LookupViT:
    options: dict[str, Any] = {
        "img_size": (24, 24),
        "patch_size": (4, 4),
        "num_classes": 5,
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "grids": ((2, 2), (3, 3)),
    }
    return shake(LookupViT(**{**options, **changes}).eval())


def block(dim: int = 16, heads: int = 2, **options: Any) -> LookupBlock:
    return shake(LookupBlock(dim, heads, **options).eval())


# The resize


@pytest.mark.parametrize("target", [(1, 1), (3, 3), (5, 5), (7, 7), (10, 10), (4, 9), (20, 16)])
@pytest.mark.parametrize("antialias", [True, False])
def test_the_resize_is_that_of_torch(target: tuple[int, int], antialias: bool) -> None:
    x = randn(2, 3, 14, 14)
    expected = F.interpolate(x, target, mode="bilinear", antialias=antialias)
    found = resize_matrix((14, 14), target, antialias) @ x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.transpose(1, 2).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    "source,target",
    [((14, 14), (5, 5)), ((6, 4), (3, 4)), ((8, 14, 14), (2, 5, 7)), ((4, 3, 3), (4, 3, 3))],
)
def test_a_constant_stays_constant(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    matrix = resize_matrix(source, target)
    assert matrix.shape == (np.prod(target), np.prod(source))
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)))
    assert bool((matrix >= 0).all())


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (2, 4, 3)])
@pytest.mark.parametrize("antialias", [True, False])
def test_equal_grids_give_the_identity(grid: tuple[int, ...], antialias: bool) -> None:
    matrix = resize_matrix(grid, grid, antialias)
    x = randn(2, matrix.shape[1], 8)
    assert torch.equal(matrix, torch.eye(len(matrix)))
    assert torch.equal(matrix @ x, x)


def test_halving_without_antialias_is_the_mean_of_two_by_two() -> None:
    x = randn(2, 14 * 14, 8)
    expected = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (14, 14)), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resize_matrix((14, 14), (7, 7), antialias=False) @ x, expected)


def test_antialias_reads_every_token() -> None:
    assert int((resize_matrix((14, 14), (5, 5)).sum(0) > 0).sum()) == 196
    assert int((resize_matrix((14, 14), (5, 5), False).sum(0) > 0).sum()) == 100


# The block


@pytest.mark.parametrize("m,n", [(1, 9), (4, 36), (12, 7)])
def test_rows_of_the_attention_sum_to_one(m: int, n: int) -> None:
    _, weights = block(infuse_norm="none").gather(randn(3, m, 16), randn(3, n, 16, seed=2))
    assert weights.shape == (3, 2, m, n)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, m))
    torch.testing.assert_close(weights.transpose(-1, -2).sum((2, 3)), torch.full((3, 2), float(m)))


def test_permuting_tokens_permutes_the_output() -> None:
    layer = block()
    z_p, z_l = randn(2, 5, 16), randn(2, 12, 16, seed=2)
    out_p, out_l = layer(z_p, z_l)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    again_p, again_l = layer(z_p, z_l[:, order])
    torch.testing.assert_close(again_p, out_p)
    torch.testing.assert_close(again_l, out_l[:, order])
    order = torch.randperm(5, generator=torch.Generator().manual_seed(4))
    again_p, again_l = layer(z_p[:, order], z_l)
    torch.testing.assert_close(again_p, out_p[:, order])
    torch.testing.assert_close(again_l, out_l)


@pytest.mark.parametrize("closed", ["infuse_proj", "gather_proj"])
def test_without_infusion_lookup_tokens_do_not_meet(closed: str) -> None:
    layers = [block(), block()]
    for layer in layers:
        nn.init.zeros_(getattr(layer, closed).weight)
    z_p, z_l = randn(1, 3, 16), randn(1, 6, 16, seed=2).requires_grad_()
    out = z_l
    for layer in layers:
        z_p, out = layer(z_p, out)
    (grad,) = torch.autograd.grad(out[0, 2].sum(), z_l)
    others = grad[0, [0, 1, 3, 4, 5]]
    assert bool((others == 0).all()) == (closed == "infuse_proj")
    assert bool((grad[0, 2] != 0).any())


@pytest.mark.parametrize("m", [9, 25, 49, 100])
def test_the_cost_is_the_formula(m: int) -> None:
    n, d = 196, 64
    layer = LookupBlock(d, 1)
    layer.reorder = False  # the paper's order of products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(1, m, d), torch.zeros(1, n, d))
    assert counter.get_total_flops() == 2 * ((3 * n * m + 2 * m * m) * d + (4 * n + 15 * m) * d * d)


def costs(layer: LookupBlock, z_p: Tensor, z_l: Tensor) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(z_p, z_l)
    return counter.get_total_flops()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [None, 2])
@pytest.mark.parametrize("infuse_norm", ["none", "col", "softmax"])
def test_the_cheaper_order_gives_the_same(bias: bool, hidden: int | None, infuse_norm: Any) -> None:
    """Few queries carry the projections of the many; the numbers and the gradients stay."""
    layer = LookupBlock(32, 2, qkv_bias=bias, proj_bias=bias, infuse_norm=infuse_norm)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    z_p, z_l = randn(3, 4, 32), randn(3, 9, 32, seed=2)
    mask = None if hidden is None else torch.arange(9) < 9 - torch.tensor([[0], [hidden], [9]])
    found, grads = [], []
    for layer.reorder in (True, False):
        out = layer(z_p, z_l, mask)
        found.append(out)
        loss = out[0].square().sum() + out[1].square().sum()
        grads.append(torch.autograd.grad(loss, list(layer.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max() + 1))


@pytest.mark.parametrize("infuse", [True, False])
@pytest.mark.parametrize("m", [4, 30])
@pytest.mark.parametrize("reorder", [True, False])
def test_side_weights_know_what_they_cost(m: int, reorder: bool, infuse: bool) -> None:
    side = LookupSide(64, 4, infuse=infuse)
    side.reorder = reorder
    z_p, z_l = randn(1, m, 64), randn(1, 49, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        z_p, weights = side.gather(z_p, z_l)
        if infuse:
            side.infuse_into(z_l, z_p, weights)
    assert counter.get_total_flops() == side.flops(m, 49)


def test_the_cheaper_order_is_taken_where_it_is_cheaper() -> None:
    layer, paper = LookupBlock(64, 4), LookupBlock(64, 4)
    paper.reorder = False
    for m in (1, 2, 9, 14, 15, 16, 17, 25):
        z_p, z_l = randn(1, m, 64), randn(1, 49, 64)
        fewer = costs(layer, z_p, z_l) < costs(paper, z_p, z_l)
        assert fewer == (m < 15), m
        assert costs(layer, z_p, z_l) <= costs(paper, z_p, z_l)


def test_a_block_without_infusion_leaves_the_lookup_tokens() -> None:
    z_p, z_l = randn(2, 4, 16), randn(2, 9, 16, seed=2)
    layer, short = block(), block(infuse=False)
    assert layer(z_p, z_l, infuse=False)[1] is z_l and short(z_p, z_l)[1] is z_l
    assert torch.equal(layer(z_p, z_l, infuse=False)[0], layer(z_p, z_l)[0])
    assert not any("infuse" in n or "lookup" in n for n in short.state_dict())


def test_padding_is_neither_read_nor_written() -> None:
    layer = block()
    z_p, z_l = randn(2, 4, 16), randn(2, 9, 16, seed=2)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    _, weights = layer.gather(z_p, z_l, mask)
    assert bool((weights[0, ..., 6:] == 0).all())
    out_p, out_l = layer(z_p, z_l, mask)
    alone_p, alone_l = layer(z_p[:1], z_l[:1, :6])
    torch.testing.assert_close(out_p[:1], alone_p)
    torch.testing.assert_close(out_l[:1, :6], alone_l)
    other_p, other_l = layer(z_p, torch.where(mask[..., None], z_l, z_l * 7 - 3), mask)
    assert torch.equal(other_p, out_p) and torch.equal(other_l[mask], out_l[mask])
    nothing = layer(z_p, z_l, torch.zeros_like(mask))
    assert all(bool(t.isfinite().all()) for t in nothing)


def test_infuse_norm_col_gives_every_lookup_token_the_same_weight() -> None:
    layer = block(infuse_norm="col")
    nn.init.zeros_(layer.infuse_v.weight)  # V' is then the same for all compressed tokens
    nn.init.zeros_(layer.lookup_mlp.fc2.weight)
    z_p, z_l = randn(1, 4, 16), randn(1, 9, 16, seed=2)
    moved = layer(z_p, z_l)[1] - z_l
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved))
    layer.infuse_norm = "none"
    plain = layer(z_p, z_l)[1] - z_l
    assert not torch.allclose(plain, plain[:, :1].expand_as(plain))


def heard_by_hand(layer: LookupBlock, z_p: Tensor, z_l: Tensor, refined: Tensor) -> Tensor:
    """What lookup tokens [N, D] hear of refined tokens [M, D], one sample, head by head: a softmax
    over the compressed tokens of what each lookup token's key has with their queries."""
    q = layer.gather_q(layer.gather_norm_p(z_p))
    k = layer.gather_k(layer.gather_norm_l(z_l))
    v = layer.infuse_v(layer.infuse_v_norm(refined))
    heads = []
    for head in range(layer.heads):
        own = slice(head * layer.dim // layer.heads, (head + 1) * layer.dim // layer.heads)
        logits = k[:, own] @ q[:, own].T / (layer.dim // layer.heads) ** 0.5
        heads.append(logits.softmax(1) @ v[:, own])
    return layer.infuse_proj(torch.cat(heads, 1))


@pytest.mark.parametrize("m", [2, 12])
@pytest.mark.parametrize("reorder", [True, False])
def test_infuse_norm_softmax_is_a_new_softmax_of_the_logits(m: int, reorder: bool) -> None:
    layer = block(infuse_norm="softmax")
    layer.reorder = reorder
    z_p, z_l = randn(2, m, 16), randn(2, 9, 16, seed=2)
    gathered, weights = layer.gather(z_p, z_l)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 2, 9))
    out_p, out_l = layer(z_p, z_l)
    for i in range(2):
        heard = z_l[i] + heard_by_hand(layer, z_p[i], z_l[i], out_p[i])
        torch.testing.assert_close(out_l[i], heard + layer.lookup_mlp(heard), rtol=1e-5, atol=1e-5)
    layer.infuse_norm = "none"
    assert torch.equal(gathered, layer.gather(z_p, z_l)[0])  # reading is as ever
    assert (layer(z_p, z_l)[1] - out_l).abs().max() > 1e-2


def test_infuse_norm_softmax_leaves_padding_alone() -> None:
    layer = block(infuse_norm="softmax")
    z_p, z_l = randn(1, 4, 16), randn(1, 9, 16, seed=2)
    mask = torch.arange(9)[None] < 6
    _, weights = layer.gather(z_p, z_l, mask)
    assert not weights[..., 6:].any()
    out_p, out_l = layer(z_p, z_l, mask)
    alone_p, alone_l = layer(z_p, z_l[:, :6])
    torch.testing.assert_close(out_p, alone_p)
    torch.testing.assert_close(out_l[:, :6], alone_l)


# The network


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 3])
def test_shapes_of_all_grids(grid: tuple[int, int], prefix: int) -> None:
    model = small(prefix=prefix)
    x = randn(2, 3, 24, 24)
    z_p, z_l = model.forward_features(x, grid)
    assert z_p.shape == (2, prefix + grid[0] * grid[1], 16)
    assert z_l is not None and z_l.shape == (2, 36, 16)
    assert model(x, grid).shape == (2, 5) == model(x, grid, heads="compressed").shape
    first, second = model.forward_heads(x, grid)
    torch.testing.assert_close(model(x, grid), (first + second) / 2)
    torch.testing.assert_close(model(x, grid, heads="compressed"), first)


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 3), (4, 2, 1), (4, 6, 6)])
def test_shapes_of_clips(grid: tuple[int, int, int]) -> None:
    model = small(img_size=(8, 24, 24), patch_size=(2, 4, 4), grids=((2, 3, 3),), in_chans=1)
    z_p, z_l = model.forward_features(randn(2, 1, 8, 24, 24), grid)
    assert z_p.shape == (2, np.prod(grid), 16)
    assert z_l is not None and z_l.shape == (2, 4 * 36, 16)
    assert model(randn(2, 1, 8, 24, 24)).shape == (2, 5)


def test_images_of_another_size_and_shape() -> None:
    model = small()
    z_p, z_l = model.forward_features(randn(2, 3, 32, 20), (3, 2))
    assert z_p.shape == (2, 6, 16) and z_l is not None and z_l.shape == (2, 40, 16)


def test_weights_do_not_depend_on_the_grid() -> None:
    states = []
    for grid in GRIDS:
        torch.manual_seed(0)
        states.append(small(grids=(grid,)).state_dict())
    for state in states[1:]:
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in states[0].items()}
        assert all(torch.equal(v, states[0][k]) for k, v in state.items())


@pytest.mark.parametrize("options", [{}, {"prefix": 2, "pool": "token"}, {"layer_scale": 0.1}])
def test_gradients_reach_every_parameter(options: dict[str, Any]) -> None:
    model = small(qk_norm=True, **options)
    first, second = model.forward_heads(randn(3, 3, 24, 24))
    y = torch.tensor([0, 3, 4])
    (F.cross_entropy(first, y) + F.cross_entropy(second, y)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), name
        assert bool((p.grad != 0).any()), name


def test_samples_of_a_batch_do_not_mix() -> None:
    model, x = small(prefix=1), randn(3, 3, 24, 24)
    together = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1])


def test_padding_of_an_image_is_not_seen() -> None:
    model = small(prefix=1)
    x = randn(2, 3, 24, 24)
    other = x.clone()
    other[0, :, 16:] = 9.0
    mask = torch.ones(2, 36, dtype=torch.bool)
    mask[0, 24:] = False
    torch.testing.assert_close(model(x, mask=mask), model(other, mask=mask))
    torch.testing.assert_close(model(x, mask=torch.ones_like(mask)), model(x))
    assert not torch.allclose(model(x)[0], model(other)[0])


def test_bfloat16() -> None:
    model, x = small(prefix=1), randn(2, 3, 24, 24)
    expected = model(x)
    model.bfloat16()
    found = model(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1 * expected.std().item())
    tokens = randn(2, 4, 16).bfloat16()
    assert block().bfloat16().gather(tokens, tokens)[1].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, x = small(prefix=1, depth=1), randn(2, 3, 24, 24)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    mask = torch.ones(2, 36, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, (2, 4)), model(x, (2, 4)))
    torch.testing.assert_close(compiled(x, mask=mask), model(x, mask=mask))


def test_grids_of_training_steps() -> None:
    model = small(grids=((2, 2), (3, 3), (5, 5)))
    state = torch.get_rng_state()
    drawn = [model.grid_of_step(i) for i in range(3000)]
    assert drawn == [model.grid_of_step(i) for i in range(3000)]
    assert all(900 < drawn.count(g) < 1100 for g in model.config.grids)
    assert torch.equal(state, torch.get_rng_state())


def test_compressed_only() -> None:
    model = small(lookup_head=False)
    assert not any("head_l" in n or "norm_l" in n for n in model.state_dict() if "blocks" not in n)
    assert model(randn(2, 3, 24, 24)).shape == (2, 5)
    assert model.forward_features(randn(2, 3, 24, 24))[1] is None
    with pytest.raises(InvalidInput, match="lookup_head=True"):
        model.forward_heads(randn(2, 3, 24, 24))


# Saving


@pytest.mark.parametrize("options", [{}, {"prefix": 2, "pool": "token", "pre_norm": True}])
def test_save_and_load(tmp_path: Path, options: dict[str, Any]) -> None:
    model, x = small(**options), randn(2, 3, 24, 24)
    model.save_pretrained(tmp_path)
    again = LookupViT.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    assert torch.equal(again(x), model(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    model.save_pretrained(tmp_path, torch.float16)
    assert LookupViT.from_pretrained(tmp_path, None).pos_embed.dtype == torch.float16
    torch.testing.assert_close(
        LookupViT.from_pretrained(tmp_path)(x), model.half().float()(x), rtol=0, atol=0
    )


def test_loading_something_else(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="cannot read .*config.json'.*Give a folder as it was saved"
    ):
        LookupViT.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    good = json.loads(config.read_text())
    config.write_text(json.dumps({**good, "depth": 3}))
    with pytest.raises(
        ValueError, match="do not fit this model: 36 missing, the first is blocks.2.gath"
    ):
        LookupViT.from_pretrained(tmp_path)
    config.write_text(json.dumps({**good, "colour": 3}))
    with pytest.raises(ValueError, match="no option colour: the options are img_size"):
        LookupViT.from_pretrained(tmp_path)
    config.write_text(json.dumps({**good, "model_type": "vit"}))
    with pytest.raises(ValueError, match="model_type='vit', not 'lookupvit'"):
        LookupViT.from_pretrained(tmp_path)


# A warm start

VITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "class token, mean": {"global_pool": "avg"},
    "registers, layer scale (dinov2)": {
        "reg_tokens": 2,
        "init_values": 0.3,
        "no_embed_class": True,
    },
    "layer scale (deit3)": {"init_values": 0.1, "no_embed_class": True},
    "qk-norm, no bias": {"qk_norm": True, "qkv_bias": False},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "dynamic size, no prefix position": {"dynamic_img_size": True, "no_embed_class": True},
    "features only": {"num_classes": 0},
}


def vit(**options: Any) -> Any:
    timm = pytest.importorskip("timm")
    base = {"img_size": 24, "patch_size": 4, "num_classes": 5}
    base |= {"embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.models.vision_transformer.VisionTransformer(**{**base, **options})
    return shake(model.eval(), 0.1)


@torch.no_grad()
def resized_vit(model: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the ViT itself makes of tokens that were resized in front of its first block."""
    tokens = model._pos_embed(model.patch_embed(x))
    prefix = model.num_prefix_tokens
    source = model.patch_embed.grid_size
    if grid != source:
        rest = resize_matrix(source, grid) @ tokens[:, prefix:]
        tokens = torch.cat([tokens[:, :prefix], rest], 1)
    return model.norm(model.blocks(model.norm_pre(tokens)))


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (2, 4)])
def test_a_warm_start_is_the_vit_on_resized_tokens(name: str, grid: tuple[int, int]) -> None:
    original, x = vit(**VITS[name]), randn(2, 3, 24, 24)
    model = LookupViT.from_vit(original, grids=[grid])
    with torch.no_grad():
        expected = resized_vit(original, x, grid)
        found = model.forward_features(x)[0]
        assert torch.equal(found, expected)
        logits = original.forward_head(expected)
        assert torch.equal(model(x, heads="compressed"), logits)
        if grid == (6, 6):
            assert torch.equal(logits, original(x))
        if original.num_classes:
            assert torch.equal(model(x), logits / 2)


@pytest.mark.parametrize("name", list(VITS)[:6])
def test_a_warm_start_leaves_the_lookup_tokens(name: str) -> None:
    original = vit(**VITS[name])
    tokens, few = randn(2, 36, 16), randn(2, 5, 16, seed=2)
    for old in original.blocks:
        new = LookupBlock.from_vit(old)
        out_p, out_l = new(few, tokens)
        assert torch.equal(out_l, tokens) and torch.equal(out_p, old(few))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_a_warm_start_from_named_architectures(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = 56 if "patch14" in name else 64
    original = timm.create_model(
        name, pretrained=False, depth=1, img_size=size, num_classes=4, embed_dim=24, num_heads=3
    )
    original, x = shake(original.eval(), 0.1), randn(1, 3, size, size)
    side = original.patch_embed.grid_size[0]
    model = LookupViT.from_vit(original, grids=[(2, 2)])
    with torch.no_grad():
        assert torch.equal(model(x, (side, side), heads="compressed"), original(x))
        assert torch.equal(model.forward_features(x)[0], resized_vit(original, x, (2, 2)))


def test_a_warm_start_learns_in_both_streams() -> None:
    model = LookupViT.from_vit(vit(), grids=[(3, 3)])
    x, y = randn(4, 3, 24, 24), torch.tensor([0, 1, 2, 3])
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    before = model.forward_features(x)[1]
    for _ in range(3):
        loss = sum(F.cross_entropy(logits, y) for logits in model.forward_heads(x))
        sgd.zero_grad()
        torch.as_tensor(loss).backward()
        sgd.step()
    assert not torch.allclose(before, model.forward_features(x)[1])  # type: ignore[arg-type]


class Separate(nn.Module):
    """Attention with queries, keys and values of their own; only queries and values have a bias."""

    def __init__(self, attn: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.num_heads, self.proj = attn.num_heads, attn.proj
        weights, biases = attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(names, weights, biases, strict=True):
            linear = nn.Linear(16, 16, bias=name[0] != "k")
            linear.weight.data.copy_(weight)
            if linear.bias is not None:
                linear.bias.data.copy_(bias)
            setattr(self, name, linear)
        self.names = names

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = (
            getattr(self, n)(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for n in self.names
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("names", [("q", "k", "v"), ("q_proj", "k_proj", "v_proj")])
def test_separate_projections(names: tuple[str, str, str]) -> None:
    old: Any = vit().blocks[0]
    old.attn.qkv.bias.data[16:32] = 0
    few = randn(2, 5, 16)
    expected = old(few)
    old.attn = Separate(old.attn, names)
    torch.testing.assert_close(LookupBlock.from_vit(old)(few, randn(2, 9, 16))[0], expected)


# Errors


def raises(text: str) -> Any:
    return pytest.raises(InvalidInput, match=text)


def test_errors_of_a_warm_start() -> None:
    pytest.importorskip("timm")
    with raises("Linear has no 'attn': from_vit needs a before-norm ViT block with norm1"):
        LookupBlock.from_vit(nn.Linear(2, 2))
    with raises("'norm' .LayerNorm. inside Attention"):
        LookupBlock.from_vit(vit(scale_attn_norm=True).blocks[0])
    old = vit().blocks[0]
    old.norm2 = nn.BatchNorm1d(16)
    with raises("norm2 is BatchNorm1d.*needs LayerNorm"):
        LookupBlock.from_vit(old)
    old = vit().blocks[0]
    old.norm2.eps = 0.1
    with raises("different eps"):
        LookupBlock.from_vit(old)
    old = vit().blocks[0]
    old.mlp.act = nn.Tanh()
    with raises("activation Tanh.. is not known: use one of gelu"):
        LookupBlock.from_vit(old)
    old = vit().blocks[0]
    del old.attn.qkv
    with raises("neither qkv nor q, k, v nor q_proj"):
        LookupBlock.from_vit(old)
    old = vit().blocks[0]
    old.attn.qkv = nn.Linear(16, 24)
    with raises("maps 16 channels to 24, and LookupBlock needs 16 to 48"):
        LookupBlock.from_vit(old)
    old = vit().blocks[0]
    old.mlp.fc2 = nn.Linear(32, 16)
    with raises("without gating"):
        LookupBlock.from_vit(old)
    from timm.models.vision_transformer import ResPostBlock

    with raises("ResPostBlock has the parts of .* but computes something else: from_vit needs x"):
        LookupBlock.from_vit(shake(ResPostBlock(16, 2)))
    old = vit().blocks[0]
    old.forward = lambda x, rope: x
    with raises("cannot be run on tokens alone .*rope"):
        LookupBlock.from_vit(old)
    with raises("cannot start from this VisionTransformer: pos_embed is missing"):
        LookupViT.from_vit(vit(pos_embed="none"), grids=[(3, 3)])
    with raises("pools by attention; global_pool='map' is neither 'avg' nor 'token'"):
        LookupViT.from_vit(vit(global_pool="map"), grids=[(3, 3)])


@pytest.mark.parametrize(
    "options,text",
    [
        ({"heads": 3}, "dim=16 does not split into heads=3"),
        ({"act": "swish"}, "act='swish' is not known: give one of gelu"),
        ({"infuse_norm": "row"}, "infuse_norm='row' is not known: give one of none, col, soft"),
        ({"lookup_ratio": 0.01}, "lookup_ratio=0.01 must leave at least one hidden channel"),
        ({"patch_size": (4,)}, "has 1 axes: give .height, width., or .time"),
        ({"img_size": (25, 24)}, "img_size=.25, 24. is not a multiple of patch_size=.4, 4."),
        ({"grids": ()}, "grids is empty"),
        ({"grids": ((3, 0),)}, "not a grid: give 2 positive integers .height, width."),
        ({"grid": (3, 3, 3)}, "not a grid: give 2 positive"),
        ({"pool": "token"}, "pool='token' with prefix=0: give 'avg', or 'token' with"),
        ({"pool": "max"}, "pool='max' with prefix=0"),
        ({"width": 7}, "no option width: the options are img_size"),
    ],
)
def test_errors_of_a_configuration(options: dict[str, Any], text: str) -> None:
    with raises(text):
        small(**options)


def test_errors_of_inputs() -> None:
    model, x = small(), randn(1, 3, 24, 24)
    with raises("shape .1, 1, 24, 24., and this model takes .B, 3, H, W."):
        model(x[:, :1])
    with raises("measures .24, 23., which is not a multiple of patch_size"):
        model(x[..., :23])
    with raises("3.0.* is not a grid: give 2 positive integers"):
        model(x, (3.0, 3))
    with raises("heads='lookup' is not known: give 'both' or 'compressed'"):
        model(x, heads="lookup")  # type: ignore[arg-type]
    with raises("mask is torch.float32 .1, 36.: give bool .1, 36., False for padding"):
        model(x, mask=torch.ones(1, 36))
    with raises("mask is torch.bool .1, 9."):
        model(x, mask=torch.ones(1, 9, dtype=torch.bool))
    assert LookupViTConfig().lookup_grid == (14, 14)


# Fashion-MNIST


def write_idx(file: Path, values: np.ndarray, magic: int, cut: int = 0) -> None:
    raw = struct.pack(f">{1 + values.ndim}i", magic, *values.shape) + values.tobytes()
    file.write_bytes(gzip.compress(raw[: len(raw) - cut]))


def test_reading_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc_zoo import fmnist

    monkeypatch.setattr(fmnist, "SIZES", {"train": 3, "test": 2})
    monkeypatch.delenv(fmnist.VARIABLE, raising=False)
    with pytest.raises(ValueError, match="no folder.*set VTC_FMNIST.*dataset-fashion-mnist"):
        fmnist.read("test")
    with pytest.raises(ValueError, match="no split 'dev': give 'train' or 'test'"):
        fmnist.read("dev", tmp_path)
    with pytest.raises(FileNotFoundError, match="no t10k-images.*apt-get download dataset-fash"):
        fmnist.read("test", tmp_path)
    images = np.random.default_rng(0).integers(256, size=(2, 28, 28), dtype=np.uint8)
    labels = np.array([9, 0], np.uint8)
    first, second = (tmp_path / f"t10k-{n}-ubyte.gz" for n in ("images-idx3", "labels-idx1"))
    write_idx(first, images, 0x0803)
    write_idx(second, labels, 0x0801)
    monkeypatch.setenv(fmnist.VARIABLE, str(tmp_path))
    found = fmnist.read("test")
    assert (found[0] == images).all() and found[1].tolist() == [9, 0]
    assert found[1].dtype == np.int64
    wrong: Any = (
        ((second, labels + 1, 0x0801), "a label of the test split is 10"),
        ((second, labels, 0x0901), "starts with 0x00000901, not 0x00000801"),
        ((second, np.zeros(3, np.uint8), 0x0801), r"says it holds \(3,\), and \(2,\) is expected"),
        ((first, images, 0x0803, 5), "holds 1563 bytes of data, and .* needs 1568"),
        ((first, images[:0, 0, 0], 0x0803, 6), "is cut off after 2 bytes"),
    )
    for contents, text in wrong:
        write_idx(*contents)
        with pytest.raises(ValueError, match=text):
            fmnist.read("test")
        write_idx(second, labels, 0x0801)
    first.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be unpacked.*fetch it again"):
        fmnist.read("test")


def test_the_shipped_sample_and_the_preprocessing() -> None:
    from PIL import Image
    from vtc_zoo import fmnist

    pixels, labels = fmnist.sample()
    assert pixels.shape == (200, 28, 28) and pixels.dtype == np.uint8
    assert labels[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]
    assert set(labels.tolist()) == set(range(10))
    x = fmnist.preprocess(pixels[:3])
    assert x.shape == (3, 1, 32, 32) and x.dtype == torch.float32
    picture = Image.fromarray(pixels[1])
    assert torch.equal(fmnist.preprocess(picture), x[1:2])
    assert torch.equal(fmnist.preprocess([pixels[0], picture.convert("RGB")]), x[:2])
    assert fmnist.preprocess(Image.new("RGB", (90, 60))).shape == (1, 1, 32, 32)
    with pytest.raises(ValueError, match=r"float64 \(28, 28\): give a PIL image, or uint8"):
        fmnist.preprocess(np.zeros((28, 28)))


def test_augmented_images_are_the_images_moved_and_mirrored() -> None:
    pytest.importorskip("timm")
    train = pytest.importorskip("vtc_zoo.train_fmnist")
    border = 2 + train.SHIFT
    images = torch.randint(1, 256, (4, 28, 28), dtype=torch.uint8)
    padded = F.pad(images, (border,) * 4)
    chosen = torch.arange(40) % 4
    out = train.augment(padded, chosen, torch.Generator().manual_seed(0))
    assert out.shape == (40, 32, 32)
    for one, i in zip(out, chosen, strict=True):
        rows, columns = (one > 0).any(1).nonzero(), (one > 0).any(0).nonzero()
        inside = one[rows[0, 0] : rows[0, 0] + 28, columns[0, 0] : columns[0, 0] + 28]
        assert torch.equal(inside, images[i]) or torch.equal(inside.flip(1), images[i])


def zoo(name: str) -> tuple[Any, Any]:
    import vtc_zoo

    if name == "tiny-vit-fmnist":
        pytest.importorskip("timm")
    try:
        return vtc_zoo.load(name)
    except FileNotFoundError:
        pytest.skip(f"no weights of {name}: python -m vtc_zoo.train_fmnist")


@pytest.mark.parametrize("name", ["tiny-vit-fmnist", "tiny-lookupvit-fmnist"])
def test_the_shipped_models(name: str) -> None:
    import vtc_zoo
    from vtc_zoo import eval_fmnist, fmnist

    model, preprocess = zoo(name)
    assert not model.training and preprocess is fmnist.preprocess
    pixels, labels = fmnist.sample()
    assert eval_fmnist.accuracy(model, pixels, labels) > 0.8
    with pytest.raises(ValueError, match="device_map: this model takes no argument but dtype"):
        vtc_zoo.load(name, device_map="auto")
    assert next(vtc_zoo.load(name, dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16
    size = sum(f.stat().st_size for f in vtc_zoo.path(name).iterdir())
    assert size < 5e6


def test_the_table_of_the_evaluation() -> None:
    from vtc_zoo import eval_fmnist, fmnist

    pixels, labels = (part[:50] for part in fmnist.sample())
    model, _ = zoo("tiny-lookupvit-fmnist")
    (dense,) = eval_fmnist.rows(model, pixels, labels, [("all", nullcontext)], grid=(8, 8))
    (few,) = eval_fmnist.rows(model, pixels, labels, [("few", nullcontext)], grid=(2, 2))
    assert few.flops < 0.4 * dense.flops and few.asked == 50
    assert few.right == round(50 * eval_fmnist.accuracy(model, pixels, labels, grid=(2, 2)))
    both, alone = eval_fmnist.lookup_rows(model, pixels, labels, (2, 2))
    assert (both.right, both.flops) == (few.right, few.flops) and alone.flops < both.flops
    options: Any = {"grid": (2, 2), "heads": "compressed"}
    assert alone.right == round(50 * eval_fmnist.accuracy(model, pixels, labels, **options))
    text = eval_fmnist.table([dense, few], dense)
    assert "| all |" in text and text.splitlines()[2].endswith("| 100 % |")
    assert f"{100 * few.accuracy:.2f} ± " in text
