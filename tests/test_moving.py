"""Moving shapes: the answers follow from the pictures, captions grow with what happens, and packed
training is the same as one question at a time, also with a method attached."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from vtc_zoo import moving, train_llava_video
from vtc_zoo.train_stts_video import inputs_of
from vtc_zoo.training import ATTENTION, pack, set_up

import vtc

ONE = moving.MovingObject("circle", "red", "right", 2, 5.0, 20.0, 40.0, 10.0)
TWO = moving.MovingObject("square", "blue", "nowhere", 0, 4.0, 70.0, 70.0, 10.0)
SCENE = moving.MovingScene((TWO, ONE), (moving.Flash(1, 0, 0), moving.Flash(6, 3, 11)))


def test_scenes_keep_their_promises() -> None:
    rng = random.Random(3)
    for _ in range(40):
        scene = moving.make_scene(rng)
        starts = [item.start for item in scene.objects]
        assert 1 <= len(starts) <= 3 and starts == sorted(set(starts)) and max(starts) < 4
        assert len({item.color for item in scene.objects}) == len(starts)
        assert len({flash.frame for flash in scene.flashes}) == len(scene.flashes) <= 3
        for frame in range(moving.FRAMES):
            for item in scene.objects:
                x, y = item.centre(frame)
                assert item.radius < x < 96 - item.radius and item.radius < y < 96 - item.radius


def test_what_is_drawn_is_what_is_told() -> None:
    frames = moving.draw(SCENE, random.Random(0)).astype(int)
    red = np.abs(frames - moving.COLORS["red"]).sum(-1) < 60
    assert not red[:2].any()  # not there yet
    middles = [np.argwhere(red[t])[:, 1].mean() for t in range(2, 8)]
    assert np.allclose(np.diff(middles), 5.0, atol=0.3)
    white = (frames > 240).all(-1)
    assert [bool(white[t].any()) for t in range(8)] == [t in (1, 6) for t in range(8)]


def test_questions_and_captions_by_hand() -> None:
    asked = {q.text: q.answer for q in moving.ask(SCENE, random.Random(1), 10)}
    assert asked == {
        "which way does the red object move ?": "right",
        "which way does the blue object move ?": "nowhere",
        "what shape is the red object ?": "circle",
        "what shape is the blue object ?": "square",
        "how many flashes are there ?": "2",
        "which color appears first ?": "blue",
        "which color appears last ?": "red",
        "how many objects are there ?": "2",
    }
    whole = ["blue", "square", "red", "circle", "appears", "right", "flash", "flash"]
    assert moving.caption(SCENE) == whole
    assert moving.caption(SCENE, 0, 2) == ["blue", "square", "flash"]
    assert moving.caption(SCENE, 4, 8) == ["blue", "square", "red", "circle", "right", "flash"]
    with pytest.raises(ValueError, match="unknown question types"):
        moving.ask(SCENE, random.Random(1), types=["colour"])


def test_targets_of_patches_and_cells() -> None:
    labels, centres = moving.patch_targets(SCENE)
    assert labels[1, 0] == moving.CLASSES - 1 and labels[6, 3 * 12 + 11] == moving.CLASSES - 1
    place = 5 * 12 + 3  # pixels 24..32 x 40..48, on the circle in frame 3
    assert labels[3, place] == ONE.kind and np.allclose(
        centres[3, place], [25 / 48 - 1, 40 / 48 - 1]
    )
    cells, directions, flashes = moving.cell_targets(SCENE)
    assert cells[1, 0] == moving.CLASSES - 1
    assert directions[2].max() == list(moving.DIRECTIONS).index("nowhere")  # red has just come
    assert list(moving.DIRECTIONS).index("right") in directions[3]
    assert flashes.tolist() == [0, 1, 1, 1, 1, 1, 2, 2]


def test_clips_are_drawn_again_the_same_and_training_is_apart() -> None:
    first, again = (moving.test_set(2, 3, seed=11) for _ in range(2))
    for (a, x, p), (b, y, q) in zip(first, again, strict=True):
        assert a == b and np.array_equal(x, y) and p == q
    scene, frames = moving.training_scene(5)
    assert moving.make_scene(random.Random(moving.TRAIN_SEED + 5)) == scene
    assert frames.shape == (8, 96, 96, 3) and frames.dtype == np.uint8


@cache
def untrained() -> Any:
    set_up()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = train_llava_video.tower_config()
        config._attn_implementation = ATTENTION
        tower = train_llava_video.SiglipVisionModel(config)
        return train_llava_video.build_llava(tower).eval()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (None, {}),
        ("stts", {"keep": 0.5, "at": "vision.2"}),
        ("evs", {"keep": 0.25}),
        ("random", {"keep": 0.5, "at": "decoder.2"}),
    ],
)
def test_packed_questions_equal_single_ones(method: str | None, options: dict[str, Any]) -> None:
    """Eight questions behind one clip under a 4-D mask give what each gives alone."""
    if method is not None and method not in vtc.REDUCERS:
        pytest.skip(f"{method} is not registered")
    model, prefix = untrained(), train_llava_video.PREFIX
    scenes, clips = zip(*map(moving.training_scene, range(2)), strict=True)
    asked = [moving.ask(scene, random.Random(0), 4) for scene in scenes]
    packed = pack(asked, prefix, train_llava_video.VOCABULARY)
    given = inputs_of(np.stack(clips), packed)
    given["attention_mask"] = given["attention_mask"].float()

    def compare() -> None:
        together = model(**given).logits
        for row, questions in enumerate(asked):
            start = 0
            for q in questions:
                end = start + len(q.text.split()) + 4
                ids = torch.cat([given["input_ids"][row, :prefix], packed.ids[row, start:end]])
                pixels = given["pixel_values_videos"][row : row + 1]
                alone = model(input_ids=ids[None], pixel_values_videos=pixels).logits
                found = together[row, prefix + start : prefix + end]
                assert (alone[0, prefix:] - found).abs().max() < 1e-4
                start = end

    with torch.no_grad():
        if method is None:
            compare()
            return
        with vtc.attach(model, method, **options):
            compare()
