"""What a model answers to questions about videos that are read already.

A video is encoded once for all its questions: its features go to every one of them ready-made, as
`generate` itself makes them. What a compressing session notes while a video is encoded (grids,
attention of the tower) is noted again for every batch that uses its features. Notes are context
variables: everything here runs in contexts of its own."""

from __future__ import annotations

import contextvars
import inspect
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..adapters.vlm import again
from ..commands.loading import templated
from ..errors import InvalidInput, NothingReduced, UnsupportedModel
from ..session import Session
from ..versions import check_features
from .prompts import SEQUENCES, check_prompt, padded, processed, spliced
from .questions import Question


@dataclass(frozen=True)
class Group:
    """One video and some of its questions."""

    clip: Any
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answer:
    """What was said to one question.

    `tokens_before`, `tokens_after`: visual tokens of the prompt, and those that are left behind the
    last step. `seconds`: its share of encoding the video, of the prefill, and of `generate`, which
    holds the prefill.
    """

    text: str
    tokens_before: int
    tokens_after: int
    seconds: dict[str, float]


class Answerer(Protocol):
    """Anything that answers questions about videos."""

    def answer(self, groups: Sequence[Group]) -> Iterator[tuple[Question, Answer]]:
        """Every question once; batches are yielded as they are done."""
        ...


class VideoModel:
    """A vision-language model of transformers and its processor; `session` compresses it.

    prompt: format of a prompt, `"<video> user {question} assistant"`; without it the processor's
    chat template is used.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        session: Session | None = None,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 32,
        prompt: str | None = None,
    ) -> None:
        self.model, self.processor, self.session = model, processor, session
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.format = check_prompt(prompt, processor)
        check_features(model, "questions about one video share them")
        ids = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        self.placeholders = torch.tensor([i for i in ids if i is not None])
        steps = () if session is None else session.recipe.steps
        self._inside = any(step.site.kind == "vision" for step in steps)
        self._fired = False

    def answer(self, groups: Sequence[Group]) -> Iterator[tuple[Question, Answer]]:
        """Encode every video once, then answer in batches of `batch_size` questions. A batch has
        videos whose features fit side by side."""
        jobs: dict[Any, list[tuple[Question, _Video, dict[str, Tensor]]]] = {}
        for group in groups:
            video = contextvars.copy_context().run(self._encode, group)
            alike = jobs.setdefault(video.shape, [])
            texts = self._texts(video, group)
            alike += [(q, video, text) for q, text in zip(group.questions, texts, strict=True)]
        for alike in jobs.values():
            for first in range(0, len(alike), self.batch_size):
                batch = alike[first : first + self.batch_size]
                run = contextvars.copy_context().run
                answers = run(self._generate, [(video, text) for _, video, text in batch])
                yield from zip((job[0] for job in batch), answers, strict=True)

    # -------------------------------------------------------------- one video

    @torch.inference_mode()
    def _encode(self, group: Group) -> _Video:
        """Features of the video, and the prompt of its first question as the processor makes it."""
        started = time.perf_counter()
        prompt = self.text(group.questions[0])
        inputs = processed(self.processor, prompt, group.clip)
        moved = inputs.to(self.model.device, self.model.dtype)
        named = {key: value for key, value in moved.items() if key not in SEQUENCES}
        features: dict[str, Any] = {}
        again.forget()
        for kind in ("image", "video"):
            encode = getattr(self.model.base_model, f"get_{kind}_features", None)
            known = inspect.signature(encode).parameters if encode is not None else ()
            given = {key: value for key, value in named.items() if key in known}
            if encode is not None and any(key.startswith("pixel_values") for key in given):
                made = encode(**given, return_dict=True)
                _check_finite(made)
                features |= _features([{kind: made}])  # without hidden states of the tower
        if not features:
            raise UnsupportedModel(
                f"the processor made {', '.join(moved)} of a video, of which "
                f"{type(self.model).__name__} cannot make features."
            )
        for key in [key for key in named if key.startswith("pixel_values")]:
            del named[key]
        wait(self.model.device)
        text = {key: inputs[key] for key in SEQUENCES if key in inputs}
        seconds = (time.perf_counter() - started) / len(group.questions)
        return _Video(features, named, prompt, text, again.noted(), seconds)

    def _texts(self, video: _Video, group: Group) -> list[dict[str, Tensor]]:
        """Token ids and what goes with them, for every question of a video."""
        first, out = video.text, []
        for question in group.questions:
            prompt = self.text(question)
            if prompt == video.prompt:
                out.append(first)
                continue
            plain, bare = (self._tokens(text) for text in (video.prompt, prompt))
            text = spliced(first, plain, bare, self.placeholders)
            if text is None:  # words around the video became tokens together with it
                made = processed(self.processor, prompt, group.clip)
                text = {key: made[key] for key in first}
            out.append(text)
        return out

    def _tokens(self, text: str) -> list[int]:
        """Of a prompt in which the video is still one placeholder."""
        return self.processor.tokenizer([text])["input_ids"][0]

    def text(self, question: Question) -> str:
        """The prompt of a question."""
        tokens = [getattr(self.processor, f"{kind}_token", None) for kind in ("video", "image")]
        for token in filter(None, tokens):
            if token in question.prompt:
                raise InvalidInput(
                    f"the question holds {token!r}, which stands for a video or an image. Leave it "
                    f"out: the video is put in front."
                )
        if self.format is not None:
            return self.format.replace("{question}", question.prompt)
        content = [{"type": "video"}, {"type": "text", "text": question.prompt}]
        chat = [{"role": "user", "content": content}]
        return templated(self.processor, chat)

    # -------------------------------------------------------------- one batch

    @torch.inference_mode()
    def _generate(self, batch: list[tuple[_Video, dict[str, Tensor]]]) -> list[Answer]:
        """Greedy answers of one left-padded batch."""
        started = time.perf_counter()
        videos = [video for video, _ in batch]
        inputs = padded([text for _, text in batch], pad_token(self.model, self.processor))
        before = torch.isin(inputs["input_ids"], self.placeholders).sum(1).tolist()
        device = self.model.device
        inputs = {key: value.to(device) for key, value in inputs.items()}
        again.note([video.noted for video in videos])
        watch = _Watch(self.session)
        out = self.model.generate(
            **inputs,
            **joined([video.named for video in videos]),
            mm_encoder_outputs=_features([video.features for video in videos]),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=[watch],
        )
        new = out[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        left = before
        if self._inside:
            left = [_left(video.features, n) for video, n in zip(videos, before, strict=True)]
        after = watch.after(left)
        self._check_fired()
        share = len(batch)
        seconds = {
            "prefill": (watch.first - started) / share,
            "generate": (time.perf_counter() - started) / share,
        }
        return [
            Answer(text.strip(), n, m, {"encode": video.seconds, **seconds})
            for text, n, m, video in zip(texts, before, after, videos, strict=True)
        ]

    def _check_fired(self) -> None:
        """After the first batch every step must have acted; later ones are like it."""
        if self.session is not None and not self._fired:
            check_acted(self.session)
            self._fired = True


def check_acted(session: Session) -> None:
    """Refuse to go on when the first visual tokens passed a step that did nothing."""
    sites = session.stats()["sites"]
    idle = [row["site"] for row in sites if not row["runs"] and row["site"] != "cache"]
    if idle:
        raise NothingReduced(
            f"a batch was answered, but nothing was reduced at {', '.join(idle)}: no visual "
            f"tokens were seen there. See `vtc describe` for the sites of this model."
        )


@dataclass(frozen=True)
class _Video:
    """An encoded video.

    features: kind -> what `get_image_features` or `get_video_features` returned.
    named: further inputs of the model, such as grids.
    prompt, text: the first question, and the tokens that the processor made of it.
    noted: what a session knows of the encoding.
    seconds: share of one question.
    """

    features: dict[str, Any]
    named: dict[str, Any]
    prompt: str
    text: dict[str, Tensor]
    noted: again.Noted
    seconds: float

    @property
    def shape(self) -> tuple[Any, ...]:
        """What is the same for videos in one batch: the shape of a row, where rows are stacked."""
        made = (one.pooler_output for one in self.features.values())
        return tuple(tuple(rows.shape[1:]) if torch.is_tensor(rows) else None for rows in made)


class _Watch:
    """Called by `generate` with the logits [B, V] of every step: notes what was true after the
    first one, and refuses logits that are not numbers."""

    def __init__(self, session: Session | None) -> None:
        self.session, self.first = session, 0.0
        self.seen: list[Any] = []
        self._before = None if session is None or not session.trace else session.trace[-1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.first:
            if bool(scores.isnan().any()):
                raise InvalidInput("the model computed NaN for the first word of an answer.")
            self.first = time.perf_counter()
            for entry in reversed(() if self.session is None else self.session.trace):
                if entry is self._before:
                    break
                self.seen.append(entry)
            self.seen.reverse()
        return scores

    def after(self, tokens: list[int]) -> list[int]:
        """Visual tokens of each prompt behind the last step, of those that entered."""
        left = list(tokens)
        for entry in self.seen:
            if entry.site.partition(".")[0] in ("projector", "decoder"):
                for sample in set(entry.samples):
                    left[sample] = 0
                for sample, n in zip(entry.samples, entry.n_out, strict=True):
                    left[sample] += n
        return left


# ---------------------------------------------------------------------- features


def pad_token(model: Any, processor: Any) -> int:
    """The token that fills short prompts; it is masked."""
    tokenizer, config = processor.tokenizer, model.generation_config
    ids = (tokenizer.pad_token_id, config.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None), 0)


def ends_of(model: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    return frozenset(() if ids is None else (ids,) if isinstance(ids, int) else ids)


def answer_length(ids: Sequence[int], ends: Container[int]) -> int:
    """Tokens of an answer with the one that ends it, without padding."""
    return next((number for number, token in enumerate(ids, 1) if token in ends), len(ids))


def joined(named: list[dict[str, Any]]) -> dict[str, Any]:
    """Inputs of several prompts, one behind the other."""
    out = {}
    for key in named[0]:
        values = [one[key] for one in named]
        out[key] = torch.cat(values) if torch.is_tensor(values[0]) else sum(values, [])
    return out


def _features(videos: list[dict[str, Any]]) -> dict[str, Any]:
    """Features of the video of every prompt, as the model's own encoding would be for all."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    out = {}
    for kind in videos[0]:
        found = [video[kind] for video in videos]
        made = _rows([one.pooler_output for one in found])
        joined: Any = BaseModelOutputWithPooling(pooler_output=made)
        deep = [getattr(one, "deepstack_features", None) for one in found]
        if deep[0] is not None:
            joined.deepstack_features = [_rows(layer) for layer in zip(*deep, strict=True)]
        out[kind] = joined
    return out


def _rows(parts: Sequence[Any]) -> Any:
    """[n, T, C] tensors as one, or lists of [T, C] as one."""
    if torch.is_tensor(parts[0]):
        return torch.cat(list(parts))
    return [row for part in parts for row in part]


def _each(features: Any) -> list[Tensor]:
    return list(features.pooler_output)


def _check_finite(features: Any) -> None:
    if not all(bool(torch.isfinite(row).all()) for row in _each(features)):
        raise InvalidInput("the vision tower computed NaN or infinities for this video.")


def _left(features: dict[str, Any], placeholders: int) -> int:
    """Visual tokens that enter the language model: what was dropped in the tower is all zero."""
    rows = [row for one in features.values() for row in _each(one)]
    return placeholders - sum(int((row == 0).all(-1).sum()) for row in rows)


def wait(device: torch.device) -> None:
    """Work on an accelerator is timed once it is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
