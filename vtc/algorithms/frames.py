"""Videos: methods that look at the tokens of a row as frames x cells."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..context import Context
from ..errors import InvalidInput
from ..plan import Plan
from ..reducer import Method, top_k


class FrameScorer(Method):
    """Ranks the tokens of whole videos: override `rank`, the highest k stay, in their old order.

    An image is a video of one frame. Tokens behind the last frame (a newline) stay, as long as they
    leave room for one token of a frame.
    """

    sites = frozenset({"projector"})
    frames = True

    def rank(self, x: Tensor, k: tuple[int, ...]) -> Tensor:
        """[R, T, C] higher is more important, for R videos x [R, T, C, D] of T frames with C cells;
        k[r] of them stay."""
        raise TypeError(f"{type(self).__name__} must define rank(x, k)")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        all_shapes = shapes(ctx, type(self).name)
        if len(set(all_shapes)) == 1:
            return top_k(self._score(ctx.x, all_shapes[0], k), ctx.visual, k)
        score = torch.zeros(ctx.visual.shape, device=ctx.x.device, dtype=torch.float32)
        for shape in dict.fromkeys(all_shapes):
            rows = [r for r, other in enumerate(all_shapes) if other == shape]
            at = torch.tensor(rows, device=ctx.x.device)
            here = self._score(ctx.x[at, : ctx.counts[rows[0]]], shape, tuple(k[r] for r in rows))
            score[at, : here.shape[1]] = here.to(score.dtype)
        return top_k(score, ctx.visual, k)

    def _score(self, x: Tensor, shape: tuple[int, int, int], k: tuple[int, ...]) -> Tensor:
        """[R, N] of rows x [R, N, D] of one shape."""
        frames, cells, tail = shape
        video = x[:, : frames * cells].unflatten(1, (frames, cells))
        room = tuple(n - tail if n > tail else n for n in k)
        score = self.rank(video, room).flatten(1)
        if not tail:
            return score
        behind = [float("inf") if n > tail else float("-inf") for n in k]
        last = torch.tensor(behind, device=x.device, dtype=score.dtype)
        return torch.cat([score, last[:, None].expand(-1, tail)], 1)


def shapes(ctx: Context, name: str) -> list[tuple[int, int, int]]:
    """(frames, cells of a frame, tokens behind the frames) of every row, which must be whole. A row
    without a known grid is an image: adapters refuse videos whose frames they do not know."""
    out = []
    for row, (layout, count) in enumerate(zip(ctx.layout, ctx.counts, strict=True)):
        whole = ctx.original[row] if layout is None else layout.n
        if count != whole:
            raise InvalidInput(
                f"{name} at {ctx.site}: row {row} has {count} of its {whole} tokens, but cells are "
                f"compared from frame to frame. It has to be the first step that drops: leave out "
                f"those before it."
            )
        out.append((1, count, 0) if layout is None else (layout.frames, layout.cells, layout.tail))
    return out


def novelty(x: Tensor) -> Tensor:
    """[R, C] 1 - cosine of every token of one frame x [R, C, D] with the mean of that frame."""
    wide = x.float()
    return 1 - F.cosine_similarity(wide, wide.mean(1, keepdim=True), dim=-1)


def change(x: Tensor) -> Tensor:
    """[R, T, C] how new every token of x [R, T, C, D] is: 1 - cosine with the same cell of the
    frame before; in the first frame, with the mean of that frame."""
    return torch.cat([novelty(x[:, 0])[:, None], (1 - ops.temporal_cosine(x)).float()], 1)


def share(weights: Tensor, k: tuple[int, ...], most: int) -> Tensor:
    """[R, T] whole numbers in proportion to weights [R, T] > 0, at most `most` each, that sum to
    k[r]: what goes beyond `most` is given to the others, rounding is by largest remainder, but of a
    half or more to one before all others (ties to the first frame)."""
    weights = weights.double()
    total = torch.tensor(k, device=weights.device, dtype=weights.dtype)[:, None]
    high, order = weights.sort(dim=1, descending=True)
    full = torch.arange(weights.shape[1], device=weights.device)  # so many frames are full
    rest = high.flip(1).cumsum(1).flip(1)
    scale = (total - full * most) / rest
    fits = (scale * high <= most + 1e-9).to(torch.uint8)
    first = fits.argmax(1, keepdim=True)
    exact = torch.where(full < first, most, (high * scale.gather(1, first)).clamp(max=most))
    quota = (exact + 1e-9).floor()
    to_one = (quota == 0) & (exact >= 0.5 - 1e-9)
    spare = torch.where(quota < most, exact - quota + to_one, -1.0)
    exact, quota, spare = (
        torch.empty_like(exact).scatter(1, order, each) for each in (exact, quota, spare)
    )
    return (quota + highest(spare, total - quota.sum(1, keepdim=True))).long()


def highest(score: Tensor, quota: Tensor) -> Tensor:
    """[..., C] bool, the quota [..., 1] highest scores along the last axis, ties to the first."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    steps = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, steps) < quota
