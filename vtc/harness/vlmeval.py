"""A model class in the form that VLMEvalKit asks for. It imports nothing of VLMEvalKit:

from functools import partial
from vlmeval.config import supported_VLM
from vtc.harness.vlmeval import CompressedVLM

supported_VLM["llava-divprune-25"] = partial(
    CompressedVLM, pretrained="llava-hf/llava-1.5-7b-hf", method="divprune", keep=0.25
)
"""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidInput, UnsupportedModel
from ..video import Sampling
from .arguments import Arguments
from .chats import Chat, Part, Turn
from .model import ChatModel, Generation

Message = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


class CompressedVLM:
    """A vision-language model of transformers with any recipe, for VLMEvalKit.

    Args:
        pretrained: name of a zoo model, folder or hub id; `recipe`, or `method` with the arguments
            of `vtc.attach`; device, dtype, ...: see `vtc.harness.arguments`.
        generation: arguments of `generate`, such as {"num_beams": 3}; greedy by default. `until`
            may name texts before which an answer ends.

    `nframe` and `fps` are set by VLMEvalKit as the data set asks; until then `frames` holds.
    """

    INTERLEAVE = True
    is_api = False
    allowed_types = ("text", "image", "video")

    def __init__(self, *, generation: Mapping[str, Any] | None = None, **given: Any) -> None:
        arguments = Arguments.read(given)
        self._generation = Generation.read(generation or {}, arguments.max_new_tokens)
        if self._generation.ignored:
            names = ", ".join(self._generation.ignored)
            raise InvalidInput(f"generation: generate() of transformers does not know {names}.")
        self._chat = ChatModel.load(arguments)
        #: whether data sets hand over videos as files; their frames as images otherwise
        self.VIDEO_LLM = getattr(self._chat.processor, "video_token", None) is not None
        # both above 0: VLMEvalKit sets the one that a data set names and the other to None
        self.nframe: int | None = arguments.frames.count or 8
        self.fps: float | None = arguments.frames.rate or 1.0
        self._unset = (self.nframe, self.fps)
        self.dump_image_func: Callable[[Any], Any] | None = None

    # -------------------------------------------------------------- asked by VLMEvalKit

    def use_custom_prompt(self, dataset: str | None = None) -> bool:
        """Prompts are those of the data sets."""
        return False

    def build_prompt(self, line: Any, dataset: str | None = None, **_: Any) -> Any:
        """Not asked for, as `use_custom_prompt` says no."""
        raise UnsupportedModel("CompressedVLM takes the prompts of data sets: it builds none.")

    def set_dump_image(self, dump_image_func: Callable[[Any], Any]) -> None:
        """How a data set writes the images of a line to files."""
        self.dump_image_func = dump_image_func

    def dump_image(self, line: Any, dataset: str | None = None) -> Any:
        """Paths of the images of a line."""
        if self.dump_image_func is None:
            raise InvalidInput("no data set has said how to write images: call set_dump_image.")
        return self.dump_image_func(line)

    def generate(self, message: Message, dataset: str | None = None) -> str:
        """The answer to a message in any form of VLMEvalKit: a text, a dictionary, or a list of
        texts, paths and dictionaries."""
        return self.generate_inner(_listed(message), dataset)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: Any = None) -> str:
        """The answer to a message: dictionaries with `type` (text, image, video) and `value`."""
        return self._answer([Turn("user", tuple(map(_part, message)))])

    def chat(self, messages: Sequence[Mapping[str, Any]], dataset: Any = None) -> str:
        """The answer to a conversation: dictionaries with `role` and `content`, the last of a
        user."""
        turns = []
        for message in messages:
            turns.append(Turn(message["role"], tuple(map(_part, _listed(message["content"])))))
        return self._answer(turns)

    def _answer(self, chat: Chat) -> str:
        frames = None
        if (self.nframe, self.fps) != self._unset:
            frames = Sampling(count=self.nframe) if self.nframe else Sampling(rate=self.fps)
        return self._chat.generate([chat], self._generation, frames)[0].text.strip()

    # -------------------------------------------------------------- besides

    def report(self) -> str:
        """Tokens before and after, FLOPs, time of the method, of all answers so far."""
        return self._chat.report()

    def close(self) -> None:
        """Leave the model as it was."""
        self._chat.close()


def _listed(message: Message) -> list[Mapping[str, Any]]:
    """Any form of a message as a list of dictionaries."""
    items = [message] if isinstance(message, str | Mapping) else message
    return [_typed(item) if isinstance(item, str) else item for item in items]


def _typed(text: str) -> dict[str, str]:
    """A text, or the path of an image or a video that is there."""
    kind = (mimetypes.guess_type(text)[0] or "").partition("/")[0]
    is_media = kind in ("image", "video") and "\n" not in text and Path(text).is_file()
    return {"type": kind if is_media else "text", "value": text}


def _part(item: Mapping[str, Any]) -> Part:
    if not isinstance(item, Mapping) or not {"type", "value"} <= set(item):
        raise InvalidInput(
            f"a message holds {item!r}: give dictionaries such as {{'type': 'image', 'value': "
            f"'a.jpg'}}."
        )
    return Part(item["type"], item["value"])
