"""merge_tokens: torch against loops, the kernel against torch, gradients, compile."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, DTYPES, close, launched, randn
from torch import Tensor
from torch.library import opcheck
from vtc_kernels import TokenMap, merge_tokens
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import merge as launch
from vtc_kernels.operators.merge import reference


def slots(b: int, n: int, k: int, seed: int = 0) -> Tensor:
    """[b, n] random slots, some lost (-1), some slots empty."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, k, (b, n), generator=g).to(DEVICE)


def loops(x: Tensor, slot: Tensor, k: int, size: Tensor | None, mean: bool) -> tuple[Tensor, ...]:
    b, n, d = x.shape
    out = torch.zeros(b, k, d, dtype=torch.float64, device=x.device)
    total = torch.zeros(b, k, dtype=torch.float64, device=x.device)
    for i in range(b):
        for j in range(n):
            s = int(slot[i, j])
            if s >= 0:
                w = 1.0 if size is None else size[i, j].double()
                out[i, s] += w * x[i, j].double()
                total[i, s] += w
    if mean:
        out = torch.where(total[..., None] > 0, out / total[..., None], 0.0)
    return out, total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("sized", [True, False])
def test_against_loops(dtype: torch.dtype, mean: bool, sized: bool) -> None:
    for n, k, d in ((1, 1, 8), (7, 3, 72), (33, 9, 8), (33, 33, 10), (65, 1, 72)):
        x, slot = randn(2, n, d, dtype=dtype), slots(2, n, k)
        size = torch.randint(1, 4, (2, n), generator=torch.Generator().manual_seed(1))
        size = size.to(DEVICE).float() if sized else None
        expected, total = loops(x, slot, k, size, mean)
        to = TokenMap.merge(slot, k)
        args = (x, size, to.inverse, *to.csr(), k, mean)
        for merged, sizes in (merge_tokens(x, to, size, mean), launched(launch.merge, *args)):
            assert merged.dtype == dtype and sizes.dtype == torch.float32
            scale = max(1.0, float(expected.abs().max()))
            close(merged / scale, expected / scale, 2.0)  # the torch form rounds shares as well
            assert torch.equal(sizes.double(), total)


@pytest.mark.parametrize("n", [577, 1025])
@pytest.mark.parametrize("d", [8, 1152])
def test_kernel_at_production_sizes(n: int, d: int) -> None:
    x, slot = randn(1, n, d, dtype=torch.bfloat16), slots(1, n, 48)
    to, size = TokenMap.merge(slot, 48), randn(1, n, seed=3).abs() + 0.5
    merged, sizes = launched(launch.merge, x, size, to.inverse, *to.csr(), 48, True)
    expected, total = reference(x.float(), size, to.inverse, *to.csr(), 48, True)
    close(merged, expected)
    close(sizes, total)


def test_infinite_tokens_stay_where_they_go() -> None:
    """A lost token, and one in another slot, may be NaN."""
    x = torch.ones(1, 4, 8, device=DEVICE)
    x[0, 1], x[0, 3] = float("nan"), float("inf")
    to = TokenMap.merge(torch.tensor([[0, -1, 0, 1]], device=DEVICE), 2)
    for merged, _ in (
        merge_tokens(x, to),
        launched(launch.merge, x, None, to.inverse, *to.csr(), 2, True),
    ):
        assert merged[0, 0].eq(1).all() and merged[0, 1].eq(float("inf")).all()


def test_views_are_read_in_place() -> None:
    store = randn(4, 70, 80, dtype=torch.bfloat16)
    slot = slots(2, 33, 5)
    to = TokenMap.merge(slot, 5)
    for x in (store[::2, 2:68:2], store[1:3, 5:38], store[:2, :33, 3:75], store[:1, :33]):
        x = x.expand(2, -1, -1)
        out, _ = launched(launch.merge, x, None, to.inverse, *to.csr(), 5, True)
        close(out, loops(x, slot, 5, None, True)[0])
        close(merge_tokens(x, to)[0], loops(x, slot, 5, None, True)[0], 2.0)


def test_identical_tokens_and_low_precision_sums() -> None:
    """400 ones are 400: sums are fp32 whatever the dtype."""
    x = torch.ones(1, 400, 8, dtype=torch.bfloat16, device=DEVICE)
    to = TokenMap.merge(torch.zeros(1, 400, dtype=torch.long, device=DEVICE), 1)
    args = (x, None, to.inverse, *to.csr(), 1)
    for run in (reference, launch.merge):
        assert run(*args, False)[0].eq(400).all()
        assert run(*args, True)[0].float().sub(1).abs().max() < 2**-7


def test_nothing_to_merge() -> None:
    for b, n, k in ((0, 5, 2), (2, 0, 3), (2, 5, 0)):
        to = TokenMap.merge(torch.full((b, n), -1, device=DEVICE), k)
        x = randn(b, n, 8)
        for out, total in (
            merge_tokens(x, to),
            launched(launch.merge, x, None, to.inverse, *to.csr(), k, True),
        ):
            assert out.shape == (b, k, 8) and total.shape == (b, k)
            assert out.eq(0).all() and total.eq(0).all()


@pytest.mark.parametrize("mean", [True, False])
def test_gradients(mean: bool) -> None:
    """Of tokens and sizes: finite differences, and the registered formula against autograd."""
    slot = torch.tensor([[0, -1, 2, 2, 0, 0], [1, 1, -1, 0, 1, 2]], device=DEVICE)
    to = TokenMap.merge(slot, 4)  # slot 3 stays empty
    x = randn(2, 6, 3).double().requires_grad_()
    size = (randn(2, 6, seed=1).abs() + 0.5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, size: merge_tokens(x, to, size, mean), (x, size))
    args = (to.inverse, *to.csr(), 4, mean)
    for weight in (size.detach().float().requires_grad_(), None):
        given = [x.detach().float().requires_grad_()]
        given += [] if weight is None else [weight]
        results = []
        for run in (reference, OPERATORS["segment_merge"]):
            out, total = run(given[0], weight, *args)
            loss = (out * randn(*out.shape, seed=2)).sum()
            if weight is not None:
                loss = loss + (total * randn(2, 4, seed=3)).sum()
            results.append(torch.autograd.grad(loss, given))
        for ours, native in zip(*results, strict=True):
            torch.testing.assert_close(ours, native)


def test_registration() -> None:
    to = TokenMap.merge(slots(2, 9, 4), 4)
    x, size = randn(2, 9, 5).requires_grad_(), randn(2, 9).abs().requires_grad_()
    for weight in (None, size):
        args = (x, weight, to.inverse, *to.csr(), 4, True)
        results = opcheck(OPERATORS["segment_merge"], args)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    def merge(x: Tensor, slot: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        return merge_tokens(x, TokenMap.merge(slot, 9), size)

    compiled = torch.compile(merge, fullgraph=True, dynamic=True, backend=backend)
    for n in (20, 33):
        x, slot, size = randn(2, n, 16), slots(2, n, 9), randn(2, n, seed=1).abs() + 0.5
        for ours, eager in zip(compiled(x, slot, size), merge(x, slot, size), strict=True):
            torch.testing.assert_close(ours, eager)


def test_errors_name_the_map() -> None:
    to, x = TokenMap.merge(slots(2, 9, 4), 4), randn(2, 9, 5)
    with pytest.raises(ValueError, match="`to` is Tensor: make a map with TokenMap.merge"):
        merge_tokens(x, to.inverse)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x has shape \(2, 10, 5\): this map of 9 tokens"):
        merge_tokens(randn(2, 10, 5), to)
    with pytest.raises(ValueError, match="x is torch.int64: means need floating-point"):
        merge_tokens(x.long(), to)
    with pytest.raises(ValueError, match="inverse goes from 0 to 4, but .* to 3 are there"):
        TokenMap.merge(torch.arange(5)[None], 4)
    with pytest.raises(ValueError, match="k=-1 slots"):
        TokenMap.merge(torch.arange(5)[None], -1)
