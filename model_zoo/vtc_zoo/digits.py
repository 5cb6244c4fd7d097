# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits: 1797 real pictures of 8x8 that scikit-learn ships, a sampler for models that
draw such digits, and two ways to judge what was drawn.

Alpaydin and Kaynak, 1998, Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49
(CC BY 4.0). Models see them at 16x16, in -1 (paper) to 1 (ink).
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

CLASSES = 10
NO_CLASS = 10
"""The label of a picture of no class in particular, for classifier-free guidance."""
SIDE = 16
"""Pixels of a picture as models see it."""
STEPS, GUIDANCE = 15, 1.5
TIME_SCALE = 1000
"""A transformer is told the time as 1000 (noise) down to 0 (picture)."""
TEST = 360
"""Digits kept for testing; the other 1437 are for training."""
FLEXDIT: dict[str, Any] = {
    "method": "flexdit",
    "poolingformers": 1,
    "modules": 1,
    "group": (1, 3, 1, 0),
    "top": 0,
    "rate": (0.61, 0.86),
}
"""How tiny-flexdit-digits uses its six blocks: the first takes means, the second makes 25 to 9
tokens of 64, three work on them, the last recovers all."""
FLEXDIT_WEIGHTS = "flexdit.safetensors"
COMPONENTS = 20
"""Principal components in which the Frechet distance is measured."""
_SPLITS = ("train", "test")


def read(split: str) -> tuple[Tensor, Tensor]:
    """Pictures [N, 1, 16, 16] in -1..1 and labels [N] of "train" (1437) or "test" (360)."""
    small, labels = read_small(split)
    return F.interpolate(small, size=(SIDE, SIDE), mode="bilinear"), labels


@cache
def read_small(split: str) -> tuple[Tensor, Tensor]:
    """Pictures as they were published [N, 1, 8, 8], in -1..1, and labels [N]; always one split."""
    if split not in _SPLITS:
        raise ValueError(f"no split {split!r}: give 'train' or 'test'")
    _need_sklearn()
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[:TEST] if split == "test" else order[TEST:]
    pixels = torch.from_numpy(data.images[chosen]).float()[:, None] / 8 - 1  # ink is 0..16
    return pixels, torch.from_numpy(data.target[chosen])


def _need_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the digits and their judge come with scikit-learn: pip install scikit-learn "
            "(or this package with [digits])"
        ) from error


def flexdit() -> dict[str, Any]:
    """Arguments of `vtc.attach` for tiny-flexdit-digits, with the weights beside the model."""
    from vtc_zoo import path

    return {**FLEXDIT, "weights": path("tiny-flexdit-digits") / FLEXDIT_WEIGHTS}


# drawing


@torch.no_grad()
def sample(
    model: nn.Module,
    labels: Tensor | Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> Tensor:
    """Draw digits by a rectified flow: Euler steps from noise at time 1 to pictures at time 0.

    Args:
        model: a transformer like tiny-dit-digits, called as
            `model(x, timestep=[2B], class_labels=[2B]).sample`. Each step is one call with
            B pictures of their class, then the same B of no class.
        labels: [B] of 0..9, or 10 for no class.
        steps: Euler steps of equal length.
        guidance: how far to go from "no class" past "no class" (0) and the class itself (1).
        seed: of the noise; the same for the same B.

    Returns:
        float32 [B, 1, 16, 16] on the model's device; about -1..1, not clamped.
    """
    weights = next(model.parameters())
    labels = _checked(labels).to(weights.device)
    if steps < 1:
        raise ValueError(f"steps={steps}: give 1 or more")
    pair = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 1, SIDE, SIDE, generator=generator).to(weights.device)
    for time in times(steps):
        both = torch.cat([x, x]).to(weights.dtype)
        timestep = torch.full((len(pair),), TIME_SCALE * time, device=weights.device)
        velocity = model(both, timestep=timestep, class_labels=pair).sample.float()
        of_class, of_none = velocity.chunk(2)
        x = x - (of_none + guidance * (of_class - of_none)) / steps
    return x


def times(steps: int) -> list[float]:
    """Times at which the model is asked: 1, 1 - 1/steps, ... 1/steps. They are also what diffusers'
    FlowMatchEulerDiscreteScheduler takes: `scheduler.set_timesteps(sigmas=times(15))`."""
    return [1 - i / steps for i in range(steps)]


def _checked(labels: Tensor | Sequence[int]) -> Tensor:
    found = torch.as_tensor(labels)
    whole = not (found.is_floating_point() or found.is_complex()) and found.dtype != torch.bool
    if not whole or found.ndim != 1 or not len(found):
        raise ValueError(
            f"labels are {found.dtype} {list(found.shape)}: give whole numbers [B], at least one"
        )
    if found.min() < 0 or found.max() > NO_CLASS:
        raise ValueError(
            f"labels are {int(found.min())}..{int(found.max())}: give 0..9, or {NO_CLASS} for no "
            f"class"
        )
    return found.long()


# judging


def recognised(images: Tensor, labels: Tensor | Sequence[int]) -> float:
    """Share of pictures [B, 1, 16, 16] in which a support vector machine, fitted to the real
    training digits, sees the digit of their label [B]. `judge_accuracy` is its own share."""
    wanted, features = _checked(labels), _features(images)
    if len(wanted) != len(features):
        raise ValueError(f"{len(features)} pictures and {len(wanted)} labels: give one for each")
    return float((_judge().predict(features) == wanted.cpu().numpy()).mean())


def judge_accuracy() -> float:
    """Share of the real test digits that the judge of `recognised` gets right."""
    return recognised(*read("test"))


@cache
def _judge() -> Any:
    images, labels = read("train")
    from sklearn.svm import SVC

    return SVC(C=10).fit(_features(images), labels.numpy())


def frechet(images: Tensor) -> float:
    """Frechet distance of pictures [B, 1, 16, 16] to the real training digits.

    Both are taken as normal distributions of 20 features, the first principal components of the
    training digits at 8x8 (ink 0..1). A finite sample is never at 0: compare equal B.
    """
    features = _features(images)
    if len(features) <= COMPONENTS:
        raise ValueError(f"{len(features)} pictures: give more than {COMPONENTS}")
    centre, axes, mean, spread = _real()
    found = (features - centre) @ axes
    own = np.cov(found.T)
    shared = np.sqrt(np.linalg.eigvals(own @ spread).real.clip(0)).sum()
    gap = ((found.mean(0) - mean) ** 2).sum()
    return float(gap + np.trace(own) + np.trace(spread) - 2 * shared)


@cache
def _real() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centre [64] and principal axes [64, 20] of the training digits; their mean and covariance
    along these axes."""
    features = _features(read("train")[0])
    centre = features.mean(0)
    axes = np.linalg.svd(features - centre, full_matrices=False)[2][:COMPONENTS].T
    seen = (features - centre) @ axes
    return centre, axes, seen.mean(0), np.cov(seen.T)


def _features(images: Tensor) -> np.ndarray:
    """Pictures [B, 1, 16, 16] as ink 0..1 at 8x8: [B, 64] float64."""
    if images.ndim != 4 or images.shape[1:] != (1, SIDE, SIDE):
        raise ValueError(f"pictures are {list(images.shape)}: give [B, 1, {SIDE}, {SIDE}]")
    ink = images.detach().cpu().double().clamp(-1, 1) / 2 + 0.5
    return F.avg_pool2d(ink, 2).flatten(1).numpy()


def write_sheet(images: Tensor, file: str | Path, columns: int = 10, scale: int = 4) -> None:
    """Write what `sheet` draws."""
    drawn = sheet(images, columns, scale)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    drawn.save(file)


def sheet(images: Tensor, columns: int = 10, scale: int = 4) -> Image.Image:
    """Pictures [B, 1, 16, 16] side by side, row by row, dark ink on white paper."""
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns}, scale={scale}: give 1 or more")
    rows = -(-len(images) // columns)
    tiles = torch.full((rows * columns, SIDE, SIDE), -1.0)
    tiles[: len(images)] = images[:, 0].detach().cpu().float().clamp(-1, 1)
    paper = ((1 - tiles) * 127.5).round().byte().view(rows, columns, SIDE, SIDE)
    small = Image.fromarray(paper.transpose(1, 2).reshape(rows * SIDE, -1).numpy())
    return small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
