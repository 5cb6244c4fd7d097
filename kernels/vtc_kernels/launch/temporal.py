"""A program walks through a chunk of frames with the frame before in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import contiguous_rows, tile, unit, warps

#: a chunk reads one frame that another one reads too: at most 1/16 of its bytes
FRAMES = 16
#: programs that fill a device; with more of them chunks get longer
PROGRAMS = 1024


@triton.jit
def temporal_kernel(
    x_ptr,
    out_ptr,
    t,
    n,
    chunk,
    xb,
    xt,
    xn,
    U: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    real = token < n
    d = tl.arange(0, BD)
    mask = real[:, None] & (d < D)[None, :]
    at = (b * xb * U + token.to(tl.int64) * xn * U)[:, None] + d[None, :]
    before = tl.program_id(1).to(tl.int64) * chunk
    old = tl.load(x_ptr + before * xt * U + at, mask=mask, other=0.0).to(tl.float32)
    old_norm = tl.maximum(tl.sqrt(tl.sum(old * old, 1)), 1e-12)
    for frame in range(before + 1, tl.minimum(before + chunk + 1, t)):
        new = tl.load(x_ptr + frame * xt * U + at, mask=mask, other=0.0).to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(new * new, 1)), 1e-12)
        cosine = tl.sum(new * old, 1) / (norm * old_norm)
        tl.store(out_ptr + (b * (t - 1) + frame - 1) * n + token, cosine, mask=real)
        old = new
        old_norm = norm


def temporal(x: Tensor) -> Tensor:
    b, t, n, d = x.shape
    out = torch.empty(b, t - 1, n, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    x = contiguous_rows(x)
    bn, bd = tile(d, columns=4096)
    u = unit(x, *x.stride()[:3])
    blocks = triton.cdiv(n, bn)
    chunks = max(1, min(PROGRAMS // (blocks * b), (t - 1) // FRAMES))
    chunk = triton.cdiv(t - 1, chunks)
    wrap_triton(temporal_kernel)[(blocks, triton.cdiv(t - 1, chunk), b)](
        x,
        out,
        t,
        n,
        chunk,
        *(s // u for s in x.stride()[:3]),
        U=u,
        D=d,
        BN=bn,
        BD=bd,
        num_warps=warps(bd * x.element_size(), bn),
    )
    return out
