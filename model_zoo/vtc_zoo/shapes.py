# SPDX-License-Identifier: Apache-2.0
"""Scenes of coloured shapes and questions about them: the data tiny-llava-shapes is trained on.

Drawing the data ourselves means that nothing has to be downloaded, that every answer is known
exactly, and that training and test scenes are kept apart by construction. All randomness comes
from the `random.Random` the caller passes in; the global generators are never touched.

Seeds. Training scene i is drawn from `Random(TRAIN_SEED + i)`; every other set is one stream
`Random(seed)` with a small seed, so no seed below `TRAIN_SEED` ever meets a training scene.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

TRAIN_SEED = 1_000_000_000
"""First seed of the training scenes: one seed per scene, counting up."""
TEST_SEED = 7
"""The test set every published number comes from."""
DEMO_SEED = 21
"""Scenes shown in the demos."""

IMAGE_SIZE = 96
PATCH_SIZE = 8
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "diamond", "ring")
WORDS: tuple[str, ...] = (
    *("what", "color", "shape", "is", "the", "object", "how", "many", "objects", "are", "there"),
    *("a", "left", "of", "above", "leftmost", "rightmost", "top", "bottom", "?", "yes", "no"),
    *COLORS,
    *SHAPES,
    *(str(digit) for digit in range(10)),
)
"""Every word a question or an answer can contain."""

_SUPERSAMPLE = 2
_GAP = 3  # pixels of ground between two objects
_MIN_OFFSET = 6  # closer than this along the axis, "left of" and "above" are not asked
_MIN_LEAD = 4  # by how much the leftmost (...) object must lead the next one


@dataclass(frozen=True)
class ShapeObject:
    """One object: what it is, its centre and its radius, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape, as the questions call it."""
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the square around the object."""
        r = self.radius
        return self.x - r, self.y - r, self.x + r, self.y + r


@dataclass(frozen=True)
class Scene:
    """A picture and the objects in it."""

    image: Image.Image
    objects: tuple[ShapeObject, ...]


@dataclass(frozen=True)
class Question:
    """A question of one of `TYPES` with its one-word answer; words are split by spaces."""

    type: str
    text: str
    answer: str


def make_scene(rng: random.Random) -> Scene:
    """Draw 2-6 objects that do not touch, on a noisy ground with faint lines as clutter."""
    ground = tuple(rng.randint(20, 110) for _ in range(3))
    side = IMAGE_SIZE * _SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(2, 8)):
        ends = [rng.randint(0, side) for _ in range(4)]
        draw.line(ends, fill=_jitter(ground, 35, rng), width=rng.randint(1, 5) * _SUPERSAMPLE)
    objects = _place_objects(rng)
    for item in objects:
        _draw_object(draw, item, _jitter(COLORS[item.color], 18, rng))
    small = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    noise = np.random.default_rng(rng.getrandbits(64)).integers(
        -10, 11, (IMAGE_SIZE, IMAGE_SIZE, 3)
    )
    pixels = np.clip(np.asarray(small, dtype=np.int64) + noise, 0, 255).astype(np.uint8)
    return Scene(Image.fromarray(pixels), objects)


def make_questions(
    scene: Scene, rng: random.Random, k: int = 6, types: Sequence[str] | None = None
) -> list[Question]:
    """Ask up to `k` different questions about a scene; see `ask`."""
    return ask(scene.objects, rng, k, types)


def ask(
    objects: Sequence[ShapeObject],
    rng: random.Random,
    k: int = 6,
    types: Sequence[str] | None = None,
) -> list[Question]:
    """Ask up to `k` different questions about these objects.

    `types` is drawn from uniformly, so a type listed twice is asked twice as often. Fewer than
    `k` come back when the objects do not allow more.
    """
    types = tuple(types or TYPES)
    if unknown := sorted(set(types) - set(TYPES)):
        raise ValueError(f"unknown question types {unknown}; the types are {list(TYPES)}")
    questions: dict[str, Question] = {}
    for _ in range(80):
        if len(questions) >= k:
            break
        kind = rng.choice(types)
        asked = _ASKERS[kind](objects, rng)
        if asked is not None and asked[0] not in questions:
            questions[asked[0]] = Question(kind, *asked)
    return list(questions.values())


def test_set(
    n_scenes: int, questions_per_scene: int = 2, seed: int = TEST_SEED
) -> list[tuple[Scene, list[Question]]]:
    """Return `n_scenes` scenes with their questions, always the same ones for a seed."""
    rng = random.Random(seed)
    scenes = (make_scene(rng) for _ in range(n_scenes))
    return [(scene, make_questions(scene, rng, questions_per_scene)) for scene in scenes]


test_set.__test__ = False  # type: ignore[attr-defined]  # data, not a test for pytest to collect


def write_scenes(
    folder: str | Path, n: int, seed: int = TEST_SEED, questions_per_scene: int = 2
) -> Path:
    """Write `scene_1.png` ... and `questions.jsonl` (image, type, question, answer).

    Returns the path of `questions.jsonl`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "questions.jsonl"
    with listing.open("w", encoding="utf-8") as lines:
        for number, (scene, questions) in enumerate(test_set(n, questions_per_scene, seed), 1):
            name = f"scene_{number}.png"
            scene.image.save(folder / name)
            for q in questions:
                row = {"image": name, "type": q.type, "question": q.text, "answer": q.answer}
                lines.write(json.dumps(row) + "\n")
    return listing


def patch_targets(objects: Sequence[ShapeObject]) -> tuple[np.ndarray, np.ndarray]:
    """What each of the 144 patches shows, to train a vision tower on.

    Returns the class of each patch [144] (0 is ground, else one class per shape and colour) and
    the centre of the object it shows [144, 2] as x, y in -1..1 (its own centre on the ground).
    """
    steps = (np.arange(IMAGE_SIZE // PATCH_SIZE) + 0.5) * PATCH_SIZE
    middles = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    labels = np.zeros(len(middles), np.int64)
    centres = middles.copy()
    for item in objects:
        inside = (np.abs(middles - (item.x, item.y)) < item.radius + 1).all(1)
        labels[inside] = object_class(item)
        centres[inside] = item.x, item.y
    return labels, (centres / (IMAGE_SIZE / 2) - 1).astype(np.float32)


def object_class(item: ShapeObject) -> int:
    """Number of an object's shape and colour, from 1: 0 is the ground."""
    return 1 + SHAPES.index(item.shape) * len(COLORS) + list(COLORS).index(item.color)


def _jitter(color: Sequence[int], amount: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, v + rng.randint(-amount, amount))) for v in color)


def _place_objects(rng: random.Random) -> tuple[ShapeObject, ...]:
    wanted = rng.randint(2, 6)
    placed: list[ShapeObject] = []
    for _ in range(200):
        if len(placed) == wanted:
            break
        radius = rng.uniform(6.5, 10.0)
        x, y = (rng.uniform(radius + 1, IMAGE_SIZE - radius - 1) for _ in range(2))
        if any((x - o.x) ** 2 + (y - o.y) ** 2 < (radius + o.radius + _GAP) ** 2 for o in placed):
            continue
        item = ShapeObject(rng.choice(SHAPES), rng.choice(tuple(COLORS)), x, y, radius)
        twin = any(item.name == o.name for o in placed)
        if not twin or rng.random() < 0.3:  # twins make counting harder, but should stay rare
            placed.append(item)
    return tuple(placed)


def _draw_object(draw: ImageDraw.ImageDraw, item: ShapeObject, fill: tuple[int, ...]) -> None:
    x, y, r = (v * _SUPERSAMPLE for v in (item.x, item.y, item.radius))
    match item.shape:
        case "circle":
            draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        case "square":
            half = 0.88 * r
            draw.rectangle([x - half, y - half, x + half, y + half], fill=fill)
        case "triangle":
            draw.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=fill)
        case "cross":
            bar = 0.38 * r
            draw.rectangle([x - bar, y - r, x + bar, y + r], fill=fill)
            draw.rectangle([x - r, y - bar, x + r, y + bar], fill=fill)
        case "diamond":
            wide, high = 0.8 * r, 1.1 * r
            draw.polygon([(x, y - high), (x + wide, y), (x, y + high), (x - wide, y)], fill=fill)
        case "ring":
            draw.ellipse([x - r, y - r, x + r, y + r], outline=fill, width=max(2, int(r / 2)))


_Asked = tuple[str, str] | None
"""Question and answer, or None when the objects (or the dice) do not allow this question."""


def _single(values: Sequence[str], rng: random.Random) -> int | None:
    """Index of an object whose value no other object shares."""
    counts = Counter(values)
    singles = [i for i, value in enumerate(values) if counts[value] == 1]
    return rng.choice(singles) if singles else None


def _ask_color_of(objects: Sequence[ShapeObject], rng: random.Random) -> _Asked:
    i = _single([o.shape for o in objects], rng)
    return None if i is None else (f"what color is the {objects[i].shape} ?", objects[i].color)


def _ask_shape_of(objects: Sequence[ShapeObject], rng: random.Random) -> _Asked:
    i = _single([o.color for o in objects], rng)
    if i is None:
        return None
    return f"what shape is the {objects[i].color} object ?", objects[i].shape


def _ask_count_all(objects: Sequence[ShapeObject], rng: random.Random) -> _Asked:
    return "how many objects are there ?", str(len(objects))


def _ask_count_color(objects: Sequence[ShapeObject], rng: random.Random) -> _Asked:
    present = [o.color for o in objects]
    return _count(present, rng.choice(present if rng.random() < 0.7 else tuple(COLORS)))


def _ask_count_shape(objects: Sequence[ShapeObject], rng: random.Random) -> _Asked:
    present = [o.shape for o in objects]
    return _count(present, rng.choice(present if rng.random() < 0.7 else SHAPES))


def _count(present: Sequence[str], word: str) -> _Asked:
    return f"how many {word} objects are there ?", str(present.count(word))


def _ask_exist(objects: Sequence[ShapeObject], rng: random.Random) -> _Asked:
    """Half the time an object that is there, else a colour and a shape not found together."""
    names = {o.name for o in objects}
    if rng.random() < 0.5:
        return f"is there a {rng.choice(objects).name} ?", "yes"
    shape = rng.choice(objects).shape
    color = rng.choice(objects).color if rng.random() < 0.6 else rng.choice(tuple(COLORS))
    name = f"{color} {shape}"
    return None if name in names else (f"is there a {name} ?", "no")


def _ask_left(objects: Sequence[ShapeObject], rng: random.Random) -> _Asked:
    return _relation(objects, rng, "x", "left of")


def _ask_above(objects: Sequence[ShapeObject], rng: random.Random) -> _Asked:
    return _relation(objects, rng, "y", "above")


def _relation(objects: Sequence[ShapeObject], rng: random.Random, axis: str, words: str) -> _Asked:
    counts = Counter(o.name for o in objects)
    nameable = [o for o in objects if counts[o.name] == 1]
    if len(nameable) < 2:
        return None
    first, second = rng.sample(nameable, 2)
    offset = getattr(first, axis) - getattr(second, axis)
    if abs(offset) < _MIN_OFFSET:
        return None
    return f"is the {first.name} {words} the {second.name} ?", "yes" if offset < 0 else "no"


def _ask_extreme(objects: Sequence[ShapeObject], rng: random.Random) -> _Asked:
    words = {"leftmost": ("x", 1), "rightmost": ("x", -1), "top": ("y", 1), "bottom": ("y", -1)}
    word = rng.choice(tuple(words))
    axis, sign = words[word]
    first, second = sorted(objects, key=lambda o: sign * getattr(o, axis))[:2]
    if abs(getattr(first, axis) - getattr(second, axis)) < _MIN_LEAD:
        return None
    asked = rng.choice(("color", "shape"))
    return f"what {asked} is the {word} object ?", getattr(first, asked)


_ASKERS: dict[str, Callable[[Sequence[ShapeObject], random.Random], _Asked]] = {
    "color_of": _ask_color_of,
    "shape_of": _ask_shape_of,
    "count_all": _ask_count_all,
    "count_color": _ask_count_color,
    "count_shape": _ask_count_shape,
    "exist": _ask_exist,
    "left": _ask_left,
    "above": _ask_above,
    "extreme": _ask_extreme,
}
TYPES: tuple[str, ...] = tuple(_ASKERS)
"""The question types."""
