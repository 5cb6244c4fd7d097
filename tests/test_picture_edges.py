"""Tokens that are merged across the edge of a picture, in tiles that a model pads: none is lost."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vtc
from vtc.testing import configs, families

#: the picture as it fills the canvas of 168 x 168, and one that leaves rows of patches above and
#: below it: 8 of 12 stay, from the third on
WHOLE, FLAT = (168, 168), (100, 168)
WINDOWS = vtc.Step("mustdrop_merge", "vision.1", "auto", params={"threshold": -1.0})


@functools.cache
def model(name: str) -> Any:
    """Tiles of 6 x 6 patches, two by two."""
    names = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
    config, cls = (
        getattr(transformers, names[name] + end) for end in ("Config", "ForConditionalGeneration")
    )
    tower = configs.clip if name == "llava_next" else configs.siglip
    own = config(
        vision_config=tower(patch_size=14, image_size=84),
        text_config=transformers.LlamaConfig(**configs.TEXT),
        image_token_index=families.IMAGE,
        image_grid_pinpoints=[WHOLE],
        vision_feature_select_strategy="default" if name == "llava_next" else "full",
    )
    torch.manual_seed(0)
    return configs.build(cls, own, "sdpa", torch.float32).eval()


def picture(seed: int = 0) -> Tensor:
    return torch.randn(1, 5, 3, 84, 84, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def lines(own: Any, size: tuple[int, int], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the view of the whole picture [36, D], and of the tiles [lines, 12, D]."""
    out = own.model.get_image_features(pixels, torch.tensor([size]), return_dict=True)
    (tokens,) = out.pooler_output
    width = 13 if own.model.image_newline is not None else 12
    return tokens[:36], tokens[36:].reshape(-1, width, tokens.shape[-1])[:, :12]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_window_over_the_edge_stands_in_the_last_line_of_the_picture(name: str) -> None:
    own = model(name)
    with vtc.attach(own, vtc.Recipe((WINDOWS,))):
        base, whole = lines(own, WHOLE, picture())
        same, flat = lines(own, FLAT, picture())
    assert torch.equal(base, same) and len(whole) == 12 and len(flat) == 8
    ours, theirs = flat.any(-1), whole.any(-1)
    # windows are three patches high; of the last ones the picture has a line, its eighth
    assert theirs.nonzero().tolist() == [[y, x] for y in (2, 5, 8, 11) for x in (2, 5, 8, 11)]
    assert ours.nonzero().tolist() == [[y, x] for y in (0, 3, 6, 7) for x in (2, 5, 8, 11)]
    assert torch.equal(flat[ours], whole[theirs])


def test_the_language_model_reads_them() -> None:
    own = model("llava_next")
    ids = torch.tensor([[5] + [families.IMAGE] * (36 + 8 * 13) + [7, 8]])
    inputs = {"input_ids": ids, "pixel_values": picture(), "image_sizes": torch.tensor([FLAT])}
    with torch.no_grad(), vtc.attach(own, vtc.Recipe((WINDOWS,))) as session:
        cache = own(**inputs, use_cache=True).past_key_values
        stage = cache._vtc_state.stage(configs.TEXT["num_hidden_layers"] - 1)
    left = stage.origin[0][stage.valid[0]].tolist()
    tokens = [column - 37 for column in left if 37 <= column < 37 + 8 * 13]
    kept = {(at // 13, at % 13) for at in tokens if at % 13 < 12}
    assert kept == {(y, x) for y in (0, 3, 6, 7) for x in (2, 5, 8, 11)}
    assert {at // 13 for at in tokens if at % 13 == 12} == {0, 3, 6, 7}  # newlines of their lines
    assert len(session.trace)


def test_merges_one_after_another_remember_all_they_hold() -> None:
    """All of a tile goes into few tokens, in two steps: each is where the picture has one of the
    places it was made of, the last in reading order, unless its own place stays."""
    own = model("llava_next")
    steps = (WINDOWS, vtc.Step("divprune", "vision.2", 2, merge="nearest"))
    with vtc.attach(own, vtc.Recipe(steps)) as session:
        _, whole = lines(own, WHOLE, picture(1))
        plans: Any = [entry.plan for entry in session.trace]
        _, flat = lines(own, FLAT, picture(1))
    both = plans[0].then(plans[1])
    wanted = torch.zeros(12, 12, dtype=torch.bool)
    for tile in range(4):
        for slot in range(2):
            cells = (both.assign[tile + 1] == slot).nonzero().flatten().tolist()
            at = int(both.index[tile + 1, slot])
            inside = [c for c in cells if 2 <= c // 6 + 6 * (tile // 2) < 10]
            place = at if at in inside or not inside else inside[-1]
            wanted[place // 6 + 6 * (tile // 2), place % 6 + 6 * (tile % 2)] = True
    assert torch.equal(flat.any(-1), wanted[2:10]) and int(wanted.sum()) == int(whole.any(-1).sum())


@pytest.mark.parametrize("merge", ["none", "nearest"])
def test_pictures_that_fill_the_canvas_do_not_change(
    merge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = model("llava_next")
    recipe = vtc.Recipe((vtc.Step("divprune", "vision.1", 9, merge=merge),))
    with vtc.attach(own, recipe):
        with_edges = lines(own, WHOLE, picture())
    monkeypatch.setattr("vtc.adapters.vlm.vision.packs_tiles", lambda base: False)
    with vtc.attach(own, recipe):
        without = lines(own, WHOLE, picture())
    assert all(torch.equal(a, b) for a, b in zip(with_edges, without, strict=True))


def test_features_that_a_model_resizes_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA-OneVision makes large pictures smaller behind its projector."""
    own = model("llava_onevision")

    @torch.no_grad()
    def packed() -> Tensor:
        out = own.model.get_image_features(
            picture(), torch.tensor([FLAT]), vision_aspect_ratio="anyres_max_1", return_dict=True
        )
        return out.pooler_output[0]

    with vtc.attach(own, vtc.Recipe((WINDOWS,))):
        with_edges = packed()
    monkeypatch.setattr("vtc.adapters.vlm.vision.packs_tiles", lambda base: False)
    with vtc.attach(own, vtc.Recipe((WINDOWS,))):
        assert torch.equal(with_edges, packed())
