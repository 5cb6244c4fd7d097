"""LLaVA on text models whose layers look in different ways: everything, windows, chunks."""

from __future__ import annotations

import functools

import torch
import transformers

from vtc.testing import configs, families
from vtc.testing.batches import IMAGE, Recipe
from vtc.testing.configs import TEXT

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
KINDS: dict[str, list[str]] = {
    "full": [FULL] * 4,
    "sliding": [SLIDING] * 4,
    "sliding-last-full": [SLIDING, SLIDING, SLIDING, FULL],
    "full-first": [FULL, SLIDING, FULL, SLIDING],
    "chunked": [CHUNKED] * 4,
    "chunked-last-full": [CHUNKED, CHUNKED, CHUNKED, FULL],
}
#: columns of a window and of a chunk; an image has 16
WINDOW, CHUNK = 20, 18


def text_config(kinds: list[str]) -> transformers.PreTrainedConfig:
    if CHUNKED in kinds:
        return transformers.Llama4TextConfig(
            **TEXT,
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=2,
            moe_layers=[1],
            layer_types=kinds,
            no_rope_layers=[int(kind == CHUNKED) for kind in kinds],
            attention_chunk_size=CHUNK,
        )
    return transformers.Qwen2Config(
        **TEXT, layer_types=kinds, use_sliding_window=True, sliding_window=WINDOW
    )


def llava_on(kinds: str, attn: str, dtype: torch.dtype) -> Recipe:
    config = transformers.LlavaConfig(
        vision_config=configs.clip(patch_size=14),
        text_config=text_config(KINDS[kinds]),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    model = configs.build(transformers.LlavaForConditionalGeneration, config, attn, dtype)
    return Recipe(model, configs.fixed(16))


def make(kinds: str, attn: str = "sdpa", **options: object) -> families.Family:
    def build(attn: str, dtype: torch.dtype) -> Recipe:
        return llava_on(kinds, attn, dtype)

    return families.make(build, attn, **options)  # type: ignore[arg-type]


@functools.cache
def family(kinds: str, attn: str = "sdpa") -> families.Family:
    """Row 0 has one image, row 1 two."""
    return make(kinds, attn)


@functools.cache
def reference(kinds: str) -> families.Family:
    """The same weights in a model that no session ever touches."""
    return make(kinds)
