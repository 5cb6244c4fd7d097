"""A vision-language model that answers the chats of a harness, dense or compressed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidInput, UnsupportedModel
from ..session import Session, attach
from ..video import Sampling
from ..video.answer import answer_length, check_acted, ends_of
from .arguments import Arguments
from .chats import Chat, Prompt, Writer


@dataclass(frozen=True)
class Generation:
    """How answers are made.

    Attributes:
        options: arguments of `generate`.
        until: an answer ends before the first of these.
        ignored: what was asked for that `generate` does not know, such as settings of one model.
    """

    options: Mapping[str, Any]
    until: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any], max_new_tokens: int) -> Generation:
        """From the settings of a task. Answers are greedy unless a temperature above 0 or
        do_sample asks for more."""
        from transformers import GenerationConfig

        wanted = {name: value for name, value in given.items() if value is not None}
        until = wanted.pop("until", ())
        until = (until,) if isinstance(until, str) else tuple(until)
        known = vars(GenerationConfig())
        ignored = tuple(sorted(name for name in wanted if name not in known))
        options = {"max_new_tokens": max_new_tokens}
        options |= {name: value for name, value in wanted.items() if name in known}
        if options.get("num_return_sequences", 1) != 1:
            raise InvalidInput("num_return_sequences: a harness takes one answer; leave it out.")
        sample = options.get("do_sample", options.get("temperature", 0) > 0)
        if not sample or options.get("temperature") == 0:
            sample = False
            for name in ("temperature", "top_p", "top_k"):
                options.pop(name, None)
        return cls(options | {"do_sample": sample}, tuple(filter(None, until)), ignored)

    def cut(self, text: str) -> str:
        """The answer up to the first of `until`."""
        return text[: min((i for i in map(text.find, self.until) if i >= 0), default=len(text))]


@dataclass(frozen=True)
class Reply:
    """An answer. tokens_in: of the prompt, all visual tokens counted; tokens_out: of the answer."""

    text: str
    tokens_in: int
    tokens_out: int


class ChatModel:
    """A model of transformers, its processor, and the session that compresses it (None: dense).

    frames, backend: which frames of videos are read, and by what, as for `vtc.video.read`.
    `answers` and `seconds` are how many were made so far, and the time that `generate` took.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        session: Session | None = None,
        *,
        frames: Sampling | str | int = 8,
        backend: str = "auto",
    ) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"{type(model).__name__} has an encoder of text: not supported.")
        self.model, self.processor, self.session = model, processor, session
        self.writer = Writer(processor, frames, backend)
        self.answers, self.seconds = 0, 0.0
        self._rows = 0  # that the prefills had: every beam is one
        self._acted = False

    @classmethod
    def load(cls, arguments: Arguments) -> ChatModel:
        """Model and processor as named, compressed as asked."""
        model, processor = arguments.load()
        request = arguments.request
        # text-only requests are fine; that nothing was reduced of visual ones is checked here
        session = None if request is None else attach(model, **request, strict=False)
        return cls(model, processor, session, frames=arguments.frames, backend=arguments.backend)

    def generate(
        self, chats: Sequence[Chat], generation: Generation, frames: Sampling | None = None
    ) -> list[Reply]:
        """One answer per chat; those of a kind are answered together."""
        prompts = [self.writer.write(chat, frames) for chat in chats]
        alike: dict[Any, list[int]] = {}
        for number, prompt in enumerate(prompts):
            alike.setdefault(prompt.kind, []).append(number)
        replies: dict[int, Reply] = {}
        for numbers in alike.values():
            found = self._batch([prompts[number] for number in numbers], generation)
            replies |= zip(numbers, found, strict=True)
        return [replies[number] for number in range(len(prompts))]

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Prompt], generation: Generation) -> list[Reply]:
        inputs = self.writer.inputs(prompts).to(self.model.device, self.model.dtype)
        started = time.perf_counter()
        words = self.processor.tokenizer
        out = self.model.generate(**inputs, pad_token_id=words.pad_token_id, **generation.options)
        new = out[:, inputs["input_ids"].shape[1] :].tolist()  # waits for an accelerator
        self.seconds += time.perf_counter() - started
        beams = generation.options.get("num_beams") or self.model.generation_config.num_beams or 1
        self.answers += len(prompts)
        self._rows += len(prompts) * beams
        if self.session is not None and prompts[0].visual and not self._acted:
            check_acted(self.session)
            self._acted = True
        texts = map(generation.cut, words.batch_decode(new, skip_special_tokens=True))
        lengths = inputs["attention_mask"].sum(1).tolist()
        ends = ends_of(self.model)
        rows = zip(texts, lengths, new, strict=True)
        return [Reply(text, length, answer_length(ids, ends)) for text, length, ids in rows]

    def numbers(self) -> dict[str, float]:
        """What compression saved, per prompt: visual tokens, and GFLOPs of the language model's
        prefill. Beams do not count: each is a prefill of the same prompt."""
        if self.session is None or not self._rows:
            return {}
        stats = self.session.stats()
        sites = [site for site in stats["sites"] if site["site"] != "cache"]  # counts every layer
        sums = {}
        if sites:
            sums["visual_tokens_before"] = sites[0]["tokens_in"]
            sums["visual_tokens_after"] = sites[-1]["tokens_out"]
        sums["prefill_gflops_dense"] = stats["flops_dense"] / 1e9
        sums["prefill_gflops"] = stats["flops"] / 1e9
        return {name: value / self._rows for name, value in sums.items()}

    def report(self) -> str:
        """What the session reports, or that there is none."""
        return "dense: no recipe" if self.session is None else self.session.report()

    def close(self) -> None:
        """Leave the model as it was. Counts stay."""
        if self.session is not None:
            self.session.detach()
