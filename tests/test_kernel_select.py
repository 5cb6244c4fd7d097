"""select_topk: torch against sorting in Python, the kernel against torch, compile, errors."""

from __future__ import annotations

import math

import pytest
import torch
from support.kernels import DEVICE, DTYPES, launched, randn
from torch import Tensor
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import select as launch
from vtc_kernels.operators import select as operators
from vtc_kernels.operators.select import reference, select_topk

NAN, INF = float("nan"), float("inf")


def plain(
    scores: Tensor,
    k: int,
    prefix: int = 0,
    valid: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row by row, by sorting tuples."""
    index, inverse = [], []
    for b, row in enumerate(scores.double().tolist()):

        def rank(token: int, row: list[float] = row, b: int = b) -> tuple[int, float, int]:
            if token < prefix:
                return 0, 0.0, token
            if valid is not None and not bool(valid[b, token]):
                return 3, 0.0, token
            return (1, 0.0, token) if math.isnan(row[token]) else (2, -row[token], token)

        count = k if counts is None else int(counts[b])
        kept = sorted(sorted(range(len(row)), key=rank)[:count])
        slots = {token: slot for slot, token in enumerate(kept)}
        index.append(kept + kept[-1:] * (k - count))
        inverse.append([slots.get(token, -1) for token in range(len(row))])
    shape = scores.shape
    return (
        torch.tensor(index, dtype=torch.int64).reshape(shape[0], k).to(DEVICE),
        torch.tensor(inverse, dtype=torch.int32).reshape(shape).to(DEVICE),
    )


def check(
    scores: Tensor,
    k: int,
    prefix: int = 0,
    valid: Tensor | None = None,
    counts: Tensor | None = None,
    kernel: bool = True,
) -> None:
    args = (scores, k, prefix, valid, counts)
    index, inverse = plain(*args)
    for run in (reference, lambda *a: launched(launch.select, *a))[: 1 + kernel]:
        out = run(*args)
        assert torch.equal(out[0], index) and torch.equal(out[1], inverse)
        assert (out[0].dtype, out[1].dtype) == (torch.int64, torch.int32)
    to = select_topk(*args)
    assert torch.equal(to.index, index) and torch.equal(to.inverse, inverse)
    assert (to.n, to.k) == (scores.shape[1], k)


@pytest.mark.parametrize("n", [1, 7, 33, 577, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_all_sizes(n: int, dtype: torch.dtype) -> None:
    """bf16 has many ties at these sizes; 2 * 1025 scores take the threshold, fewer the sort."""
    scores = randn(2, n, dtype=dtype)
    check(scores, n // 3)
    for k in sorted({0, 1, n - 1, n}):
        check(scores, k, kernel=False)
        check(scores[:1], k, kernel=dtype == torch.bfloat16)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_order_is_total(
    sort: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both NaNs on top, -0.0 as 0.0, -inf above tokens that are not valid, lowest index first."""
    monkeypatch.setattr(operators, "SORTED", 1 << 20 if sort else 0)
    row = [0.0, -0.0, NAN, -INF, INF, 1.0, -NAN, -0.0, 0.0, -INF, 1.0, -1e-40, 65504.0, -INF, 1e-7]
    scores = torch.tensor([row, row[::-1], [-0.0, 0.0, 0.0] * 5], device=DEVICE).to(dtype)
    sign = torch.copysign(torch.tensor(NAN), torch.tensor(-1.0)).to(DEVICE, dtype)
    scores[0, 6], scores[1, 8] = sign, sign
    valid = torch.tensor([[i % 4 != 3 for i in range(15)]] * 2 + [[False] * 15], device=DEVICE)
    counts = torch.tensor([1, 2, 4], device=DEVICE)
    for k in range(4, 16):
        kernel = k in (6, 13) and not sort and dtype != torch.float64
        check(scores, k, kernel=kernel)
        check(scores, k, 2, valid, kernel=kernel)
        check(scores, k, 4, valid, (counts * k / 4).ceil().int(), kernel=kernel)
        check(scores, k, 4, kernel=False)
        check(scores, k, 0, valid, kernel=False)
        check(scores, k, 3, None, counts, kernel=False)
        check(scores, k, k, kernel=False)


def test_bits_near_the_limit() -> None:
    """Neighbours of the threshold in the last bit, at both ends of the range of exponents."""
    base = torch.tensor([[1.0], [-1.0], [3e38], [1e-38], [-1e-44]])
    bits = base.view(torch.int32) + torch.arange(-3, 4, dtype=torch.int32)
    scores = bits.flip(1).contiguous().view(torch.float32).to(DEVICE)
    for k in range(1, 8):
        check(scores, k, kernel=k in (2, 5))


def test_strides_offsets_and_empty_batches() -> None:
    scores, valid = randn(5, 70), randn(5, 70, seed=1) > -1
    counts = torch.tensor([9, 1, 4, 9, 5, 7, 3, 2, 6, 1], device=DEVICE)
    check(scores[1::2, 3:36], 9, 2, valid[1::2, 3:36], counts[1::6])
    check(scores[:, ::2], 9, 0, valid[:, ::2], counts[::2])
    check(scores.t()[:2], 3, 1, valid.t()[:2])
    check(scores[:1].expand(3, 70), 9, 0, valid[:1].expand(3, 70), counts[:1].expand(3))
    check(scores[:0], 9, 1, valid[:0], counts[:0])
    check(scores[:, :0], 0)


def test_rows_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, the prefix and repeated last tokens across blocks."""
    monkeypatch.setattr(launch, "BLOCK", 16)
    scores = (randn(3, 100) * 2).round()
    counts = torch.tensor([1, 17, 70], device=DEVICE)
    check(scores, 16, 3)
    check(scores, 40, 20, scores > -1)
    check(scores, 70, 3, None, counts)


def test_long_rows_take_the_torch_formula() -> None:
    scores = randn(1, operators.LONGEST + 3)
    to = select_topk(scores, 9)
    index, inverse = plain(scores, 9)
    assert torch.equal(to.index, index) and torch.equal(to.inverse, inverse)


def test_counts_beyond_the_slots_are_clamped() -> None:
    """On a GPU, where nothing checks them."""
    counts = torch.tensor([-3, 0, 4, 99], device=DEVICE)
    scores = randn(4, 12)
    index, inverse = plain(scores, 4, 0, None, counts.clamp(1, 4))
    for run in (reference, launch.select):
        out = run(scores, 4, 0, None, counts)
        assert torch.equal(out[0], index) and torch.equal(out[1], inverse)


def test_scores_with_a_gradient() -> None:
    scores = randn(2, 33).requires_grad_()
    to = select_topk(scores, 5)
    assert not to.index.requires_grad and not to.inverse.requires_grad
    assert torch.equal(to.index, plain(scores.detach(), 5)[0])


def test_registration() -> None:
    scores, valid = randn(2, 33), randn(2, 33) > 0
    counts = torch.tensor([3, 5], device=DEVICE)
    for extra in ((0, None, None), (2, valid, counts)):
        torch.library.opcheck(OPERATORS["select"], (scores, 5, *extra))
        for out, expected in zip(
            OPERATORS["select"](scores, 5, *extra), plain(scores, 5, *extra), strict=True
        ):
            assert torch.equal(out, expected)


def joined(scores: Tensor, k: int, valid: Tensor | None, counts: Tensor | None) -> Tensor:
    to = select_topk(scores * 1.0, k, 1, valid, counts)
    return torch.cat([to.index, to.inverse.long()], 1)


def test_compiled() -> None:
    torch._dynamo.reset()
    fast = torch.compile(joined, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, k in ((33, 9), (40, 12), (1200, 9)):
        given = (randn(2, n), k, None, None)
        assert torch.equal(fast(*given), joined(*given))
    given = (randn(2, 1200), 9, randn(2, 1200) > -1, torch.tensor([7, 9], device=DEVICE))
    assert torch.equal(fast(*given), joined(*given))


@pytest.mark.parametrize("n", [33, 1200])
def test_inductor(n: int) -> None:
    torch._dynamo.reset()
    given = (randn(2, n), 9, None, None)
    fast = torch.compile(joined, fullgraph=True, dynamic=True)
    assert torch.equal(fast(*given), joined(*given))


def test_errors_name_the_way_out() -> None:
    scores = randn(2, 33)
    with pytest.raises(ValueError, match="k=34 and prefix=0 of 33 tokens: 0 <= prefix <= k <= 33"):
        select_topk(scores, 34)
    with pytest.raises(ValueError, match="k=3 and prefix=4 of 33 tokens"):
        select_topk(scores, 3, 4)
    with pytest.raises(ValueError, match="int64 of shape .* one row per image"):
        select_topk(torch.zeros(2, 3, dtype=torch.int64), 1)
    with pytest.raises(
        ValueError, match="float32 of shape .33,.: they must be .* one row per image"
    ):
        select_topk(scores[0], 1)
    with pytest.raises(ValueError, match="valid is torch.float32 .* must be bool"):
        select_topk(scores, 3, valid=scores)
    with pytest.raises(ValueError, match="valid is torch.bool of shape .2, 32."):
        select_topk(scores, 3, valid=scores[:, 1:] > 0)
    with pytest.raises(ValueError, match="one for each of the 2 rows"):
        select_topk(scores, 3, counts=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="counts are torch.float32"):
        select_topk(scores, 3, counts=torch.ones(2))
    for counts, text in (([0, 3], "go from 0 to 3"), ([1, 4], "to k=3, so raise k or clamp")):
        with pytest.raises(ValueError, match=text):
            select_topk(scores.cpu(), 3, counts=torch.tensor(counts))
