"""What a vision tower knows about its tokens: attention and keys of the layer whose features the
language model reads, carried over to the language model's visual tokens.

How families lay out features behind the projector (tiles, newlines, window order) differs, so it
is not assumed: projector outputs are found again among the visual tokens by their values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import MissingSignal
from .attention import Overlay, Tap, attention_rows, received, taps
from .slot import Slot

TOWER_SIGNALS = frozenset({"attn_cls", "vision_keys"})


@dataclass
class Encoding:
    """One run of the tower: its attention calls and what the projector made of it."""

    tap: Tap
    projected: list[Tensor] = field(default_factory=list)


_ENCODINGS: Slot[tuple[Encoding, ...]] = Slot("vtc_encodings", ())
_UNMATCHED = (
    "an image or video has no token that equals an output of the projector: this family changes "
    "features behind its projector (video pooling, scaling), so tower scores cannot be carried "
    "over. Use a method that reads the embeddings (divprune) or the decoder (fastv)."
)
#: encodings remembered when a caller encodes images but never runs the language model
MOST = 8


@dataclass(frozen=True)
class Tower:
    """The tower, its projector and the attention module that is tapped.

    `packed`: tokens of all images in one sequence (Qwen); else [images, tokens, channels].
    """

    tower: nn.Module
    projector: nn.Module
    attention: nn.Module
    implementation: str
    packed: bool

    @classmethod
    def find(cls, base: nn.Module) -> Tower | None:
        """By structure: a submodule with a list of blocks that have an attention child."""
        config: Any = base.config
        for name in ("vision_tower", "visual", "vision_model", "vision_encoder"):
            tower = getattr(base, name, None)
            if not isinstance(tower, nn.Module):
                continue
            merger = getattr(tower, "merger", None)
            projector = merger
            for other in ("multi_modal_projector", "connector"):
                projector = projector or getattr(base, other, None)
            blocks = _blocks(tower)
            if projector is None or not blocks:
                return None
            depth = len(blocks)
            layer = getattr(config, "vision_feature_layer", None)
            index = depth - 1
            if isinstance(layer, int):  # hidden_states[i] leaves block i - 1
                index = depth + layer if layer < 0 else layer - 1
            full = getattr(tower.config, "fullatt_block_indexes", None)
            if full:
                index = max(full)
            attention = _attention(blocks[min(max(index, 0), depth - 1)])
            if attention is None:
                return None
            own = getattr(attention, "config", None) or tower.config
            implementation = str(getattr(own, "_attn_implementation", None) or "eager")
            return cls(tower, projector, attention, implementation, merger is not None)
        return None

    def install(self) -> list[Any]:
        return [
            Overlay([self.implementation]),
            self.tower.register_forward_pre_hook(self._before),
            self.tower.register_forward_hook(self._after, always_call=True),
            self.projector.register_forward_hook(self._projected),
        ]

    def _before(self, module: nn.Module, args: Any) -> None:
        encoding = Encoding(Tap())
        _ENCODINGS.set((*_ENCODINGS.get(), encoding)[-MOST:])
        taps.set({id(self.attention): encoding.tap})

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        taps.set(None)

    def _projected(self, module: nn.Module, args: Any, output: Any) -> None:
        if _ENCODINGS.get() and torch.is_tensor(output):
            _ENCODINGS.get()[-1].projected.append(output)

    def forget(self) -> None:
        """Drop what was remembered; called when a forward of the base model ends."""
        _ENCODINGS.set(())

    def match(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [R, N] and keys [R, N, C] for the visual tokens x [R, N, D].

        Tokens that no projector output explains (newline tokens of tiled images) get score 0 and
        key 0.
        """
        encodings = [e for e in _ENCODINGS.get() if e.projected and e.tap.calls]
        if not encodings:
            raise MissingSignal(
                "the vision tower did not run before this forward (were image features passed "
                "in ready-made, or encoded in another thread?), so attn_cls is not known."
            )
        parts = [self._scores(e) for e in encodings]
        projected = torch.cat([p for p, _, _ in parts]).to(x.dtype)
        scores, keys = torch.cat([s for _, s, _ in parts]), torch.cat([k for _, _, k in parts])
        place, known = _find(projected, x.reshape(-1, x.shape[-1]))
        known = known.reshape(valid.shape) & valid
        every = known.any(1).all()
        if torch.compiler.is_compiling():
            torch._assert_async(every, _UNMATCHED)
        elif not bool(every):
            raise MissingSignal(_UNMATCHED)
        score = torch.where(known, scores[place].reshape(valid.shape), 0.0)
        key = keys[place].reshape(*valid.shape, -1)
        return score, torch.where(known[..., None], key, 0.0)

    def _scores(self, encoding: Encoding) -> tuple[Tensor, Tensor, Tensor]:
        """Projector outputs [F, D] with their scores [F] and keys [F, C]."""
        projected = encoding.projected[0]
        out = projected.reshape(-1, projected.shape[-1])
        if self.packed and "flash" in self.implementation:
            raise MissingSignal(
                "flash attention runs all images of this tower in one call, so attn_cls cannot be "
                "told apart per image: load the vision tower with attn_implementation='sdpa'."
            )
        if self.packed:
            score = torch.cat([received(c)[0] for c in encoding.tap.calls])
            key = torch.cat([c.key[0].float().mean(0) for c in encoding.tap.calls])
            group = len(score) // len(out)
            if group * len(out) != len(score):
                raise MissingSignal(
                    f"{len(score)} tower tokens do not merge evenly into {len(out)} tokens, so "
                    f"attn_cls cannot be carried over to them."
                )
            return (
                out,
                score.reshape(-1, group).sum(1),
                key.reshape(-1, group, key.shape[-1]).mean(1),
            )
        call = encoding.tap.call
        if call.query.shape[0] == 1 and _blocked(call.mask):
            raise MissingSignal(
                "this tower packs several images into one sequence (Pixtral), where tokens cannot "
                "be told apart by place: attn_cls is offered for one image per batch only."
            )
        total, tokens = call.query.shape[2], projected.shape[-2]
        group = total // tokens
        prefix = total - group * tokens
        side, merge = math.isqrt(total - prefix), math.isqrt(group)
        if side * side != total - prefix or merge * merge != group:
            raise MissingSignal(
                f"{total} tower tokens do not form a square grid that merges into {tokens} "
                f"projected tokens, so attn_cls cannot be carried over to them."
            )
        if prefix:
            first = torch.zeros(call.query.shape[0], 1, dtype=torch.long, device=out.device)
            score = attention_rows(call, first).mean(1)[:, 0, prefix:]
        else:
            score = received(call)
        key = call.key.float().mean(1)[:, prefix:]
        return (
            out,
            _pool(score[..., None], side, merge).sum(2).flatten(),
            _pool(key, side, merge).mean(2).flatten(0, 1),
        )


def _blocked(mask: Tensor | None) -> bool:
    """A mask that hides some tokens from others."""
    if mask is None:
        return False
    return not bool(mask.all()) if mask.dtype == torch.bool else bool((mask < 0).any())


def _pool(x: Tensor, side: int, merge: int) -> Tensor:
    """[n, side*side, C] in raster order -> [n, groups, merge*merge, C]."""
    n, _, c = x.shape
    g = side // merge
    x = x.reshape(n, g, merge, g, merge, c).transpose(2, 3)
    return x.reshape(n, g * g, merge * merge, c)


def _find(pool: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For every token the row of `pool` with the same values, and whether there is one."""
    columns = torch.arange(pool.shape[1], device=pool.device)
    direction = ops.hash_uniform(columns, 0).double() - 0.5
    keys, wanted = pool.double() @ direction, tokens.double() @ direction
    ordered, order = keys.sort()
    right = torch.searchsorted(ordered, wanted).clamp(max=len(pool) - 1)
    left = (right - 1).clamp(min=0)
    nearer = (ordered[left] - wanted).abs() < (ordered[right] - wanted).abs()
    place = order[torch.where(nearer, left, right)]
    return place, (ops.gather_rows(pool[None], place[None])[0] == tokens).all(-1)


def _blocks(tower: nn.Module) -> nn.ModuleList | None:
    """The longest list of blocks with attention."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [m for m in lists if _attention(m[0]) is not None]
    return max(lists, key=len) if lists else None


def _attention(block: nn.Module) -> nn.Module | None:
    for name in ("self_attn", "attention", "attn"):
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            return module
    return None
