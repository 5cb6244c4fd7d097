"""A slow reference for dropping and merging inside a vision tower: full length, masked keys.

A *unit* is what becomes one token of the language model: one patch for LLaVA and PaliGemma, the
`s * s` patches of a pixel shuffle or an average pooling, the 4 rows of a packed tower.  Units are
numbered in raster order (frame, row, column), whatever order the tower works in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

from . import oracle
from .families import IMAGE, VIDEO, Family
from .images import line_of, rows_of

PerImage = Tensor | Sequence[Tensor]  # [tiles, ...], or one tensor for every image or video
Hook = Callable[..., Any]


@dataclass(frozen=True)
class TowerReduction:
    """What happens before one block of the tower.

    The three tensors hold one entry per tile (or image or video of `grid_thw`): stacked, or as a
    list when the numbers of units differ.
    """

    layer: int
    keep: PerImage  # bool [units]: units that stay visible from this block on
    mix: PerImage | None = None  # [units, units]: patches become `mix @ patches` before the block
    bias: PerImage | None = None  # [units]: added to the attention logits of the unit's keys


@contextmanager
def masked_tower(
    family_or_model: Family | PreTrainedModel, reductions: Sequence[Sequence[TowerReduction]]
) -> Iterator[_Reference]:
    """Within the context the vision tower sees only the kept units.

    reductions: one entry per tower call, in order; each a list of what happens in that call, an
        empty one for nothing.  Reductions act by ascending layer, `keep` adds up (AND), a bias
        holds until the next reduction that has one.  Dropped units become zero rows behind the
        projector or merger.  Tokens in front of the patches (CLS) always stay.
    """
    model = family_or_model.model if isinstance(family_or_model, Family) else family_or_model
    reference = _Reference(model, reductions)
    with ExitStack() as stack:
        config = reference.tower.config
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = "sdpa"
        overlay = {"sdpa": reference.attend(ALL_ATTENTION_FUNCTIONS["sdpa"])}
        stack.enter_context(mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, overlay))
        if hasattr(model.model, "apply_pooling"):
            pool = reference.pool(model.model.apply_pooling)
            stack.enter_context(mock.patch.object(model.model, "apply_pooling", pool))
        handles = [
            reference.tower.register_forward_pre_hook(reference.start, with_kwargs=True),
            reference.projector.register_forward_hook(reference.zero),
        ]
        for i, block in enumerate(reference.blocks):
            handles.append(block.register_forward_pre_hook(reference.enter(i), with_kwargs=True))
        for handle in handles:
            stack.callback(handle.remove)
        yield reference


def zero_columns(
    family_or_model: Family | PreTrainedModel,
    inputs: dict[str, Tensor],
    offsets: Sequence[int] = (0,),
) -> Tensor:
    """True at visual columns whose embedding is all zero, and at newlines whose line is, [B, L].

    offsets: where the pieces of the prompt begin; a newline goes with what its piece has of a line.

    Called inside `masked_tower` these are the columns of dropped units: the keep mask of
    "projector" is its negation.  Uses up one entry of `reductions` for every tower call.
    """
    model = family_or_model.model if isinstance(family_or_model, Family) else family_or_model
    with torch.no_grad(), _bare_placeholders(model):
        embeds = oracle.encode(model, inputs).embeds  # [B, L, C]
    ids = inputs["input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)
    zero = visual & (embeds == 0).all(-1)
    newline = visual & _is_newline(model, embeds)
    for start, end in itertools.pairwise((*offsets, visual.shape[1])):
        for sample, place in rows_of(visual[:, start:end]):
            columns = [start + p for p in place]
            breaks = newline[sample, columns].nonzero()[:, 0].tolist()
            for at in breaks:
                line = [columns[p] for p in line_of(at, breaks)]
                zero[sample, columns[at]] = bool(line) and bool(zero[sample, line].all())
    return zero


def newlines(family_or_model: Family | PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """True at visual columns that hold the newline of the model, [B, L]."""
    model = family_or_model.model if isinstance(family_or_model, Family) else family_or_model
    ids = inputs["input_ids"]
    with torch.no_grad():
        embeds = oracle.encode(model, inputs).embeds
    return ((ids == IMAGE) | (ids == VIDEO)) & _is_newline(model, embeds)


def _is_newline(model: PreTrainedModel, embeds: Tensor) -> Tensor:
    row: Any = getattr(getattr(model, "model", None), "image_newline", None)
    return embeds.new_zeros(embeds.shape[:2]).bool() if row is None else (embeds == row).all(-1)


@contextmanager
def _bare_placeholders(model: PreTrainedModel) -> Iterator[None]:
    """Visual columns hold the features alone, also where they are added to an embedding."""
    table: Any = model.get_input_embeddings().weight
    before = table[IMAGE].clone()
    table[IMAGE] = 0
    try:
        yield
    finally:
        table[IMAGE] = before


def parts(model: PreTrainedModel) -> tuple[Any, Any, Any]:
    """The vision tower, the list of its blocks, and the projector, connector or merger."""
    base = model.model
    names = ("vision_tower", "visual", "vision_model")
    tower = next(getattr(base, name) for name in names if hasattr(base, name))
    if hasattr(tower, "blocks"):
        return tower, tower.blocks, tower.merger
    if hasattr(tower, "layers"):  # Molmo2
        return tower, tower.layers, base.multi_modal_projector
    if not hasattr(tower, "encoder"):
        raise NotImplementedError(
            f"{type(tower).__name__} packs its images with a block mask: no reference"
        )
    blocks = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    project = "connector" if hasattr(base, "connector") else "multi_modal_projector"
    return tower, blocks, getattr(base, project)


@dataclass
class _Call:
    """One tower call: tables from units to tokens, and what holds at each block."""

    layers: int
    tokens: int  # N
    patches: Tensor  # [U, p] tokens of each unit
    rows: Tensor  # [U] place of each unit among the units of the projector output
    keep: Tensor  # [T, U] after all reductions
    mix: dict[int, list[Tensor]]  # [T, U, U]
    hidden: dict[int, Tensor]  # [T, N] keys that nobody sees at a block
    bias: dict[int, Tensor]  # [T, N]
    offset: dict[nn.Module, int] = field(default_factory=dict)  # first token of the next segment
    pooled: bool = False  # units are pooled behind the projector

    def mixed(self, layer: int, x: Tensor) -> Tensor:
        """Hidden states [T, N, C] after the merging before a block."""
        for matrix in self.mix.get(layer, []):
            before = x[:, self.patches]
            flat = before.reshape(len(matrix), -1, *before.shape[2:])  # frames of a video as one
            units = torch.einsum("tuv,tvpc->tupc", matrix.to(x.dtype), flat)
            x = x.clone()
            x[:, self.patches] = units.reshape(before.shape)
        return x

    def spread(self, units: Tensor) -> Tensor:
        """Values of units [T, U] as values of tokens [T, N]; 0 in front of the patches."""
        out = units.new_zeros(len(units), self.tokens)
        out[:, self.patches] = units[..., None].expand(-1, -1, self.patches.shape[1])
        return out


class _Reference:
    """The hooks of `masked_tower` and the tower call they are in."""

    def __init__(
        self, model: PreTrainedModel, reductions: Sequence[Sequence[TowerReduction]]
    ) -> None:
        self.model = model
        self.tower, self.blocks, self.projector = parts(model)
        self.packed = hasattr(self.tower, "blocks")
        self.side = _unit_side(model.config, self.projector, self.tower)  # s
        self.owner = {m: i for i, block in enumerate(self.blocks) for m in block.modules()}
        self.reductions = [sorted(call, key=lambda r: r.layer) for call in reductions]
        for reduction in (r for call in self.reductions for r in call):
            if not 0 <= reduction.layer < len(self.blocks):
                raise ValueError(f"layers are 0..{len(self.blocks) - 1}, got {reduction.layer}")
        self.calls = 0
        self.active: list[TowerReduction] = []
        self.grid = torch.empty(0, 3, dtype=torch.long)  # [images, 3]
        self.call: _Call | None = None
        self.written: Hook | None = None

    def start(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The tower is called: take the next entry."""
        if self.calls == len(self.reductions):
            raise RuntimeError(f"more than the expected {self.calls} calls of the tower")
        self.active = self.reductions[self.calls]
        self.calls += 1
        self.call = None
        if self.packed:
            self.grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]

    def enter(self, layer: int) -> Hook:
        """Pre-hook of a block: mixes, and in front of the first block prepares the call."""

        def pre_hook(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            given = args[0] if args else kwargs["hidden_states"]
            x = given[None] if self.packed else given  # [T, N, C]
            if layer == 0:
                self.call = self.prepare(x) if self.active else None
            if self.call is None or layer not in self.call.mix:
                return None
            x = self.call.mixed(layer, x)
            x = x[0] if self.packed else x
            if args:
                return (x, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": x}

        return pre_hook

    def attend(self, attention: Hook) -> Hook:
        """The attention function with the keys of dropped units closed and the bias added."""

        def masked(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if self.call is not None and module in self.owner:
                attention_mask = self.mask(self.call, module, key, attention_mask)
            return attention(module, query, key, value, attention_mask, *args, **kwargs)

        return masked

    def mask(
        self, call: _Call, module: nn.Module, key: Tensor, given: Tensor | None
    ) -> Tensor | None:
        """Additive mask [T, 1, 1 or n, n] of the next n tokens of an attention module."""
        count = key.shape[2]
        first = call.offset.get(module, 0)
        call.offset[module] = (first + count) % call.tokens
        layer = self.owner[module]
        if layer not in call.hidden:
            return given
        here = slice(first, first + count)
        hidden = call.hidden[layer][:, None, None, here]  # [T, 1, 1, n]
        scores = torch.zeros(hidden.shape, dtype=key.dtype)
        if layer in call.bias:
            scores = call.bias[layer][:, None, None, here].to(key.dtype)
        if given is not None and given.dtype == torch.bool:
            hidden = hidden | ~given
        elif given is not None:
            scores = scores + given
        return torch.where(hidden, torch.finfo(key.dtype).min, scores)

    def zero(self, projector: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """Zero rows for the dropped units, [T, prefix + U, C] or [U, C]."""
        call = self.call
        if call is not None and not isinstance(out, Tensor):  # Molmo2: [frames * units, C]
            out.last_hidden_state = out.last_hidden_state.masked_fill(~call.keep.view(-1, 1), 0)
            return None
        if call is None or call.pooled:
            return None
        tiles, units = call.keep.shape
        rows = out[None] if self.packed else out
        dropped = torch.zeros(tiles, rows.shape[1], dtype=torch.bool)
        dropped[:, rows.shape[1] - units + call.rows] = ~call.keep
        return rows.masked_fill(dropped[..., None], 0).view_as(out)

    def bias_columns(self, inputs: dict[str, Tensor]) -> Tensor:
        """The last bias of every unit at the column of its token, [B, L]; 0 elsewhere.

        The projector's outputs are replaced by vectors that carry the bias, so that families may
        arrange them as they like.  Uses up one entry of `reductions` for every tower call.
        """

        def write(projector: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if self.call is None or (self.call.pooled and projector is self.projector):
                return None
            if not isinstance(out, Tensor):  # Molmo2
                flat = out.last_hidden_state
                rows = write(self.model, (), flat.view(*self.call.keep.shape, -1))
                out.last_hidden_state = rows.view_as(flat)
                return None
            rows = out[None] if self.packed else out
            new = torch.zeros_like(rows)
            new[..., 1:3] = 1  # what is no projector output (newlines) has no two equal channels
            bias = self.call.bias.get(self.call.layers - 1)
            if bias is not None:
                units = bias[:, self.call.patches[:, 0]].to(new.dtype)  # [T, U]
                place = rows.shape[1] - units.shape[1] + self.call.rows
                new[:, place, 0] = units
            return new.view_as(out)

        handle = self.projector.register_forward_hook(write)
        self.written = write
        with torch.no_grad(), _bare_placeholders(self.model):
            embeds = oracle.encode(self.model, inputs).embeds  # [B, L, C]
        handle.remove()
        self.written = None
        ids = inputs["input_ids"]
        visual = (ids == IMAGE) | (ids == VIDEO)
        made = visual & (embeds[..., 1] == embeds[..., 2]) & (embeds[..., 1] != 0)
        return torch.where(made, embeds[..., 0] / embeds[..., 1].where(made, 1.0), 0.0)

    def pool(self, pooling: Hook) -> Hook:
        """Pooling 2 x 2 behind the projector: what it makes of dropped units is zero."""

        def checked(frames: Tensor) -> Tensor:
            out = pooling(frames)  # [T, U, C]
            if self.call is None:
                return out
            if self.written is not None:
                return self.written(self.model, (), out)
            return out.masked_fill(~self.call.keep[..., None], 0)

        return checked

    def prepare(self, x: Tensor) -> _Call:
        """Tables for hidden states [T, N, C]."""
        tiles, tokens = x.shape[:2]
        pooled = False
        if hasattr(self.model.model, "apply_pooling"):  # 4 patches a unit in calls on videos
            pooled = sum(len(row) for row in self.active[0].keep) * 4 == tiles * tokens
        patches, rows = self.tables(tokens, 2 if pooled else self.side)
        units = len(patches)
        keep = torch.ones(tiles, units, dtype=torch.bool)
        call = _Call(len(self.blocks), tokens, patches, rows, keep, {}, {}, {}, pooled=pooled)
        for reduction in self.active:
            mine = self.stacked(reduction.keep, (tiles, units))
            if mine.dtype != torch.bool:
                raise ValueError("keep masks must be bool")
            call.keep = call.keep & mine
            bias = None
            if reduction.mix is not None:
                matrix = self.matrices(reduction.mix, (tiles, units, units))
                call.mix.setdefault(reduction.layer, []).append(matrix)
            if reduction.bias is not None:
                bias = call.spread(self.stacked(reduction.bias, (tiles, units)))
            for layer in range(reduction.layer, call.layers):
                call.hidden[layer] = call.spread(~call.keep)
                if bias is not None:
                    call.bias[layer] = bias
        for layer in list(call.hidden):
            if layer not in call.bias and not bool(call.hidden[layer].any()):
                del call.hidden[layer]  # nothing to do: the attention keeps its own mask
        return call

    def tables(self, tokens: int, s: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens [U, p] and projector row [U] of each unit."""
        s = s or self.side
        if self.packed:
            place = torch.arange(tokens // s**2)  # [U] place of each unit in the tower
            if hasattr(self.tower, "window_size"):
                order, _ = get_vision_window_index(
                    self.grid, s, self.tower.window_size, self.tower.patch_size
                )
                place = order.argsort()
            return place[:, None] * s**2 + torch.arange(s**2), place
        width = math.isqrt(tokens)
        number = torch.arange(width**2) + tokens - width**2  # the patches follow the prefix
        grid = number.view(width // s, s, width // s, s).transpose(1, 2)
        return grid.reshape(-1, s**2), torch.arange((width // s) ** 2)

    def stacked(self, given: PerImage, shape: tuple[int, int]) -> Tensor:
        """One tensor for all images, [T, U], T = 1 for a packed tower; an entry may hold all frames
        of a video."""
        out = torch.cat(list(given))
        if out.numel() != shape[0] * shape[1]:
            raise ValueError(f"expected {shape} (images, units), got {[len(r) for r in given]}")
        return out.reshape(shape)

    def matrices(self, given: PerImage, shape: tuple[int, ...]) -> Tensor:
        """[T, U, U] of all images, or one matrix over all frames of videos and packed images."""
        rows = list(given)
        if not self.packed and all(len(row) == shape[1] for row in rows):
            out = torch.stack(rows)
        else:
            out = torch.block_diag(*rows)[None]
        square = out.ndim == 3 and out.shape[1] == out.shape[2]
        if not square or out.shape[0] * out.shape[1] != shape[0] * shape[1]:
            raise ValueError(f"expected {shape} (images, units), got {tuple(out.shape)}")
        return out


def _unit_side(config: Any, projector: Any, tower: Any) -> int:
    """Patches along each side of a unit."""
    if hasattr(tower, "blocks"):
        return tower.spatial_merge_size
    if config.model_type == "molmo2":
        return 2
    if hasattr(config, "downsample_ratio"):
        return round(1 / config.downsample_ratio)
    if hasattr(config, "scale_factor"):
        return config.scale_factor
    return getattr(projector, "kernel_size", 1)
