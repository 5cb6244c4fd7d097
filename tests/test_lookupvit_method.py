"""LookupViT as a method inside encoders and vision towers.

References: the untouched encoder run on tokens that torch resized, `LookupViT` with the same
weights, and a vision-language model that is handed the features of such a tower and nothing else.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from test_hf_encoders import DUAL, KINDS, STRETCH, blocks_of, hooks_of, made, pooled
from test_hf_encoders import images as hf_images
from test_hf_encoders import run as run_hf
from test_lookupvit import randn, shake
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.errors import (
    InvalidBudget,
    InvalidInput,
    InvalidRecipe,
    UnsupportedModel,
    UnsupportedSite,
)
from vtc.modules.lookup_side import LookupSides
from vtc.modules.lookupvit import LookupViT
from vtc.session import adapter_for
from vtc.testing import families
from vtc.testing.threads import in_threads

timm = pytest.importorskip("timm", reason="image encoders need the extra 'vision'")

from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import ResPostBlock, VisionTransformer  # noqa: E402

TINY: dict[str, Any] = {
    "img_size": (32, 24),
    "patch_size": 4,
    "num_classes": 5,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
}
HEIGHT, WIDTH = 8, 6
GRIDS = [(1, 1), (3, 3), (5, 2), (2, 6), (8, 6)]
HOSTS: dict[str, dict[str, Any]] = {
    "cls": {},
    "registers": {"reg_tokens": 3, "init_values": 0.3, "qk_norm": True},
    "average": {"class_token": False, "global_pool": "avg"},
    "map": {"class_token": False, "global_pool": "map"},
    "no bias": {"qkv_bias": False, "proj_bias": False, "no_embed_class": True},
}
#: those that the network can start from, too
NATIVE = ["cls", "registers", "average"]
#: vision towers: class token, none, pixel shuffle, pixel shuffle with masks
TOWERS = ("llava", "llava_siglip_qwen3", "internvl", "idefics3")
#: encoders of transformers on their own; the prefix is none, one, two or four tokens
HF_HOSTS = ("clip", "siglip", "vit", "vit_class", "deit", "dinov2", "registers", "registers_class")
SITE = "vision.0"


def host(name: str = "cls", **options: Any) -> Any:
    torch.manual_seed(0)
    return shake(VisionTransformer(**{**TINY, **HOSTS[name], **options}).eval(), 0.1)


@cache
def images() -> Tensor:
    return randn(3, 3, 32, 24)


def resized(x: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """[B, N, D] -> [B, M, D], by torch."""
    grid = x.transpose(1, 2).unflatten(2, source)
    return F.interpolate(grid, target, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


@torch.no_grad()
def short_vit(model: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, prefix + M, D] that the encoder makes of resized ones."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    prefix = model.num_prefix_tokens
    few = resized(tokens[:, prefix:], (HEIGHT, WIDTH), grid)
    return model.norm(model.blocks(torch.cat([tokens[:, :prefix], few], 1)))


def near(cells: int, count: int) -> list[int]:
    """For each of `cells` along an axis, which of `count` compressed centres is nearest."""
    centres = [(j + 0.5) * cells / count for j in range(count)]
    return [min(range(count), key=lambda j: abs(centres[j] - i - 0.5)) for i in range(cells)]


def cells(grid: tuple[int, int], of: tuple[int, int]) -> list[int]:
    """Raster place of the cell under the centre of each compressed one."""
    y, x = ([int((j + 0.5) * n / m) for j in range(m)] for m, n in zip(grid, of, strict=True))
    return [row * of[1] + column for row in y for column in x]


def trained(session: vtc.Session, seed: int = 0) -> LookupSides:
    """Side weights far from a warm start."""
    return shake(session.modules[SITE], 0.2, seed)


def native_with(model: Any, side: nn.Module, grid: tuple[int, int]) -> LookupViT:
    """The network with the host's weights and these side weights."""
    network = LookupViT.from_vit(model, grids=[grid])
    left = network.load_state_dict(side.state_dict(), strict=False)
    assert not left.unexpected_keys
    return network


# A warm start


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_warm_start_is_the_encoder_on_resized_tokens(name: str, grid: tuple[int, int]) -> None:
    model, x = host(name), images()
    few = short_vit(model, x, grid)
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=grid) as session:
        found, dense = model(x), model.forward_features(x)
    torch.testing.assert_close(found, model.forward_head(few), rtol=1e-5, atol=1e-5)
    if name in NATIVE:
        network = LookupViT.from_vit(model, grids=[grid])
        torch.testing.assert_close(found, network(x, heads="compressed"), rtol=1e-5, atol=1e-5)
    if grid == (HEIGHT, WIDTH):
        assert torch.equal(found, model(x))
    assert session.trace[-1].n_out == (grid[0] * grid[1],) * 3
    # dense outputs: every cell shows the nearest compressed token
    prefix = model.num_prefix_tokens
    rows, columns = near(HEIGHT, grid[0]), near(WIDTH, grid[1])
    of = torch.tensor([r * grid[1] + c for r in rows for c in columns])
    expected = torch.cat([few[:, :prefix], few[:, prefix:][:, of]], 1)
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5)


def test_the_plan_tells_where_tokens_sit_and_what_they_stand_for() -> None:
    model = host()
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 2)) as session:
        model(images())
        text = session.report()
    plan = session.trace[-1].plan
    assert plan is not None and plan.index[2].tolist() == cells((3, 2), (HEIGHT, WIDTH))
    assert plan.size is not None and plan.size.eq(48 / 6).all()
    assert "lookupvit: an untrained stand-in: the encoder on resized tokens" in text


def test_blocks_of_other_shapes_are_refined_as_they_are() -> None:
    """The host block is never rebuilt, so norms behind the attention are no obstacle."""
    model = host(block_fn=ResPostBlock, init_values=0.5)
    expected = model.forward_head(short_vit(model, images(), (3, 3)))
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 3)):
        torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quick", [False, True])
def test_a_tower_of_open_clip(quick: bool) -> None:
    """The norm in front of its blocks is in front of the resize, too."""
    open_clip = pytest.importorskip("open_clip", reason="needs the extra 'vision'")
    vision = {"image_size": (32, 24), "patch_size": 4, "width": 16, "head_width": 8, "layers": 3}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    model = shake(open_clip.CLIP(16, vision, text, quick_gelu=quick).eval(), 0.1)

    def shorten(module: nn.Module, args: Any, kwargs: Any) -> Any:
        few = resized(args[0][:, 1:], (HEIGHT, WIDTH), (3, 2))
        return (torch.cat([args[0][:, :1], few], 1), *args[1:]), kwargs

    block = model.visual.transformer.resblocks[0]
    handle = block.register_forward_pre_hook(shorten, with_kwargs=True)
    with torch.no_grad():
        expected = model.encode_image(images())
    handle.remove()
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 2)) as session:
        found = model.encode_image(images())
        side = session.modules[SITE]
        assert torch.equal(
            side[1].gather_q.weight, model.visual.transformer.resblocks[1].attn.in_proj_weight[:16]
        )
        assert side.about["act"] == ("quick_gelu" if quick else "gelu")
        trained(session)
        assert (model.encode_image(images()) - found).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [1, 2])
def test_it_can_begin_at_a_later_block(first: int) -> None:
    model, x = host(), images()
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks[:first]:
            tokens = block(tokens)
        z_l = tokens[:, 1:]
        z_p = torch.cat([tokens[:, :1], resized(z_l, (HEIGHT, WIDTH), (3, 2))], 1)
        at = f"vision.{first}"
        with vtc.attach(model, "lookupvit", grid=(3, 2), at=at) as session:
            side = shake(session.modules[at])
            found = model(x)
        network = LookupViT.from_vit(model, grids=[(3, 2)])
        for layer, weights in zip(network.blocks[first:], side.blocks, strict=True):
            layer.load_state_dict(weights.state_dict(), strict=False)
            z_p, z_l = layer(z_p, z_l)  # the last infusion is read by nobody
        expected = model.forward_head(model.norm(z_p))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Trained side weights


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("norm", ["none", "col", "softmax"])
def test_side_weights_compute_what_the_network_computes(name: str, norm: str) -> None:
    model, x = host(name), images()
    plain = model(x)
    with torch.no_grad(), vtc.attach(model, "lookupvit", infuse_norm=norm, grid=(3, 2)) as session:
        warm = model(x)
        side = copy.deepcopy(trained(session))
        found = model(x)
    network = native_with(model, side, (3, 2))
    for block in network.blocks:
        vars(block)["infuse_norm"] = norm
    with torch.no_grad():
        expected = network(x, heads="compressed")
    assert (found - warm).abs().max() > 1e-2  # they matter
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("grid", GRIDS)
def test_one_file_of_weights_serves_all_grids(grid: tuple[int, int], tmp_path: Path) -> None:
    model, x, file = host(), images(), tmp_path / "side.safetensors"
    with vtc.attach(model, "lookupvit", grid=(3, 2), strict=False) as session:
        side = trained(session)
        side.save(file)
    with safe_open(str(file), "pt") as stored:
        assert stored.metadata() == {
            "format": "pt",
            "heads": "2",
            "infuse_norm": "none",
            "act": "gelu",
        }
        assert set(stored.keys()) == set(side.state_dict())
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=grid, weights=str(file)) as session:
        found = model(x)
        assert "stand-in" not in session.report()
    assert all(
        torch.equal(v, side.state_dict()[k]) for k, v in session.modules[SITE].state_dict().items()
    )
    with torch.no_grad():
        expected = native_with(model, side, grid)(x, heads="compressed")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_side_parameter_and_the_host() -> None:
    model, x = host("registers"), images().clone().requires_grad_()
    with vtc.attach(model, "lookupvit", grid=(3, 3)) as session:
        side = trained(session)
        F.cross_entropy(model(x), torch.tensor([0, 3, 4])).backward()
    for name, p in [*side.named_parameters(), *model.named_parameters()]:
        assert p.grad is not None and bool(p.grad.isfinite().all()), name
        assert bool((p.grad != 0).any()), name
    assert x.grad is not None and bool((x.grad != 0).any())
    assert not any("infuse" in n or "lookup_mlp" in n for n, _ in side[2].named_parameters())


def test_it_learns_with_the_host_frozen() -> None:
    model, x, y = host("average").requires_grad_(False), images(), torch.tensor([0, 3, 4])
    with vtc.attach(model, "lookupvit", grid=(2, 2)) as session:
        optimiser = torch.optim.AdamW(session.modules[SITE].parameters(), 0.01)
        losses = []
        for _ in range(6):
            loss = F.cross_entropy(model(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_trained_network_of_the_zoo_as_a_method() -> None:
    """Refine weights in a ViT, the others beside it: the logits of the trained network."""
    import vtc_zoo
    from vtc_zoo import fmnist

    try:
        network, _ = vtc_zoo.load("tiny-lookupvit-fmnist")
    except FileNotFoundError:
        pytest.skip("no weights of tiny-lookupvit-fmnist: python -m vtc_zoo.train_fmnist")
    network: Any = network
    c = network.config
    model: Any = VisionTransformer(
        img_size=c.img_size,
        patch_size=c.patch_size[0],
        in_chans=c.in_chans,
        num_classes=c.num_classes,
        embed_dim=c.dim,
        depth=c.depth,
        num_heads=c.heads,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    ).eval()
    names = {
        "refine_norm": "norm1",
        "refine_qkv": "attn.qkv",
        "refine_proj": "attn.proj",
        "refine_mlp.norm": "norm2",
        "refine_mlp.fc": "mlp.fc",
        "patch_embed": "patch_embed.proj",
        "norm_p": "norm",
        "head_p": "head",
    }
    weights, side = {}, {}
    for key, value in network.state_dict().items():
        if "gather" in key or "infuse" in key or "lookup_mlp" in key:
            side[key] = value
        elif not key.startswith(("norm_l", "head_l")):
            for old, new in names.items():
                key = key.replace(old, new)
            weights[key] = value
    model.load_state_dict(weights)
    x = fmnist.preprocess(fmnist.sample()[0][:40])
    for grid in ((3, 3), (2, 4)):
        with torch.no_grad(), vtc.attach(model, "lookupvit", grid=grid) as session:
            own = session.modules[SITE]
            own.load_state_dict({k: side[k] for k in own.state_dict()})
            found = model(x)
            expected = network(x, grid, heads="compressed")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Ways to run


def test_alone_equals_in_a_batch_and_in_threads() -> None:
    model, x = host("registers"), images()
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 3)) as session:
        trained(session)
        together = model(x)

        def work(one: Tensor) -> Tensor:
            with torch.no_grad():
                return model(one[None])

        results = in_threads([partial(work, one) for one in x])
        alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(results), alone)


def test_intermediate_layers_have_whole_grids() -> None:
    model, x = host("registers"), images()
    shapes = [t.shape for t in model.forward_intermediates(x)[1]]
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 2)) as session:
        trained(session)
        once = model(x)
        last, grids = model.forward_intermediates(x)
        assert torch.equal(model(x), once)
    assert [g.shape for g in grids] == shapes
    of = torch.tensor([r * 2 + c for r in near(HEIGHT, 3) for c in near(WIDTH, 2)])
    places = torch.tensor(cells((3, 2), (HEIGHT, WIDTH)))
    for grid in grids:
        flat = grid.flatten(2)
        assert torch.equal(flat, flat[:, :, places][:, :, of])
    torch.testing.assert_close(
        model.forward_head(torch.cat([last[:, :4], last[:, 4:][:, places]], 1)), once
    )


def test_nothing_is_left_behind() -> None:
    from vtc.adapters.encoder.hooks import _runs

    model, x = host(), images()
    before, names, state = model(x), set(vars(model)), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="boom"), vtc.attach(model, "lookupvit"):
        model(x)
        raise RuntimeError("boom")
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), vtc.attach(model, "lookupvit"):
        model(x)
    handle.remove()
    assert torch.equal(model(x), before) and set(vars(model)) == names and _runs.get() == ()
    assert not [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16() -> None:
    model, x = host("registers"), images()
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 3)) as session:
        trained(session)
        expected = model(x)
        model.bfloat16()
        session.modules[SITE].bfloat16()
        found = model(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1 * expected.std().item())
    with vtc.attach(model, "lookupvit", strict=False) as session:
        assert {p.dtype for p in session.modules[SITE].parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model, x = host("average"), images()
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 2)) as session:
        trained(session)
        eager = model(x)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)


def test_the_cost_is_that_of_the_network() -> None:
    """Nothing is computed that the network does not compute."""
    model, x = host("average"), images()[:1]
    network = LookupViT.from_vit(model, grids=[(3, 3)])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, heads="compressed")
    expected = counter.get_total_flops()
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 3)):
        model(x)
        with FlopCounterMode(display=False) as counter:
            model(x)
    assert counter.get_total_flops() == expected


# Vision towers


@cache
def family(name: str) -> families.Family:
    return families.make(name)


@torch.no_grad()
def tower_features(
    name: str, inputs: families.Inputs, grid: tuple[int, int], first: int = 0
) -> Tensor:
    """[images, M, D] what a model without any session hands to its language model when its tower
    runs on tokens that torch resized, from block `first` on."""
    model: Any = families.make(name).model
    adapter = adapter_for(model)
    tower: Any = adapter.tower  # type: ignore[attr-defined]
    merge = tower.merge

    def shorten(module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0]
        prefix = x.shape[1] - 64
        few = resized(x[:, prefix:], (8, 8), (grid[0] * merge, grid[1] * merge))
        short = torch.cat([x[:, :prefix], few], 1)
        assert all(not torch.is_tensor(a) for a in (*args[1:], *kwargs.values()))
        return (short, *args[1:]), kwargs

    tower.blocks[first].register_forward_pre_hook(shorten, with_kwargs=True)
    extra = {"return_dict": True}
    out = model.model.get_image_features(inputs["pixel_values"], **extra).pooler_output
    features = torch.stack(list(out)) if not torch.is_tensor(out) else out
    return features.reshape(-1, grid[0] * grid[1], features.shape[-1])


@torch.no_grad()
def last_logits(
    name: str, inputs: families.Inputs, features: Tensor, kept: list[list[int]]
) -> Tensor:
    """The language model on the text and on `features` [images, M, D], which stand at the columns
    `kept` of the M x images placeholders of one prompt."""
    fam = families.make(name)
    model: Any = fam.model
    ids, visual = inputs["input_ids"][0], fam.visual(inputs)[0]
    embeds = model.get_input_embeddings()(ids[None]).clone()
    spots = visual.nonzero()[:, 0].reshape(len(features), -1)
    keep = ~visual
    for image, places in enumerate(kept):
        columns = spots[image][torch.tensor(places)]
        embeds[0, columns] = features[image].to(embeds.dtype)
        keep[columns] = True
    where = keep.nonzero()[:, 0]
    out = model.model(
        inputs_embeds=embeds[:, where],
        position_ids=where[None],
        attention_mask=torch.ones(1, len(where), dtype=torch.long),
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)[:, -1]


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("row", [0, 1])
def test_a_warm_start_in_a_vlm_is_its_tower_on_resized_tokens(name: str, row: int) -> None:
    grid = (2, 2)
    fam = family(name)
    inputs, side = fam.single(row), 8 if "llava" in name else 4
    features = tower_features(name, inputs, grid)
    widths = []

    def measure(module: nn.Module, args: Any, kwargs: Any) -> None:
        widths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    adapter: Any = adapter_for(fam.model)
    handle = adapter.layers[0].register_forward_pre_hook(measure, with_kwargs=True)
    model: Any = fam.model
    with torch.no_grad(), vtc.attach(fam.model, "lookupvit", grid=grid) as session:
        found = model(**inputs).logits[:, -1]
        tokens = model.generate(**inputs, max_new_tokens=3)
    handle.remove()
    expected = last_logits(name, inputs, features, [cells(grid, (side, side))] * len(features))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    text = int((~fam.visual(inputs)).sum())
    assert (
        widths[:2] == [text + 4 * len(features)] * 2
        and tokens.shape[1] > inputs["input_ids"].shape[1]
    )
    assert session.stats()["visual_tokens"] == 4


def test_it_can_begin_at_a_later_block_of_a_tower() -> None:
    fam = family("llava")
    inputs = fam.single(0)
    model: Any = fam.model
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(2, 3), at="vision.2") as session:
        found = model(**inputs).logits[:, -1]
        assert len(session.modules["vision.2"].blocks) == 1
        shake(session.modules["vision.2"])
        assert (model(**inputs).logits[:, -1] - found).abs().max() > 1e-2
    features = tower_features("llava", inputs, (2, 3), first=2)
    expected = last_logits("llava", inputs, features, [cells((2, 3), (8, 8))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_later_steps_choose_among_the_compressed_tokens() -> None:
    fam = family("llava")
    inputs = fam.single(0)
    recipe = vtc.Recipe(
        (
            vtc.Step("lookupvit", SITE, "auto", params={"grid": [3, 4]}),
            vtc.Step("divprune", "projector", 5),
        )
    )
    with torch.no_grad(), vtc.attach(fam.model, recipe) as session:
        found = fam.model(**inputs).logits[:, -1]
    first, second = session.trace
    assert first.n_out == second.n_in == (12,) and second.n_out == (5,)
    places = cells((3, 4), (8, 8))
    assert first.source[0].tolist() == places
    left = second.source[0].tolist()
    assert set(left) < set(places)
    features = tower_features("llava", inputs, (3, 4))[:, [places.index(p) for p in left]]
    expected = last_logits("llava", inputs, features, [left])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_vlm_trains_its_side_weights(name: str) -> None:
    fam = family(name)
    with vtc.attach(fam.model, "lookupvit", grid=(2, 3)) as session:
        side = session.modules[SITE]
        warm = fam.model(**fam.inputs).logits
        shake(side, 0.1)
        out = fam.model(**fam.labelled())
        grads = torch.autograd.grad(out.loss, list(side.parameters()), allow_unused=True)
    assert len(side.blocks) == (3 if name == "llava" else 4)  # up to the block that is read
    assert (out.logits - warm).abs().max() > 1e-2
    for (key, _), grad in zip(side.named_parameters(), grads, strict=True):
        assert grad is not None and bool((grad != 0).any()), key


def test_nothing_of_a_forward_is_kept_behind_the_last_block() -> None:
    from vtc.adapters.encoder.hooks import _runs
    from vtc.adapters.vlm.tower import ENCODINGS

    model, fam = host(), family("llava")
    with torch.no_grad(), vtc.attach(model, "lookupvit"):
        model(images())
        assert _runs.get() == ()
    with torch.no_grad(), vtc.attach(fam.model, "lookupvit"):
        fam.model(**fam.inputs)
        assert ENCODINGS.get() and all(e.rewrite is None for e in ENCODINGS.get())
    assert ENCODINGS.get() == ()


# Image encoders of transformers


def start_short(model: Any, prefix: int, source: tuple[int, int], target: tuple[int, int]) -> None:
    """From now on block 0 reads patches that torch resized."""

    def shorten(module: nn.Module, args: Any, kwargs: Any) -> Any:
        few = resized(args[0][:, prefix:], source, target)
        return (torch.cat([args[0][:, :prefix], few], 1), *args[1:]), kwargs

    blocks_of(model)[0].register_forward_pre_hook(shorten, with_kwargs=True)


@pytest.mark.parametrize("name", HF_HOSTS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (3, 5), None])
def test_a_warm_start_in_transformers(name: str, grid: tuple[int, int] | None) -> None:
    model, kind, x = copy.deepcopy(made(name)), KINDS[name], hf_images(name)
    with torch.no_grad():
        for p in blocks_of(model).parameters():
            p.mul_(0.5)  # or four random blocks amplify what the resize rounds
    untouched = copy.deepcopy(model)
    grid, same, prefix = grid or kind.grid, grid is None, kind.prefix
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=grid) as session:
        found = run_hf(name, model, x, output_hidden_states=True)
    assert session.trace[-1].n_out == (grid[0] * grid[1],) * 3
    with torch.no_grad():
        if same:
            assert torch.equal(pooled(found), pooled(run_hf(name, model, x)))
        start_short(untouched, prefix, kind.grid, grid)
        few = run_hf(name, untouched, x, output_hidden_states=True)
    torch.testing.assert_close(pooled(found), pooled(few), rtol=1e-5, atol=1e-5)
    # what is returned token by token: every cell shows the nearest compressed token
    rows, columns = near(kind.grid[0], grid[0]), near(kind.grid[1], grid[1])
    of = torch.tensor([r * grid[1] + c for r in rows for c in columns])
    pairs = list(zip(found.hidden_states, few.hidden_states, strict=True))
    if "last_hidden_state" in found:
        pairs.append((found.last_hidden_state, few.last_hidden_state))
    for whole, short in pairs:
        expected = torch.cat([short[:, :prefix], short[:, prefix:][:, of]], 1)
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_a_warm_start_beside_a_text_model(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**DUAL)
    model: Any = getattr(transformers, f"{name}Model")(config).eval()
    untouched, x = copy.deepcopy(model), randn(3, 3, 32, 48)
    start_short(untouched.vision_model, int(name == "CLIP"), (4, 6), (2, 3))
    with torch.no_grad():
        expected = untouched.get_image_features(x, **STRETCH)
        with vtc.attach(model, "lookupvit", grid=(2, 3)) as session:
            found = model.get_image_features(x, **STRETCH)
            trained(session)
            other = model.get_image_features(x, **STRETCH)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    assert found.last_hidden_state.shape[1] == 24 + (name == "CLIP")
    assert (other.pooler_output - found.pooler_output).abs().max() > 1e-2


@pytest.mark.parametrize("name", HF_HOSTS)
@pytest.mark.parametrize("first", [0, 2])
def test_trained_side_weights_in_transformers(name: str, first: int) -> None:
    """Both streams by hand, block after block."""
    model, kind, at = made(name), KINDS[name], f"vision.{first}"
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 2), at=at) as session:
        warm = pooled(run_hf(name))
        side = shake(session.modules[at], 0.2)
        found = run_hf(name, output_hidden_states=True)
    assert len(side.blocks) == 4 - first and (pooled(found) - warm).abs().max() > 1e-2
    with torch.no_grad():
        tokens = run_hf(name, output_hidden_states=True).hidden_states[first]
        z_l = tokens[:, kind.prefix :]
        z_p = torch.cat([tokens[:, : kind.prefix], resized(z_l, kind.grid, (3, 2))], 1)
        for i, block in enumerate(blocks_of(model)[first:]):
            z_p, weights = side[i].gather(z_p, z_l)
            z_p = block(z_p, None)
            if side[i].infuse:
                z_l = side[i].infuse_into(z_l, z_p, weights)
    last, places = found.hidden_states[-1], torch.tensor(cells((3, 2), kind.grid))
    own = torch.cat([last[:, : kind.prefix], last[:, kind.prefix :][:, places]], 1)
    torch.testing.assert_close(own, z_p, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HF_HOSTS)
def test_gradients_in_transformers_also_with_checkpointing(name: str) -> None:
    model, grads = copy.deepcopy(made(name)).train(), list[list[Tensor]]()
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        x = hf_images(name).requires_grad_()
        with vtc.attach(model, "lookupvit", grid=(3, 2)) as session:
            side = trained(session)
            pooled(run_hf(name, model, x)).square().sum().backward()
        named = {"images": x, **dict(side.named_parameters())}
        for key, p in named.items():
            assert p.grad is not None and bool(p.grad.isfinite().all()), key
            assert bool((p.grad != 0).any()), key
        grads.append([p.grad for p in named.values() if p.grad is not None])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip", "vit_class"])
def test_nothing_is_left_behind_in_transformers(name: str) -> None:
    from vtc.adapters.hf_vision.hooks import _runs

    model = made(name)
    before = pooled(run_hf(name, output_hidden_states=True))  # installs transformers' own hooks
    names, hooks = {n: set(vars(m)) for n, m in model.named_modules()}, hooks_of(model)
    mapping = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with vtc.attach(model, "lookupvit", grid=(2, 3)):
        assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == mapping  # nothing is biased
        run_hf(name)
    handle = blocks_of(model)[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), vtc.attach(model, "lookupvit", grid=(2, 3)):
        run_hf(name)
    handle.remove()
    assert torch.equal(pooled(run_hf(name)), before) and _runs.get() == ()
    assert {n: set(vars(m)) for n, m in model.named_modules()} == names
    assert hooks_of(model) == hooks


def test_masks_in_transformers_are_refused() -> None:
    model, x = made("vit"), hf_images("vit")
    mask = torch.ones(3, 25, dtype=torch.long)
    mask[1, 5:15] = 0
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(2, 3)):
        with pytest.raises(UnsupportedModel, match="call the model without a mask"):
            model(x, attention_mask=mask)
        assert model(x).last_hidden_state.shape == (3, 25, 32)
    with (
        vtc.attach(made("beit_shared"), "lookupvit", grid=(2, 3), strict=False),
        pytest.raises(UnsupportedModel, match="bias.* that these blocks are given"),
    ):
        run_hf("beit_shared")


# Errors


def test_what_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    model = host()
    with pytest.raises(UnsupportedModel, match="no place of their own in the rotary positions"):
        vtc.attach(Eva(**TINY, use_rot_pos_emb=True), "lookupvit")
    with pytest.raises(UnsupportedModel, match="packs images of all sizes"):
        vtc.attach(family("qwen2_5_vl").model, "lookupvit")
    with pytest.raises(UnsupportedModel, match="no place of their own in the rotary positions"):
        vtc.attach(made("dinov3"), "lookupvit")
    with pytest.raises(InvalidInput, match="LookupViT needs LayerNorm"):
        vtc.attach(made("aimv2"), "lookupvit")
    with pytest.raises(UnsupportedSite, match="works at vision, not at 'projector'"):
        vtc.attach(family("llava").model, "lookupvit", at="projector")
    with pytest.raises(InvalidBudget, match="keep=25, but it takes keep='auto'"):
        vtc.attach(model, "lookupvit", keep=25)
    with pytest.raises(InvalidRecipe, match="merge='none' and mass=0"):
        vtc.attach(model, "lookupvit", mass=0.5)
    with pytest.raises(InvalidRecipe, match="merge='none' and mass=0"):
        vtc.attach(model, "lookupvit", merge="nearest")
    for grid in (5, (5,), (5, 5, 5), (2.0, 2), "5x5"):
        with pytest.raises(InvalidRecipe, match=r"lookupvit.grid: .* is not \(int, int\)"):
            vtc.attach(model, "lookupvit", grid=grid)
    with pytest.raises(InvalidRecipe, match=r"grid=\(0, 3\), use numbers from 1 on"):
        vtc.attach(model, "lookupvit", grid=(0, 3))
    with pytest.raises(UnsupportedSite, match="not inside .*: use at='vision.0'"):
        vtc.attach(model, "lookupvit", at="vision.0.mlp")
    two = (vtc.Step("lookupvit", SITE, "auto"), vtc.Step("random", "vision.1", 4))
    with pytest.raises(InvalidRecipe, match="no other step can act at vision.<i>"):
        vtc.attach(model, vtc.Recipe(two))
    bare = host()
    bare.blocks[0].norm1 = nn.BatchNorm1d(16)
    with pytest.raises(InvalidInput, match="BatchNorm1d.*LookupViT needs LayerNorm"):
        vtc.attach(bare, "lookupvit")
    for each in (model, bare):
        assert not [h for m in each.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_what_is_refused_in_a_forward() -> None:
    model = host()
    with (
        vtc.attach(model, "lookupvit", grid=(3, 7), strict=False),
        pytest.raises(InvalidInput, match=r"grid=\(3, 7\) does not fit into 1 x 8 x 6 tokens"),
    ):
        model(images())
    with (
        vtc.attach(model, "lookupvit", grid=(2, 2), strict=False),
        pytest.raises(InvalidInput, match="NaN"),
    ):
        model(images() * float("nan"))


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    def saved(name: str, **options: Any) -> str:
        file = tmp_path / f"{name}.safetensors"
        with vtc.attach(host(**options), "lookupvit", strict=False) as session:
            session.modules[SITE].save(file)
        return str(file)

    def refused(weights: Any, text: str, **options: Any) -> None:
        with pytest.raises(InvalidInput, match=text):
            vtc.attach(host(), "lookupvit", weights=weights, **options)

    refused(
        saved("wide", embed_dim=32),
        "of another shape, the first is blocks.0.gather_k.bias: "
        r"\(32,\) there, \(16,\) here.*of this width and depth",
    )
    refused(saved("deep", depth=4), r"too many, the first is blocks.2.infuse_proj.bias \(16,\)")
    refused(saved("flat", depth=2), "missing, the first is blocks.1.infuse_proj.bias")
    refused(saved("heads", num_heads=4), "heads is '4' there and '2' here")
    good = saved("good")
    refused(good, "infuse_norm is 'none' there and 'col' here", infuse_norm="col")
    refused(good, "lookup_mlp.fc1.bias: ", lookup_ratio=1.0)
    refused(str(tmp_path / "none"), "cannot read weights from .*Give a safetensors file")
    (tmp_path / "text").write_text("no weights")
    refused(str(tmp_path / "text"), "cannot read weights from .*Give a safetensors file")
    some = {k: v for k, v in host().state_dict().items()}
    save_file(some, str(tmp_path / "other"))
    refused(str(tmp_path / "other"), "missing, the first is blocks.0.gather_k.bias.*too many")
    with pytest.raises(InvalidRecipe, match=r"lookupvit.weights: 3 is not str \| None"):
        vtc.attach(host(), "lookupvit", weights=3)


def test_padding_inside_a_tower_is_refused() -> None:
    fam = family("idefics3")
    inputs = dict(fam.single(0))
    mask = torch.ones(inputs["pixel_values"].shape[:2] + (56, 56), dtype=torch.bool)
    mask[..., 28:] = False
    with (
        vtc.attach(fam.model, "lookupvit", grid=(2, 2), strict=False),
        pytest.raises(UnsupportedModel, match="some patches of this batch are padding"),
    ):
        fam.model(**inputs, pixel_attention_mask=mask)


# Recipes


def test_a_recipe_file_keeps_the_grid(tmp_path: Path) -> None:
    recipe = vtc.Recipe.build("lookupvit", 4, grid=[3, 2])
    assert recipe == vtc.Recipe((vtc.Step("lookupvit", SITE, "auto", params={"grid": (3, 2)}),))
    file = tmp_path / "recipe.yaml"
    assert "grid:\n    - 3\n    - 2\n" in recipe.dump(file) and "tuple" not in recipe.dump()
    assert vtc.Recipe.load(file) == recipe == vtc.Recipe.load(recipe.to_dict())
    model = host()
    with torch.no_grad(), vtc.attach(model, "lookupvit", grid=(3, 2)):
        expected = model(images())
    with torch.no_grad(), vtc.attach(model, file) as session:
        assert torch.equal(model(images()), expected)
    assert session.trace[-1].n_out == (6,) * 3


def test_describe_tells_where_it_runs() -> None:
    assert vtc.describe(host()).methods["lookupvit"] == "lookupvit at vision.0"
    refused = vtc.describe(family("qwen2_5_vl").model).methods["lookupvit"]
    assert refused.startswith("no: 'lookupvit' writes new tokens")
