"""Prompts about a video: what the processor makes of one, and of further ones without reading the
video again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedModel

#: per prompt: [1, L] tensors that grow with it
SEQUENCES = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def check_prompt(prompt: str | None, processor: Any) -> str | None:
    """The format of prompts, or None for the chat template."""
    token = getattr(processor, "video_token", None)
    if token is None:
        raise UnsupportedModel(
            f"{type(processor).__name__} has no video_token: it reads no videos."
        )
    if prompt is None:
        return None if getattr(processor, "chat_template", None) else f"{token}{{question}}"
    if prompt.count("{question}") != 1 or prompt.count(token) != 1:
        raise InvalidInput(
            f"prompt {prompt!r}: write {{question}} and {token} once each, such as "
            f"'{token} user {{question}} assistant'."
        )
    return prompt


def metadata(clip: Any) -> dict[str, Any]:
    """What processors want to know of a clip. Time stamps are those of the file."""
    info = clip.info
    return {
        "total_num_frames": info.frames,
        "fps": info.fps,
        "width": info.width,
        "height": info.height,
        "duration": info.duration,
        "video_backend": info.backend,
        "frames_indices": [seconds * info.fps for seconds in clip.times],
    }


def processed(processor: Any, prompt: str, clip: Any) -> Any:
    """What the processor makes of one prompt with one video."""
    return processor(
        videos=[clip.frames],
        text=[prompt],
        video_metadata=[metadata(clip)],
        do_sample_frames=False,
        return_tensors="pt",
    )


def spliced(
    first: dict[str, Tensor], plain: list[int], bare: list[int], placeholders: Tensor
) -> dict[str, Tensor] | None:
    """Tokens of another prompt about the same video, None where that cannot be told.

    first: [1, L] of one prompt as the processor made it, video expanded. plain: the same prompt
    with one placeholder; what differs between the two is the video. bare: the other prompt.
    """
    ids = first["input_ids"][0].tolist()
    marks = [i for i, token in enumerate(plain) if token in placeholders]
    if not marks:
        return None
    head = _common(plain[: marks[0]], ids)
    tail = _common(plain[: marks[-1] : -1], ids[: head - 1 if head else None : -1])
    short, end = plain[head : len(plain) - tail], len(ids) - tail
    there = [i for i in range(len(bare)) if bare[i : i + len(short)] == short]
    if len(there) != 1:
        return None
    start, rest = there[0], bare[there[0] + len(short) :]
    out = {}
    for key, value in first.items():
        row = value[0].tolist()
        if key == "input_ids":
            sides = (bare[:start], rest)
        else:  # the same for all text
            fill = set(row[:head] + row[end:])
            if len(fill) > 1:
                return None
            sides = tuple([*fill] * n for n in (start, len(rest)))
        out[key] = torch.tensor([[*sides[0], *row[head:end], *sides[1]]], dtype=value.dtype)
    return out


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def padded(texts: list[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """[B, L], filled on the left; everything but ids is 0 there."""
    out = {}
    for key in texts[0]:
        rows = [text[key][0] for text in texts]
        fill = pad if key == "input_ids" else 0
        out[key] = torch.nn.utils.rnn.pad_sequence(rows, True, fill, "left")
    return out
