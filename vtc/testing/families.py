"""Tiny, randomly initialised instances of real Hugging Face VLM classes with ragged batches.

Every family has 4 decoder layers, hidden size 64 and 4:2 grouped-query attention.  By default
row 0 of the batch holds one image and row 1 two images (or an image and a video), left-padded.
The text, pixels and sizes of a row depend only on the row number and ``data_seed``, therefore
``Family.single(row)`` is exactly the same sample without its neighbours and without padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .batches import (
    HIDDEN,
    IMAGE,
    LAYERS,
    PAD,
    VIDEO,
    VOCAB,
    Inputs,
    Recipe,
    Segment,
    collate,
    words,
)
from .configs import FAMILIES, NAMED, TEXT, UNSEEN

__all__ = [
    "FAMILIES",
    "HIDDEN",
    "IMAGE",
    "LAYERS",
    "NAMED",
    "PAD",
    "TEXT",
    "UNSEEN",
    "VIDEO",
    "VOCAB",
    "Family",
    "Inputs",
    "Recipe",
    "Segment",
    "collate",
    "fault",
    "make",
    "usable",
]


@dataclass(frozen=True)
class Family:
    """A tiny model (eval mode) and a batch for it."""

    name: str
    model: PreTrainedModel
    inputs: Inputs
    visual_ids: frozenset[int]
    rows: tuple[tuple[Segment, ...], ...]
    recipe: Recipe

    def single(self, row: int) -> Inputs:
        """Inputs of one row alone: no padding, only the pixels of that row."""
        return self.batch([row])

    def padded(self, side: str) -> Inputs:
        """The whole batch padded on `side` ("left" or "right")."""
        return self.batch(range(len(self.rows)), side)

    def batch(self, rows: Sequence[int], side: str = "left") -> Inputs:
        """Inputs of the given rows, in that order."""
        picked = [self.rows[r] for r in rows]
        return collate(picked, self.recipe, side, self.model.dtype)

    def visual(self, inputs: Inputs | None = None) -> Tensor:
        """True at the visual placeholders."""
        ids = (self.inputs if inputs is None else inputs)["input_ids"]
        return torch.isin(ids, torch.tensor(sorted(self.visual_ids)))  # [B, L]

    def labelled(self, inputs: Inputs | None = None) -> Inputs:
        """Inputs plus `labels` (text tokens only; padding and visual tokens are ignored)."""
        inputs = dict(self.inputs if inputs is None else inputs)
        skip = self.visual(inputs) | (inputs["attention_mask"] == 0)  # [B, L]
        return inputs | {"labels": inputs["input_ids"].masked_fill(skip, -100)}


def make(
    name: str | Callable[[str, torch.dtype], Recipe],
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    *,
    images_per_row: Sequence[int] | None = None,
    padding: str = "left",
    row: int | None = None,
    data_seed: int = 0,
) -> Family:
    """Build one family, by name or from a function like those of `configs`.

    `images_per_row` replaces the default rows by rows with that many images each (0 is allowed),
    `padding` is the side for `Family.inputs` and `row` makes `Family.inputs` that row alone.
    `seed` determines the weights, `data_seed` the inputs.  The global generator is not touched.
    Raises `unittest.SkipTest` for a name whose family the installed transformers lacks or cannot
    run (see `fault`).
    """
    if isinstance(name, str) and (why := fault(name)) is not None:
        raise SkipTest(f"{name}: {why}")
    return _make(name, attn, dtype, seed, images_per_row, padding, row, data_seed)


@functools.cache
def fault(name: str) -> str | None:
    """Why the installed transformers cannot run this family without vtc; None when it can."""
    import transformers

    try:
        family = _make(name)
        with torch.no_grad():
            family.model(**family.inputs)
    except Exception as error:  # whatever that version raises where a class is missing or broken
        return f"transformers {transformers.__version__} does not run it: {error!r}"
    return None


def usable() -> tuple[str, ...]:
    """The families that the installed transformers can run."""
    return tuple(name for name in FAMILIES if fault(name) is None)


def _make(
    name: str | Callable[[str, torch.dtype], Recipe],
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    images_per_row: Sequence[int] | None = None,
    padding: str = "left",
    row: int | None = None,
    data_seed: int = 0,
) -> Family:
    with torch.random.fork_rng(devices=[]):
        recipe = (FAMILIES[name] if isinstance(name, str) else name)(attn, dtype)
    model = recipe.model
    _init(model, seed)
    model.eval()
    _plain_greedy(model)
    rows = _rows(recipe, images_per_row, data_seed)
    ids = {IMAGE} if recipe.video is None else {IMAGE, VIDEO}
    family = Family(
        name if isinstance(name, str) else name.__name__, model, {}, frozenset(ids), rows, recipe
    )
    inputs = family.padded(padding) if row is None else family.single(row)
    family.inputs.update(inputs)
    return family


def _rows(
    recipe: Recipe, images_per_row: Sequence[int] | None, data_seed: int
) -> tuple[tuple[Segment, ...], ...]:
    if images_per_row is None:
        kinds = [["image"], ["image", "image" if recipe.video is None else "video"]]
    else:
        kinds = [["image"] * n for n in images_per_row]
    return tuple(_row(recipe, r, row, data_seed) for r, row in enumerate(kinds))


def _row(recipe: Recipe, r: int, kinds: Sequence[str], data_seed: int) -> tuple[Segment, ...]:
    gen = torch.Generator().manual_seed(1000 * data_seed + 17 * r + 3)
    segments = [words(5 - 2 * (r % 2), gen)]
    for j, kind in enumerate(kinds):
        if j:
            segments.append(words(4, gen))
        encode = recipe.video if kind == "video" else recipe.image
        assert encode is not None
        segments.append(encode(r + j, gen))
    segments.append(words(9 - 3 * (r % 2), gen))
    return tuple(segments)


def _plain_greedy(model: PreTrainedModel) -> None:
    config = model.generation_config
    config.pad_token_id, config.eos_token_id, config.bos_token_id = PAD, None, None
    config.do_sample = False


def _init(model: PreTrainedModel, seed: int) -> None:
    """Normal weights at a scale where every layer and every visual token matters."""
    gen = torch.Generator().manual_seed(seed)
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
    }
    embeddings = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    table = model.get_input_embeddings().weight
    input_table = next(name for name, p in model.named_parameters() if p is table)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=gen)
            if name in norms:  # starts as the neutral value: 1, or 0 for a (1 + w) norm
                neutral = 0.0 if "Gemma" in type(_parent(model, name)).__name__ else 1.0
                p.copy_(neutral + 0.1 * noise)
            elif p.ndim < 2:
                p.copy_(0.1 * noise)
            elif name in embeddings or p.shape[0] == 1:  # tables, class tokens, position tables
                scaled = name == input_table and "gemma" in model.config.model_type
                p.copy_(0.3 * noise / (math.sqrt(HIDDEN) if scaled else 1.0))
            else:
                sharp = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                fan_in = p.shape[-1] if p.ndim == 3 else math.prod(p.shape[1:])
                p.copy_(sharp * noise / math.sqrt(fan_in))
        head: Any = model.get_output_embeddings()
        head.weight[IMAGE:] = 0  # greedy never writes a placeholder


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
