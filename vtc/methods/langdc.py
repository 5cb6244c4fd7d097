"""LangDC in front of somebody's language model: soft caption tokens of a small one, behind a few
pooled tokens of each frame, instead of the visual tokens.

Wang et al., "Language-aware dynamic compression" (LangDC), EMNLP 2025,
https://arxiv.org/abs/2509.00969. `vtc.modules.langdc` is the network; here it reads what the host's
projector made. A row of visual tokens [frames x height x width] is cut into clips; it becomes
[pooled tokens, frame by frame][soft tokens, clip by clip], and a tail behind the grid (newline)
stays as it is. Captions end where the small model says EOS, so richer clips get more tokens.

Differs from the paper: one encoder, the host's, for both streams, behind its projector; of the host
only what LoRA the weights hold changes, while the session lives. Tokens sit on places of the row
they replace, spread evenly, and have those positions; `positions="renumber"` counts them instead,
as published, like text (on all axes alike). With deepstack features (Qwen3-VL) they get none.

When to use: videos in which much happens at times only, when you can train. Not untrained.

Cost: a small language model writes up to `max_len` tokens per clip; the report counts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..context import Context
from ..errors import InvalidInput, InvalidRecipe, UnsupportedModel
from ..hooks import Installed
from ..modules.langdc import DynamicCompressor, Grid, Settings, spread, stand_in
from ..plan import Plan
from ..reducer import Rewrite, Rewriter
from ..registry import register

_PROMPT: dict[str, Any] = {"before": (1,), "after": (2,), "eos": (0,)}  # of a stand-in


@register("langdc")
@dataclass(frozen=True)
class LangDC(Rewriter):
    """Keeps hidden states of a small model's captions, and a few pooled tokens per frame.

    Args:
        weights: folder that `save` of a trained `DynamicCompressor` wrote; None: a stand-in.
        clip_frames, pool, base, max_len, min_len, eos_bias, total: `vtc.modules.langdc.Settings`;
            None for what that folder says (stand-in: the paper's 4, 8 x 8, 4 x 4, 128 tokens).
    """

    weights: str | None = None
    clip_frames: int | None = None
    pool: Grid | None = None
    base: Grid | None = None
    max_len: int | None = None
    min_len: int | None = None
    eos_bias: float | None = None
    total: int | None = None

    paper: ClassVar[str] = "LangDC, EMNLP 2025, https://arxiv.org/abs/2509.00969"
    sites: ClassVar[frozenset[str]] = frozenset({"projector"})
    frames: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given: dict[str, Any] = {"max_len": max(128, self.min_len or 1)}
        try:
            Settings(**_PROMPT, **given | self._changes())
        except InvalidInput as error:
            raise InvalidRecipe(str(error)) from error

    def _changes(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weights"}
        return {name: value for name, value in values.items() if value is not None}

    def note(self, module: Any) -> str | None:
        note = "an untrained stand-in: captions of random weights, unless this session trains it"
        return note if self.weights is None else None

    def build(self, blocks: Sequence[nn.Module]) -> DynamicCompressor:
        width = next(m for m in blocks[0].modules() if isinstance(m, nn.Linear)).in_features
        if self.weights is None:
            made = stand_in(width, Settings(**_PROMPT, **self._changes()))
        else:
            made = DynamicCompressor.load(self.weights, **self._changes())
        if (made.width, made.host_width) != (width, width):
            raise InvalidInput(
                f"langdc: {self.weights!r} was trained for tokens {made.width} wide and a host of "
                f"{made.host_width}, but this language model is {width} wide: give a folder of its "
                f"own, or weights=None for a stand-in."
            )
        if made.lora is not None:
            made.lora.check(blocks)
        real = next(p for p in blocks[0].parameters() if p.is_floating_point())
        return made.to(real.device, real.dtype)

    def install(self, module: Any, blocks: Sequence[nn.Module], on: Installed) -> None:
        if module.lora is not None:
            module.lora.install(blocks, on)

    def start(self, module: Any, ctx: Context) -> Rewrite:
        if torch.compiler.is_compiling():
            raise UnsupportedModel(
                "langdc: captions decide how many tokens there are, which torch.compile cannot "
                "trace: run it uncompiled."
            )
        videos = [_video(ctx, row) for row in range(len(ctx.counts))]
        captions, flops = module.caption_videos(videos)
        rows = [
            torch.cat([module.base(video).flatten(0, 1), caption, _tail(ctx, row)])
            for row, (video, caption) in enumerate(zip(videos, captions, strict=True))
        ]
        tokens = pad_sequence(rows, batch_first=True).to(ctx.x.dtype)
        rewrite = Rewrite(_spread(ctx, [len(row) for row in rows]), tokens)
        rewrite.flops = flops
        return rewrite


def _video(ctx: Context, row: int) -> Tensor:
    """The grid of a row [T, h, w, D]."""
    layout = ctx.layout[row]
    if layout is None or layout.n != ctx.counts[row]:
        raise InvalidInput(
            f"langdc cuts videos into frames, but the grid of image {row} "
            f"({ctx.counts[row]} tokens) is not known here: let nothing drop tokens in front of "
            f"it, and give whole images or videos (no tiles, scope='image')."
        )
    grid = layout.frames, layout.height, layout.width
    return ctx.x[row, : layout.frames * layout.height * layout.width].unflatten(0, grid)


def _tail(ctx: Context, row: int) -> Tensor:
    """What stands behind the grid of a row [tail, D]."""
    layout = ctx.layout[row]
    assert layout is not None
    return ctx.x[row, layout.n - layout.tail : layout.n]


def _spread(ctx: Context, made: Sequence[int]) -> Plan:
    """Places for that many tokens of each row: even steps over its grid, the tail on its own."""
    index = []
    for row, (m, n) in enumerate(zip(made, ctx.counts, strict=True)):
        tail = len(_tail(ctx, row))
        if m > n:
            raise InvalidInput(
                f"langdc: {m} tokens for image {row}, which has {n} itself: give a smaller base, "
                f"longer clips (clip_frames), or shorter captions (max_len, total, eos_bias)."
            )
        places = torch.cat([spread(m - tail, n - tail), torch.arange(n - tail, n, device="cpu")])
        index.append(torch.cat([places, places[-1:].expand(max(made) - m)]))
    return Plan(torch.stack(index).to(ctx.x.device), ctx.x.shape[1], tuple(made))
