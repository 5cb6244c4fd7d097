"""What an image encoder of transformers is made of, found by looking at it, not by its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...context import Layout
from ...errors import UnsupportedModel
from ..attention import attention_of

#: parameters that become tokens in front of the patches, and those that become none
_CLASS_TOKENS = ("cls_token", "class_embedding")
_PREFIX_TOKENS = (*_CLASS_TOKENS, "distillation_token", "register_tokens")
_NO_TOKENS = ("mask_token", "pos_", "position", "logit_")

#: arguments of a block that are cut to the tokens that are left, or say nothing of tokens
_BLOCK_ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "position_embeddings",
    "output_attentions",
    "interpolate_pos_encoding",
    "resolution",
}

#: what models return that is pooled, or read token by token and made whole again
_OUTPUTS = {
    "last_hidden_state",
    "hidden_states",
    "attentions",
    "pooler_output",
    "image_embeds",
    "text_embeds",
    "loss",
    "logits",
    "cls_logits",
    "distillation_logits",
    "logits_per_image",
    "logits_per_text",
    "text_model_output",
    "vision_model_output",
}


@dataclass(frozen=True)
class Facts:
    """An encoder [images, tokens, channels] of one stride-size convolution and blocks.

    Attributes:
        path: the modules that hold the blocks, the model first.
        blocks: in order.
        embedding: convolution that makes patches.
        prefix: tokens in front of the patches (CLS, registers), which always stay.
        cls: whether the first of them is a class token.
        config: of the encoder.
    """

    path: tuple[nn.Module, ...]
    blocks: tuple[nn.Module, ...]
    embedding: nn.Conv2d
    prefix: int
    cls: bool
    config: Any

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.config.hidden_size

    @property
    def implementation(self) -> str:
        """Name of the attention function in use: sdpa, eager, flash_attention_2, ..."""
        return str(getattr(self.config, "_attn_implementation", None) or "eager")

    def grid(self, tokens: int, patches: tuple[int, int] | None) -> Layout:
        """The patch grid of one image; `patches` is what the convolution has just made."""
        if patches is not None and patches[0] * patches[1] == tokens - self.prefix:
            return Layout(1, *patches)
        made = "no patches" if patches is None else f"{patches[0]} x {patches[1]} patches"
        raise UnsupportedModel(
            f"{tokens} tokens enter the blocks of {type(self.path[0]).__name__}, but its "
            f"convolution made {made}, and {self.prefix} more are in front of them (are images "
            f"masked, or embedded elsewhere?): only whole grids can be shortened."
        )


def look(model: Any) -> Facts | str:
    """The facts of an image encoder, or what was looked for in vain."""
    if not isinstance(model, PreTrainedModel):
        return "an image encoder of transformers (a PreTrainedModel)"
    named = dict(_without_text(model))
    problem = _reads_grids(model)
    if problem:
        return problem
    lists = [name for name, module in named.items() if _is_blocks(module)]
    if len(lists) != 1:
        return f"one list of blocks with attention (this one has {_some(lists)})"
    convolutions = [n for n, m in named.items() if isinstance(m, nn.modules.conv._ConvNd)]
    if not convolutions:
        return (
            "a convolution that makes patches (this one has none; images that come as patches, "
            "padded to one length, are not supported)"
        )
    if len(convolutions) > 1:
        return (
            f"no convolution besides the patch embedding, since it reads tokens as a grid (this "
            f"one has {_some(convolutions)})"
        )
    (listed,), (conv,) = lists, convolutions
    inside = (f"{listed}.", f"{conv}.")
    for name, module in named.items():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and not f"{name}.".startswith(inside):
            return f"nothing but pooling, norms and linear layers behind the blocks (here {name})"
    embedding, holder, blocks = named[conv], named[listed.rpartition(".")[0]], named[listed]
    if not isinstance(embedding, nn.Conv2d) or embedding.kernel_size != embedding.stride:
        return f"a 2-D convolution whose stride is its size ({conv} is {embedding})"
    assert isinstance(blocks, nn.ModuleList | nn.Sequential)
    problem = _block_problem(blocks)
    if problem:
        return problem
    prefix = _prefix([named[name] for name in _holders(conv)])
    if isinstance(prefix, str):
        return prefix
    above = _holders(listed)
    strange = [n for n, _ in holder.named_parameters(recurse=False)]
    if strange and above[-1] not in _holders(conv):
        return f"blocks with nothing added between them (this one has {_some(strange)})"
    attention: Any = attention_of(blocks[0])
    config = getattr(attention, "config", None) or getattr(holder, "config", None) or model.config
    return Facts(
        path=tuple(named[name] for name in above),
        blocks=tuple(blocks),
        embedding=embedding,
        prefix=sum(prefix.values()),
        cls=next(iter(prefix), None) in _CLASS_TOKENS,
        config=config,
    )


def _without_text(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model, but for the text model of a dual encoder."""
    dual = hasattr(model, "get_text_features")
    for name, module in model.named_modules():
        if not (dual and name.split(".")[0] == "text_model"):
            yield name, module


def _is_blocks(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
        return False
    return attention_of(module[0]) is not None


def _holders(name: str) -> list[str]:
    """Names of the modules that hold the module `name`, the model ("") first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _reads_grids(model: PreTrainedModel) -> str | None:
    """Why what the model returns cannot be made of fewer tokens."""
    if getattr(model.config, "mask_ratio", None):
        return "an encoder that sees all patches (this one hides and shuffles some: mask_ratio)"
    returned = _returned(model)
    strange = returned - _OUTPUTS
    if strange:
        return (
            f"pooled outputs or plain tokens (this model also returns {_some(sorted(strange))}, "
            f"made of a grid of tokens)"
        )
    arguments = inspect.signature(model.forward).parameters
    sizes = [name for name in arguments if name.endswith(("_sizes", "_shapes", "_thw"))]
    if sizes:
        return f"images that say their own size (this model is told {_some(sizes)} besides)"
    if "bool_masked_pos" in arguments and returned and "last_hidden_state" not in returned:
        return "an encoder or a classifier (this model predicts masked patches)"
    return None


def _returned(model: nn.Module) -> set[str]:
    """Fields of the dataclass that `forward` says it returns; none when it does not say, and then
    the results themselves are checked."""
    try:
        hint = get_type_hints(inspect.unwrap(type(model).forward)).get("return")
    except NameError:  # an annotation for type checkers only
        return set()
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    return {f.name for kind in kinds if is_dataclass(kind) for f in fields(kind)}


def _block_problem(blocks: nn.ModuleList | nn.Sequential) -> str | None:
    """Why tokens cannot be dropped before these blocks."""
    names = sorted({type(block).__name__ for block in blocks})
    if len(names) > 1:
        return f"blocks of one kind (this one has {_some(names)})"
    for name, _ in blocks.named_parameters():
        if "rel_pos" in name or "relative_position" in name:
            return f"attention without a bias per pair of places (this one has {name})"
    if any(hasattr(block, "window_size") for block in blocks):
        return "attention over the whole image (this one has blocks with a window_size)"
    arguments = inspect.signature(blocks[0].forward).parameters.values()
    known = (n.name for n in arguments if n.kind is n.VAR_KEYWORD or n.name in _BLOCK_ARGUMENTS)
    extra = {n.name for n in arguments} - set(known)
    if extra:
        return f"blocks that read tokens only (these read {_some(sorted(extra))})"
    return None


def _prefix(holders: list[nn.Module]) -> dict[str, int] | str:
    """Tokens in front of the patches by the name of their parameter, class token first."""
    owned: dict[str, Tensor] = {}
    for module in holders:
        owned |= dict(module.named_parameters(recurse=False))
    tokens = {
        name: 1 if p.ndim == 1 else p.shape[-2]
        for name, p in owned.items()
        if not name.startswith(_NO_TOKENS)
    }
    strange = sorted(tokens.keys() - set(_PREFIX_TOKENS))
    if strange:
        return f"patches, class and register tokens only (this one has {_some(strange)})"
    return {name: tokens[name] for name in _PREFIX_TOKENS if name in tokens}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
