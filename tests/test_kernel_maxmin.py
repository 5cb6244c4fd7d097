"""maxmin_select and maxmin_tokens: torch against loops, kernels against torch, compile, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.kernels import DEVICE, DTYPES, launched, randn
from torch import Tensor
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import maxmin as launch
from vtc_kernels.operators import maxmin
from vtc_kernels.operators.maxmin import maxmin_select, maxmin_tokens


def similar(b: int, n: int, seed: int = 0) -> Tensor:
    """Symmetric, in steps of 1 / 64 so that ties abound and all sums are exact; some above 1."""
    s = (randn(b, n, n, seed=seed) * 24).round().clamp(-70, 70) / 64
    return (s + s.transpose(1, 2)) / 2


def signs(b: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Features whose cosines are exact in every order of summation: rows of +-1, d a power of 4."""
    assert d == 4 ** round(math.log(d, 4))
    return torch.where(randn(b, n, d, seed=n) > 0, 1.0, -1.0).to(dtype)


def plain(
    s: Tensor,
    k: int,
    valid: Tensor | None = None,
    first: Tensor | None = None,
    priority: Tensor | None = None,
) -> list[list[int]]:
    """Greedy choice by loops over a table of distances."""
    out = []
    for b in range(len(s)):
        n = s.shape[1]
        far = [[max(0.0, 1 - v) if v == v else 0.0 for v in row] for row in s[b].tolist()]
        free = [j for j in range(n) if valid is None or bool(valid[b, j])]
        weight = [1.0] * n if priority is None else priority[b].tolist()
        if first is not None:
            picks = [int(first[b])]
        else:
            alone = {i: min([far[i][j] for j in free if j != i], default=math.inf) for i in free}
            picks = [max(free, key=lambda i: (alone[i], -i))]
        while len(picks) < k:
            rest = [j for j in free if j not in picks]
            score = {j: min(far[i][j] for i in picks) * weight[j] for j in rest}
            picks.append(max(rest, key=lambda j: (score[j], -j)))
        out.append(picks[:k])
    return out


def options(b: int, n: int, which: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    valid = first = priority = None
    if "v" in which:
        valid = randn(b, n, seed=1) > -0.5
        valid[:, n // 2] = True
    if "f" in which:
        first = torch.full((b,), n // 2, device=DEVICE)
    if "p" in which:  # many equal ones, and zeros
        priority = (randn(b, n, seed=2).abs() * 4).floor() / 4
    return valid, first, priority


ALL = ["", "f", "v", "p", "vf", "vp", "vfp"]


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("n", [1, 7, 33])
def test_select_equals_loops(n: int, which: str) -> None:
    s, (valid, first, priority) = similar(2, n), options(2, n, which)
    most = n if valid is None else int(valid.sum(1).min())
    for k in sorted({0, 1, most // 2, max(0, most - 1), most}):
        expected = torch.tensor(plain(s, k, valid, first, priority)).reshape(2, k)
        out = maxmin_select(s, k, valid, first, priority)
        assert out.dtype == torch.int64 and torch.equal(out.cpu(), expected)
        picks = launched(launch.maxmin, s, k, valid, first, priority)
        assert picks.dtype == torch.int64 and torch.equal(picks.cpu(), expected)


@pytest.mark.parametrize("n", [577, 729, 1025])
def test_select_of_many_tokens(n: int) -> None:
    s, (valid, first, priority) = similar(1, n), options(1, n, "vfp")
    expected = maxmin.reference(s, 12, valid, first, priority)
    assert torch.equal(launched(launch.maxmin, s, 12, valid, first, priority), expected)
    assert expected.tolist() == plain(s, 12, valid, first, priority)
    assert maxmin.reference(s, 3, valid, None, None).tolist() == plain(s, 3, valid)


def test_long_rows_break_ties_too() -> None:
    """All similarities are views of one row."""
    n = 8200
    row = torch.full((n,), 0.5, device=DEVICE)
    row[[5, 8190, 8199]] = torch.tensor([0.25, 0.25, 0.0], device=DEVICE)
    s = row.expand(1, n, n)
    first = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    priority = torch.ones(1, n, device=DEVICE)
    for weight in (None, priority):
        picks = launched(launch.maxmin, s, 5, None, first, weight)
        assert picks.tolist() == [[0, 8199, 5, 8190, 1]]
        assert torch.equal(maxmin.reference(s, 5, None, first, weight), picks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_dtypes(dtype: torch.dtype) -> None:
    s, (valid, first, _) = similar(3, 20).to(dtype), options(3, 20, "vf")
    expected = plain(s.float(), 6, valid)
    wide = torch.full((3, 25, 33), float("nan"), device=DEVICE, dtype=dtype)
    wide[:, 3:23, 5:25] = s
    for given in (s, wide[:, 3:23, 5:25], s.transpose(1, 2), torch.stack([s, s], 3)[..., 0]):
        assert maxmin_select(given, 6, valid).tolist() == expected
        assert launched(launch.maxmin, given, 6, valid, None, None).tolist() == expected
    one = s[:1].expand(3, 20, 20)
    expected = plain(one.float(), 6, valid, first)
    assert first is not None and valid is not None
    both = torch.stack([valid, ~valid], 2)[..., 0]
    for given in (valid, both):
        picks = launched(launch.maxmin, one, 6, given, first.to(torch.int32), None)
        assert picks.tolist() == expected
        assert maxmin_select(one, 6, given, first.to(torch.int32)).tolist() == expected


def test_nan_is_a_distance_of_zero() -> None:
    s = similar(1, 12).clamp(max=0.9)
    s[:, 3], s[:, :, 3] = float("nan"), float("nan")
    s[:, 5], s[:, :, 5] = -float("inf"), -float("inf")
    s[:, 3, 5], s[:, 5, 3] = float("nan"), float("nan")
    for priority in (None, torch.ones(1, 12, device=DEVICE)):
        expected = plain(s, 12, priority=priority)
        assert maxmin_select(s, 12, priority=priority).tolist() == expected
        assert launched(launch.maxmin, s, 12, None, None, priority).tolist() == expected
        assert expected[0][-1] == 3
    zero = torch.zeros(1, 12, device=DEVICE)  # inf * 0 counts as 0
    assert maxmin_select(s, 4, priority=zero).tolist() == [[0, 1, 2, 3]]
    picks = launched(launch.maxmin, s, 4, None, None, zero)
    assert torch.equal(picks, maxmin_select(s, 4, priority=zero))


def test_behind_the_valid_tokens_is_token_0() -> None:
    s, valid = similar(2, 9), torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    valid[:, [4, 7]] = True
    for picks in (maxmin_select(s, 4, valid), launched(launch.maxmin, s, 4, valid, None, None)):
        assert picks[:, :2].sort(1).values.tolist() == [[4, 7]] * 2
        assert picks[:, 2:].tolist() == [[0, 0]] * 2
    x = signs(2, 9, 4)
    picks = maxmin_tokens(x, 4, valid)
    assert picks[:, 2:].tolist() == [[0, 0]] * 2
    assert torch.equal(launched(launch.tokens, x, 4, valid, None, None), picks)


def test_empty_batch() -> None:
    for n, d in ((5, 16), (5, 4)):
        x = torch.empty(0, n, d, device=DEVICE)
        assert maxmin_tokens(x, 3).shape == launch.tokens(x, 3, None, None, None).shape == (0, 3)
    s = torch.empty(0, 5, 5, device=DEVICE)
    assert maxmin_select(s, 3).shape == launch.maxmin(s, 3, None, None, None).shape == (0, 3)


# -- features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("n,d", [(1, 4), (33, 64), (21, 16)])
def test_tokens_equal_loops(n: int, d: int, which: str) -> None:
    """Exact cosines: picks agree to the last, whichever way they are summed."""
    x, (valid, first, priority) = signs(2, n, d), options(2, n, which)
    most = min(9, n if valid is None else int(valid.sum(1).min()))
    s = x @ x.transpose(1, 2) / d
    expected = plain(s, most, valid, first, priority)
    assert maxmin_tokens(x, most, valid, first, priority).tolist() == expected
    assert launched(launch.tokens, x, most, valid, first, priority).tolist() == expected
    for k in (0, 1):
        assert maxmin_tokens(x, k, valid, first, priority).tolist() == [p[:k] for p in expected]
        if first is not None:
            picks = launched(launch.tokens, x, k, valid, first, priority)
            assert picks.tolist() == [p[:k] for p in expected]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,d", [(75, 72), (9, 1000), (40, 8)])
def test_tokens_of_odd_widths(n: int, d: int, dtype: torch.dtype) -> None:
    """Clusters that are far apart: rounding moves no pick. Views with stride and offset."""
    k = min(6, d)
    x = torch.zeros(1, n, d, device=DEVICE)
    x[:, torch.arange(n), torch.arange(n) % k] = 1.0
    x = (x * (1 + randn(1, n, 1, seed=3).abs()) + 0.3 * randn(1, n, d, seed=4) / d**0.5).to(dtype)
    wide = torch.full((1, n + 3, d + 8), float("nan"), device=DEVICE, dtype=dtype)
    wide[:, 2 : n + 2, 3 : d + 3] = x
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    expected = plain(unit @ unit.transpose(1, 2), k)
    assert [sorted(i % k for i in row) for row in expected] == [list(range(k))]
    assert maxmin_tokens(x, k).tolist() == expected
    view = wide[:, 2 : n + 2, 3 : d + 3]
    assert maxmin_tokens(view, k).tolist() == expected
    assert launched(launch.tokens, view, k, None, None, None).tolist() == expected
    assert maxmin_tokens(x.expand(3, n, d), k).tolist() == expected * 3


def test_tokens_do_not_follow_the_precision_of_products() -> None:
    for n, d in ((40, 48), (40, 16)):
        x = randn(2, n, d, seed=6)
        unit = torch.nn.functional.normalize(x.double(), dim=-1)
        expected = plain(unit @ unit.transpose(1, 2), 15)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            assert maxmin_tokens(x, 15).tolist() == expected
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert maxmin_tokens(x, 15).tolist() == expected


def test_isolation_of_features_spans_blocks() -> None:
    """More tokens than a tile or a block; the loner and its runner-up are behind the first."""
    n = maxmin.BLOCK + 10
    x = torch.zeros(1, n, 16, device=DEVICE)
    x[..., 0] = 1.0
    x[:, ::2, 1] = 0.5
    x[:, n - 7, 2], x[:, n - 3, 3] = 3.0, 2.0
    for valid in (None, torch.arange(n, device=DEVICE)[None] != n - 7):
        expected = [[n - 7, n - 3] if valid is None else [n - 3]]
        k = len(expected[0])
        assert maxmin_tokens(x, k, valid).tolist() == expected
    expected = [n - 7, n - 3]
    assert launched(launch.tokens, x, 2, None, None, None).tolist() == [expected]
    s = torch.nn.functional.normalize(x, dim=-1)
    assert maxmin_select(s @ s.transpose(1, 2), 2).tolist() == [expected]


# -- registration ----------------------------------------------------------------------------------


def test_operators() -> None:
    s, x = similar(2, 9), signs(2, 9, 4)
    valid, first, priority = options(2, 9, "vfp")
    for args in ((4, None, None, None), (3, valid, first, priority)):
        torch.library.opcheck(OPERATORS["maxmin"], (s, *args))
        torch.library.opcheck(OPERATORS["maxmin_tokens"], (x, *args))
        expected = maxmin_select(s, *args)
        assert torch.equal(OPERATORS["maxmin"](s, *args), expected)
        assert torch.equal(OPERATORS["maxmin_tokens"](x, *args), maxmin_tokens(x, *args))


def test_picks_of_inputs_that_require_grad() -> None:
    s, x, priority = similar(1, 9), signs(1, 9, 16), randn(1, 9).abs()
    expected = maxmin_select(s, 4, priority=priority), maxmin_tokens(x, 4, priority=priority)
    for t in (s, x, priority):
        t.requires_grad_()
    picks = maxmin_select(s, 4, priority=priority), maxmin_tokens(x, 4, priority=priority)
    for got, want in zip(picks, expected, strict=True):
        assert torch.equal(got, want) and not got.requires_grad


def test_fp64_stays_fp64() -> None:
    s = torch.tensor([[[1, 0.5, 0.5 - 1e-12], [0.5, 1, 0], [0.5, 0, 1]]], dtype=torch.float64)
    first = torch.zeros(1, dtype=torch.int64)
    assert maxmin_select(s, 2, first=first).tolist() == [[0, 2]]
    assert maxmin_select(s.float(), 2, first=first).tolist() == [[0, 1]]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    def both(s: Tensor, x: Tensor, valid: Tensor, priority: Tensor) -> tuple[Tensor, ...]:
        return (
            maxmin_select(s, 3, valid, priority=priority),
            maxmin_tokens(x, 3, valid),
            maxmin_tokens(x[..., :4], 3, valid, priority=priority),
        )

    def only(s: Tensor, x: Tensor, valid: Tensor, priority: Tensor) -> tuple[Tensor, ...]:
        return (maxmin_select(s, 2, valid, priority=priority),)

    sizes = (9,) if backend == "inductor" else (9, 11)
    run = only if backend == "inductor" else both
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for n in sizes:
        valid, _, priority = options(2, n, "vp")
        args = similar(2, n), signs(2, n, 16), valid, priority
        for got, want in zip(compiled(*args), run(*args), strict=True):
            assert torch.equal(got, want)


def test_errors() -> None:
    s, x = similar(2, 5), signs(2, 5, 4)
    calls: list[tuple[str, Any, tuple[Any, ...]]] = [
        (r"k=6 of 5 tokens per row: use 0 to 5", maxmin_select, (s, 6)),
        (r"k=-1 of 5 tokens", maxmin_tokens, (x, -1)),
        (r"\(2, 5, 4\) is not \[B, N, N\].*maxmin_tokens", maxmin_select, (x, 2)),
        (r"\(2, 5, 4\) and torch.int64 is not a floating", maxmin_tokens, (x.long(), 2)),
        (
            r"valid has shape \(2, 4\), these tokens need \(2, 5\)",
            maxmin_select,
            (s, 2, s[:, 0, :4]),
        ),
        (r"valid is torch.float32: use torch.bool", maxmin_select, (s, 2, s[:, 0])),
        (
            r"first has shape \(1,\), these tokens need \(2,\)",
            maxmin_tokens,
            (x, 2, None, s[0, 0, :1]),
        ),
        (r"priority has shape \(5,\)", maxmin_tokens, (x, 2, None, None, s[0, 0])),
    ]
    for text, function, args in calls:
        with pytest.raises(ValueError, match=text):
            function(*args)
