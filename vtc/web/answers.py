"""One request about a picture or clip: the answer of the whole model, that of the compressed one,
and what each of them took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .. import attach, draw
from ..commands import loading
from ..errors import InvalidInput, UnsupportedModel, VtcError
from ..session import Reduction
from ..video.answer import wait
from ..video.prompts import check_prompt, processed
from .media import Media
from .models import Loaded
from .offer import Choice

LONGEST_QUESTION, MOST_WORDS = 1000, 256
WARM = 2  # tokens: a prefill and one step behind it
PANEL, FRAME = 420, 168  # pixels of a picture, and of a frame


@dataclass(frozen=True)
class Ask:
    """What a visitor chose.

    Attributes:
        keep: share of tokens that stay; None: as the method decides.
        at: site; "" where the method goes by itself.
        words: tokens of the longest answer.
    """

    question: str
    method: str
    at: str = ""
    keep: float | None = None
    merge: bool = False
    mass: float = 0.0
    words: int = 16


@dataclass(frozen=True)
class Stage:
    """A step of the recipe: tokens before and after it, and the time it took."""

    site: str
    method: str
    before: float
    after: float
    seconds: float


@dataclass(frozen=True)
class Picture:
    """What is left of the tokens behind one stage."""

    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Comparison:
    """Both answers. `flops` are those of the dense and of the compressed model, `pictures` begin
    with what the model is given; `undrawn` says why there are no others."""

    dense: str
    compressed: str
    seconds: tuple[float, float]
    flops: tuple[float, float]
    stages: tuple[Stage, ...]
    pictures: tuple[Picture, ...]
    undrawn: str
    report: str


def request(choice: Choice, ask: Ask) -> dict[str, Any]:
    """Arguments of `attach`."""
    if ask.at and ask.at not in choice.sites:
        there = ", ".join(choice.sites) or f"the places it chooses itself ({choice.usual})"
        raise InvalidInput(f"{choice.name!r} cannot be put at {ask.at!r}. It can be at: {there}.")
    at = ask.at or (None if choice.usual else choice.sites[0])
    given: dict[str, Any] = {"method": choice.name, "keep": ask.keep, "at": at, **choice.params}
    if ask.merge:
        given["merge"] = "nearest"
    if ask.mass:
        given["mass"] = ask.mass
    return given


def chosen(loaded: Loaded, method: object) -> Choice:
    """The method, if it fits the model."""
    offer = loaded.offer
    if not isinstance(method, str) or method not in offer.choices:
        why = offer.reasons.get(str(method), "there is no such method")
        raise InvalidInput(
            f"{method!r} does not fit {loaded.name}: {why}. These do: {', '.join(offer.choices)}."
        )
    return offer.choices[method]


@torch.inference_mode()
def compare(loaded: Loaded, media: Media, ask: Ask) -> Comparison:
    """Answer twice. The caller has the model to itself."""
    _check(ask)
    given = request(chosen(loaded, ask.method), ask)
    inputs = _inputs(loaded, media, ask.question)
    model = loaded.model
    _answer(loaded, inputs, WARM)  # the first run is slow, of either
    with attach(model, **given):
        _answer(loaded, inputs, WARM)
    with attach(model, **given) as session:
        compressed, after = _answer(loaded, inputs, ask.words)
    dense, before = _answer(loaded, inputs, ask.words)
    stats = session.stats()
    pictures, undrawn = _pictures(loaded, media, inputs, list(session.trace))
    return Comparison(
        dense,
        compressed,
        (before, after),
        (stats["flops_dense"], stats["flops"]),
        tuple(map(_stage, stats["sites"])),
        pictures,
        undrawn,
        session.report(),
    )


def _check(ask: Ask) -> None:
    if not isinstance(ask.question, str) or not ask.question.strip():
        raise InvalidInput("there is no question: type one, or pick one from the list.")
    if len(ask.question) > LONGEST_QUESTION:
        raise InvalidInput(
            f"the question has {len(ask.question)} characters: at most {LONGEST_QUESTION}."
        )
    if ask.words != int(ask.words) or not 1 <= ask.words <= MOST_WORDS:
        raise InvalidInput(f"an answer of {ask.words} tokens: give 1 to {MOST_WORDS}.")


def _inputs(loaded: Loaded, media: Media, question: str) -> Any:
    """What the model reads, on its device."""
    processor, model = loaded.processor, loaded.model
    for kind in ("image", "video"):
        token = getattr(processor, f"{kind}_token", None)
        if token and token in question:
            raise InvalidInput(f"the question holds {token!r}, which stands for the {kind} itself.")
    if media.clip is None:
        made = loading.encode(processor, question, [media.image])
    else:
        made = processed(processor, _video_prompt(loaded, question), media.clip)
    return made.to(model.device, model.dtype)


def _video_prompt(loaded: Loaded, question: str) -> str:
    """By the chat template, or the bare question behind the video."""
    processor = loaded.processor
    if not loaded.reads_videos:
        raise UnsupportedModel(
            f"{loaded.name} reads no videos. Pick an image, or a model that does, such as "
            f"tiny-llava-video."
        )
    form = check_prompt(None, processor)
    if form is not None:
        return form.replace("{question}", question)
    content = [{"type": "video"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return loading.templated(processor, chat)


def _answer(loaded: Loaded, inputs: Any, words: int) -> tuple[str, float]:
    """Greedy answer and seconds."""
    wait(loaded.model.device)
    started = time.perf_counter()
    ids = loaded.model.generate(**inputs, max_new_tokens=int(words), do_sample=False)
    wait(loaded.model.device)
    seconds = time.perf_counter() - started
    new = ids[0, inputs["input_ids"].shape[1] :]
    return loaded.processor.decode(new, skip_special_tokens=True).strip(), seconds


def _stage(row: dict[str, Any]) -> Stage:
    """The cache counts every layer and every step: means stand for them."""
    runs = max(1, row["runs"]) if row["site"] == "cache" else 1
    counts = (row["tokens_in"] / runs, row["tokens_out"] / runs)
    return Stage(row["site"], row["method"], *counts, row["seconds"])


def _pictures(
    loaded: Loaded, media: Media, inputs: Any, trace: Sequence[Reduction]
) -> tuple[tuple[Picture, ...], str]:
    """What the model is given, then what is left behind each stage."""
    pixels = inputs.get("pixel_values" if media.clip is None else "pixel_values_videos")
    seen = draw.as_seen(loaded.processor, pixels)
    size = PANEL if media.clip is None else FRAME
    plain = [picture.resize(_size(picture, size)) for picture in seen or media.pictures]
    found = [Picture(draw.join(plain, gap=4), "stage 0: what the model is given, all tokens")]
    try:
        for number, fate in enumerate(draw.fates(trace)):
            drawn = _drawn(media, seen, trace, number, size)
            found.append(Picture(drawn, f"stage {number + 1}: {fate.caption}"))
    except VtcError as error:
        return tuple(found), str(error)
    return tuple(found), ""


def _drawn(
    media: Media,
    seen: Sequence[Image.Image],
    trace: Sequence[Reduction],
    stage: int,
    size: int,
) -> Image.Image:
    """The state behind one stage."""
    whole = len(seen or media.pictures) == len(media.pictures)
    if whole and len(trace[-1].n_in) == 1:
        shown = seen or media.pictures
        return draw.overlay(shown, trace, size=size, stages=stage, captions=False)
    return draw.prompt_picture(media.pictures, seen, trace, size=size, stages=stage)  # tiles


def _size(picture: Image.Image, side: int) -> tuple[int, int]:
    """With that longer side."""
    scale = side / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
