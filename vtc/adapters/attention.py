"""The attention-function seam of transformers: read q and k, add a bias, without attention maps.

Every transformers model calls its attention through one mapping. While a session needs it, the
entries in use are wrapped; a wrapped call does nothing unless it is handed a `Side` (as keyword
argument `vtc`, from a decoder layer's keyword arguments) or its module is listed in `taps`."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import MissingSignal, UnsupportedModel
from ..ops import gather_tokens, qrow_scores
from .slot import Slot

#: channels that carry the bias inside q and k; 8 keeps fused kernels on their fast path
BIAS_CHANNELS = 8


@dataclass
class Call:
    """One attention call: q [B, H, Lq, D], k [B, Hkv, Lk, D] after RoPE and cache update."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    bias: Tensor | None
    lower_right: bool = False  # without a mask, the last query sees the last key (flash)


@dataclass
class Tap:
    """Remembers the calls of one attention module in one forward. `unpadded`: queries and keys of
    this forward at positions that leave out padding, where the model counts it."""

    calls: list[Call] = field(default_factory=list)
    unpadded: Call | None = None

    @property
    def call(self) -> Call:
        if not self.calls:
            raise MissingSignal(
                "the attention of this layer was not seen. Was the attention implementation "
                "changed after attach, or does the layer not pass its keyword arguments on?"
            )
        return self.calls[-1]


@dataclass
class Side:
    """What rides along with attention calls.

    Attributes:
        tap: remembers the calls.
        bias: [B, K] added to the logits of every key.
        real: [B, K] False for keys that nobody may see (padding of a vision tower).
        probe: only the tap is wanted; values are not mixed.
        packed: several calls, one per segment, share the columns of `bias` one after another.
        segments: lengths of sequences that lie one behind the other in one call: each attends to
            itself alone.
        mask: [B, 1, L, L] True where a query sees a key.
        seen: an attention function got it.
        arrived: it came as a keyword argument, which gradient checkpointing replays.
    """

    tap: Tap | None = None
    bias: Tensor | None = None
    real: Tensor | None = None
    probe: bool = False
    packed: bool = False
    segments: tuple[int, ...] | None = None
    mask: Tensor | None = None
    seen: bool = False
    arrived: bool = False
    _done: int = 0

    def segment(self, length: int) -> Tensor | None:
        """The bias of this call's keys."""
        if self.bias is None or not self.packed or self.bias.shape[1] == length:
            return None if self.bias is None else fit(self.bias, length)
        start = self._done % self.bias.shape[1]
        self._done = start + length
        return self.bias[:, start : start + length]


#: what goes with the attention modules (by id) of an image encoder in the current context
sides: Slot[dict[int, Side]] = Slot("vtc_sides", {})


class Overlay:
    """A share in the wrapped entries of the attention mapping: `put()` takes it, `remove()` gives
    it back. An entry that somebody else has replaced meanwhile stays theirs."""

    _lock = threading.Lock()
    _users: dict[str, set[Overlay]] = {}
    #: name -> (entry before, our entry)
    _entries: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any]]] = {}

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(dict.fromkeys(names))

    def put(self) -> None:
        local = ALL_ATTENTION_FUNCTIONS._local_mapping
        with self._lock:
            for name in self._names:
                self._users.setdefault(name, set()).add(self)
                _, ours = self._entries.get(name, (None, None))
                if ours is None or local.get(name) is not ours:
                    base = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
                    ours = wrap(base, "flash" in name)
                    self._entries[name] = (local.get(name), ours)
                    ALL_ATTENTION_FUNCTIONS[name] = ours

    def remove(self) -> None:
        local = ALL_ATTENTION_FUNCTIONS._local_mapping
        with self._lock:
            for name in self._names:
                users = self._users.get(name, set())
                users.discard(self)
                if users or name not in self._entries:
                    continue
                before, ours = self._entries[name]
                if local.get(name) is ours:
                    if before is None:
                        del ALL_ATTENTION_FUNCTIONS[name]
                    else:
                        ALL_ATTENTION_FUNCTIONS[name] = before
                self._entries.pop(name)


def attention_of(block: nn.Module) -> nn.Module | None:
    """The attention module of a block of any family."""
    for name in ("self_attn", "attention", "attn"):
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


def refuse_maps(maps: Any) -> None:
    """Refuse to hand out attention maps (a tuple with one per layer, or None) of a sequence that is
    shorter than the one that was given."""
    if any(torch.is_tensor(x) for x in maps or ()):
        raise UnsupportedModel(
            "attention maps of shortened sequences are no maps of what was given: call the model "
            "without output_attentions (also in its config), use keep=1.0, or detach the session."
        )


def takes_keywords(module: nn.Module) -> bool:
    """Its forward accepts any keyword argument; whether it hands them on shows when it runs."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def eager_function(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the file that defines `module`: not in the mapping, but beside it."""
    scope = vars(sys.modules[type(module).__module__])
    own = scope.get("eager_attention_forward")
    found = [own] if own else [f for n, f in scope.items() if n.endswith("eager_attention_forward")]
    if len(found) != 1:
        raise UnsupportedModel(
            f"cannot find the eager attention function of {type(module).__module__}. Load the "
            f"model with attn_implementation='sdpa'."
        )
    return found[0]


def wrap(base: Callable[..., Any] | None, flash: bool = False) -> Callable[..., Any]:
    """An attention function that taps and biases, then calls `base` (None: the eager one)."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        vtc: Side | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        function = base or eager_function(module)
        side = vtc or sides.get().get(id(module))
        if side is None:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        side.seen = True
        side.arrived |= vtc is not None
        if side.real is not None:
            attention_mask = _hide(attention_mask, side.real, base is None, flash, query.dtype)
        if side.mask is not None:
            attention_mask = _only(attention_mask, side.mask, base is None, flash, query.dtype)
        if side.segments is not None:
            if attention_mask is not None:
                raise UnsupportedModel(
                    "this vision tower masks its attention itself, so frames of a video cannot "
                    "keep different numbers of tokens: use a method that drops elsewhere."
                )
            biases = [None] * len(side.segments)
            if side.bias is not None:
                biases = side.bias.split(side.segments, 1)
            parts = zip(*(x.split(side.segments, 2) for x in (query, key, value)), strict=True)
            outs = [
                attention(module, *part, None, *args, vtc=Side(side.tap, bias), **kwargs)[0]
                for part, bias in zip(parts, biases, strict=True)
            ]
            return torch.cat(outs, 1), None
        given = side.segment(key.shape[2])
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if side.tap is not None:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            call = Call(query.detach(), key.detach(), attention_mask, scale, causal, given, flash)
            side.tap.calls.append(call)
        if side.probe:
            return query.new_zeros(
                query.shape[0], query.shape[2], query.shape[1], value.shape[-1]
            ), None
        if given is None:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        kwargs["scaling"] = scale
        bias = given
        additive = base is None or (query.shape[2] == 1 and not flash)  # one row: cheap and exact
        if additive and _additive(attention_mask):
            mask = add_bias(attention_mask, bias, query.dtype)
            return function(module, query, key, value, mask, *args, **kwargs)
        width = value.shape[-1]
        query, key, value = carry_bias(query, key, value, bias, scale)
        out, weights = function(module, query, key, value, attention_mask, *args, **kwargs)
        return out[..., :width], weights

    return attention


def _hide(
    mask: Tensor | None, real: Tensor, eager: bool, flash: bool, dtype: torch.dtype
) -> Tensor:
    """A mask under which only the keys that are True in `real` [B, K] are seen."""
    if flash and mask is None:
        return real
    row = real[:, None, None, :]
    if mask is None:
        return torch.where(row, 0.0, torch.finfo(dtype).min).to(dtype) if eager else row
    if not _additive(mask):
        raise UnsupportedModel(
            "images that keep different numbers of tokens need a maskable attention in the vision "
            "tower: load it with attn_implementation='sdpa'."
        )
    return (
        mask & row if mask.dtype == torch.bool else mask.masked_fill(~row, torch.finfo(dtype).min)
    )


def _only(
    mask: Tensor | None, seen: Tensor, eager: bool, flash: bool, dtype: torch.dtype
) -> Tensor:
    """A mask that is True, or 0, where `seen` [B, 1, L, L] is."""
    if mask is not None or flash:
        raise UnsupportedModel(
            "attention of this vision tower is masked by itself or takes no mask (flash), so "
            "frames of a video cannot share bins: use packing='segments'."
        )
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype) if eager else seen


def _additive(mask: Tensor | None) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)


def fit(bias: Tensor, length: int) -> Tensor:
    """bias [B, K] -> [B, length]: unwritten slots of a static cache get 0, a window its end."""
    if bias.shape[1] < length:
        return F.pad(bias, (0, length - bias.shape[1]))
    return bias[:, bias.shape[1] - length :]


def add_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask that also carries the bias [B, L] of every key."""
    row = bias[:, None, None, :].to(dtype)
    if mask is None:
        return row
    if mask.dtype == torch.bool:
        return torch.where(mask, row, torch.finfo(dtype).min)
    return mask + row


def carry_bias(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Bias inside the dot product: q gets [1/s, 1/s, 0...], k gets [hi, lo, 0...], v zeros.

    The attention stays fused and no L x L mask is stored. hi + lo is the bias split in the
    compute dtype, so that low precision loses nothing.
    """
    high = bias.to(key.dtype)
    low = (bias - high.to(bias.dtype)).to(key.dtype)
    carried = torch.stack([high, low], -1)[:, None].expand(-1, key.shape[1], -1, -1)
    one = query.new_zeros(BIAS_CHANNELS)
    one[:2] = 1 / scale
    query = torch.cat([query, one.expand(*query.shape[:-1], -1)], -1)
    key = torch.cat([key, F.pad(carried, (0, BIAS_CHANNELS - 2))], -1)
    return query, key, F.pad(value, (0, BIAS_CHANNELS))


def attention_rows(call: Call, rows: Tensor, heads: Literal["mean"] | None = None) -> Tensor:
    """Softmax attention of query rows [B, T] over all keys -> [B, H, T, Lk] in fp32, or its mean
    over heads, [B, T, Lk]."""
    query = call.query
    b, t = rows.shape
    (picked,) = gather_tokens(rows, query, axis=2)
    length = call.key.shape[2]
    additive = None
    if isinstance(call.mask, Tensor) and call.mask.ndim == 4:
        mask = call.mask.expand(b, -1, query.shape[2], -1)
        index = rows[:, None, :, None].expand(b, mask.shape[1], t, mask.shape[-1])
        mask = mask.gather(2, index)
        additive = (
            torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask.float()
        )
    elif call.causal:
        shift = length - query.shape[2] if call.lower_right else 0
        limit = (rows + shift)[:, None, :, None]
        seen = torch.arange(length, device=rows.device) <= limit
        if isinstance(call.mask, Tensor) and call.mask.ndim == 2:
            seen = seen & call.mask[:, None, None, -length:].bool()
        additive = torch.where(seen, 0.0, float("-inf"))
    if call.bias is not None:
        row = fit(call.bias, length)[:, None, None, :]
        additive = row if additive is None else additive + row
    return qrow_scores(picked, call.key, call.scale, additive, heads=heads)


def received(call: Call, real: Tensor | None = None, block: int = 256) -> Tensor:
    """Mean attention that every key receives from all queries, mean over heads: [B, L].

    real: [B, L] False for queries that do not count. Queries go through in blocks, so no L x L
    map is stored.
    """
    b, length = call.query.shape[0], call.query.shape[2]
    total: Tensor | float = 0.0
    for start in range(0, length, block):
        rows = torch.arange(start, min(start + block, length), device=call.query.device)
        weights = attention_rows(call, rows[None].expand(b, -1), "mean")
        if real is not None:
            weights = weights * real[:, rows, None]
        total = total + weights.sum(1)
    return total / (length if real is None else real.sum(1, keepdim=True))  # type: ignore[return-value]


def weighed(call: Call, cls: bool, real: Tensor | None) -> Tensor:
    """[B, L] weight of every token of an image encoder, mean over heads: attention of the class
    token, which is the first one, or the mean received without one. real: as in `received`."""
    if not cls:
        return received(call, real)
    first = torch.zeros(call.query.shape[0], 1, dtype=torch.long, device=call.query.device)
    return attention_rows(call, first, "mean")[:, 0]
