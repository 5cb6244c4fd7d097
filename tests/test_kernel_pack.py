"""PackMap, pack_varlen and unpack_varlen: torch against loops, the kernel against torch."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, GPU, launched, randn
from torch import Tensor
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import expand as launch_expand
from vtc_kernels.launch import pack as launch
from vtc_kernels.operators.pack import PackMap, pack_varlen, reference, unpack_varlen


def plain(keep: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token."""
    b, n = keep.shape
    source: list[int] = []
    inverse, starts = torch.full((b, n), -1, dtype=torch.int32), [0]
    for row in range(b):
        for token in range(n):
            if bool(keep[row, token]) and (capacity is None or len(source) < capacity):
                inverse[row, token] = len(source)
                source.append(row * n + token)
        starts.append(len(source))
    source += [-1] * ((capacity or 0) - len(source))
    integers = (torch.tensor(v, dtype=torch.int32) for v in (source, starts))
    source_, starts_ = (v.to(DEVICE) for v in integers)
    return source_, inverse.to(DEVICE), starts_


def masks(b: int, n: int) -> list[Tensor]:
    """Ragged, with empty and full rows; all; none."""
    keep = randn(b, n) > 0.3
    keep[:1], keep[-1:] = False, True
    return [keep, torch.ones_like(keep), torch.zeros_like(keep)]


def check(keep: Tensor, kernel: bool = True) -> None:
    expected = plain(keep)
    total = expected[0].shape[0]
    to = PackMap.of(keep)
    assert all(
        torch.equal(a, e) and a.dtype == torch.int32
        for a, e in zip((to.source, to.inverse, to.cu_seqlens), expected, strict=True)
    )
    assert to.max_seqlen == (int(keep.sum(1).max()) if keep.shape[0] else 0)
    for capacity in (None, total, total + 5, total // 2):
        source, inverse, starts = plain(keep, capacity)
        args = (keep, starts, source.shape[0], capacity is None)
        for run in (reference, lambda *a: launched(launch.pack, *a))[: 1 + kernel]:
            out = run(*args)
            assert torch.equal(out[0], source) and torch.equal(out[1], inverse)
            assert out[0].dtype == out[1].dtype == torch.int32
        if capacity is not None and (capacity >= total or GPU):
            to = PackMap.of(keep, capacity)
            assert torch.equal(to.source, source) and torch.equal(to.inverse, inverse)
            assert torch.equal(to.cu_seqlens, starts) and to.max_seqlen == keep.shape[1]


@pytest.mark.parametrize("n", [0, 1, 7, 33, 577])
def test_masks_of_all_sizes(n: int) -> None:
    for keep in masks(3, n):
        check(keep)


def test_rows_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "BLOCK", 16)
    for n in (16, 17, 100):
        for keep in masks(3, n):
            check(keep)


def test_strided_masks_and_empty_batches() -> None:
    keep = randn(6, 80) > 0
    for part in (keep[1::2, 3:40], keep[:, ::3], keep.t()[:5], keep[:1].expand(3, 80), keep[:0]):
        check(part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(8,), (72,), (3, 10), ()])
def test_bits_of_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    keep = masks(3, 33)[0]
    x = (randn(3, 33, *shape) * 3).to(dtype)
    if dtype.is_floating_point:
        x.view(3, 33, -1)[2, :2, 0] = torch.tensor([float("nan"), -0.0]).to(dtype)
    raw = torch.uint8 if dtype == torch.bool else torch.int8
    fill = (randn(1, *shape, seed=2) * 3).to(dtype)[0]
    for capacity in (None, 70):
        to = PackMap.of(keep, capacity)
        rows = torch.stack([x[b, n] for b in range(3) for n in range(33) if keep[b, n]])
        rows = torch.cat([rows, rows.new_zeros(to.source.shape[0] - rows.shape[0], *shape)])
        packed = pack_varlen(x, to)
        assert packed.shape == rows.shape and packed.dtype == dtype
        assert torch.equal(packed[..., None].view(raw), rows[..., None].view(raw))
        flat = launched(
            launch_expand.expand, x.reshape(1, 99, -1), to.source[None], None, None, None
        )
        assert torch.equal(flat.reshape(-1).view(raw), rows.reshape(-1).view(raw))
        for value in (None, fill):
            kept = keep.reshape(3, 33, *[1] * len(shape))
            lost = torch.zeros((), dtype=dtype, device=DEVICE) if value is None else value
            back = unpack_varlen(packed, to, value)
            expected = torch.where(kept, x, lost)
            assert torch.equal(back[..., None].view(raw), expected[..., None].view(raw))


def test_strided_rows() -> None:
    keep = masks(3, 20)[0]
    to = PackMap.of(keep)
    x = randn(3, 16, 20).transpose(1, 2)
    packed = pack_varlen(x, to)
    assert torch.equal(packed, x[keep])
    wide = randn(packed.shape[0], 40)[:, 4:20]
    assert torch.equal(unpack_varlen(wide, to)[keep], wide)
    assert pack_varlen(x[:0], PackMap.of(keep[:0], 4)).tolist() == [[0.0] * 16] * 4


def test_adjoint() -> None:
    """<pack(x), y> == <x, unpack(y)> and gradients by finite differences."""
    keep = masks(2, 7)[0]
    keep[0, 2] = True
    for to in (PackMap.of(keep), PackMap.of(keep, 11)):
        x = randn(2, 7, 3).double().requires_grad_()
        y = randn(to.source.shape[0], 3, seed=1).double().requires_grad_()
        real = (to.source >= 0)[:, None]
        pairs = (pack_varlen(x, to) * y).sum(), (x * unpack_varlen(y * real, to)).sum()
        torch.testing.assert_close(*pairs)
        (grad,) = torch.autograd.grad(pairs[0], x)
        torch.testing.assert_close(grad, unpack_varlen(y * real, to))
        fill = randn(3, seed=2).double().requires_grad_()
        torch.autograd.gradcheck(lambda x, to=to: pack_varlen(x, to), x)
        torch.autograd.gradcheck(lambda y, f, to=to: unpack_varlen(y, to, f), (y, fill))
        # the registered operator, as on a GPU
        own = OPERATORS["expand"](x.reshape(1, 14, 3), to.source[None], None, None, None)[0]
        torch.testing.assert_close(own, pack_varlen(x, to))
        torch.testing.assert_close(torch.autograd.grad((own * y).sum(), x)[0], grad)


def test_registration() -> None:
    keep = masks(3, 33)[0]
    source, inverse, starts = plain(keep)
    torch.library.opcheck(OPERATORS["pack"], (keep, starts, source.shape[0], True))
    torch.library.opcheck(OPERATORS["pack_ragged"], (keep,))
    for out in (
        OPERATORS["pack"](keep, starts, source.shape[0], True),
        OPERATORS["pack_ragged"](keep),
    ):
        assert all(torch.equal(a, e) for a, e in zip(out, (source, inverse, starts), strict=False))


def both_ways(x: Tensor, keep: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    to = PackMap.of(keep, capacity)
    packed = pack_varlen(x * 1.0, to)
    return packed, unpack_varlen(packed * 2, to), to.cu_seqlens


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    fast = torch.compile(both_ways, backend=backend, fullgraph=True, dynamic=True)
    for n in (20, 33)[: 1 + (backend == "aot_eager")]:
        keep = masks(3, n)[0]
        given = (randn(3, n, 8), keep, 80)
        for out, expected in zip(fast(*given), both_ways(*given), strict=True):
            assert torch.equal(out, expected)


def test_compiled_without_a_capacity() -> None:
    """T is a size that is not known before the mask; the bound of a row is then N."""
    torch._dynamo.reset()
    fast = torch.compile(both_ways, backend="aot_eager", fullgraph=True, dynamic=True)
    bound = torch.compile(lambda keep: PackMap.of(keep).max_seqlen, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for n in (20, 33):
            for keep in masks(3, n):
                given = (randn(3, n, 8), keep, None)
                for out, expected in zip(fast(*given), both_ways(*given), strict=True):
                    assert torch.equal(out, expected)
            assert bound(keep) == n


def test_errors_name_the_way_out() -> None:
    keep = masks(3, 10)[0]
    to = PackMap.of(keep)
    with pytest.raises(ValueError, match="keep is torch.int64 .* must be bool .B, N."):
        PackMap.of(keep.long())
    with pytest.raises(ValueError, match="shape .10,.: it must be bool"):
        PackMap.of(keep[0])
    with pytest.raises(ValueError, match="at least 0, not -1"):
        PackMap.of(keep, -1)
    total = int(keep.sum())
    with pytest.raises(ValueError, match=f"{total} tokens are kept .*={total - 1} .* raise the"):
        PackMap.of(keep.cpu(), total - 1)
    with pytest.raises(ValueError, match="x of shape .3, 9, 4. .* first two axes"):
        pack_varlen(randn(3, 9, 4), to)
    with pytest.raises(ValueError, match=f"a map of {total} packed rows"):
        unpack_varlen(randn(total + 1, 4), to)
