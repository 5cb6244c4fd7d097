"""kv_compact: in place against a copy by indexing, the kernel against torch, compile, errors."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, DTYPES, fenced, indices, randn
from torch import Tensor
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import cache as launch
from vtc_kernels.operators import cache as operators
from vtc_kernels.operators.cache import kv_compact, reference


def plain(cache: Tensor, index: Tensor) -> Tensor:
    """Row by row, by indexing."""
    rows = [cache[b][:, row.long()] for b, row in enumerate(index)]
    return torch.stack(rows) if rows else cache[:, :, : index.shape[1]]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8 if x.dtype == torch.bool else torch.int8)


def check(index: Tensor, *caches: Tensor, prefix: int = 0, fence: bool = True) -> None:
    """Both ways, on one or two caches; nothing changes but the front."""
    k = index.shape[1]
    expected = [plain(c.view(torch.uint8) if c.itemsize == 1 else c, index) for c in caches]
    for run in (reference, launch.compact):
        own = [fenced(c) if fence and c.numel() else c.clone() for c in caches]
        before = [c.clone() for c in own]
        assert run(index, own[0], own[1] if len(own) == 2 else None, prefix) is None
        for mine, e, old in zip(own, expected, before, strict=True):
            assert torch.equal(bits(mine[:, :, :k]), bits(e))
            assert torch.equal(bits(mine[:, :, k:]), bits(old[:, :, k:]))


@pytest.mark.parametrize("n", [1, 7, 33, 577])
@pytest.mark.parametrize("d", [8, 72, 1000])
def test_caches_of_all_sizes(n: int, d: int) -> None:
    keys, values = randn(2, 2, n, d, dtype=torch.bfloat16), randn(2, 2, n, d, dtype=torch.bfloat16)
    for k in sorted({0, 1, n - 1, n}) if n * d < 1 << 17 else [n // 9]:
        index = indices(2, n, k)
        check(index, keys, values)
        if k:
            check(indices(2, n, k, seed=1).int(), keys[:1].repeat(2, 1, 1, 1))


@pytest.mark.parametrize("tile", [8, 64])
def test_tiles_that_overlap(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that move by less than a tile, across many tiles; also a part of the row."""
    monkeypatch.setattr(launch, "TILE", tile * 8)
    monkeypatch.setattr(launch, "WORDS", 8)
    monkeypatch.setattr(operators, "TILE", tile * 3 * 12 * 4)
    cache = randn(2, 3, 90, 12)
    for seed, k in ((0, 89), (1, 80), (2, 45), (3, 17)):
        check(indices(2, 90, k, seed), cache)
    for shift in (1, 2, 7, 8, 9, 63):
        check((torch.arange(90 - shift, device=DEVICE) + shift).expand(2, -1), cache)


def test_prefix_and_repeated_last_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TILE", 64)
    head = torch.arange(5, device=DEVICE).expand(2, -1)
    index = torch.cat([head, indices(2, 60, 20) + 5], 1)
    for prefix in (0, 1, 5):
        check(index, randn(2, 2, 70, 8), randn(2, 2, 70, 8, seed=1), prefix=prefix)
    check(head, randn(2, 2, 70, 8), prefix=5)
    for count, last in ((1, 0), (1, 69), (5, 4), (7, 9), (30, 33)):
        index = indices(2, max(last, 1), count - 1)
        check(torch.cat([index, index.new_full((2, 40 - count), last)], 1), randn(2, 2, 70, 8))


def test_the_prefix_is_not_touched() -> None:
    index = torch.arange(20, device=DEVICE).expand(2, -1)
    for run in (reference, launch.compact):
        cache = randn(2, 2, 30, 8)
        wrong = torch.cat([index[:, :6] + 9, index[:, 6:] + 2], 1)
        expected = plain(cache, wrong)
        expected[:, :, :6] = cache[:, :, :6]
        run(wrong, cache, None, 6)
        assert torch.equal(cache[:, :, :20], expected)


@pytest.mark.parametrize(
    "dtype", [*DTYPES, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_bits_of_every_dtype(dtype: torch.dtype) -> None:
    index = indices(2, 33, 9)
    for width in (1, 3, 10, 72):
        x = (randn(2, 2, 33, width) * 3).to(dtype)
        if dtype.is_floating_point:
            x[:, :, index[0, 0], 0] = torch.tensor(float("nan")).to(dtype)
            x[:, :, index[0, 1], 0] = torch.tensor(-0.0).to(dtype)
        check(index, x, x.clone(), fence=dtype != torch.float8_e4m3fn)


def test_strides_offsets_and_unlike_pairs() -> None:
    """Columns apart, heads behind tokens, an odd offset, keys and values of other shapes."""
    index = indices(3, 33, 20)
    for part in (
        lambda: randn(3, 2, 40, 24)[:, :, 3:36, 4:12],
        lambda: randn(3, 33, 2, 16).transpose(1, 2),
        lambda: randn(3 * 2 * 33 * 9 + 1)[1:].view(3, 2, 33, 9),
        lambda: randn(6, 4, 66, 8, dtype=torch.bfloat16)[::2, 1::2, ::2],
    ):
        for run in (reference, launch.compact, lambda i, a, b, p: kv_compact(i, a, b, prefix=p)):
            one, two = part(), randn(3, 4, 50, 6, dtype=torch.float16)
            expected = plain(one, index), plain(two, index)
            run(index, one, two, 0)
            assert torch.equal(one[:, :, :20], expected[0])
            assert torch.equal(two[:, :, :20], expected[1])


def test_views_of_many_caches() -> None:
    index = indices(2, 33, 9)
    caches = [randn(2, 2, 33, 8, seed=s) for s in range(5)]
    expected = [plain(c, index) for c in caches]
    out = kv_compact(index, *caches)
    assert [y.data_ptr() for y in out] == [c.data_ptr() for c in caches]
    assert all(torch.equal(y, e) for y, e in zip(out, expected, strict=True))
    assert kv_compact(index) == []


def test_empty() -> None:
    for shape in ((0, 2, 33, 8), (2, 0, 33, 8), (2, 2, 33, 0)):
        index = indices(2, 33, 9)[: shape[0]]
        check(index, randn(*shape))
        assert kv_compact(index, randn(*shape))[0].shape == (*shape[:2], 9, shape[3])


def test_no_second_cache_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers stay below the size of a tile."""
    monkeypatch.setattr(operators, "TILE", 4096)
    sizes: list[int] = []
    real = Tensor.index_select

    def watched(self: Tensor, dim: int, index: Tensor) -> Tensor:
        out = real(self, dim, index)
        sizes.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(Tensor, "index_select", watched)
    cache, index = randn(2, 2, 577, 8), indices(2, 577, 500)
    expected = plain(cache, index)
    reference(index, cache, None, 0)
    assert torch.equal(cache[:, :, :500], expected)
    assert len(sizes) > 8 and max(sizes) <= 4096


def test_registration() -> None:
    index = indices(2, 33, 9)
    for second in (None, randn(2, 2, 33, 8)):
        cache = randn(2, 2, 33, 8)
        torch.library.opcheck(OPERATORS["compact"], (index, cache.clone(), second, 0))
        expected = plain(cache, index)
        assert OPERATORS["compact"](index, cache, second, 0) is None
        assert torch.equal(cache[:, :, :9], expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    def run(index: Tensor, keys: Tensor, values: Tensor, prefix: int) -> Tensor:
        one, two = kv_compact(index, keys, values, prefix=prefix)
        return one + two

    torch._dynamo.reset()
    fast = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for n, k in ((33, 9), (50, 20))[: 1 + (backend == "aot_eager")]:
        index = torch.cat([torch.zeros(2, 1, dtype=torch.int64), indices(2, n - 1, k).cpu() + 1], 1)
        index = index.to(DEVICE)
        keys, values = randn(2, 2, n, 8), randn(2, 2, n, 8, seed=1)
        expected = plain(keys, index), plain(values, index)
        assert torch.equal(fast(index, keys, values, 1), expected[0] + expected[1])
        assert torch.equal(keys[:, :, : k + 1], expected[0])
        assert torch.equal(values[:, :, : k + 1], expected[1])


def test_compiled_operator() -> None:
    """The registered operator, as on a GPU: what it writes is seen outside of the graph."""
    torch._dynamo.reset()
    fast = torch.compile(
        lambda *a: OPERATORS["compact"](*a), backend="aot_eager", fullgraph=True, dynamic=True
    )
    index, cache = indices(2, 33, 9), randn(2, 2, 33, 8)
    expected = plain(cache, index)
    fast(index, cache, None, 0)
    assert torch.equal(cache[:, :, :9], expected)


def test_errors_name_the_way_out() -> None:
    index, cache = indices(2, 33, 9).cpu(), randn(2, 2, 33, 8).cpu()
    before = cache.clone()
    for call, text in (
        (lambda: kv_compact(index.float(), cache), "torch.float32 of shape .2, 9.* integers"),
        (lambda: kv_compact(index[0], cache), "must be .B, K. integers"),
        (lambda: kv_compact(index, cache, prefix=10), "prefix=10 of 9 kept columns"),
        (lambda: kv_compact(index, cache[0]), "must be .B, H, N, Dh. with B = 2"),
        (lambda: kv_compact(index, cache[:1]), "index of 2 rows and 9 columns"),
        (lambda: kv_compact(index, cache[:, :, :8]), "N of at least 9"),
        (lambda: kv_compact(index, cache.mT.contiguous().mT), "stride 33: .* call contiguous"),
        (lambda: kv_compact(index, cache[:, :1].expand(2, 4, 33, 8)), "is expanded .* from"),
        (lambda: kv_compact(index, cache.clone().requires_grad_()), "requires grad.*no_grad"),
        (lambda: kv_compact(index.flip(1), cache), "not ascending.* sort every row"),
        (lambda: kv_compact(index[:, [0, 0, *range(1, 8)]], cache), "not ascending"),
        (lambda: kv_compact(index + 25, cache), "the caches have columns 0 to 32"),
        (lambda: kv_compact(index - 9, cache), "the caches have columns 0 to 32"),
        (lambda: kv_compact(index, cache, prefix=9), "begins with 0 to 8 .* lower the prefix"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert torch.equal(cache, before)
    with torch.no_grad():
        assert kv_compact(index, cache.requires_grad_())[0].shape == (2, 2, 9, 8)
