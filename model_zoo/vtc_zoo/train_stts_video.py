# SPDX-License-Identifier: Apache-2.0
"""Train STTS end to end on tiny-llava-video, at 50 % of the tokens, on one CPU core.

Run as `python -m vtc_zoo.train_stts_video --out DIR [--smoke]`. The trained model runs with the
method attached, as a user would train it: the scorer, the tower, the projector and the language
model learn from the answers (through the bias on one block's attention) and from the temporal loss.
Fixed steps, fixed seeds. The folder holds the model and `stts.safetensors`, the scorer.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import vtc
import vtc_zoo
from vtc_zoo import load_folder, moving
from vtc_zoo.train_llava_video import (
    MIX,
    PREFIX,
    QUESTIONS,
    TOKENS,
    VIDEO,
    VOCABULARY,
    build_processor,
)
from vtc_zoo.training import (
    ATTENTION,
    BOS,
    EOS,
    Averages,
    Packed,
    accuracies,
    normalise,
    pack,
    save,
    schedule,
    set_up,
)

SITE, KEEP = "vision.2", 0.5
SCORER = "stts.safetensors"
BATCH = 12
SIMILARITY = 0.5
"""Strength of the temporal loss, as published."""
RATES = {"scorer": 1e-3, "model": 2e-4}
FIRST_CLIP = 1_000_000
"""Clips that the dense model has not been trained on."""


def inputs_of(frames: np.ndarray, packed: Packed) -> dict[str, Any]:
    """Arguments of the model: clips [B, 8, 96, 96, 3] and the questions packed behind them."""
    batch = len(frames)
    pixels = normalise(frames.reshape(-1, *frames.shape[2:]))
    head = torch.tensor([BOS] + [VIDEO] * TOKENS).expand(batch, -1)
    return {
        "input_ids": torch.cat([head, packed.ids], 1),
        "pixel_values_videos": pixels.unflatten(0, (batch, moving.FRAMES)),
        "attention_mask": packed.mask,
        "position_ids": packed.positions,
        "use_cache": False,
    }


def train(model: Any, session: vtc.Session, steps: int) -> None:
    """Learn everything in place."""
    scorer = session.modules[SITE].train()
    groups = [
        {"params": list(scorer.parameters()), "peak": RATES["scorer"]},
        {"params": list(model.parameters()), "peak": RATES["model"]},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    rng, mean = random.Random(2), Averages()
    with tqdm(range(steps), "stts", mininterval=5) as bar:
        for step in bar:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps, warmup=50)
            numbers = range(FIRST_CLIP + step * BATCH, FIRST_CLIP + (step + 1) * BATCH)
            scenes, clips = zip(*map(moving.training_scene, numbers), strict=True)
            asked = [moving.ask(scene, rng, QUESTIONS, MIX) for scene in scenes]
            packed = pack(asked, PREFIX, VOCABULARY)
            learnt = packed.targets >= 0
            targets = packed.targets[learnt]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**inputs_of(np.stack(clips), packed)).logits
            logits = logits[:, PREFIX:][learnt].float()
            similarity = session.take_loss()
            loss = F.cross_entropy(logits, targets) + SIMILARITY * similarity
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
            optimiser.step()
            right = (logits.argmax(-1) == targets)[targets != EOS].tolist()
            shown = accuracies(asked, right) | {"similarity": float(similarity)}
            bar.set_postfix_str(mean.update(shown), refresh=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train STTS on tiny-llava-video.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and scorer")
    parser.add_argument("--model", type=Path, help="dense model; default: the shipped one")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--smoke", action="store_true", help="20 steps, to see that it runs")
    args = parser.parse_args()
    set_up()
    began = time.monotonic()
    folder = args.model or vtc_zoo.path("tiny-llava-video")
    model, _ = load_folder(folder, attn_implementation=ATTENTION)
    with vtc.attach(model.train(), "stts", keep=KEEP, at=SITE) as session:
        train(model, session, 20 if args.smoke else args.steps)
        session.modules[SITE].bfloat16().save(_made(args.out) / SCORER)
    save(model, build_processor(), args.out)
    print(f"trained in {(time.monotonic() - began) / 60:.1f} min, saved in {args.out}")
    scorer = f"stts:weights={args.out / SCORER}"
    print(f"test it with: vtc bench quality --model {args.out} --methods {scorer} --at {SITE}")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
