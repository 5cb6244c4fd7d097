"""Which diffusion transformer a model is, by structure, and what its blocks are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...context import Layout
from ...errors import InvalidInput, UnsupportedModel

Call = Mapping[str, Any]
#: "self": image tokens alone; "joint": text beside them; "single": text in front of them
Kind = Literal["self", "joint", "single"]
_COMMON = ("hidden_states", "encoder_hidden_states", "timestep", "return_dict")
#: what a model of a family has to be given and what it may be given. Others with such blocks take
#: more: control signals, masks, frames of the past, which would not follow the tokens
TAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sd3": (
        ("pooled_projections",),
        ("block_controlnet_hidden_states", "joint_attention_kwargs", "skip_layers"),
    ),
    "flux": (
        ("img_ids", "txt_ids"),
        (
            "pooled_projections",
            "guidance",
            "joint_attention_kwargs",
            "controlnet_block_samples",
            "controlnet_single_block_samples",
            "controlnet_blocks_repeat",
        ),
    ),
    "wan": ((), ("encoder_hidden_states_image", "attention_kwargs")),
}


@dataclass(frozen=True)
class Part:
    """One block.

    Attributes:
        block, attention, mlp: modules; attention and mlp are called once per block.
        kind: how text comes to the attention.
        over_time: the block that mixes the frames behind this one (Latte).
        modulation: the linear whose output begins with shift and scale of the attention, None
            where `table` has them.
        norms: what makes the tokens of the attention and those of the MLP, token by token and for
            nothing else; None where a norm serves more.
    """

    block: nn.Module
    attention: nn.Module
    mlp: nn.Module
    kind: Kind = "self"
    over_time: nn.Module | None = None
    modulation: nn.Module | None = None
    norms: tuple[nn.Module | None, nn.Module | None] = (None, None)


@dataclass(frozen=True)
class Facts:
    """A diffusion transformer.

    Attributes:
        name: of the family.
        parts: blocks in order.
        sample, time: arguments of the model that hold the images and the timestep.
        full: value of the timestep at pure noise.
        grid: arguments of the model -> tokens of one sample.
        rotary: how blocks are given rotary tables.
        end: module that reads what leaves the last block.
    """

    name: str
    parts: tuple[Part, ...]
    grid: Callable[[Call], Layout]
    sample: str = "hidden_states"
    time: str = "timestep"
    full: float = 1000.0
    rotary: Literal["none", "shared", "each"] = "none"
    end: nn.Module | None = None

    @property
    def mixes(self) -> bool:
        """Whether attention can be asked for queries and keys of different tokens."""
        return self.rotary == "none" and all(p.kind == "self" for p in self.parts)


def look(model: nn.Module) -> Facts | str:
    """The facts of a model, or what it lacks."""
    blocks = _blocks(model, "transformer_blocks")
    if blocks and all(_has(b, "norm1", "attn1", "ff", "norm_type") for b in blocks):
        return _basic(model, blocks)
    if blocks and all(_has(b, "norm1", "norm1_context", "attn", "ff") for b in blocks):
        return (
            _flux(model, blocks)
            if hasattr(model, "single_transformer_blocks")
            else _sd3(model, blocks)
        )
    blocks = _blocks(model, "blocks")
    if blocks and all(
        _has(b, "attn1", "attn2", "ffn", "norm3", "scale_shift_table") for b in blocks
    ):
        return _wan(model, blocks)
    if blocks and all(_has(b, "attn", "mlp", "norm1", "norm2", "adaLN_modulation") for b in blocks):
        return _original(model, blocks)
    return (
        "blocks of a diffusion transformer: `transformer_blocks` as DiT, PixArt, Latte, SD3 or "
        "Flux of diffusers have them, or `blocks` as Wan or the original DiT have them"
    )


def _basic(model: Any, blocks: list[Any]) -> Facts | str:
    """DiT, PixArt and Latte are made of one kind of block."""
    kinds = {block.norm_type for block in blocks}
    if kinds == {"ada_norm_zero"}:
        parts = tuple(
            Part(b, b.attn1, b.ff, modulation=b.norm1.linear, norms=(b.norm1.norm, b.norm3))
            for b in blocks
        )
        return Facts("dit", parts, _grid_2d(model))
    if kinds != {"ada_norm_single"}:
        return f"blocks with norm_type ada_norm_zero or ada_norm_single, found {sorted(kinds)}"
    times = _blocks(model, "temporal_transformer_blocks")
    if not times:
        return Facts("pixart", tuple(_single_table(b, None) for b in blocks), _grid_2d(model))
    parts = tuple(_single_table(b, t) for b, t in zip(blocks, times, strict=True))
    return Facts("latte", parts, _grid_3d(model), end=model.norm_out)


def _single_table(block: Any, over_time: nn.Module | None) -> Part:
    """A block with a table of modulation, whose second norm is that of the MLP."""
    norms = (block.norm1, block.norm2)
    return Part(block, block.attn1, block.ff, over_time=over_time, norms=norms)


def _sd3(model: Any, blocks: list[Any]) -> Facts | str:
    if lacks := _unlike(model, "sd3"):
        return lacks
    parts = tuple(Part(b, b.attn, b.ff, "joint") for b in blocks)
    return Facts("sd3", parts, _grid_2d(model))


def _flux(model: Any, blocks: list[Any]) -> Facts | str:
    if lacks := _unlike(model, "flux"):
        return lacks
    single = _blocks(model, "single_transformer_blocks")
    if not all(_has(b, "attn", "proj_mlp", "proj_out") for b in single):
        return "single_transformer_blocks with attn, proj_mlp and proj_out"
    parts = [Part(b, b.attn, b.ff, "joint") for b in blocks]
    parts += [Part(b, b.attn, b.proj_mlp, "single") for b in single]
    return Facts("flux", tuple(parts), _grid_of_ids, full=1.0, rotary="shared")


def _wan(model: Any, blocks: list[Any]) -> Facts | str:
    if lacks := _unlike(model, "wan"):
        return lacks
    parts = tuple(Part(b, b.attn1, b.ffn, norms=(b.norm1, b.norm3)) for b in blocks)
    return Facts("wan", parts, _grid_3d(model), rotary="each")


def _original(model: Any, blocks: list[Any]) -> Facts | str:
    names = list(inspect.signature(model.forward).parameters)
    if names[:2] != ["x", "t"]:
        return f"forward(x, t, ...), found forward({', '.join(names)})"
    if not all(_has(b.attn, "qkv", "proj", "num_heads") for b in blocks):
        return "blocks whose attn has qkv, proj and num_heads"
    parts = tuple(
        Part(b, b.attn, b.mlp, modulation=b.adaLN_modulation, norms=(b.norm1, b.norm2))
        for b in blocks
    )
    return Facts("original", parts, _grid_2d(model, "x"), "x", "t")


def _unlike(model: Any, family: str) -> str:
    """How the arguments of a model differ from those of a family whose blocks it has."""
    needs, may = TAKES[family]
    given = list(inspect.signature(_forward(model)).parameters)[1:]
    lacks = [name for name in (*_COMMON, *needs) if name not in given]
    more = [name for name in given if name not in (*_COMMON, *needs, *may)]
    if not lacks and not more:
        return ""
    without = f" without {', '.join(more)}" if more else ""
    return f"the forward of {family}, whose blocks these look like: " + (
        f"with {', '.join(lacks)}{without}" if lacks else without.strip()
    )


# ---------------------------------------------------------------------- grids


def _grid_2d(model: Any, name: str = "hidden_states") -> Callable[[Call], Layout]:
    def grid(call: Call) -> Layout:
        patch = _patch(model)
        height, width = call[name].shape[-2:]
        return Layout(1, height // patch, width // patch)

    return grid


def _grid_3d(model: Any) -> Callable[[Call], Layout]:
    """Latte cuts frames, Wan cuts time too."""

    def grid(call: Call) -> Layout:
        patch = model.config.patch_size
        t, h, w = patch if isinstance(patch, list | tuple) else (1, patch, patch)
        frames, height, width = call["hidden_states"].shape[-3:]
        return Layout(frames // t, height // h, width // w)

    return grid


def _grid_of_ids(call: Call) -> Layout:
    """Flux is given tokens and where each of them stands."""
    ids = call["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    height, width = (int(side) + 1 for side in ids[:, 1:3].amax(0).tolist())
    if height * width != len(ids):
        raise UnsupportedModel(
            f"img_ids name {len(ids)} tokens that are no full grid of {height} x {width}: only "
            f"one image at a time is understood."
        )
    return Layout(1, height, width)


def _patch(model: Any) -> int:
    patch = getattr(getattr(model, "config", model), "patch_size", None)
    if patch is None:
        patch = model.x_embedder.patch_size
    return int(patch[0] if isinstance(patch, list | tuple) else patch)


# ---------------------------------------------------------------------- one call of the model


def bound(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of the model by name."""
    signature = inspect.signature(_forward(model))
    return dict(signature.bind_partial(model, *args, **kwargs).arguments)


def _forward(model: Any) -> Callable[..., Any]:
    return inspect.unwrap(type(model).forward)


def noise(facts: Facts, call: Call) -> tuple[float, float]:
    """The highest and the lowest share of noise in the batch."""
    time = call.get(facts.time)
    if time is None:
        raise InvalidInput(f"no `{facts.time}` is given, which tells how noisy the images are.")
    given = time if torch.is_tensor(time) else torch.tensor(time, device="cpu")
    values = given.to("cpu", torch.float64).flatten() / facts.full
    most, least = float(values.max()), float(values.min())
    if not (least >= -1e-6 and most <= 1.0 + 1e-6):
        raise InvalidInput(
            f"{facts.time} is {least * facts.full:g} to {most * facts.full:g}: {facts.name} models "
            f"are given 0 (data) to {facts.full:g} (noise)."
        )
    return most, least


def prompt(call: Call) -> Tensor | None:
    """What tells pictures apart that are denoised in turns: text or classes."""
    found = (call.get(name) for name in ("encoder_hidden_states", "class_labels", "y"))
    return next((given for given in found if torch.is_tensor(given)), None)


def context_length(call: Call) -> int:
    """Tokens of the prompt that a model is given, 0 without one."""
    given = call.get("encoder_hidden_states")
    return given.shape[1] if torch.is_tensor(given) else 0


def _blocks(model: Any, name: str) -> list[Any]:
    blocks = getattr(model, name, None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def _has(module: Any, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def modulate(part: Part, norm: nn.Module, given: Tensor, y: Tensor) -> Tensor:
    """Tokens y [B, n, D] normed and modulated for the attention. given: [B, 6 D] (shift and scale
    first)."""
    shift, scale = given.reshape(len(given), -1, y.shape[-1])[:, :2].unbind(1)
    return norm(y) * (1 + scale[:, None]) + shift[:, None]
