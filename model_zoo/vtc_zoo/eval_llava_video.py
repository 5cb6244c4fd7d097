# SPDX-License-Identifier: Apache-2.0
"""Exact-match accuracy of tiny-llava-video by question type, on clips it never saw.

Run as `python -m vtc_zoo.eval_llava_video`. The answers come from the stock `generate()` through
the shipped processor, in float32, on left-padded batches: what a user gets.
"""

import argparse
from pathlib import Path
from typing import Any

import vtc_zoo
from vtc_zoo import moving
from vtc_zoo.eval_llava_shapes import Score, score


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
        (list(frames), question)
        for _, frames, questions in moving.test_set(n_clips, questions_per_clip, seed)
        for question in questions
    ]
    return score(model, processor, samples, "videos", vtc_zoo.video_prompt, batch_size)


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
    found = evaluate(model, processor, args.clips, args.questions_per_clip, args.seed)
    print(found.table(moving.TYPES))


if __name__ == "__main__":
    main()
