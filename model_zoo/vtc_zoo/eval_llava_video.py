# SPDX-License-Identifier: Apache-2.0
"""Exact-match accuracy of tiny-llava-video by question type, on clips it never saw.

Run as `python -m vtc_zoo.eval_llava_video`. The answers come from the stock `generate()` through
the shipped processor, in float32, on left-padded batches: what a user gets.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vtc_zoo
from vtc_zoo import moving
from vtc_zoo.eval_llava_shapes import Score


@torch.inference_mode()
def evaluate(
    model: Any,
    processor: Any,
    n_clips: int = 1000,
    questions_per_clip: int = 4,
    seed: int = moving.TEST_SEED,
    batch_size: int = 40,
) -> Score:
    """Let `model` answer the questions of `moving.test_set` and count the right ones."""
    samples = [
        (frames, question)
        for _, frames, questions in moving.test_set(n_clips, questions_per_clip, seed)
        for question in questions
    ]
    right: Counter[str] = Counter()
    for start in tqdm(range(0, len(samples), batch_size), "test", mininterval=2):
        batch = samples[start : start + batch_size]
        inputs = processor(
            videos=[list(frames) for frames, _ in batch],
            text=[vtc_zoo.video_prompt(question.text) for _, question in batch],
            padding=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        answers = processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right.update(q.type for (_, q), a in zip(batch, answers, strict=True) if a == q.answer)
    return Score(right, Counter(question.type for _, question in samples))


def main() -> None:
    parser = argparse.ArgumentParser(description="Test tiny-llava-video.")
    parser.add_argument("--model", type=Path, help="folder to test; default: the shipped one")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--questions-per-clip", type=int, default=4)
    parser.add_argument("--seed", type=int, default=moving.TEST_SEED)
    args = parser.parse_args()
    if args.seed >= moving.TRAIN_SEED:
        parser.error(f"seeds from {moving.TRAIN_SEED} on draw training clips")
    model, processor = vtc_zoo.load_folder(args.model or vtc_zoo.path("tiny-llava-video"))
    score = evaluate(model, processor, args.clips, args.questions_per_clip, args.seed)
    print(score.table(moving.TYPES))


if __name__ == "__main__":
    main()
