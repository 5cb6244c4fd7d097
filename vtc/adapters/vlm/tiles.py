"""Images that a model cuts into tiles of any arrangement: what of the picture every token shows.

The model's own `pack_image_features` is asked: coordinates go through it in place of features, so
that its order, unpadding, resizing and newlines need not be known here. A forward only notes what
the packing was given; it is asked when somebody reads the parts, such as a drawing."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from typing import Any, overload

import torch
from torch import Tensor, nn

from ...context import WHOLE, Part
from ..slot import Slot
from .grids import Run, repeat_beams

Parts = tuple[Part, ...]
#: marks of newlines and, from there down, of the tokens of the whole picture
NEWLINE, FIRST = -1.0, -2.0


class Packing:
    """One call of `pack_image_features`: shapes and sizes, not the features.

    The model is not kept alive: once it is gone, nothing is known of what was not read before.
    """

    def __init__(self, pack: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._pack = weakref.WeakMethod(pack) if inspect.ismethod(pack) else lambda: pack
        self._newline = arguments.get("image_newline") is not None
        left_out = ("image_features", *["image_newline"] * self._newline)
        kept = {name: value for name, value in arguments.items() if name not in left_out}
        self._arguments = {name: _copied(value) for name, value in kept.items()}
        features = arguments.get("image_features")
        known = isinstance(features, list | tuple | Tensor)
        shapes = [getattr(views, "shape", ()) for views in features] if known else []
        self._views: Sequence[Sequence[int]] = shapes

    def __len__(self) -> int:
        return len(self._views)

    @cached_property
    def parts(self) -> tuple[Parts, ...]:
        """Parts of every image, () where its tokens are no grid of tiles."""
        try:
            with torch.no_grad(), torch.device("cpu"):
                return self._find()
        except Exception:  # code of the model met no features: a drawing must never fail a model
            return ((),) * len(self)  # pictures then say that the grid is unknown

    def _find(self) -> tuple[Parts, ...]:
        pack, shapes = self._pack(), [(shape[0], shape[1]) for shape in self._views]
        if pack is None or any(math.isqrt(n) ** 2 != n for _, n in shapes):
            return ((),) * len(shapes)
        ways = [[c for c in range(1, views) if (views - 1) % c == 0] or [1] for views, _ in shapes]
        most = max(map(len, ways))
        sent = [
            torch.cat([_coordinates(*shape, c) for c in (way * most)[:most]], -1)
            for shape, way in zip(shapes, ways, strict=True)
        ]
        told = {name: v.cpu() if torch.is_tensor(v) else v for name, v in self._arguments.items()}
        sizes = told["image_sizes"]
        told |= {"image_features": sent}
        if self._newline:
            told["image_newline"] = torch.full((2 * most,), NEWLINE, device="cpu")
        packed = pack(**told)
        packed = packed[0] if isinstance(packed, tuple) else packed
        return tuple(
            _parts(tokens, views, n, way, (int(size[0]), int(size[1])))
            for tokens, (views, n), way, size in zip(packed, shapes, ways, sizes, strict=True)
        )


def _copied(value: Any) -> Any:
    """An argument as it is now, without waiting for an accelerator."""
    if torch.is_tensor(value):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value


class Shown(Sequence[Part]):
    """The parts of one image, found when they are read; a copy is a tuple.

    tokens: how many of it the language model has; other parts are not of these tokens.
    """

    def __init__(self, packing: Packing, image: int, tokens: int | None = None) -> None:
        self.packing, self.image, self._tokens = packing, image, tokens

    def of(self, tokens: int) -> Shown:
        """The same for a run of so many placeholders, which may end with a newline."""
        return Shown(self.packing, self.image, tokens)

    @property
    def _parts(self) -> Parts:
        parts, n = self.packing.parts[self.image], self._tokens
        return parts if parts and (n is None or 0 <= n - parts[-1].end <= 1) else ()

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> Parts: ...
    def __getitem__(self, index: int | slice) -> Part | Parts:
        return self._parts[index]

    def __len__(self) -> int:
        return len(self._parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Shown, tuple)) and self._parts == tuple(other)

    def __hash__(self) -> int:
        return hash(self._parts)

    def __repr__(self) -> str:
        return repr(self._parts)

    def __reduce__(self) -> tuple[type, tuple[Parts]]:
        return tuple, (self._parts,)


#: every image that was packed since the last forward
TILES: Slot[tuple[Shown, ...]] = Slot("vtc_tiles", ())


def packs_tiles(base: nn.Module) -> bool:
    """The model has a packing that takes features and sizes of images."""
    pack = getattr(base, "pack_image_features", None)
    wanted = {"image_features", "image_sizes"}
    return pack is not None and wanted <= set(inspect.signature(pack).parameters)


def note_tiles(pack: Callable[..., Any]) -> Callable[..., Any]:
    """`pack_image_features` that remembers what it was given."""
    signature = inspect.signature(pack)

    @wraps(pack)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            packing = Packing(pack, signature.bind(*args, **kwargs).arguments)
            TILES.set(tuple(Shown(packing, i) for i in range(len(packing))))
        return pack(*args, **kwargs)

    return called


def runs_of_images(
    runs: Sequence[Run], kinds: Sequence[int], tiles: Sequence[Shown]
) -> list[Sequence[Part]]:
    """Parts of every run of placeholders, () where no packing was noted."""
    images = [run for run, kind in zip(runs, kinds, strict=True) if not kind]
    known = list(tiles)
    if len(known) != len(images):  # a prompt may stand there several times
        known = [shown for shown, _ in repeat_beams([(shown, 0) for shown in tiles], images)]
    left = iter(known)
    return [
        () if kind or not known else next(left).of(n)
        for (_, _, n), kind in zip(runs, kinds, strict=True)
    ]


def _coordinates(views: int, n: int, columns: int) -> Tensor:
    """[views, n, 2] line and column of every token among tiles that stand in so many columns; the
    first view is the whole picture, whose tokens are counted down instead."""
    side = math.isqrt(n)
    tile, token = (
        torch.arange(views, device="cpu")[:, None] - 1,
        torch.arange(n, device="cpu"),
    )
    y = tile // columns * side + token // side
    x = tile % columns * side + token % side
    out = torch.stack([y, x], -1).float()
    out[0] = FIRST - token[:, None]
    return out


def _parts(tokens: Tensor, views: int, n: int, ways: list[int], size: tuple[int, int]) -> Parts:
    """The parts of one image of `size` (height, width), from what was sent [N, 2 ways]."""
    side = math.isqrt(n)
    if len(tokens) < n or not torch.equal(tokens[:n, 0], FIRST - torch.arange(n, device="cpu")):
        return ()
    whole, rest = Part(0, side, side, WHOLE), tokens[n:]
    if views == 1:
        return (whole,) if bool((rest == NEWLINE).all()) else ()
    newline = rest[:, 0] == NEWLINE
    for number, columns in enumerate(ways):
        found = _lines(rest[~newline, 2 * number : 2 * number + 2])
        if found is None:
            continue
        ys, xs = found
        gap = int(newline.any())
        lines = torch.arange(len(rest), device="cpu") % (len(xs) + gap)
        canvas = (side * ((views - 1) // columns), side * columns)
        box = _box(ys, xs, canvas, size)
        if torch.equal(newline, (lines == len(xs)) & bool(gap)) and box is not None:
            return whole, Part(n, len(ys), len(xs), box, gap)
    return ()


def _lines(at: Tensor) -> tuple[list[float], list[float]] | None:
    """Lines and columns of tokens at [N, 2], when they are an even grid in raster order."""
    starts = (at[:, 0] != at[0, 0]).nonzero()
    width = int(starts[0]) if len(starts) else len(at)
    if len(at) % width:
        return None
    grid = at.view(-1, width, 2)
    ys, xs = grid[:, 0, 0], grid[0, :, 1]
    even = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), -1)
    steps = [d for line in (ys, xs) for d in (line.diff() - line.diff()[:1]).tolist()]
    rising = all(float(line.diff().min()) > 0 for line in (ys, xs) if len(line) > 1)
    if not rising or max(map(abs, steps), default=0) > 1e-3 or not torch.allclose(grid, even):
        return None
    return ys.tolist(), xs.tolist()


def _box(
    ys: list[float], xs: list[float], canvas: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """Where a grid of tokens lies in a picture of `size` that was made as large as the canvas
    allows and put in its middle. None when it does not cover the picture, but for a token."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    edges = []
    for line, whole, length in zip((ys, xs), canvas, size, strict=True):
        step = (line[-1] - line[0]) / (len(line) - 1) if len(line) > 1 else 1.0
        inner = length * scale
        start = line[0] + 0.5 - step / 2 - (whole - inner) / 2
        end = start + step * len(line)
        if max(abs(start), abs(end - inner)) > 1.5 * step:
            return None
        edges.append((start / inner, end / inner))
    (top, bottom), (left, right) = edges
    return left, top, right, bottom
