"""Exams for the small trained models: drawn pictures or clips, and questions whose answers are one
token each.

One forward of the prompt answers a question: the argmax of its last row is the first token that
`generate` would emit, which is the whole answer. Features are computed once and shared by all runs,
except for methods that read the vision tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..versions import check_features


@dataclass(frozen=True)
class Subject:
    """What is asked about.

    Attributes:
        kind: "image" or "video", as models and processors call it.
        types: of questions; `counts`: those whose answer is a number of things.
        draw: (scenes, questions per scene, seed) -> picture or frames, and its questions.
        prompt: around a question.
    """

    kind: str
    types: tuple[str, ...]
    counts: frozenset[str]
    draw: Callable[[int, int, int], list[tuple[Any, Sequence[Any]]]]
    prompt: Callable[[str], str]

    @classmethod
    def of(cls, processor: Any) -> Subject:
        """Moving shapes for a processor of videos, else shapes."""
        import vtc_zoo
        from vtc_zoo import moving, shapes

        if getattr(processor, "video_processor", None) is not None:

            def clips(n: int, questions: int, seed: int) -> list[tuple[Any, Sequence[Any]]]:
                return [(list(f), q) for _, f, q in moving.test_set(n, questions, seed)]

            counts = frozenset({"flashes", "count"})
            return cls("video", moving.TYPES, counts, clips, vtc_zoo.video_prompt)

        def pictures(n: int, questions: int, seed: int) -> list[tuple[Any, Sequence[Any]]]:
            return [(scene.image, q) for scene, q in shapes.test_set(n, questions, seed)]

        counts = frozenset(kind for kind in shapes.TYPES if kind.startswith("count_"))
        return cls("image", shapes.TYPES, counts, pictures, vtc_zoo.prompt)

    @property
    def pixels(self) -> str:
        """The model's argument."""
        return "pixel_values" if self.kind == "image" else "pixel_values_videos"


@dataclass(frozen=True)
class Batch:
    """Questions, padded on the left. `rows`: the scene of each; `answers`: its token."""

    ids: Tensor
    mask: Tensor
    rows: Tensor
    answers: Tensor
    types: tuple[str, ...]

    def one(self, at: int) -> Batch:
        """One of the questions, without padding."""
        real, here = self.mask[at].bool(), slice(at, at + 1)
        return Batch(
            self.ids[here, real],
            self.mask[here, real],
            self.rows[here],
            self.answers[here],
            self.types[here],
        )


@dataclass(frozen=True)
class Exam:
    """Scenes and questions of one seed. pixels [S, ...]; features [S, N, D], S scenes."""

    subject: Subject
    pixels: Tensor
    features: Tensor
    batches: tuple[Batch, ...]


def scene_seed(seed: int) -> int:
    """The scenes of a seed; seed 0 is the test set that published numbers come from."""
    from vtc_zoo import shapes

    return shapes.TEST_SEED + 1000 * seed


@torch.inference_mode()
def set_exam(
    model: Any, processor: Any, seed: int, scenes: int, questions: int, batch: int
) -> Exam:
    """Draw scenes, encode them once, and sort the questions by length, so that padding is short."""
    check_features(model, "the questions about one scene share them")
    subject = Subject.of(processor)
    drawn = subject.draw(scenes, questions, scene_seed(seed))
    media = [seen for seen, _ in drawn]
    reader = getattr(processor, f"{subject.kind}_processor")
    pixels = reader(**{f"{subject.kind}s": media}, return_tensors="pt")[subject.pixels]
    pixels = pixels.to(model.dtype)
    encode = getattr(model, f"get_{subject.kind}_features")
    encoded = map(encode, pixels.split(batch))
    features = torch.cat([torch.stack(list(part.pooler_output)) for part in encoded])
    asked = [(row, question) for row, (_, own) in enumerate(drawn) for question in own]
    asked.sort(key=lambda item: len(item[1].text.split()))
    batches = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        text = processor(
            **{f"{subject.kind}s": [media[row] for row, _ in part]},
            text=[subject.prompt(question.text) for _, question in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        words = processor.tokenizer([q.answer for _, q in part], add_special_tokens=False)
        if any(len(ids) != 1 for ids in words["input_ids"]):
            raise InvalidInput("an answer is not a single token of this model's tokenizer.")
        batches.append(
            Batch(
                text["input_ids"],
                text["attention_mask"],
                torch.tensor([row for row, _ in part]),
                torch.tensor(words["input_ids"])[:, 0],
                tuple(question.type for _, question in part),
            )
        )
    return Exam(subject, pixels, features, tuple(batches))


def inputs(exam: Exam, batch: Batch, pixels: bool) -> dict[str, Any]:
    """Arguments of the model: with pixels, or with the features that are known already."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    places = (batch.mask.cumsum(1) - 1).clamp(min=0)  # padding does not count, as in `generate`
    out: dict[str, Any] = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "position_ids": places,
    }
    subject = exam.subject
    if pixels:
        return {**out, subject.pixels: exam.pixels[batch.rows]}
    known: Any = exam.features[batch.rows]
    known = list(known) if subject.kind == "image" else known
    ready = BaseModelOutputWithPooling(pooler_output=known)
    return {**out, "mm_encoder_outputs": {subject.kind: ready}}


@torch.inference_mode()
def answer(model: Any, exam: Exam, batch: Batch, pixels: bool) -> Tensor:
    """The token that the model answers to each question."""
    logits = model(**inputs(exam, batch, pixels), logits_to_keep=1, use_cache=True).logits
    return logits[:, -1].argmax(-1)
