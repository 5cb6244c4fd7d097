# SPDX-License-Identifier: Apache-2.0
"""Train tiny-vit-fmnist or tiny-lookupvit-fmnist from nothing, on one CPU core.

Run as `python -m vtc_zoo.train_fmnist --model vit|lookupvit --data DIR --out DIR [--smoke]`. Both
models see the same images in the same order, augmented the same way, for the same number of steps,
and have the same width and depth. Nothing is chosen by the test images: they are looked at once, at
the end, and the result goes into metrics.json. 5000 training images are kept for validation.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtc_zoo import fmnist, load_folder
from vtc_zoo.eval_fmnist import TRAINED_GRIDS, accuracy, label_of
from vtc_zoo.training import Averages, steps_of

WIDTH, DEPTH, HEADS, PATCH = 128, 6, 2, 4
GRID = (3, 3)
"""Compressed grid of LookupViT that is used unless another one is asked for; it is trained on
`TRAINED_GRIDS`, one drawn for each step."""
VALIDATION = 5000
SMOOTHING = 0.05
SHIFT = 1  # pixels, in each direction


@dataclass(frozen=True)
class Plan:
    """How much is trained and tested."""

    steps: int
    batch: int
    warmup: int
    test_images: int


FULL = Plan(steps=2400, batch=64, warmup=60, test_images=10_000)
SMOKE = Plan(steps=20, batch=16, warmup=5, test_images=100)


def build(kind: str) -> nn.Module:
    """A fresh model: "vit" is timm's VisionTransformer, "lookupvit" ours of the same size."""
    if kind == "vit":
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(**vit_arguments())
    from vtc.modules.lookupvit import LookupViT

    return LookupViT(
        img_size=(fmnist.FRAME,) * 2,
        patch_size=(PATCH, PATCH),
        in_chans=1,
        num_classes=len(fmnist.CLASSES),
        dim=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        grids=TRAINED_GRIDS,
        grid=GRID,
    )


def vit_arguments() -> dict[str, Any]:
    """What timm's VisionTransformer is built from: 64 tokens and a class token."""
    return {
        "img_size": fmnist.FRAME,
        "patch_size": PATCH,
        "in_chans": 1,
        "num_classes": len(fmnist.CLASSES),
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
    }


def augment(padded: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Images `chosen` out of `padded` [N, 32 + 2 s, 32 + 2 s], each moved by up to s pixels and,
    every second one, mirrored: [B, 32, 32] uint8."""
    b, side = len(chosen), fmnist.FRAME
    moved = torch.randint(0, 2 * SHIFT + 1, (2, b, 1), generator=generator)
    mirrored = torch.randint(0, 2, (b, 1), generator=generator).bool()
    line = torch.arange(side)
    rows, columns = moved[0] + line, moved[1] + torch.where(mirrored, side - 1 - line, line)
    return padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def train(kind: str, pixels: np.ndarray, labels: np.ndarray, plan: Plan, seed: int) -> nn.Module:
    """Train a fresh model on pixels [N, 28, 28] uint8 and labels [N]."""
    torch.manual_seed(seed)
    model = build(kind).train()
    generator = torch.Generator().manual_seed(seed)
    border = (fmnist.FRAME - fmnist.SIDE) // 2 + SHIFT
    padded = torch.from_numpy(np.pad(pixels, ((0, 0), (border, border), (border, border))))
    targets = torch.from_numpy(labels)
    mean = Averages()
    for step, (bar, optimiser) in enumerate(steps_of(model, plan.steps, plan.warmup, kind)):
        chosen = torch.randint(len(targets), (plan.batch,), generator=generator)
        x, y = fmnist.normalise(augment(padded, chosen, generator)), targets[chosen]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            if kind == "vit":
                outputs = (model(x),)
            else:
                any_model: Any = model
                outputs = any_model.forward_heads(x, any_model.grid_of_step(step))
        logits = [o.float() for o in outputs]
        losses = [F.cross_entropy(o, y, label_smoothing=SMOOTHING) for o in logits]
        loss = torch.stack(losses).sum()
        optimiser.step(loss)
        right = (torch.stack(logits).sum(0).argmax(-1) == y).float().mean()
        numbers = {"loss": loss.item() / len(logits), "right": right.item()}
        bar.set_postfix_str(mean.update(numbers), refresh=False)
    return model.eval()


def save(kind: str, model: nn.Module, out: Path) -> None:
    """Write weights (float16) and configuration, as `vtc_zoo.load_folder` reads them."""
    if kind == "lookupvit":
        writer: Any = model
        writer.save_pretrained(out, torch.float16)
        return
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "timm",
        "class": "timm.models.vision_transformer.VisionTransformer",
        "arguments": vit_arguments(),
    }
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(out / "model.safetensors"), metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model on Fashion-MNIST.")
    parser.add_argument("--model", choices=("vit", "lookupvit"), required=True)
    parser.add_argument("--data", help=f"folder of the files; default: ${fmnist.VARIABLE}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"default: {FULL.steps}")
    parser.add_argument("--smoke", action="store_true", help="20 steps, to see that it runs")
    args = parser.parse_args()
    plan = SMOKE if args.smoke else FULL
    steps = args.steps or plan.steps
    plan = Plan(steps, plan.batch, plan.warmup, plan.test_images)
    torch.set_num_threads(1)  # faster than two for matrices this small
    if args.model == "vit":
        from timm.layers import set_fused_attn

        set_fused_attn(False)  # plain products are faster backwards in bfloat16 on a CPU

    pixels, labels = fmnist.read("train", args.data)
    order = np.random.default_rng(0).permutation(len(labels))
    held, kept = order[:VALIDATION], order[VALIDATION:]
    began, began_cpu = time.monotonic(), time.process_time()
    model = train(args.model, pixels[kept], labels[kept], plan, args.seed)
    minutes = [(time.monotonic() - began) / 60, (time.process_time() - began_cpu) / 60]
    save(args.model, model, args.out)

    model, _ = load_folder(args.out)  # what is stored is what is measured
    held = held[: plan.test_images]
    test_pixels, test_labels = fmnist.read("test", args.data)
    test = test_pixels[: plan.test_images], test_labels[: plan.test_images]
    grids = TRAINED_GRIDS if args.model == "lookupvit" else (None,)
    metrics = {
        "model": args.model,
        "seed": args.seed,
        "steps": plan.steps,
        "batch": plan.batch,
        "minutes": round(minutes[0], 1),
        "cpu_minutes": round(minutes[1], 1),
        "validation_images": len(held),
        "test_images": len(test[1]),
    }
    for name, (x, y) in (("validation", (pixels[held], labels[held])), ("test", test)):
        found = {label_of(g): round(accuracy(model, x, y, grid=g), 4) for g in grids}
        metrics[f"{name}_accuracy"] = found if len(found) > 1 else next(iter(found.values()))
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
