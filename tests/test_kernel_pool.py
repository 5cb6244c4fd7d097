"""pool_tokens and unpool_tokens against loops, the kernel's path against torch, gradients."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, DTYPES, close, launched, randn
from torch import Tensor
from vtc_kernels import TokenMap
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import expand as launch_expand
from vtc_kernels.operators.pool import pool_tokens, reference, unpool_tokens
from vtc_kernels.token_map import window_slots

CASES = [
    ((1, 1), (1, 1)),
    ((4, 6), (2, 2)),
    ((6, 4), (3, 1)),
    ((3, 8), (1, 4)),
    ((24, 24), (2, 3)),
    ((5, 7), (5, 7)),
]


def plain_pool(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Window by window."""
    (height, width), (high, wide) = grid, window
    out = []
    for top in range(0, height, high):
        for left in range(0, width, wide):
            tokens = [
                r * width + c for r in range(top, top + high) for c in range(left, left + wide)
            ]
            out.append(sum(x[:, t].double() for t in tokens) / len(tokens))
    return torch.stack(out, 1)


def plain_unpool(y: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Token by token."""
    across = grid[1] // window[1]
    where = [
        (r // window[0]) * across + c // window[1] for r in range(grid[0]) for c in range(grid[1])
    ]
    return torch.stack([y[:, slot] for slot in where], 1)


@pytest.mark.parametrize("grid,window", CASES)
@pytest.mark.parametrize("d", [1, 8, 72])
def test_pooling_of_all_sizes(grid: tuple[int, int], window: tuple[int, int], d: int) -> None:
    for dtype in DTYPES:
        x = randn(2, grid[0] * grid[1], d, dtype=dtype)
        expected = plain_pool(x, grid, window)
        out = pool_tokens(x, grid, window)
        assert out.dtype == dtype and out.is_contiguous()
        close(out, expected)
        one_rounding = (out.double() - expected).abs() <= (
            expected.to(dtype).double() - expected
        ).abs() + 1e-6 * expected.abs() + 1e-7
        assert bool(one_rounding.all())


@pytest.mark.parametrize("grid,window", CASES)
def test_unpooling_copies_bits(grid: tuple[int, int], window: tuple[int, int]) -> None:
    k = grid[0] * grid[1] // (window[0] * window[1])
    for dtype in (*DTYPES, torch.int64, torch.bool):
        y = (randn(2, k, 9) * 3).to(dtype)
        if dtype.is_floating_point:
            y[0, 0, 0], y[1, -1, -1] = float("nan"), -0.0
        raw = torch.uint8 if dtype == torch.bool else torch.int8
        expected = plain_unpool(y, grid, window).view(raw)
        assert torch.equal(unpool_tokens(y, grid, window).view(raw), expected)
        slots = window_slots(grid, window, y.device).expand(2, -1)
        kernel = launched(launch_expand.expand, y, slots, None, None, None)
        assert torch.equal(kernel.view(raw), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpooling_onto_a_residual(dtype: torch.dtype) -> None:
    grid, window = (4, 6), (2, 3)
    y, residual = randn(2, 4, 72, dtype=dtype), randn(2, 24, 72, dtype=dtype, seed=1)
    gate = randn(2, 72, dtype=dtype, seed=2)
    slots = window_slots(grid, window, y.device).expand(2, -1)
    for r in (None, residual):
        for g in (None, gate, gate[0]):
            expected = plain_unpool(y, grid, window).double()
            expected = expected if g is None else expected * g.expand(2, 72)[:, None].double()
            expected = expected if r is None else expected + r.double()
            out = unpool_tokens(y, grid, window, r, g)
            close(out, expected)
            assert out.dtype == dtype
            full = None if g is None else g.expand(2, 72)
            kernel = launched(launch_expand.expand, y, slots, r, full, None)
            close(kernel, reference(y, grid, window, r, full).double())


def test_slots_are_those_of_the_token_map() -> None:
    for grid, window in CASES:
        to = TokenMap.pooling(2, *grid, window, torch.device(DEVICE))
        slots = window_slots(grid, window, torch.device(DEVICE))
        assert torch.equal(slots.expand(2, -1), to.inverse) and slots.dtype == to.inverse.dtype


def test_strides_and_empty_batches() -> None:
    x = randn(2, 9, 30)[:, :, ::3].transpose(1, 2)
    assert torch.equal(pool_tokens(x, (2, 5), (2, 1)), pool_tokens(x.contiguous(), (2, 5), (2, 1)))
    one = randn(1, 24, 8)
    close(
        pool_tokens(one.expand(3, -1, -1), (4, 6), (2, 2)),
        plain_pool(one, (4, 6), (2, 2)).expand(3, -1, -1),
    )
    y = randn(2, 8, 10)[:, 1:7, 2:9]
    assert torch.equal(unpool_tokens(y, (4, 6), (2, 2)), plain_unpool(y, (4, 6), (2, 2)))
    for shape in ((0, 24, 8), (2, 24, 0)):
        assert pool_tokens(randn(*shape), (4, 6), (2, 2)).shape == (shape[0], 6, shape[2])
        y = randn(shape[0], 6, shape[2])
        assert unpool_tokens(y, (4, 6), (2, 2)).shape == shape


def test_infinities_and_nan_stay_in_their_window() -> None:
    x = torch.zeros(1, 24, 8, device=DEVICE)
    x[0, 0, 0], x[0, 4, 1] = float("inf"), float("nan")
    out = pool_tokens(x, (4, 6), (2, 2))
    assert out[0, 0, 0] == float("inf") and bool(out[0, 2, 1].isnan())
    assert int((out != 0).sum()) == 2


def test_gradients() -> None:
    grid, window = (4, 6), (2, 3)
    x, y, residual, gate = (
        randn(*s, seed=i).double().requires_grad_()
        for i, s in enumerate(((2, 24, 3), (2, 4, 3), (2, 24, 3), (2, 3)))
    )
    torch.autograd.gradcheck(lambda x: pool_tokens(x, grid, window), x)
    torch.autograd.gradcheck(
        lambda *a: unpool_tokens(a[0], grid, window, *a[1:]), (y, residual, gate)
    )
    slots = window_slots(grid, window, y.device).expand(2, -1)
    g = randn(2, 24, 3, seed=9).double()
    own = OPERATORS["expand"](y, slots, residual, gate, None)
    native = unpool_tokens(y, grid, window, residual, gate)
    torch.testing.assert_close(own, native)
    grads = [torch.autograd.grad((out * g).sum(), (y, residual, gate)) for out in (own, native)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # the operator adds in fp32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    def run(x: Tensor, gate: Tensor, height: int) -> Tensor:
        y = pool_tokens(x * 1.0, (height, 6), (2, 2))
        return unpool_tokens(y, (height, 6), (2, 2), x, gate)

    torch._dynamo.reset()
    fast = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for height in (4, 8)[: 1 + (backend == "aot_eager")]:
        x, gate = randn(2, height * 6, 8), randn(8)
        torch.testing.assert_close(fast(x, gate, height), run(x, gate, height))


def test_errors_name_the_way_out() -> None:
    x = randn(2, 24, 8)
    for call, text in (
        (lambda: pool_tokens(x, (4, 6), (3, 2)), "4 x 6 .* no whole windows of 3 x 2: pad it"),
        (lambda: pool_tokens(x, (4, 6), (2, 4)), "no whole windows"),
        (lambda: pool_tokens(x, (4, 6), (0, 2)), "no whole windows of 0 x 2"),
        (lambda: pool_tokens(x, (4, 8), (2, 2)), "24 tokens and a grid of 4 x 8 has 32: leave"),
        (lambda: pool_tokens(x.long(), (4, 6), (2, 2)), "int64 .* floating point"),
        (lambda: pool_tokens(x[0], (4, 6), (2, 2)), "shape .24, 8."),
        (lambda: unpool_tokens(x, (4, 6), (2, 2)), "needs .B, 6, D."),
        (lambda: unpool_tokens(x[:, :6], (4, 6), (5, 2)), "no whole windows of 5 x 2"),
        (lambda: unpool_tokens(x[:, :6], (4, 6), (2, 2), x[:1]), "residual .* .2, 24, 8."),
    ):
        with pytest.raises(ValueError, match=text):
            call()
