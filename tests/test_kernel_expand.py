"""expand_tokens and TokenMap: torch against loops, the kernel against torch, adjoints, compile."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, DTYPES, close, indices, launched, randn
from torch import Tensor
from torch.library import opcheck
from vtc_kernels import TokenMap, expand_tokens, gather_tokens, merge_tokens
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import expand as launch
from vtc_kernels.operators.expand import reference


def inverses(b: int, n: int, k: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, k, (b, n), generator=g, dtype=torch.int32).to(DEVICE)


def loops(
    y: Tensor, inverse: Tensor, residual: Tensor | None, gate: Tensor | None, fill: Tensor | None
) -> Tensor:
    (b, _, d), n = y.shape, inverse.shape[1]
    out = torch.zeros(b, n, d, dtype=torch.float64, device=y.device)
    for i in range(b):
        for j in range(n):
            s = int(inverse[i, j])
            if s >= 0:
                out[i, j] = y[i, s].double() * (1 if gate is None else gate[i].double())
            elif fill is not None:
                out[i, j] = fill.double()
            if residual is not None:
                out[i, j] += residual[i, j].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["", "residual", "gate", "residual gate", "fill", "gate fill"])
def test_against_loops(dtype: torch.dtype, given: str) -> None:
    for n, k, d in ((1, 1, 8), (7, 3, 72), (33, 9, 10), (33, 33, 8), (577, 12, 72)):
        y, inverse = randn(2, k, d, dtype=dtype), inverses(2, n, k)
        residual = randn(2, n, d, dtype=dtype, seed=1) if "residual" in given else None
        gate = randn(2, d, dtype=dtype, seed=2) if "gate" in given else None
        fill = randn(d, dtype=dtype, seed=3) if "fill" in given else None
        args = (y, inverse, residual, gate, fill)
        expected = loops(*args)
        for out in (reference(*args), launched(launch.expand, *args)):
            assert out.dtype == dtype
            if residual is None and gate is None:
                assert torch.equal(out.double(), expected)
            else:
                close(out, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_copies_keep_the_bits(dtype: torch.dtype) -> None:
    y, inverse = (randn(2, 5, 3) * 9).to(dtype), inverses(2, 33, 5)
    if dtype.is_floating_point:
        y[0, 0, 0], y[0, 1, 0] = float("nan"), -0.0
    args = (y, inverse, None, None, None)
    out = launched(launch.expand, *args).view(torch.int8)
    assert torch.equal(out, reference(*args).view(torch.int8))


def test_views_are_read_in_place() -> None:
    store = randn(4, 70, 80, dtype=torch.bfloat16)
    inverse, residual = inverses(2, 33, 5), store[2:, 9:42, 4:76]
    shared = store[:1, :5, :72].expand(2, -1, -1)
    for y in (store[::2, 2:12:2, :72], store[1:3, 5:10, 3:75], shared):
        gate = store[:2, 0, :72]
        out = launched(launch.expand, y, inverse, residual, gate, None)
        close(out, loops(y, inverse, residual, gate, None))
        assert torch.equal(out, reference(y, inverse, residual, gate, None))


def test_nothing_to_expand() -> None:
    for b, n, k in ((0, 5, 2), (2, 0, 3), (2, 5, 0)):
        inverse = torch.full((b, n), -1, dtype=torch.int32, device=DEVICE)
        for run in (reference, launch.expand):
            out = run(randn(b, k, 8), inverse, None, None, None)
            assert out.shape == (b, n, 8) and out.eq(0).all()


def test_gradients() -> None:
    inverse = torch.tensor([[0, -1, 2, 2, 0], [1, 1, -1, 0, 3]], dtype=torch.int32, device=DEVICE)
    y, residual = (randn(2, m, 3, seed=m).double().requires_grad_() for m in (4, 5))
    gate, fill = (randn(*s, seed=7).double().requires_grad_() for s in ((2, 3), (3,)))
    to = TokenMap(torch.zeros(2, 4, dtype=torch.long, device=DEVICE), inverse)
    for options in ((None, None, None), (residual, gate, None), (None, gate, fill)):
        used = [t for t in (y, *options) if t is not None]
        assert torch.autograd.gradcheck(lambda *_, o=options: expand_tokens(y, to, *o), used)
        grads = []
        for run in (reference, OPERATORS["expand"]):
            out = run(y, inverse, *options)
            grads.append(torch.autograd.grad((out * randn(2, 5, 3, seed=5)).sum(), used))
        for native, ours in zip(*grads, strict=True):
            torch.testing.assert_close(ours, native, rtol=1e-5, atol=1e-6)


def test_registration() -> None:
    inverse = inverses(2, 9, 4)
    y, residual = randn(2, 4, 5).requires_grad_(), randn(2, 9, 5).requires_grad_()
    gate, fill = randn(2, 5).requires_grad_(), randn(5).requires_grad_()
    for options in ((None, None, None), (residual, gate, None), (None, None, fill)):
        results = opcheck(OPERATORS["expand"], (y, inverse, *options))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    def expand(y: Tensor, index: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
        return expand_tokens(y, TokenMap.keep(index, residual.shape[1]), residual, gate)

    compiled = torch.compile(expand, fullgraph=True, dynamic=True, backend=backend)
    for k in (5, 20):
        args = randn(2, k, 16), indices(2, 33, k), randn(2, 33, 16, seed=1), randn(2, 16, seed=2)
        torch.testing.assert_close(compiled(*args), expand(*args))


def test_fill_and_residual_exclude_each_other() -> None:
    to = TokenMap.keep(indices(1, 4, 2), 4)
    with pytest.raises(ValueError, match="lost tokens keep their residual"):
        expand_tokens(randn(1, 2, 3), to, residual=randn(1, 4, 3), fill=randn(3))


# -- TokenMap --------------------------------------------------------------------------------------


def test_a_kept_map_by_hand() -> None:
    to = TokenMap.keep(torch.tensor([[1, 3], [0, 0]], device=DEVICE), 4)
    assert to.inverse.tolist() == [[-1, 0, -1, 1], [1, -1, -1, -1]] and (to.n, to.k) == (4, 2)
    order, offsets = to.csr()
    assert order.tolist() == [1, 3, 4, 0, 0, 0, 0, 0] and offsets.tolist() == [0, 1, 2, 2, 3, 8]


def test_a_merging_map_by_hand() -> None:
    slot = torch.tensor([[1, -1, 0, 1], [1, 1, -1, 1]], device=DEVICE)
    to = TokenMap.merge(slot, 2)
    assert to.index.tolist() == [[2, 0], [0, 0]]  # slot 0 of the second row is empty
    order, offsets = to.csr()
    assert order.tolist() == [2, 0, 3, 4, 5, 7, 0, 0] and offsets.tolist() == [0, 1, 3, 3, 6, 8]
    index = torch.tensor([[2, 3], [0, 3]], device=DEVICE)
    assert TokenMap.merge(slot, 2, index).index is index


def test_pooling_map() -> None:
    to = TokenMap.pooling(1, 2, 4, (2, 2), torch.device(DEVICE))
    assert to.inverse.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]] and to.k == 2
    with pytest.raises(ValueError, match="3 x 4 tokens has no whole windows of 2 x 2"):
        TokenMap.pooling(1, 3, 4, (2, 2), torch.device(DEVICE))


def test_the_three_directions_are_adjoint() -> None:
    """<gather x, y> = <x, expand y> for kept tokens, <sum x, y> = <x, expand y> for merged ones;
    expanding and merging again is the identity."""
    x, y = randn(2, 33, 8).double(), randn(2, 9, 8, seed=1).double()
    kept = TokenMap.keep(indices(2, 33, 9), 33)
    left = (gather_tokens(kept.index, x)[0] * y).sum()
    torch.testing.assert_close(left, (x * expand_tokens(y, kept)).sum())
    assert torch.equal(gather_tokens(kept.index, expand_tokens(y, kept))[0], y)
    merged = TokenMap.merge(inverses(2, 33, 9), 9)
    left = (merge_tokens(x, merged, mean=False)[0] * y).sum()
    torch.testing.assert_close(left, (x * expand_tokens(y, merged)).sum())
    again, sizes = merge_tokens(expand_tokens(y, merged), merged)
    torch.testing.assert_close(again, torch.where(sizes[..., None] > 0, y, 0.0))
    assert int(sizes.sum()) == int((merged.inverse >= 0).sum())


def test_errors_name_the_shapes() -> None:
    to, y = TokenMap.keep(indices(2, 9, 4), 9), randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"y has shape \(2, 6, 3\): this map into 4 slots"):
        expand_tokens(randn(2, 6, 3), to)
    with pytest.raises(ValueError, match=r"residual has shape \(2, 1, 3\): this map of 9"):
        expand_tokens(y, to, residual=randn(2, 1, 3))
    with pytest.raises(ValueError, match=r"gate has shape \(2,\): it must be \(3,\) or \(2, 3\)"):
        expand_tokens(y, to, gate=randn(2))
    with pytest.raises(ValueError, match="`to` is Tensor: give the TokenMap"):
        expand_tokens(y, to.index)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index is torch.float32: token numbers"):
        TokenMap.keep(randn(2, 3), 9)
