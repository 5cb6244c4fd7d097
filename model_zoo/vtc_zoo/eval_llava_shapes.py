# SPDX-License-Identifier: Apache-2.0
"""Exact-match accuracy of tiny-llava-shapes by question type, on scenes it never saw.

Run as `python -m vtc_zoo.eval_llava_shapes`. The answers come from the stock `generate()`
through the shipped processor, in float32, on left-padded batches: what a user gets.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vtc_zoo
from vtc_zoo import shapes


@dataclass(frozen=True)
class Score:
    """Right and asked questions, by type."""

    right: Counter[str]
    asked: Counter[str]

    @property
    def accuracy(self) -> float:
        """Share of all the questions answered with exactly the right word."""
        return self.right.total() / self.asked.total()

    def table(self, types: Sequence[str] = shapes.TYPES) -> str:
        """The accuracies as a markdown table, in the order of `types`."""
        rows = [(kind, self.right[kind], self.asked[kind]) for kind in types]
        rows.append(("all", self.right.total(), self.asked.total()))
        lines = ["| question type | questions | right | exact match |", "|---|---|---|---|"]
        lines += [f"| {kind} | {n} | {k} | {k / n:.4f} |" for kind, k, n in rows if n]
        return "\n".join(lines)


@torch.inference_mode()
def score(
    model: Any,
    processor: Any,
    samples: Sequence[tuple[Any, shapes.Question]],
    kind: str = "images",
    prompt: Callable[[str], str] = vtc_zoo.prompt,
    batch_size: int = 50,
) -> Score:
    """Let `model` answer one question about each picture or clip (`kind`: "images", "videos"), and
    count the right ones."""
    right: Counter[str] = Counter()
    for start in tqdm(range(0, len(samples), batch_size), "test", mininterval=2):
        batch = samples[start : start + batch_size]
        inputs = processor(
            **{kind: [seen for seen, _ in batch]},
            text=[prompt(question.text) for _, question in batch],
            padding=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        answers = processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right.update(q.type for (_, q), a in zip(batch, answers, strict=True) if a == q.answer)
    return Score(right, Counter(question.type for _, question in samples))


def evaluate(
    model: Any,
    processor: Any,
    n_scenes: int = 2000,
    questions_per_scene: int = 2,
    seed: int = shapes.TEST_SEED,
    batch_size: int = 50,
) -> Score:
    """Let `model` answer the questions of `shapes.test_set` and count the right ones."""
    samples = [
        (scene.image, question)
        for scene, questions in shapes.test_set(n_scenes, questions_per_scene, seed)
        for question in questions
    ]
    return score(model, processor, samples, batch_size=batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description="Test tiny-llava-shapes.")
    parser.add_argument("--model", type=Path, help="folder to test; default: the shipped one")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--questions-per-scene", type=int, default=2)
    parser.add_argument("--seed", type=int, default=shapes.TEST_SEED)
    args = parser.parse_args()
    if args.seed >= shapes.TRAIN_SEED:
        parser.error(f"seeds from {shapes.TRAIN_SEED} on draw training scenes")
    model, processor = vtc_zoo.load_folder(args.model or vtc_zoo.path("tiny-llava-shapes"))
    print(evaluate(model, processor, args.scenes, args.questions_per_scene, args.seed).table())


if __name__ == "__main__":
    main()
