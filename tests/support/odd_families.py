"""Tiny models of real classes that few people run: text models of other kinds behind LLaVA, and
families with a part that others lack."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from vtc.testing import families
from vtc.testing.batches import Recipe, Segment
from vtc.testing.configs import (
    PACKED_TOWER,
    PINPOINTS,
    TEXT,
    _mrope,
    _packed_image,
    build,
    clip,
    fixed,
)


def family(recipe: Recipe) -> families.Family:
    """A batch of one image and of two, as `families.make` builds them."""
    model = recipe.model
    families._init(model, 1)
    model.eval()
    families._plain_greedy(model)
    rows = families._rows(recipe, [1, 2], 0)
    made = families.Family(
        type(model).__name__, model, {}, frozenset({families.IMAGE}), rows, recipe
    )
    made.inputs.update(made.padded("left"))
    return made


def llava_on(text: Any, attn: str = "sdpa") -> families.Family:
    """LLaVA in front of any text model."""
    config = transformers.LlavaConfig(
        vision_config=clip(),
        text_config=text,
        image_token_index=families.IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = build(
            transformers.LlavaForConditionalGeneration, config, attn, torch.float32
        )
    return family(Recipe(model, fixed(64)))


def short_convolutions() -> families.Family:
    """Layers without columns (a state of a few tokens) and layers of full attention in turns."""
    kinds = ["conv", "full_attention"] * (families.LAYERS // 2)
    text = transformers.Lfm2Config(**TEXT, layer_types=kinds, block_auto_adjust_ff_dim=False)
    return llava_on(text)


def shallow_windows(named: Any = None) -> families.Family:
    """Qwen2.5-VL with 3 tower blocks; `named` see the whole image, by default those of the released
    model, which are deeper."""
    vision = {**PACKED_TOWER, "depth": 3, "window_size": 56}
    if named is not None:
        vision["fullatt_block_indexes"] = named
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": _mrope([2, 3, 3])},
        vision_config=vision,
        image_token_id=families.IMAGE,
        video_token_id=families.VIDEO,
    )
    with torch.random.fork_rng(devices=[]):
        model = build(
            transformers.Qwen2_5_VLForConditionalGeneration, config, "sdpa", torch.float32
        )
    return family(Recipe(model, _packed_image, types="mm_token_type_ids"))


def exaone() -> families.Family:
    """EXAONE 4.5, whose released tower is deeper than this one, as in `shallow_windows`."""
    vision = {**PACKED_TOWER, "depth": 3, "window_size": 56, "num_key_value_heads": 2}
    text = {**TEXT, "layer_types": ["full_attention"] * families.LAYERS, "sliding_window": None}
    config = transformers.Exaone4_5_Config(
        text_config={"model_type": "exaone4", **text},
        vision_config=vision,
        image_token_id=families.IMAGE,
        video_token_id=families.VIDEO,
    )
    with torch.random.fork_rng(devices=[]):
        model = build(
            transformers.Exaone4_5_ForConditionalGeneration, config, "sdpa", torch.float32
        )
    return family(Recipe(model, _packed_image))


def granite() -> families.Family:
    """Granite 4 Vision: visual tokens enter the text model as zeros, features of several tower
    layers are added to them before its layers 0 to 3."""
    config = transformers.Granite4VisionConfig(
        vision_config=clip(hidden_size=64, num_attention_heads=2, patch_size=7),
        text_config=dict(TEXT, embedding_multiplier=2.0),
        image_token_index=families.IMAGE,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="2/4",
        deepstack_layer_map=[[-2, 0], [-3, 1]],
        spatial_target_layers=[1, 2, 2, 3],
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
        },
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = build(
            transformers.Granite4VisionForConditionalGeneration, config, "sdpa", torch.float32
        )

    def image(which: int, gen: torch.Generator) -> Segment:
        pixels = torch.randn(1, 3, 3, 56, 56, generator=gen)
        size = torch.tensor([[56, 112]])
        with torch.no_grad():
            out = model.model.get_image_features(pixels, size, return_dict=True)
        count = len(out.deepstack_features[0][1][0])
        ids = torch.full((count,), families.IMAGE)
        return Segment(ids, {"pixel_values": pixels, "image_sizes": size})

    return family(Recipe(model, image))


def ernie() -> families.Family:
    """ERNIE 4.5 VL: text and visual tokens have experts of their own, told apart by an argument."""
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config={
            **TEXT,
            "rope_parameters": _mrope([3, 3, 2]),
            "moe_intermediate_size": [32, 32],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense"] + ["sparse"] * (families.LAYERS - 1),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
        },
        image_token_id=families.IMAGE,
        video_token_id=families.VIDEO,
        image_start_token_id=502,
        image_end_token_id=503,
        video_start_token_id=504,
        video_end_token_id=505,
    )
    with torch.random.fork_rng(devices=[]):
        model = build(
            transformers.Ernie4_5_VLMoeForConditionalGeneration, config, "sdpa", torch.float32
        )

    def image(which: int, gen: torch.Generator) -> Segment:
        grid = (1, 4, 8)
        pixels = torch.randn(32, 3 * 14 * 14, generator=gen)
        payload = {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}
        return Segment(torch.full((8,), families.IMAGE), payload)

    made = family(Recipe(model, image, types="mm_token_type_ids"))
    made.inputs["moe_mm_token_type_ids"] = made.inputs["mm_token_type_ids"].int()
    return made
