"""Projectors that merge patches themselves and hand on a grid (pixel shuffle)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import vtc
from vtc.testing.batches import IMAGE
from vtc.testing.configs import TEXT, siglip

SIDE = 4  # tokens of one side of an image, each of 2 x 2 patches


def made(name: str) -> Any:
    size = {"image_size": 56, "patch_size": 7}
    text = {k: v for k, v in TEXT.items() if k != "head_dim"} | {"vocab_size": 512}
    vision = siglip(**size)
    if name == "aya_vision":
        config: Any = transformers.AyaVisionConfig(
            vision_config=vision,
            text_config=transformers.CohereConfig(**text),
            image_token_index=IMAGE,
            downsample_factor=2,
            vision_feature_layer=-1,
        )
        cls: Any = transformers.AyaVisionForConditionalGeneration
    else:
        config = transformers.Cohere2VisionConfig(
            vision_config=vision,
            text_config=transformers.Cohere2Config(**text),
            image_token_id=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=64,
        )
        cls = transformers.Cohere2VisionForConditionalGeneration
    torch.manual_seed(0)
    return cls(config).eval()


def prompt(images: int = 2) -> dict[str, torch.Tensor]:
    ids = [5, 6]
    for _ in range(images):
        ids += [IMAGE] * SIDE**2 + [7]
    gen = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, 56, 56, generator=gen)
    return {"input_ids": torch.tensor([[*ids, 8, 9]]), "pixel_values": pixels}


@pytest.mark.parametrize("name", ["aya_vision", "cohere2_vision"])
def test_methods_of_the_tower_work_where_the_projector_shuffles(name: str) -> None:
    model = made(name)
    for method in ("zoo_prune", "visionzip", "fastervlm", "mustdrop_merge"):
        keep = "auto" if method == "mustdrop_merge" else 6
        params: Any = {"threshold": -1.0} if method == "mustdrop_merge" else {}
        at = "vision.1" if method == "mustdrop_merge" else "projector"
        with torch.no_grad(), vtc.attach(model, method, keep=keep, at=at, **params) as session:
            model(**prompt())
        assert session.trace[-1].n_out == ((8, 8) if method == "mustdrop_merge" else (6, 6))


@pytest.mark.parametrize("name", ["aya_vision", "cohere2_vision"])
def test_features_are_what_each_token_is_made_of(name: str) -> None:
    """The projector on single units gives the tokens; a changed patch changes its own token."""
    model, seen = made(name), {}
    own: Any = vtc.registry.REDUCERS["zoo_prune"]

    def look(self: Any, ctx: Any, k: Any) -> Any:
        seen["made"] = ctx.signals["projector"](ctx.signals["features"].flatten(0, 1))
        seen["x"] = ctx.x.flatten(0, 1)
        return own.plan_untouched(self, ctx, k)

    own.plan_untouched = own.plan
    try:
        own.plan = look
        with torch.no_grad(), vtc.attach(model, "zoo_prune", keep=4):
            model(**prompt())
    finally:
        own.plan = own.plan_untouched
        del own.plan_untouched
    assert (seen["made"] - seen["x"]).abs().max() < 1e-5
    assert seen["x"].std(0).max() > 1e-3


@pytest.mark.parametrize("name", ["aya_vision", "cohere2_vision"])
def test_dropping_in_the_tower_takes_whole_groups_of_patches(name: str) -> None:
    """Each dropped unit is one placeholder fewer, at the place of its patches."""
    model, given = made(name), []
    with torch.no_grad(), vtc.attach(model, "random", keep=5, at="vision.1") as session:
        hook = model.model.multi_modal_projector.register_forward_pre_hook(
            lambda module, args: given.append(args[0])
        )
        model(**prompt())
        hook.remove()
    entry = session.trace[-1]
    for image, features in enumerate(given[0]):
        grid = features.abs().sum(-1).reshape(2 * SIDE, 2 * SIDE) > 0
        whole = grid.reshape(SIDE, 2, SIDE, 2).transpose(1, 2).flatten(2).all(-1)
        kept = entry.source[image, : entry.n_out[image]].tolist()
        assert whole.flatten().nonzero()[:, 0].tolist() == kept
        assert int(grid.sum()) == 4 * len(kept)
