# SPDX-License-Identifier: Apache-2.0
"""Train tiny-dit-digits, a diffusion transformer that draws digits, from nothing on one CPU core.

Run as `python -m vtc_zoo.train_dit_digits --out DIR [--smoke]`. A rectified flow: the model sees
x = (1 - t) picture + t noise and learns the velocity noise - picture. The weights kept are a
running average of those trained. Nothing is chosen by the test digits: what is drawn is judged
once, at the end, and the result goes into metrics.json.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtc_zoo import digits, load_folder
from vtc_zoo.eval_digits import draw
from vtc_zoo.training import Averages, steps_of

LABEL_DROPOUT = 0.1
AVERAGING = 0.999
TURN, ZOOM, SHIFT = math.radians(6), 0.05, 0.06
"""Largest change of a training picture: radians, share of its size, share of half its side."""


@dataclass(frozen=True)
class Plan:
    """How much is trained, and how many digits are drawn and judged at the end."""

    steps: int
    batch: int
    warmup: int
    drawn: int


FULL = Plan(steps=2600, batch=64, warmup=100, drawn=1000)
SMOKE = Plan(steps=20, batch=16, warmup=5, drawn=50)

EXAMPLES = """examples:
  python -m vtc_zoo.train_dit_digits --out work/dit --compile   # a quarter of an hour
  python -m vtc_zoo.train_dit_digits --out work/dit --smoke     # to see that it runs
  python -m vtc_zoo.train_dit_digits --out work/dit --seed 1 --steps 3000"""


Times = Callable[[int, torch.Generator], Tensor]


def build() -> DiTTransformer2DModel:
    """A fresh model: 64 tokens, 6 blocks, each at first the identity, and an output of zeros."""
    model = DiTTransformer2DModel(
        sample_size=digits.SIDE,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=64,
        num_embeds_ada_norm=digits.CLASSES,  # rows of the label table; times need no table
    )
    blocks: Any = model.transformer_blocks
    for layer in (*(block.norm1.linear for block in blocks), model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in blocks:
        # Each block would drop labels on its own draw, so none would ever see "no class" in all.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def jitter(small: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 1, 8, 8] enlarged to [B, 1, 16, 16], each turned, sized and moved a little."""
    b = len(small)
    change = 2 * torch.rand(4, b, generator=generator) - 1
    angle, size = TURN * change[0], 1 + ZOOM * change[1]
    along, across = size * angle.cos(), size * angle.sin()
    rows = (along, -across, SHIFT * change[2], across, along, SHIFT * change[3])
    return enlarge(small, torch.stack(rows, 1).view(b, 2, 3))


def enlarge(small: Tensor, maps: Tensor) -> Tensor:
    """Pictures [B, 1, 8, 8] under affine maps [B, 2, 3], as `digits.read` enlarges: to 16x16."""
    grid = F.affine_grid(maps, [len(small), 1, digits.SIDE, digits.SIDE], align_corners=False)
    return F.grid_sample(small, grid, padding_mode="border", align_corners=False)


def train(plan: Plan, seed: int, compiled: bool = False) -> DiTTransformer2DModel:
    """Train a fresh model and return its running average."""
    torch.manual_seed(seed)
    model = build().train()
    average = copy.deepcopy(model).requires_grad_(False)
    network: Any = torch.compile(model) if compiled else model
    fit(model, average, network, plan, seed, mostly_middle)
    return average.eval()


def fit(
    trained: nn.Module,
    average: nn.Module,
    network: nn.Module,
    plan: Plan,
    seed: int,
    times: Times,
    rate: float = 2e-3,
) -> None:
    """Train the parameters of `trained` by the loss of `network`, which uses them, and keep their
    running average in `average`."""
    generator = torch.Generator().manual_seed(seed)
    small, labels = digits.read_small("train")
    mean = Averages()
    steps = steps_of(trained, plan.steps, plan.warmup, "dit", rate)
    for step, (bar, optimiser) in enumerate(steps):
        chosen = torch.randint(len(labels), (plan.batch,), generator=generator)
        t = times(plan.batch, generator)
        loss = flow_loss(network, jitter(small[chosen], generator), labels[chosen], t, generator)
        optimiser.step(loss)
        share = 1 - min(AVERAGING, (1 + step) / (10 + step))
        for kept, new in zip(average.parameters(), trained.parameters(), strict=True):
            kept.lerp_(new.detach(), share)
        bar.set_postfix_str(mean.update({"loss": loss.item()}), refresh=False)


def mostly_middle(batch: int, generator: torch.Generator) -> Tensor:
    """[batch] times, mostly in the middle, where it is hard."""
    return torch.randn(batch, generator=generator).sigmoid()


def flow_loss(
    model: nn.Module, x: Tensor, labels: Tensor, t: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity for pictures x [B, 1, 16, 16] at times t [B]."""
    noise = torch.randn(x.shape, generator=generator)
    dropped = torch.rand(len(x), generator=generator) < LABEL_DROPOUT
    labels = labels.masked_fill(dropped, digits.NO_CLASS)
    between = torch.lerp(x, noise, t.view(-1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = model(between, timestep=digits.TIME_SCALE * t, class_labels=labels).sample
    return F.mse_loss(velocity.float(), noise - x)


def save(model: DiTTransformer2DModel, out: Path) -> None:
    """Write weights (float16), configuration and scheduler, as `from_pretrained` reads them."""
    model.half().save_pretrained(out)
    FlowMatchEulerDiscreteScheduler().save_pretrained(out)


def options(about: str, examples: str) -> argparse.ArgumentParser:
    """What the scripts of models that draw digits are asked."""
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of those of the full training")
    parser.add_argument("--smoke", action="store_true", help="20 steps, to see that it runs")
    return parser


def planned(parser: argparse.ArgumentParser, full: Plan, smoke: Plan) -> tuple[Any, Plan]:
    """The arguments, and how much is trained."""
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be at least 1")
    plan = smoke if args.smoke else full
    torch.set_num_threads(1)  # faster than two for matrices this small
    return args, replace(plan, steps=args.steps or plan.steps)


def main() -> None:
    parser = options("Train tiny-dit-digits.", EXAMPLES)
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    args, plan = planned(parser, FULL, SMOKE)

    began, began_cpu = time.monotonic(), time.process_time()
    model = train(plan, args.seed, args.compile)
    minutes = [(time.monotonic() - began) / 60, (time.process_time() - began_cpu) / 60]
    save(model, args.out)

    stored, _ = load_folder(args.out)  # what is stored is what is measured
    report(stored, plan, args.seed, minutes, args.out)


def report(model: nn.Module, plan: Plan, seed: int, minutes: Sequence[float], out: Path) -> None:
    """Judge what the model draws, and write and print what came out of the training."""
    images, labels = draw(model, plan.drawn, seed=0)
    metrics = {
        "seed": seed,
        "steps": plan.steps,
        "batch": plan.batch,
        "minutes": round(minutes[0], 1),
        "cpu_minutes": round(minutes[1], 1),
        "drawn": plan.drawn,
        "recognised": round(digits.recognised(images, labels), 4),
        "frechet": round(digits.frechet(images), 4),
        "judge_on_real_test_digits": round(digits.judge_accuracy(), 4),
        "frechet_of_real_test_digits": round(digits.frechet(digits.read("test")[0]), 4),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
