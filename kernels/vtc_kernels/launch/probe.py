"""A program forms the difference of activations of a few tokens in registers, as one side of a
product with a block of rows of the root, and writes the sums of squares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

#: tokens, rows of the root, and hidden units of a tile, and warps, by bytes per element of the root
TILES = {2: (64, 128, 32, 8), 4: (64, 64, 16, 8)}


@triton.jit
def activation(x, ACT: tl.constexpr):
    if ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACT == "gelu_tanh":  # tanh(t) = 2 sigmoid(2 t) - 1
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    if ACT == "quick_gelu":
        return x / (1.0 + tl.exp(-1.702 * x))
    return tl.maximum(x, 0.0)


@triton.jit
def probe_kernel(
    a_ptr,
    v_ptr,
    root_ptr,
    plus_ptr,
    minus_ptr,
    constant_ptr,
    out_ptr,
    n,
    m,
    outputs,
    gain,
    ACT: tl.constexpr,
    TRIANGULAR: tl.constexpr,
    NORM: tl.constexpr,
    CONSTANT: tl.constexpr,
    H: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    direction = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    row = block * BR + tl.arange(0, BR)
    real = token < n
    side = direction * n + token
    if NORM:
        plus = tl.load(plus_ptr + side, mask=real, other=0.0)[:, None]
        minus = tl.load(minus_ptr + side, mask=real, other=0.0)[:, None]
    acc = tl.zeros([BN, BR], tl.float32)
    start = 0
    if TRIANGULAR:  # BR is a multiple of BH
        start = block * BR
    for first in range(start, H, BH):
        h = first + tl.arange(0, BH)
        inside = h < H
        a = tl.load(
            a_ptr + token.to(tl.int64)[:, None] * H + h[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        v = tl.load(v_ptr + direction * H + h, mask=inside, other=0.0)[None, :]
        up = a + v
        down = a - v
        if NORM:
            up = up * plus
            down = down * minus
        if CONSTANT:
            constant = tl.load(constant_ptr + h, mask=inside, other=0.0)[None, :]
            up = up + constant
            down = down + constant
        change = (activation(up, ACT) - activation(down, ACT)) * gain
        root = tl.load(
            root_ptr + row.to(tl.int64)[:, None] * H + h[None, :],
            mask=(row < outputs)[:, None] & inside[None, :],
            other=0.0,
        )
        acc = tl.dot(change.to(root.dtype), tl.trans(root), acc, input_precision="ieee")
    target = out_ptr + block.to(tl.int64) * m * n + side
    tl.store(target, tl.sum(acc * acc, 1), mask=real)


def probe(
    a: Tensor,
    v: Tensor,
    root: Tensor,
    act: str,
    triangular: bool,
    h: float,
    plus: Tensor | None,
    minus: Tensor | None,
    constant: Tensor | None,
) -> Tensor:
    (n, hidden), m, outputs = a.shape, len(v), len(root)
    bn, br, bh, warps = TILES[root.element_size()]
    blocks = triton.cdiv(outputs, br)
    squares = torch.empty(blocks, m, n, dtype=torch.float32, device=a.device)
    if squares.numel() == 0:
        return torch.zeros(n, dtype=torch.float32, device=a.device)
    a, v, root = a.contiguous(), v.contiguous(), root.contiguous()
    plus, minus, constant = (None if t is None else t.contiguous() for t in (plus, minus, constant))
    wrap_triton(probe_kernel)[(triton.cdiv(n, bn), m, blocks)](
        a,
        v,
        root,
        a if plus is None else plus,
        a if minus is None else minus,
        a if constant is None else constant,
        squares,
        n,
        m,
        outputs,
        0.5 / h,
        ACT=act,
        TRIANGULAR=triangular,
        NORM=plus is not None,
        CONSTANT=constant is not None,
        H=hidden,
        BN=bn,
        BR=br,
        BH=bh,
        num_warps=warps,
        num_stages=2,
    )
    return squares.sum(0).sqrt().sum(0) * (2 * h)
