"""Signals of a decoder site, each computed only when a method asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ... import ops
from ...versions import cache_argument
from ..attention import Side, Tap
from .columns import Stage
from .masks import Reach
from .rows import Rows
from .vision import Vision

#: read from the attention of the layer that has just run
PREVIOUS_LAYER_SIGNALS = frozenset({"keys", "queries", "text_keys", "attn_last", "attn_text"})
#: turned by positions: as in a prompt alone where the model counts padding as well
ROTATED_SIGNALS = frozenset({"keys", "queries", "text_keys"})
#: read from attention, one way or the other
ATTENTION_SIGNALS = PREVIOUS_LAYER_SIGNALS | {"attn_ahead"}
#: read from the sequence itself
SEQUENCE_SIGNALS = frozenset({"text", "text_mask", "normed", "text_normed", "token_size"})
#: read from one layer of the KV cache
CACHE_SIGNALS = frozenset({"keys", "values", "survivors", "token_size"})


@dataclass
class SignalSource:
    """What a site can be asked about.

    Attributes:
        vision: the tower's part of the session.
        rows, valid: the visual rows, and the real columns [B, L], of the sequence x [B, L, D].
        tap, shift: attention of the layer before, and where this forward's columns start in it.
        layer: the decoder layer about to run; `tables` the rotary tables it would be given for x.
        stage: columns that the layer about to run already governs.
        origin, reach: original columns [B, L], and how far a layer looks that does not see all.
    """

    x: Tensor
    rows: Rows
    valid: Tensor
    norm: nn.Module | None
    vision: Vision | None
    tap: Tap | None
    shift: int
    layer: Any
    tables: Callable[[], Any]
    stage: Stage | None
    dense: bool
    origin: Tensor
    reach: Reach | None
    memo: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def makers(self, needs: frozenset[str]) -> dict[str, Callable[[], Any]]:
        """Name -> function for what the method declared; token sizes whenever they differ."""
        wanted = needs | ({"token_size"} if self.rows.size is not None else frozenset())
        return {name: self._maker(name) for name in wanted}

    def _maker(self, name: str) -> Callable[[], Any]:
        if name in self.rows.carried:
            return lambda: self.rows.carried[name]
        if name == "projector":
            assert self.vision is not None  # made by the session when a step declares it
            return self.vision.projector
        return getattr(self, name)

    @property
    def _text(self) -> tuple[Tensor, Tensor]:
        if "text" not in self.memo:
            self.memo["text"] = self.rows.text_after(self.valid)
        return self.memo["text"]

    @property
    def _keys(self) -> Tensor:
        own = self._tap.unpadded
        if own is not None:
            return self._own_columns(own.key, 0)
        return self._own_columns(self._tap.call.key, self.shift)

    @property
    def _tap(self) -> Tap:
        return self.tap or Tap()  # an empty tap explains itself when it is read

    @property
    def _last(self) -> Tensor:
        return self.rows.last_prompt(self.valid)

    def _own_columns(self, states: Tensor, start: int) -> Tensor:
        """[B, H, Lk, D] -> this forward's columns with heads side by side, [B, L, H * D]."""
        return states[:, :, start : start + self.x.shape[1]].transpose(1, 2).flatten(2)

    def _of_text(self, values: Tensor) -> Tensor:
        return ops.gather_rows(values.index_select(0, self.rows.sample), self._text[0])

    def token_size(self) -> Tensor:
        return self.rows.sizes()

    def text(self) -> Tensor:
        return self._of_text(self.x)

    def text_mask(self) -> Tensor:
        return self._text[1]

    def normed(self) -> Tensor:
        assert self.norm is not None  # offered only with a final norm
        return self.norm(self.rows.take(self.x))

    def text_normed(self) -> Tensor:
        assert self.norm is not None
        return self.norm(self.text())

    def keys(self) -> Tensor:
        return self.rows.take(self._keys)

    def queries(self) -> Tensor:
        call = self._tap.unpadded or self._tap.call
        return self.rows.take(self._own_columns(call.query, 0))

    def text_keys(self) -> Tensor:
        return self._of_text(self._keys)

    def attn_last(self) -> Tensor:
        return self.rows.last_attention(self._tap.call, self._last, self.shift)

    def attn_text(self) -> Tensor:
        return self.rows.text_attention(self._tap.call, self._text, self.shift)

    def attn_ahead(self) -> Tensor:
        """Runs norm, q and k of the layer about to run; its values are never mixed."""
        tap = Tap()
        self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(self.x),
            position_embeddings=self.tables(),
            attention_mask=None,
            vtc=Side(tap=tap, probe=True),
            **cache_argument(self.layer.self_attn.forward, None),
        )
        bias = None
        if self.stage is not None and self.stage.bias is not None:
            bias = self.stage.bias[:, -self.x.shape[1] :]
        call = replace(tap.call, mask=self._seen_ahead(), bias=bias, causal=True)
        return self.rows.last_attention(call, self._last, 0)

    def _seen_ahead(self) -> Tensor | None:
        """Columns [B, L] that the last token sees; [B, 1, L, L] for every token of packed rows."""
        reach, at, part = self.reach, self.origin, self.rows.part
        if part is not None:
            seen = (part[:, :, None] == part[:, None]) & self.valid[:, None]
            if reach is not None:
                seen = seen & reach.sees(at[:, :, None], at[:, None])
            return seen.tril()[:, None]
        if reach is not None:
            return self.valid & reach.sees(at.gather(1, self._last), at)
        return None if self.dense else self.valid
