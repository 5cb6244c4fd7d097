"""The strict interpreter itself: bf16 as on hardware, and every kind of bug that it must catch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.kernels import DEVICE, GPU, fenced, launched, poisoned
from torch import Tensor

if GPU:
    pytest.skip("the interpreter runs where there is no GPU", allow_module_level=True)

from support.interpreter import OutOfBounds, Race, _narrow, watch  # noqa: E402

BF16 = torch.bfloat16


def bits(t: Tensor) -> Tensor:
    """Equal for equal values; all NaN are one."""
    raw = t.view(torch.int16 if t.dtype == BF16 else torch.int32)
    return torch.where(t.isnan(), -1, raw)


def sweep() -> Tensor:
    """fp32 numbers at and around every kind of rounding: all exponents and signs, halfway cases,
    carries into the exponent, denormals, infinities, NaN."""
    high = torch.arange(0, 0x10000, 7, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    named = [0x7F7FFFFF, 0x7F7F8000, 0x3FFFFFFF, 0x00000001, 0x007FFFFF, 0x00800000, 0x7F800000]
    named += [0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x80000000, 0x3F808000, 0x3F818000]
    raw = torch.cat([(high[:, None] | low).reshape(-1), torch.tensor(named)])
    return torch.from_numpy(raw.numpy().astype(np.uint32).view(np.float32).copy())


# -- bf16 ------------------------------------------------------------------------------------------


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def implicit_cast_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, flag_ptr, n, OP: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < n)
    y = tl.load(y_ptr + i, mask=i < n)
    if OP == 0:
        out = x + y
    elif OP == 1:
        out = x - y
    elif OP == 2:
        out = x * y
    else:
        out = tl.where(x > y, x, y)
    tl.store(out_ptr + i, out, mask=i < n)
    flag = (x < y).to(tl.int32) + 2 * (x == y).to(tl.int32) + 4 * (x >= y).to(tl.int32)
    tl.store(flag_ptr + i, flag, mask=i < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    out = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(out_ptr + at, out)


@triton.jit
def sum_kernel(x_ptr, out_ptr, B: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, B)), 0).to(tl.float32))


@pytest.mark.parametrize("kernel", [cast_kernel, implicit_cast_kernel])
def test_fp32_to_bf16_rounds_to_nearest_even(kernel: object) -> None:
    x = sweep()
    y = torch.empty(x.shape, dtype=BF16)
    kernel[(1,)](x, y, x.numel(), B=triton.next_power_of_2(x.numel()))  # type: ignore[index]
    assert torch.equal(bits(y), bits(x.to(BF16)))
    assert bool((y.isnan() == x.isnan()).all())


def test_rounding_is_not_truncation() -> None:
    """The sweep holds cases that truncation gets wrong, so the test above can fail."""
    x = sweep()
    cut = (x.view(torch.int32) >> 16).to(torch.int16).view(BF16)
    assert int((bits(cut) != bits(x.to(BF16))).sum()) > 1000
    assert _narrow(np.float32([1.99902])).tolist() == [0x4000]  # the carry reaches the exponent


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bf16_widens_exactly(dtype: torch.dtype) -> None:
    raw = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    y = torch.empty(raw.shape, dtype=dtype)
    cast_kernel[(1,)](raw, y, raw.numel(), B=2**16)
    assert torch.equal(y.nan_to_num(7), raw.to(dtype).nan_to_num(7))
    assert torch.equal(y.isnan(), raw.isnan())


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("op", [0, 1, 2, 3])
def test_bf16_arithmetic_and_compare(op: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, generator=g).mul(8).to(BF16) for _ in range(2))
    y[:16] = x[:16]
    x[16:20] = torch.tensor([float("inf"), -0.0, float("nan"), 3e38]).to(BF16)
    y[16:20] = torch.tensor([1.0, 0.0, 1.0, 3e38]).to(BF16)
    out, flag = torch.empty(256, dtype=BF16), torch.empty(256, dtype=torch.int32)
    arithmetic_kernel[(1,)](x, y, out, flag, 256, OP=op, B=256)
    expected = [x + y, x - y, x * y, torch.where(x > y, x, y)][op]
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(flag, (x < y).int() + 2 * (x == y).int() + 4 * (x >= y).int())


def test_bf16_dot() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=g).to(BF16) for _ in range(2))
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, B=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_reduction_of_bf16_is_refused() -> None:
    """Hardware adds in fp32 or not, as the compiler likes: kernels must say it."""
    with pytest.raises(Exception, match="cast to fp32 after the load"):
        sum_kernel[(1,)](torch.ones(8, dtype=BF16), torch.empty(1), B=8)


# -- memory ----------------------------------------------------------------------------------------


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, LOAD: tl.constexpr, STORE: tl.constexpr, B: tl.constexpr):
    """LOAD, STORE: with a mask."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=(i < n) | (not LOAD))
    tl.store(y_ptr + i, x, mask=(i < n) | (not STORE))


@triton.jit
def pick_kernel(x_ptr, index_ptr, y_ptr, k, B: tl.constexpr):
    i = tl.arange(0, B)
    index = tl.load(index_ptr + i, mask=i < k, other=0)
    tl.store(y_ptr + i, tl.load(x_ptr + index, mask=i < k), mask=i < k)


@triton.jit
def scatter_kernel(index_ptr, y_ptr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    index = tl.load(index_ptr + i)
    tl.store(y_ptr + index, index)


@triton.jit
def shift_kernel(x_ptr, B: tl.constexpr):
    """In place: a program reads what its right neighbour writes."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x_ptr + i, tl.load(x_ptr + i + 1))


@triton.jit
def scalar_kernel(y_ptr):
    tl.store(y_ptr, 1.0)


@triton.jit
def half_kernel(y_ptr, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y_ptr + i, i.to(tl.float32), mask=i < n // 2)


def room(n: int) -> Tensor:
    """n numbers with the memory of a larger tensor around them."""
    return fenced(torch.arange(n, dtype=torch.float32, device=DEVICE))


def test_masked_copy_passes() -> None:
    x, y = room(7), room(7)
    copy_kernel[(2,)](x, y.zero_(), 7, LOAD=True, STORE=True, B=4)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("load", "store", "said"),
    [(False, True, "1 of 4 lanes .* read"), (True, False, "1 of 4 lanes .* write")],
)
def test_missing_mask(load: bool, store: bool, said: str) -> None:
    """Memory behind the tensor exists, so nothing but the check can notice."""
    with pytest.raises(Exception, match=said) as caught:
        copy_kernel[(2,)](room(7), room(7), 7, LOAD=load, STORE=store, B=4)
    assert caused_by(caught.value, OutOfBounds)


@pytest.mark.parametrize("index", [[0, 7, 1], [0, -1, 1]])
def test_index_out_of_range(index: list[int]) -> None:
    with pytest.raises(Exception, match="1 of 3 lanes .* read") as caught:
        pick_kernel[(1,)](room(7), torch.tensor(index), room(3), 3, B=4)
    assert caused_by(caught.value, OutOfBounds)


def test_masked_lanes_may_point_anywhere() -> None:
    y = room(3)
    pick_kernel[(1,)](room(7), torch.tensor([6, 0, 3, 10**6]), y, 3, B=4)
    assert y.tolist() == [6, 0, 3]


@pytest.mark.parametrize(
    ("index", "grid", "said"),
    [
        ([0, 2, 2, 1], 1, "two lanes of program"),
        ([0, 1, 2, 2], 2, "two lanes of program"),  # both in the second program
        ([0, 2, 1, 2], 2, "two programs store to one address"),
    ],
)
def test_two_stores_to_one_address(index: list[int], grid: int, said: str) -> None:
    with pytest.raises(Exception, match=said) as caught:
        scatter_kernel[(grid,)](torch.tensor(index), torch.zeros(4, dtype=torch.int64), B=4 // grid)
    assert caused_by(caught.value, Race)


def test_scatter_without_a_race_passes() -> None:
    y = torch.zeros(4, dtype=torch.int64)
    scatter_kernel[(2,)](torch.tensor([3, 1, 0, 2]), y, B=2)
    assert y.tolist() == [0, 1, 2, 3]


def test_two_programs_store_one_scalar() -> None:
    scalar_kernel[(1,)](torch.zeros(1))
    with pytest.raises(Race, match="two programs"):
        scalar_kernel[(2,)](torch.zeros(1))


def test_reading_what_another_program_writes() -> None:
    x = torch.arange(9.0)
    with pytest.raises(Race, match="reads an address that another program stores to"):
        shift_kernel[(2,)](x, B=4)
    alone = torch.arange(9.0)
    shift_kernel[(1,)](alone, B=8)  # its own data: not a race between programs
    assert alone.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_records_do_not_outlive_a_launch() -> None:
    """Two launches may write one address; tensors of an earlier launch are out of bounds."""
    whole = torch.arange(16.0)
    for _ in range(2):
        copy_kernel[(2,)](whole, room(7), 7, LOAD=True, STORE=True, B=4)
    with pytest.raises(Exception, match="1 of 2 lanes .* read") as caught:
        pick_kernel[(1,)](whole[:7], torch.tensor([0, 8]), room(2), 2, B=2)
    assert caused_by(caught.value, OutOfBounds)


def caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Triton wraps what a kernel raises."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


# -- poison and traffic ----------------------------------------------------------------------------


def half(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    half_kernel[(1,)](out, x.numel(), B=8)
    return out


def test_poison_shows_an_unwritten_output() -> None:
    out = launched(half, torch.zeros(8))
    assert out[:4].tolist() == [0, 1, 2, 3]
    assert bool(out[4:].isnan().all())
    with poisoned():
        assert int(torch.empty(3, dtype=torch.int32).min()) == 2**31 - 1
        assert bool(torch.empty(3, dtype=torch.bool).all())


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.int8])
def test_watch_counts_a_copy(dtype: torch.dtype) -> None:
    x, y = torch.ones(100, dtype=dtype), torch.zeros(100, dtype=dtype)
    with watch() as seen:
        copy_kernel[(7,)](x, y, 100, LOAD=True, STORE=True, B=16)
    assert (seen.launches, seen.read, seen.written) == (1, x.nbytes, y.nbytes)
    assert (seen.moved, seen.requested) == (2 * x.nbytes, 2 * x.nbytes)
    copy_kernel[(7,)](x, y, 100, LOAD=True, STORE=True, B=16)
    assert seen.launches == 1  # only inside of the block


def test_watch_counts_an_address_once_per_launch() -> None:
    x, index, y = room(7), torch.tensor([3, 3, 3, 2]), room(4)
    with watch() as seen:
        for _ in range(2):
            pick_kernel[(1,)](x, index, y, 4, B=4)
    assert (seen.launches, seen.read, seen.written) == (2, 2 * (2 * 4 + 4 * 8), 2 * 4 * 4)
    assert seen.requested == 2 * (4 * 4 + 4 * 8 + 4 * 4)
