"""From chats with pictures and videos to what the processor makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..commands import loading
from ..errors import InvalidInput, UnsupportedModel
from ..video import Clip, Sampling, read
from ..video.prompts import check_prompt, metadata

KINDS = ("text", "image", "video")


@dataclass(frozen=True)
class Part:
    """A piece of a turn. kind: text, image or video; value: text, picture, or path of a file."""

    kind: str
    value: Any

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInput(f"a prompt holds {self.kind!r}; these are read: {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Turn:
    """What one role (system, user, assistant) says."""

    role: str
    parts: tuple[Part, ...]


Chat = Sequence[Turn]


@dataclass(frozen=True)
class Prompt:
    """A chat as one text with placeholders, and what they stand for."""

    text: str
    images: tuple[Image.Image, ...]
    clips: tuple[Clip, ...]

    @property
    def visual(self) -> bool:
        return bool(self.images or self.clips)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What prompts of one batch have in common."""
        return bool(self.images), tuple(clip.frames.shape for clip in self.clips)


class Writer:
    """Writes prompts for a processor: by its chat template, or else placeholders and text as they
    come. frames, backend: as `vtc.video.read` takes them."""

    def __init__(self, processor: Any, frames: Sampling | str | int = 8, backend: str = "auto"):
        self.processor, self.frames, self.backend = processor, Sampling.parse(frames), backend
        self.tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in KINDS[1:]}

    def write(self, chat: Chat, frames: Sampling | None = None) -> Prompt:
        """Read the media of a chat and write its text."""
        for kind, token in self.tokens.items():
            chat = _placed(chat, kind, token) if token else chat
        media = [part for turn in chat for part in turn.parts if part.kind != "text"]
        if any(part.kind == "video" for part in media):
            check_prompt(None, self.processor)
        images = tuple(_image(part.value) for part in media if part.kind == "image")
        clips = tuple(
            self._clip(part.value, frames or self.frames) for part in media if part.kind == "video"
        )
        return Prompt(self._text(chat), images, clips)

    def inputs(self, prompts: Sequence[Prompt]) -> Any:
        """One batch of prompts of a kind, padded on the left."""
        given: dict[str, Any] = {"text": [prompt.text for prompt in prompts]}
        if prompts[0].images:
            given["images"] = [list(prompt.images) for prompt in prompts]
        clips = [clip for prompt in prompts for clip in prompt.clips]
        if clips:
            given["videos"] = [clip.frames for clip in clips]
            given["video_metadata"] = [metadata(clip) for clip in clips]
            given["do_sample_frames"] = False
        if len(prompts) > 1:
            given |= {"padding": True, "padding_side": "left"}
        return self.processor(**given, return_tensors="pt")

    def _text(self, chat: Chat) -> str:
        if getattr(self.processor, "chat_template", None):
            messages = [{"role": t.role, "content": list(map(_content, t.parts))} for t in chat]
            return loading.templated(self.processor, messages)
        if len(chat) != 1 or chat[0].role != "user":
            roles = ", ".join(turn.role for turn in chat) or "none"
            raise UnsupportedModel(
                f"{type(self.processor).__name__} has no chat template: it takes one turn of a "
                f"user, but there are turns of: {roles}."
            )
        return "".join(self._plain(part) for part in chat[0].parts)

    def _plain(self, part: Part) -> str:
        token = part.value if part.kind == "text" else self.tokens[part.kind]
        if token is None:
            raise UnsupportedModel(
                f"{type(self.processor).__name__} has neither a chat template nor a placeholder "
                f"for a {part.kind}."
            )
        return token

    def _clip(self, path: Any, frames: Sampling) -> Clip:
        if not isinstance(path, str | Path):
            raise InvalidInput(f"a video is a {type(path).__name__}: give the path of a file.")
        return read(path, frames, self.backend)


def _content(part: Part) -> dict[str, str]:
    """As chat templates read it."""
    return {"type": "text", "text": part.value} if part.kind == "text" else {"type": part.kind}


def _placed(chat: Chat, kind: str, token: str) -> Chat:
    """Media where the text itself holds their placeholders, which benchmarks write for LLaVA."""
    texts = [part.value for turn in chat for part in turn.parts if part.kind == "text"]
    media = [part for turn in chat for part in turn.parts if part.kind == kind]
    held = sum(text.count(token) for text in texts)
    if not held:
        return chat
    if held != len(media):
        raise InvalidInput(
            f"the text of a prompt holds {token!r} {held} times, which stands for a {kind}, but "
            f"the prompt has {len(media)}: write as many, or none."
        )
    queue = iter(media)
    return [Turn(turn.role, tuple(_pieces(turn, kind, token, queue))) for turn in chat]


def _pieces(turn: Turn, kind: str, token: str, media: Iterator[Part]) -> Iterator[Part]:
    """The parts of a turn with its media in their places."""
    for part in turn.parts:
        if part.kind == "text":
            for number, piece in enumerate(part.value.split(token)):
                if number:
                    yield next(media)
                if piece:
                    yield Part("text", piece)
        elif part.kind != kind:
            yield part


def _image(value: Any) -> Image.Image:
    """Upright RGB, from a picture or the path of one."""
    if isinstance(value, Image.Image):
        return loading.upright(value)
    if not isinstance(value, str | Path):
        raise InvalidInput(f"an image is a {type(value).__name__}: give a picture or a path.")
    return loading.open_image(Path(value))
