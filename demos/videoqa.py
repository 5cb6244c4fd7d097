"""Answer questions about a folder of clips from Python, dense and with fewer tokens.

    python demos/videoqa.py                        # draws clips, asks tiny-llava-video
    python demos/videoqa.py --keep 0.1 --out out/videoqa

Killed and started again it goes on where it was."""

from __future__ import annotations

import argparse
from pathlib import Path

import vtc_zoo
from vtc_zoo import moving

import vtc.video


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions about clips, dense and compressed.")
    parser.add_argument("--model", default="tiny-llava-video", help="zoo name, or a folder")
    parser.add_argument("--method", default="divprune")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens")
    parser.add_argument("--clips", type=int, default=20, help="how many are drawn")
    parser.add_argument("--out", type=Path, default=Path("out/videoqa"), help="a folder")
    args = parser.parse_args()

    load = vtc_zoo.load if args.model in vtc_zoo.names() else vtc_zoo.load_folder
    model, processor = load(args.model)
    clips = args.out / f"{args.clips}_clips"
    questions = clips / "questions.jsonl"
    if not questions.is_file():
        moving.write_clips(clips, args.clips)

    for name, recipe in {
        "dense": None,
        f"{args.method}_{args.keep:g}": {"method": args.method, "keep": args.keep},
    }.items():
        summary = vtc.video.answer_questions(
            model,
            processor,
            questions,
            clips,
            recipe=recipe,
            out=clips / f"{name}.jsonl",
            frames=moving.FRAMES,
            max_new_tokens=3,
        )
        print(f"{name}\n{summary}\n")


if __name__ == "__main__":
    main()
