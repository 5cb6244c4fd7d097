"""Context: everything a method may look at, as tensors. One row is one image (or one video)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .errors import MissingSignal, UnsupportedSite

#: name -> what an adapter promises to deliver under it
SIGNALS: dict[str, str] = {
    "keys": "[R, N, C] keys of the layer before the site after RoPE, KV heads concatenated; in a "
    "padded row as in the row alone",
    "queries": "[R, N, C] queries of the layer before the site after RoPE, heads concatenated; in "
    "a padded row as in the row alone",
    "text_keys": "[R, T, C] the same keys for the text tokens that follow the row's sample images",
    "attn_last": "[R, H, N] attention of the last prompt token in the layer before the site",
    "attn_text": "[R, T, N] attention of the text after the images, layer before, mean over heads",
    "attn_ahead": "[R, H, N] attention of the last prompt token in the layer about to run",
    "attn_cls": "[R, N] attention in the vision tower: CLS row, or mean received without a CLS",
    "vision_keys": "[R, N, C] keys of that vision-tower layer, mean over heads and merged patches",
    "cls_rank": "[R, N] share of its tower image that ranks above a token by CLS attention, 0 to 1",
    "tile": "[R, N] tower image (tile, frame) of each token; equal images may share one",
    "features": "[R, N, U] what the projector made each token of, 0 for tokens it did not make",
    "text": "[R, T, D] hidden states of the text tokens after the images",
    "text_mask": "[R, T] bool, which of those text tokens exist",
    "normed": "[R, N, D] x after the language model's final norm",
    "text_normed": "[R, T, D] text after the language model's final norm",
    "projector": "`vtc.algorithms.projector.Projector`, maps features [n, U] to embeddings [n, D]",
    "token_size": "[R, N] how many original tokens each token stands for",
    "values": "[R, N, C] values in the KV cache of this layer, KV heads concatenated",
    "survivors": "[R, N] bool, which columns of this layer the last drop of the prefill kept",
}


#: kind of site with layers -> parts of a layer that are sites of their own
PARTS = {"vision": ("", "mlp"), "decoder": ("",), "dit": ("", "attn")}


@dataclass(frozen=True)
class Site:
    """Where a step acts: `projector`, `decoder.2`, `vision.3`, `cache`, `dit.7`; before that layer,
    or, as in `vision.3.mlp`, between its attention and its MLP, or, as in `dit.7.attn`, around its
    attention alone."""

    kind: str
    layer: int | None = None
    part: str = ""

    @property
    def mlp(self) -> bool:
        return self.part == "mlp"

    @classmethod
    def parse(cls, text: str) -> Site:
        kind, *rest = text.split(".")
        if kind in ("projector", "cache") and not rest:
            return cls(kind)
        if kind in PARTS and rest and rest[0].isdigit() and ".".join(rest[1:]) in PARTS[kind]:
            return cls(kind, int(rest[0]), ".".join(rest[1:]))
        raise UnsupportedSite(
            f"not a site: {text!r}. Sites are 'projector', 'cache', 'vision.<i>', 'decoder.<i>', "
            f"'dit.<i>' with a layer number, 'vision.<i>.mlp' and 'dit.<i>.attn'."
        )

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        return ".".join(filter(None, (self.kind, str(self.layer), self.part)))


@dataclass(frozen=True)
class Layout:
    """Token grid of one row in raster order: frames x height x width, then `tail` tokens that
    belong to no frame (the newline behind a video)."""

    frames: int
    height: int
    width: int
    tail: int = 0

    @property
    def cells(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width

    @property
    def n(self) -> int:
        return self.frames * self.cells + self.tail


#: a box around a whole picture
WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Part:
    """Tokens of one row, from place `first` on, that are a grid over a picture, line by line.

    Attributes:
        box: left, top, right and bottom edge of the grid in shares of the picture; below 0 and
            above 1 is padding around it.
        gap: tokens behind every line that show nothing (newlines).
    """

    first: int
    height: int
    width: int
    box: tuple[float, float, float, float]
    gap: int = 0

    @property
    def end(self) -> int:
        """Place behind its last token."""
        return self.first + self.height * (self.width + self.gap)

    @property
    def places(self) -> tuple[int, ...]:
        """Place of every cell in raster order."""
        line = self.width + self.gap
        starts = range(self.first, self.first + self.height * line, line)
        return tuple(start + column for start in starts for column in range(self.width))


class Signals(Mapping[str, Tensor]):
    """Lazy signals: each is computed at most once, when a method asks for it."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)
        self._done: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._done:
            if name not in self._makers:
                offered = ", ".join(sorted(self._makers)) or "none"
                raise MissingSignal(
                    f"signal {name!r} was not declared in `needs`, or is not offered here. "
                    f"Offered: {offered}."
                )
            self._done[name] = self._makers[name]()
        return self._done[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class Context:
    """What a method sees.

    Attributes:
        x: [R, N, D] visual tokens at the site, right padded to the longest row.
        visual: [R, N] bool, False on that padding.
        counts: real tokens of each row, known on the host.
        original: tokens each row had before the first reduction; budgets refer to it.
        source: [R, N] where each token sat on that original grid.
        layout: original grid of each row, None where the adapter cannot know it.
        parts: what the tokens of each row show, of images that were cut into tiles; no layout then.
        site, signals: where we are, and what the adapter offers there.
        timestep: how noisy the images of a diffusion transformer still are: 1 noise, 0 data.
        seed: for methods that draw; they build a generator of their own from it.
        depth: layers of the language model, 0 where there is none.
        history: [layers before this site][R] tokens that each of them processed of every row.
    """

    x: Tensor
    visual: Tensor
    counts: tuple[int, ...]
    original: tuple[int, ...]
    source: Tensor
    layout: tuple[Layout | None, ...]
    site: Site
    signals: Mapping[str, Tensor] = field(default_factory=lambda: Signals({}))
    timestep: float | None = None
    seed: int = 0
    depth: int = 0
    history: tuple[tuple[int, ...], ...] = ()
    parts: tuple[Sequence[Part], ...] = ()
