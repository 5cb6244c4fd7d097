"""Small random models of every kind, to ask what `vtc.describe` says of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import vtc
from vtc.testing import dits, families

ENCODERS = ("vit_base_patch16_224", "vit_base_patch14_reg4_dinov2", "eva02_base_patch14_224")
#: of transformers: configuration, model
HUGGING_FACE = (("CLIPVisionConfig", "CLIPVisionModel"), ("Dinov2Config", "Dinov2Model"))


def support() -> dict[str, dict[str, str]]:
    """Kind of models -> model -> method -> where it acts, or "no: ..." with the reason."""
    return {kind: _asked(make()) for kind, make in KINDS.items()}


def _asked(found: dict[str, Any]) -> dict[str, Any]:
    return {name: vtc.describe(model).methods for name, model in found.items()}


def language() -> dict[str, Any]:
    """Vision-language models."""
    return {name: families.make(name).model for name in families.FAMILIES}


def denoisers() -> dict[str, Any]:
    """Diffusion transformers."""
    return {name: dits.make(name, depth=8) for name in dits.FAMILIES}


def encoders() -> dict[str, Any]:
    """Image encoders of three libraries, without weights."""
    import open_clip
    import timm
    import transformers

    with torch.device("meta"):
        out = {f"timm {n}": timm.create_model(n, pretrained=False) for n in ENCODERS}
        out["open_clip ViT-B-32"] = open_clip.create_model("ViT-B-32", device="meta")
        for config, model in HUGGING_FACE:
            built = getattr(transformers, model)(getattr(transformers, config)())
            out[f"transformers {model}"] = built
    return out


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "Vision-language models": language,
    "Image encoders": encoders,
    "Diffusion transformers": denoisers,
}
