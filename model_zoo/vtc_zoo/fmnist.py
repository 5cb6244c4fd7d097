# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: 60 000 training and 10 000 test photographs of clothes, 28x28, ten classes.

Xiao et al., 2017, https://arxiv.org/abs/1708.07747, MIT licence. The four files are not shipped;
`read` takes the folder they are in. The first 200 test images are shipped (`sample`).
"""

import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SIDE = 28
"""Pixels of an image; models see it in the middle of a black frame of `FRAME` pixels."""
FRAME = 32
MEAN, STD = 0.286, 0.353
"""Of the training pixels, scaled to 0..1."""
VARIABLE = "VTC_FMNIST"
"""Environment variable with the folder of the four files."""

SIZES = {"train": 60_000, "test": 10_000}
_PREFIX = {"train": "train", "test": "t10k"}
_SAMPLE = Path(__file__).parent / "data" / "fmnist_sample.png"
_COLUMNS = 20
_HOW = (
    "They are in the Debian package dataset-fashion-mnist; no root is needed: apt-get download "
    "dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DIR, then give "
    "DIR/usr/share/datasets/fashion-mnist"
)


def read(split: str, folder: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read all images of a split.

    Args:
        split: "train" or "test".
        folder: where the four .gz files are; default: the environment variable VTC_FMNIST.

    Returns:
        pixels [N, 28, 28] uint8 and labels [N] int64, positions in `CLASSES`.

    Raises:
        ValueError: unknown split, no folder given, or a file that is not what it should be.
        FileNotFoundError: a file is missing; the text says where it comes from.
    """
    if split not in SIZES:
        raise ValueError(f"no split {split!r}: give 'train' or 'test'")
    folder = folder or os.environ.get(VARIABLE)
    if not folder:
        raise ValueError(
            f"no folder with the Fashion-MNIST files: give one, or set {VARIABLE}. {_HOW}."
        )
    n, prefix = SIZES[split], _PREFIX[split]
    pixels = read_idx(Path(folder) / f"{prefix}-images-idx3-ubyte.gz", (n, SIDE, SIDE))
    labels = read_idx(Path(folder) / f"{prefix}-labels-idx1-ubyte.gz", (n,))
    if labels.max() >= len(CLASSES):
        raise ValueError(
            f"a label of the {split} split is {labels.max()}, and there are {len(CLASSES)} "
            f"classes: the files are not Fashion-MNIST. {_HOW}."
        )
    return pixels, labels.astype(np.int64)


def read_idx(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read a gzip-ed IDX file of bytes that must hold exactly `shape`."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file.name} in {file.parent}. {_HOW}.")
    try:
        raw = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} cannot be unpacked ({error}): fetch it again. {_HOW}.") from None
    header = 4 + 4 * len(shape)
    magic = 0x0800 + len(shape)  # 08: unsigned bytes; then the number of axes
    if len(raw) < header:
        raise ValueError(f"{file} is cut off after {len(raw)} bytes: fetch it again. {_HOW}.")
    found, *sizes = struct.unpack(f">{1 + len(shape)}i", raw[:header])
    if found != magic:
        raise ValueError(
            f"{file} starts with {found:#010x}, not {magic:#010x}: it is no IDX file of bytes with "
            f"{len(shape)} axes"
        )
    if tuple(sizes) != shape:
        raise ValueError(f"{file} says it holds {tuple(sizes)}, and {shape} is expected")
    body = np.frombuffer(raw, np.uint8, offset=header)
    if body.size != np.prod(shape):
        raise ValueError(
            f"{file} holds {body.size} bytes of data, and {shape} needs {np.prod(shape)}: fetch it "
            f"again. {_HOW}."
        )
    return body.reshape(shape)


def sample() -> tuple[np.ndarray, np.ndarray]:
    """The first 200 test images, which are shipped: pixels [200, 28, 28], labels [200]."""
    labels = np.array(json.loads(_SAMPLE.with_suffix(".json").read_text())["labels"])
    with Image.open(_SAMPLE, formats=["PNG"]) as sheet:
        tiles = np.asarray(sheet).reshape(-1, SIDE, _COLUMNS, SIDE)
    return tiles.transpose(0, 2, 1, 3).reshape(-1, SIDE, SIDE), labels


def write_sample(folder: str | Path, n: int = 200) -> None:
    """Write the sheet that `sample` reads from the files of the test split in `folder`."""
    pixels, labels = (part[:n] for part in read("test", folder))
    rows = pixels.reshape(-1, _COLUMNS, SIDE, SIDE).transpose(0, 2, 1, 3)
    _SAMPLE.parent.mkdir(exist_ok=True)
    Image.fromarray(rows.reshape(-1, _COLUMNS * SIDE)).save(_SAMPLE, optimize=True)
    about = {
        "source": f"Fashion-MNIST, test images 0-{n - 1}",
        "licence": "MIT, Copyright 2017 Zalando SE, https://tech.zalando.com",
        "labels": labels.tolist(),
    }
    _SAMPLE.with_suffix(".json").write_text(json.dumps(about) + "\n")


def preprocess(images: Any) -> Any:
    """Turn images into what the models take.

    Args:
        images: a PIL image (any size and mode; it becomes grey and 28x28), or uint8 pixels
            [28, 28] or [B, 28, 28] as an array, or a list of either. Bright clothes on black.

    Returns:
        float32 tensor [B, 1, 32, 32], normalised; B is 1 for one image.
    """
    import torch

    if isinstance(images, (list, tuple)):
        return torch.cat([preprocess(image) for image in images])
    if isinstance(images, Image.Image):
        grey = images.convert("L")
        if grey.size != (SIDE, SIDE):
            grey = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        images = np.asarray(grey)
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[-2:] != (SIDE, SIDE):
        raise ValueError(
            f"pixels are {pixels.dtype} {pixels.shape}: give a PIL image, or uint8 values "
            f"[{SIDE}, {SIDE}] or [B, {SIDE}, {SIDE}]"
        )
    frame = (FRAME - SIDE) // 2
    padded = np.pad(pixels.reshape(-1, SIDE, SIDE), ((0, 0), (frame, frame), (frame, frame)))
    return normalise(torch.from_numpy(padded))


def normalise(pixels: Any) -> Any:
    """uint8 tensor [B, H, W] -> float32 [B, 1, H, W], of mean 0 and spread 1."""
    return (pixels[:, None].float() / 255 - MEAN) / STD
