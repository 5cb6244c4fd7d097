"""Configurations of real Hugging Face VLM classes, as small as they get: `FAMILIES`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from .batches import HIDDEN, IMAGE, LAYERS, PAD, VIDEO, VOCAB, Recipe, Segment, words

TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
GRID_TOWER: dict[str, Any] = {  # CLIP and SigLIP: 8 x 8 patches
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 7,
}
PACKED_TOWER: dict[str, Any] = {  # Qwen and GLM: packed patches, merged 2 x 2
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
SIZES = [(112, 56), (112, 112), (56, 100), (56, 56)]  # original height, width
GRIDS = [(1, 8, 12), (1, 12, 8), (1, 8, 8), (1, 4, 8)]  # t, h, w in patches


def build(
    cls: type, config: transformers.PreTrainedConfig, attn: str, dtype: torch.dtype
) -> PreTrainedModel:
    config.tie_word_embeddings = False  # a tied random head mostly repeats the last token
    return cls._from_config(config, attn_implementation=attn, dtype=dtype)


def siglip(**extra: Any) -> transformers.SiglipVisionConfig:
    return transformers.SiglipVisionConfig(**{**GRID_TOWER, **extra}, vision_use_head=False)


def clip(**extra: Any) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**{**GRID_TOWER, **extra})


def _placeholders(count: int, token: int = IMAGE) -> Tensor:
    return torch.full((count,), token)  # [count]


def fixed(count: int) -> Callable[..., Segment]:
    """Square images of one size, each giving `count` tokens."""

    def image(which: int, gen: torch.Generator) -> Segment:
        pixels = torch.randn(1, 3, 56, 56, generator=gen)
        return Segment(_placeholders(count), {"pixel_values": pixels})

    return image


def _tiled(model: PreTrainedModel) -> Callable[..., Segment]:
    """Any-resolution images: a base view and tiles, zero-filled to 5 views."""

    def image(which: int, gen: torch.Generator) -> Segment:
        size = SIZES[which % len(SIZES)]
        views = 5 if size == (112, 112) else 3
        pixels = torch.zeros(1, 5, 3, 56, 56)
        pixels[:, :views] = torch.randn(1, views, 3, 56, 56, generator=gen)
        payload = {"pixel_values": pixels, "image_sizes": torch.tensor([size])}
        with torch.no_grad():
            cast = pixels.to(model.dtype)
            out = model.model.get_image_features(cast, payload["image_sizes"], return_dict=True)
        return Segment(_placeholders(len(out.pooler_output[0])), payload)

    return image


def _packed_pixels(grid: tuple[int, int, int], gen: torch.Generator) -> Tensor:
    return torch.randn(math.prod(grid), 3 * 2 * 14 * 14, generator=gen)  # [patches, C]


def _packed_image(which: int, gen: torch.Generator) -> Segment:
    grid = GRIDS[which % len(GRIDS)]
    payload = {"pixel_values": _packed_pixels(grid, gen), "image_grid_thw": torch.tensor([grid])}
    return Segment(_placeholders(math.prod(grid) // 4), payload)


def _packed_video(which: int, gen: torch.Generator) -> Segment:
    """One video as a single run of placeholders (Qwen2-VL, Qwen2.5-VL)."""
    grid = (3, 8, 8)
    pixels = _packed_pixels(grid, gen)
    payload = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}
    return Segment(_placeholders(math.prod(grid) // 4, VIDEO), payload)


def _stamped_video(which: int, gen: torch.Generator) -> Segment:
    """One video whose frames are separated by text, as Qwen3-VL writes its timestamps."""
    grid = (3, 4, 8)
    pixels = _packed_pixels(grid, gen)
    payload = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}
    frame = _placeholders(math.prod(grid[1:]) // 4, VIDEO)
    parts = [frame]
    for _ in range(grid[0] - 1):
        parts += [words(2, gen).ids, frame]
    return Segment(torch.cat(parts), payload)


def _mrope(section: list[int], **extra: object) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section, **extra}


# --------------------------------------------------------------------------------------------
# families


def llava(attn: str, dtype: torch.dtype) -> Recipe:
    """CLIP, class token dropped, second to last tower layer."""
    config = transformers.LlavaConfig(
        vision_config=clip(),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    model = build(transformers.LlavaForConditionalGeneration, config, attn, dtype)
    return Recipe(model, fixed(64))


def llava_next(attn: str, dtype: torch.dtype) -> Recipe:
    """Tiles of several resolutions and newline tokens."""
    config = transformers.LlavaNextConfig(
        vision_config=clip(patch_size=14),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    model = build(transformers.LlavaNextForConditionalGeneration, config, attn, dtype)
    return Recipe(model, _tiled(model))


def llava_onevision(attn: str, dtype: torch.dtype) -> Recipe:
    """SigLIP and Qwen2; tiled images, and videos pooled 2 x 2 after the projector."""
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(patch_size=14),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = build(transformers.LlavaOnevisionForConditionalGeneration, config, attn, dtype)

    def video(which: int, gen: torch.Generator) -> Segment:
        frames = 4
        pixels = torch.randn(1, frames, 3, 56, 56, generator=gen)
        return Segment(_placeholders(frames * 4 + 1, VIDEO), {"pixel_values_videos": pixels})

    return Recipe(model, _tiled(model), video)


def qwen2_vl(attn: str, dtype: torch.dtype) -> Recipe:
    """Packed tower, multimodal RoPE; image and video."""
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": _mrope([2, 3, 3])},
        vision_config={
            "depth": 4,
            "embed_dim": 32,
            "hidden_size": HIDDEN,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = build(transformers.Qwen2VLForConditionalGeneration, config, attn, dtype)
    return Recipe(model, _packed_image, _packed_video, types="mm_token_type_ids")


def qwen2_5_vl(attn: str, dtype: torch.dtype) -> Recipe:
    """Packed tower with window attention, multimodal RoPE; image and video."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": _mrope([2, 3, 3])},
        vision_config={**PACKED_TOWER, "window_size": 56, "fullatt_block_indexes": [1, 3]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = build(transformers.Qwen2_5_VLForConditionalGeneration, config, attn, dtype)
    return Recipe(model, _packed_image, _packed_video, types="mm_token_type_ids")


def qwen3_vl(attn: str, dtype: torch.dtype) -> Recipe:
    """Deepstack features for 3 of the 4 decoder layers; image and time-stamped video."""
    config = transformers.Qwen3VLConfig(
        text_config={
            **TEXT,
            "head_dim": 16,
            "rope_parameters": _mrope([4, 2, 2], mrope_interleaved=True),
        },
        vision_config={
            **PACKED_TOWER,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = build(transformers.Qwen3VLForConditionalGeneration, config, attn, dtype)
    return Recipe(model, _packed_image, _stamped_video, types="mm_token_type_ids")


def internvl(attn: str, dtype: torch.dtype) -> Recipe:
    """Pixel shuffle 2 x 2 before the projector."""
    vision = transformers.InternVLVisionConfig(
        **{**GRID_TOWER, "image_size": [56, 56], "patch_size": [7, 7]}
    )
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    model = build(transformers.InternVLForConditionalGeneration, config, attn, dtype)
    return Recipe(model, fixed(16))


def smolvlm(attn: str, dtype: torch.dtype) -> Recipe:
    """Pixel shuffle 2 x 2 in the connector, nested pixel values."""
    config = transformers.SmolVLMConfig(
        vision_config=dict(GRID_TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,  # pyright: ignore[reportCallIssue]
    )
    model = build(transformers.SmolVLMForConditionalGeneration, config, attn, dtype)
    return Recipe(model, fixed(16), nested=True)


def idefics3(attn: str, dtype: torch.dtype) -> Recipe:
    """As smolvlm, with its own merge of the image features."""
    config = transformers.Idefics3Config(
        vision_config=dict(GRID_TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,  # pyright: ignore[reportCallIssue]
    )
    model = build(transformers.Idefics3ForConditionalGeneration, config, attn, dtype)
    return Recipe(model, fixed(16), nested=True)


def gemma3(attn: str, dtype: torch.dtype) -> Recipe:
    """Sliding and full layers in turn; every image is a bidirectional block."""
    text = transformers.Gemma3TextConfig(
        **TEXT,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
        query_pre_attn_scalar=12,
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=siglip(),
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
    )
    model = build(transformers.Gemma3ForConditionalGeneration, config, attn, dtype)
    return Recipe(model, fixed(16), types="token_type_ids")


def paligemma(attn: str, dtype: torch.dtype) -> Recipe:
    """The whole prompt is a bidirectional prefix; positions start at 1."""
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, head_dim=16),
        vision_config=siglip(projection_dim=HIDDEN),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )
    model = build(transformers.PaliGemmaForConditionalGeneration, config, attn, dtype)
    return Recipe(model, fixed(64), types="token_type_ids", typed=False)


def vipllava(attn: str, dtype: torch.dtype) -> Recipe:
    """Features of several tower layers concatenated."""
    config = transformers.VipLlavaConfig(
        vision_config=clip(),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=[-2, -3, 1],
    )
    model = build(transformers.VipLlavaForConditionalGeneration, config, attn, dtype)
    return Recipe(model, fixed(64))


def glm4v(attn: str, dtype: torch.dtype) -> Recipe:
    """Packed tower, multimodal RoPE on half of each head, extra norms around each block."""
    config = transformers.Glm4vConfig(
        text_config={
            **{k: v for k, v in TEXT.items() if k not in ("bos_token_id", "eos_token_id")},
            "rope_parameters": _mrope([2, 1, 1], partial_rotary_factor=0.5),
        },
        vision_config={**PACKED_TOWER, "image_size": 112},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=502,
        image_end_token_id=503,
        video_start_token_id=504,
        video_end_token_id=505,
    )
    model = build(transformers.Glm4vForConditionalGeneration, config, attn, dtype)
    return Recipe(model, _packed_image, types="mm_token_type_ids")


def mistral3(attn: str, dtype: torch.dtype) -> Recipe:
    """Pixtral tower with images of several sizes, patches merged 2 x 2."""
    vision = transformers.PixtralVisionConfig(
        **{**GRID_TOWER, "image_size": 112},
        rope_parameters={"rope_type": "axial", "rope_theta": 1e4},
    )
    config = transformers.Mistral3Config(
        vision_config=vision,
        text_config=transformers.MistralConfig(**TEXT, head_dim=16, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    model = build(transformers.Mistral3ForConditionalGeneration, config, attn, dtype)
    sizes = [(56, 84), (84, 56), (56, 56), (28, 56)]

    def image(which: int, gen: torch.Generator) -> Segment:
        h, w = sizes[which % len(sizes)]
        pixels = torch.zeros(1, 3, 84, 84)
        pixels[..., :h, :w] = torch.randn(1, 3, h, w, generator=gen)
        payload = {"pixel_values": pixels, "image_sizes": torch.tensor([[h, w]])}
        return Segment(_placeholders((h // 14) * (w // 14)), payload)

    return Recipe(model, image)


def qwen3_vl_moe(attn: str, dtype: torch.dtype) -> Recipe:
    """As qwen3_vl with 4 experts, 2 active; images only."""
    text = {
        **TEXT,
        "head_dim": 16,
        "rope_parameters": _mrope([4, 2, 2], mrope_interleaved=True),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    config = transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config={
            **PACKED_TOWER,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = build(transformers.Qwen3VLMoeForConditionalGeneration, config, attn, dtype)
    return Recipe(model, _packed_image, types="mm_token_type_ids")


def llava_siglip_qwen3(attn: str, dtype: torch.dtype) -> Recipe:
    """LLaVA with another tower (no class token) and another text model (query/key norms)."""
    config = transformers.LlavaConfig(
        vision_config=siglip(),
        text_config=transformers.Qwen3Config(**TEXT, head_dim=16),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )
    model = build(transformers.LlavaForConditionalGeneration, config, attn, dtype)
    return Recipe(model, fixed(64))


def molmo2(attn: str, dtype: torch.dtype) -> Recipe:
    """Videos: 2 x 2 patches of a frame pooled by attention, added to the placeholder's embedding;
    frames are runs of their own, all of them one bidirectional block."""
    vision = {**GRID_TOWER, "image_size": [42, 42], "num_key_value_heads": 2, "head_dim": 16}
    adapter = {
        "vision_feature_layer": [-1, 1],
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "text_hidden_size": HIDDEN,
    }
    config = transformers.Molmo2Config(
        vision_config=vision,
        adapter_config=adapter,
        text_config={**TEXT, "head_dim": 16, "additional_vocab_size": 8},
        image_patch_id=IMAGE,
    )
    model = build(transformers.Molmo2ForConditionalGeneration, config, attn, dtype)
    patches = torch.arange(36).view(3, 2, 3, 2).transpose(1, 2).reshape(9, 4)

    def video(which: int, gen: torch.Generator) -> Segment:
        frames = 3 + which
        payload = {
            "pixel_values_videos": torch.randn(frames, 36, 3 * 7 * 7, generator=gen),
            "video_token_pooling": patches.repeat(frames, 1),  # `collate` moves them along
            "video_grids": torch.tensor([(frames, 3, 3)]),
        }
        parts = [_placeholders(9)]
        for _ in range(frames - 1):
            parts += [words(2, gen).ids, _placeholders(9)]
        return Segment(torch.cat(parts), payload)

    return Recipe(model, video, types="mm_token_type_ids", typed=False)


_NAMED = (
    llava,
    llava_next,
    llava_onevision,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    internvl,
    smolvlm,
    idefics3,
    gemma3,
    paligemma,
)
_UNSEEN = (vipllava, glm4v, mistral3, qwen3_vl_moe, llava_siglip_qwen3, molmo2)

NAMED: tuple[str, ...] = tuple(f.__name__ for f in _NAMED)
UNSEEN: tuple[str, ...] = tuple(f.__name__ for f in _UNSEEN)
FAMILIES: dict[str, Callable[[str, torch.dtype], Recipe]] = {
    f.__name__: f for f in _NAMED + _UNSEEN
}
