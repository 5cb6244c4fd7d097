# SPDX-License-Identifier: Apache-2.0
"""Clips of moving shapes, questions about them, and captions: the data of tiny-llava-video.

As in `shapes`, every answer is known exactly, all randomness comes from the `random.Random` the
caller passes in, and training clips (one seed each, from `TRAIN_SEED` on) never meet test clips
(one stream from a small seed)."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vtc_zoo.shapes import COLORS as ALL_COLORS
from vtc_zoo.shapes import TEST_SEED, TRAIN_SEED, Question

FRAMES = 8
FPS = 4.0
"""Frames per second of the files that `write_clips` writes."""
FRAME_SIZE = 96
PATCH_SIZE = 8
GRID = FRAME_SIZE // PATCH_SIZE
COLORS = {name: ALL_COLORS[name] for name in ("red", "green", "blue", "yellow", "purple", "cyan")}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}
MOST_OBJECTS = MOST_FLASHES = 3
QUESTION_WORDS = (
    "which way does the object move ? what shape is how many flashes are there color appears "
    "first last objects"
)
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [*QUESTION_WORDS.split(), *DIRECTIONS, *COLORS, *SHAPES, *map(str, range(6)), "flash"]
    )
)
"""Every word a question, an answer or a caption can contain."""

CLASSES = 2 + len(SHAPES) * len(COLORS)
"""What a patch can show: ground, a shape in a colour, a flash."""
_LATEST = 4  # objects appear before this frame, so that each moves for half of the clip
_GAP = 2  # pixels of ground between two objects, in every frame


@dataclass(frozen=True)
class MovingObject:
    """An object that appears in frame `start` at (x, y) and moves `speed` pixels per frame."""

    shape: str
    color: str
    direction: str
    start: int
    speed: float
    x: float
    y: float
    radius: float

    def centre(self, frame: int) -> tuple[float, float]:
        """Where it is, in pixels; it stands still before it appears."""
        dx, dy = DIRECTIONS[self.direction]
        way = self.speed * max(0, frame - self.start)
        return self.x + dx * way, self.y + dy * way

    @property
    def kind(self) -> int:
        """Number of its shape and colour, from 1: 0 is the ground."""
        return 1 + SHAPES.index(self.shape) * len(COLORS) + list(COLORS).index(self.color)


@dataclass(frozen=True)
class Flash:
    """A white cross that fills one patch of one frame."""

    frame: int
    row: int
    column: int


@dataclass(frozen=True)
class MovingScene:
    """Objects in the order they appear, at most one in a frame, and flashes."""

    objects: tuple[MovingObject, ...]
    flashes: tuple[Flash, ...]


def make_scene(rng: random.Random) -> MovingScene:
    """1 to 3 objects of different colours that never touch, and 0 to 3 flashes."""
    n = rng.randint(1, MOST_OBJECTS)
    starts = sorted(rng.sample(range(_LATEST), n))
    placed: list[MovingObject] = []
    for color, start in zip(rng.sample(list(COLORS), n), starts, strict=True):
        for _ in range(60):
            item = _place(rng, color, start)
            if not any(_touch(item, other) for other in placed):
                placed.append(item)
                break
    flashes = (
        Flash(frame, rng.randrange(GRID), rng.randrange(GRID))
        for frame in rng.sample(range(FRAMES), rng.randint(0, MOST_FLASHES))
    )
    return MovingScene(tuple(placed), tuple(sorted(flashes, key=lambda flash: flash.frame)))


def draw(scene: MovingScene, rng: random.Random) -> np.ndarray:
    """Frames [8, 96, 96, 3] uint8: objects and flashes on a still ground, with fresh noise."""
    noise = np.random.default_rng(rng.getrandbits(64))
    amount = rng.randint(0, 8)
    ground = np.array([rng.randint(20, 100) for _ in range(3)])
    texture = noise.integers(-18, 19, (GRID * 2, GRID * 2, 3))
    texture = texture.repeat(PATCH_SIZE // 2, 0).repeat(PATCH_SIZE // 2, 1)
    frames = np.empty((FRAMES, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    for number in range(FRAMES):
        frame = (ground + texture).astype(np.float32)
        for item in scene.objects:
            if number >= item.start:
                cover = _cover(item, number)[..., None]
                frame += cover * (np.array(COLORS[item.color]) - frame)
        for flash in scene.flashes:
            if flash.frame == number:
                top, left, arm = flash.row * PATCH_SIZE, flash.column * PATCH_SIZE, PATCH_SIZE // 2
                frame[top + arm - 1 : top + arm + 1, left : left + PATCH_SIZE] = 255
                frame[top : top + PATCH_SIZE, left + arm - 1 : left + arm + 1] = 255
        frame += noise.integers(-amount, amount + 1, frame.shape)
        frames[number] = np.clip(frame, 0, 255)
    return frames


def ask(
    scene: MovingScene, rng: random.Random, k: int = 5, types: Sequence[str] | None = None
) -> list[Question]:
    """Up to `k` different questions; `types` is drawn from uniformly, so a type listed twice is
    asked twice as often. Fewer come back when the scene does not allow more."""
    types = tuple(types or TYPES)
    if unknown := sorted(set(types) - set(TYPES)):
        raise ValueError(f"unknown question types {unknown}; the types are {list(TYPES)}")
    questions: dict[str, Question] = {}
    for _ in range(40):
        if len(questions) >= k:
            break
        kind = rng.choice(types)
        asked = _ASKERS[kind](scene, rng)
        if asked is not None:
            questions.setdefault(asked[0], Question(kind, *asked))
    return list(questions.values())


def caption(scene: MovingScene, first: int = 0, last: int = FRAMES) -> list[str]:
    """What happens in frames `first` to `last` - 1, in words; the more happens, the longer.

    Per visible object colour and shape, where it moves if it does, and "appears" when it was not
    there from the clip's start; then one "flash" for each."""
    words: list[str] = []
    for item in scene.objects:
        if item.start >= last:
            continue
        words += [item.color, item.shape]
        if item.start >= first and item.start > 0:
            words.append("appears")
        seen = last - max(first, item.start)
        if seen > 1 and item.direction != "nowhere":
            words.append(item.direction)
    return words + ["flash"] * sum(first <= flash.frame < last for flash in scene.flashes)


def test_set(
    n: int, questions: int = 5, seed: int = TEST_SEED
) -> list[tuple[MovingScene, np.ndarray, list[Question]]]:
    """`n` scenes with frames and questions, always the same ones for a seed."""
    rng = random.Random(seed)
    clips = []
    for _ in range(n):
        scene = make_scene(rng)
        clips.append((scene, draw(scene, rng), ask(scene, rng, questions)))
    return clips


test_set.__test__ = False  # type: ignore[attr-defined]  # data, not a test for pytest to collect


def training_scene(number: int) -> tuple[MovingScene, np.ndarray]:
    """Training clip `number` with its frames."""
    rng = random.Random(TRAIN_SEED + number)
    scene = make_scene(rng)
    return scene, draw(scene, rng)


def write_clips(
    folder: str | Path, n: int, seed: int = TEST_SEED, questions_per_clip: int = 5
) -> Path:
    """Write `clip_1.mp4` ... and `questions.jsonl` (id, video, type, question, answer).

    Returns the path of `questions.jsonl`."""
    from vtc.video import write

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "questions.jsonl"
    with listing.open("w", encoding="utf-8") as lines:
        for number, (_, frames, questions) in enumerate(test_set(n, questions_per_clip, seed), 1):
            name = f"clip_{number}.mp4"
            write(folder / name, frames, FPS)
            for i, q in enumerate(questions, 1):
                row = {"id": f"{number}.{i}", "video": name, "type": q.type}
                lines.write(json.dumps(row | {"question": q.text, "answer": q.answer}) + "\n")
    return listing


def patch_targets(scene: MovingScene) -> tuple[np.ndarray, np.ndarray]:
    """What each patch of each frame shows, to train a vision tower on: its class [8, 144], and the
    centre of the object it shows [8, 144, 2] as x, y in -1..1 (its own centre elsewhere)."""
    steps = (np.arange(GRID) + 0.5) * PATCH_SIZE
    middles = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    labels = np.zeros((FRAMES, len(middles)), np.int64)
    centres = np.repeat(middles[None], FRAMES, 0)
    for item in scene.objects:
        for frame in range(item.start, FRAMES):
            centre = item.centre(frame)
            inside = (np.abs(middles - centre) < item.radius + 1).all(1)
            labels[frame, inside] = item.kind
            centres[frame, inside] = centre
    for flash in scene.flashes:
        place = flash.row * GRID + flash.column
        labels[flash.frame, place] = CLASSES - 1
        centres[flash.frame, place] = middles[place]
    return labels, (centres / (FRAME_SIZE / 2) - 1).astype(np.float32)


def cell_targets(scene: MovingScene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each 2 x 2 group of patches tells, to train a language model on: its class [8, 36] (a
    flash counts before an object), the direction of the object it shows once that has moved
    [8, 36] (-1 elsewhere), and the flashes so far in each frame [8]."""
    labels = patch_targets(scene)[0].reshape(FRAMES, GRID // 2, 2, GRID // 2, 2)
    cells = labels.max((2, 4)).reshape(FRAMES, -1)
    directions = np.full(cells.shape, -1)
    for item in scene.objects:
        for frame in range(item.start + 1, FRAMES):
            here = (labels[frame] == item.kind).any((1, 3)).reshape(-1)
            directions[frame, here] = list(DIRECTIONS).index(item.direction)
    flashes = np.array([sum(f.frame <= frame for f in scene.flashes) for frame in range(FRAMES)])
    return cells, directions, flashes


def _place(rng: random.Random, color: str, start: int) -> MovingObject:
    """An object whose whole way stays inside the frame."""
    direction = rng.choice(list(DIRECTIONS))
    radius, speed = rng.uniform(9.0, 13.0), rng.uniform(4.0, 7.0)
    way, margin = speed * (FRAMES - 1 - start), radius + 2
    x, y = (
        rng.uniform(margin + way * (step < 0), FRAME_SIZE - margin - way * (step > 0))
        for step in DIRECTIONS[direction]
    )
    return MovingObject(rng.choice(SHAPES), color, direction, start, speed, x, y, radius)


def _touch(a: MovingObject, b: MovingObject) -> bool:
    apart = a.radius + b.radius + _GAP
    return any(
        np.hypot(*np.subtract(a.centre(frame), b.centre(frame))) < apart for frame in range(FRAMES)
    )


_X, _Y = np.meshgrid(np.arange(FRAME_SIZE) + 0.5, np.arange(FRAME_SIZE) + 0.5)


def _cover(item: MovingObject, frame: int) -> np.ndarray:
    """[96, 96] how much of each pixel the object covers; edges are one pixel soft."""
    cx, cy = item.centre(frame)
    x, y, r = _X - cx, _Y - cy, item.radius
    if item.shape == "circle":
        inside = r - np.hypot(x, y)
    elif item.shape == "square":
        inside = 0.88 * r - np.maximum(np.abs(x), np.abs(y))
    else:
        inside = np.minimum(0.85 * r - y, 0.88 * ((y + r) / 1.85 - np.abs(x)))
    return np.clip(inside + 0.5, 0, 1).astype(np.float32)


_Asked = tuple[str, str] | None
"""Question and answer, or None when the scene does not allow this question."""


def _ask_direction(scene: MovingScene, rng: random.Random) -> _Asked:
    item = rng.choice(scene.objects)
    return f"which way does the {item.color} object move ?", item.direction


def _ask_shape(scene: MovingScene, rng: random.Random) -> _Asked:
    item = rng.choice(scene.objects)
    return f"what shape is the {item.color} object ?", item.shape


def _ask_flashes(scene: MovingScene, rng: random.Random) -> _Asked:
    return "how many flashes are there ?", str(len(scene.flashes))


def _ask_first(scene: MovingScene, rng: random.Random) -> _Asked:
    if len(scene.objects) < 2:
        return None
    return "which color appears first ?", scene.objects[0].color


def _ask_last(scene: MovingScene, rng: random.Random) -> _Asked:
    if len(scene.objects) < 2:
        return None
    return "which color appears last ?", scene.objects[-1].color


def _ask_count(scene: MovingScene, rng: random.Random) -> _Asked:
    return "how many objects are there ?", str(len(scene.objects))


_ASKERS: dict[str, Callable[[MovingScene, random.Random], _Asked]] = {
    "direction": _ask_direction,
    "shape": _ask_shape,
    "flashes": _ask_flashes,
    "first": _ask_first,
    "last": _ask_last,
    "count": _ask_count,
}
TYPES: tuple[str, ...] = tuple(_ASKERS)
"""The question types."""
