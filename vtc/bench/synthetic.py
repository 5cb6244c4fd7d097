"""Vision-language models with random weights: for measuring speed and memory, not answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..versions import check_features

IMAGE_TOKEN = 3


@dataclass(frozen=True)
class Shape:
    """Proportions of a language model; the default is Qwen2-0.5B with fewer layers and words."""

    layers: int = 6
    hidden: int = 896
    intermediate: int = 4864
    heads: int = 14
    kv_heads: int = 2
    vocabulary: int = 4096


@dataclass(frozen=True)
class TowerShape:
    """Proportions of a CLIP tower, by default a toy: features are meant to be handed in."""

    layers: int = 1
    hidden: int = 16
    intermediate: int = 16
    heads: int = 1


#: CLIP ViT-L, with fewer layers
CLIP_LARGE = TowerShape(6, 1024, 4096, 16)


def llava(
    shape: Shape,
    visual: int,
    dtype: torch.dtype,
    seed: int,
    attention: str = "sdpa",
    tower: TowerShape = TowerShape(),
) -> Any:
    """A stock LLaVA; `visual` patches of 4 x 4 pixels."""
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
    )

    patch = 4
    vision = CLIPVisionConfig(
        hidden_size=tower.hidden,
        intermediate_size=tower.intermediate,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=patch * (math.isqrt(visual - 1) + 1),
        patch_size=patch,
    )
    text = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )
    options: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "image_seq_length": visual}
    config = LlavaConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=True, **options
    )
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config)
    return model.to(dtype).eval()


@contextmanager
def first_layers(model: Any, layers: int) -> Iterator[None]:
    """Inside, the model ends after its first `layers` decoder layers."""
    config = model.model.language_model.config
    before = config.num_hidden_layers
    config.num_hidden_layers = layers
    try:
        yield
    finally:
        config.num_hidden_layers = before


def prompt(model: Any, visual: int, text: int, seed: int) -> dict[str, Any]:
    """One prompt: four words, an image of `visual` tokens, then the other words of `text`.

    The image comes as ready-made features, in `mm_encoder_outputs`.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    check_features(model, "prompts of this benchmark come without pixels")
    generator = torch.Generator().manual_seed(seed)
    config = model.config.text_config
    words = torch.randint(IMAGE_TOKEN + 1, config.vocab_size, (1, text), generator=generator)
    image = torch.full((1, visual), IMAGE_TOKEN)
    ids = torch.cat([words[:, :4], image, words[:, 4:]], 1)
    features = torch.randn(1, visual, config.hidden_size, generator=generator).to(model.dtype)
    encoded = BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"image": encoded},
    }


def picture(model: Any, visual: int, text: int, seed: int) -> dict[str, Any]:
    """The same prompt with the pixels of a picture: noise on the left, one grey on the right."""
    inputs = prompt(model, visual, text, seed)
    del inputs["mm_encoder_outputs"]
    side = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(1, 3, side, side)
    pixels[..., : side // 2] = torch.randn(1, 3, side, side // 2, generator=generator)
    return {**inputs, "pixel_values": pixels.to(model.dtype)}


def prefill(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits of the next token, computed as the first step of `generate` does."""
    return model(**inputs, logits_to_keep=1, use_cache=True).logits
