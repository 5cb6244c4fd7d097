"""qrow_scores: torch against loops, the kernels against torch, gradients, compile."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.kernels import DEVICE, DTYPES, GPU, close, launched, randn
from torch import Tensor
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import attention as launch
from vtc_kernels.operators.attention import qrow_scores, reference

NEVER = float("-inf")
REDUCTIONS = list(itertools.product(("mean", "max", None), repeat=2))


def plain(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, start: int, stop: int
) -> Tensor:
    """Row by row in fp64, not reduced: [B, H, M, stop - start]."""
    (b, h, m, _), (kv, n) = query.shape, key.shape[1:3]
    out = torch.zeros(b, h, m, stop - start, dtype=torch.float64, device=query.device)
    added = torch.zeros(b, h, m, n, device=query.device) if mask is None else mask
    added = torch.broadcast_to(added, (b, h, m, n)).double()
    for i, j, r in itertools.product(range(b), range(h), range(m)):
        logits = key[i, j * kv // h].double() @ query[i, j, r].double() * scale + added[i, j, r]
        weights = (logits - logits.max()).exp()
        out[i, j, r] = (weights / weights.sum())[start:stop]
    return out


def reduced(share: Tensor, heads: str | None, rows: str | None) -> Tensor:
    for axis, how in ((1, heads), (-2, rows)):
        if how is not None:
            share = share.mean(axis) if how == "mean" else share.max(axis).values
    return share


def inputs(
    b: int, h: int, kv: int, m: int, n: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return randn(b, h, m, d, dtype=dtype), randn(b, kv, n, d, dtype=dtype, seed=1)


def causal(*shape: int) -> Tensor:
    """Additive, random, with keys that are not seen."""
    hidden = randn(*shape, seed=3) > 0.6
    hidden[..., -1] = False
    return torch.where(hidden, NEVER, randn(*shape, seed=4))


@pytest.mark.parametrize("heads,rows", REDUCTIONS)
def test_torch_is_the_loop(heads: str | None, rows: str | None) -> None:
    for kv, mask in ((4, None), (2, causal(2, 1, 3, 9)), (1, causal(4, 1, 9)), (2, causal(9))):
        query, key = inputs(2, 4, kv, 3, 9, 8)
        expected = reduced(plain(query, key, mask, 0.4, 2, 8), heads, rows)
        close(reference(query, key, mask, 0.4, 2, 8, heads, rows), expected)
        strided = key.transpose(1, 2).contiguous().transpose(1, 2)
        close(reference(query, strided, mask, 0.4, 2, 8, heads, rows), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_in_other_dtypes(dtype: torch.dtype) -> None:
    """Logits are rounded to the input dtype once; everything else is fp32 or wider."""
    query, key = inputs(1, 4, 2, 2, 9, 8, dtype)
    out = reference(query, key, None, 0.3, 0, 9, "mean", None)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    expected = plain(query, key, None, 0.3, 0, 9).mean(1)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=1e-5)
    close(out.sum(-1).float(), torch.ones(1, 2, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 33, 577])
def test_kernel_is_torch(n: int, dtype: torch.dtype) -> None:
    """All reductions, several tiles of keys, windows that begin and end anywhere."""
    windows = sorted({(0, n), (n // 2, n), (n // 3, max(n // 3, n - 5)), (n - 1, n), (n, n)})
    for i, (heads, rows) in enumerate(REDUCTIONS if n < 500 else REDUCTIONS[::4]):
        b = 2 if n < 9 else 1
        query, key = inputs(b, 4, 2, 3, n, 64, dtype)
        start, stop = windows[i % len(windows)]
        mask = causal(b, 1, 3, n) if i % 2 else None
        out = launched(launch.qrow, query, key, mask, 0.2, start, stop, heads, rows)
        expected = reference(query.float(), key.float(), mask, 0.2, start, stop, heads, rows)
        assert out.shape == expected.shape
        close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 64, 72, 80, 96, 128, 256])
def test_head_widths(d: int, dtype: torch.dtype) -> None:
    query, key = inputs(1, 2, 1, 1, 70, d, dtype)
    out = launched(launch.qrow, query, key, None, d**-0.5, 3, 70, "mean", None)
    close(out, reference(query.float(), key.float(), None, d**-0.5, 3, 70, "mean", None))


@pytest.mark.parametrize("h,kv,m", [(1, 1, 1), (12, 4, 1), (9, 1, 5), (10, 10, 2), (2, 2, 33)])
@pytest.mark.parametrize("heads,rows", [("mean", "mean"), ("max", None), (None, "max")])
def test_groups_of_heads(h: int, kv: int, m: int, heads: str | None, rows: str | None) -> None:
    """Groups fill less than a block of rows, exactly one, or several; heads beyond a block."""
    query, key = inputs(1, h, kv, m, 40, 16)
    mask = causal(1, h, m, 40)
    out = launched(launch.qrow, query, key, mask, 0.5, 5, 37, heads, rows)
    close(out, reduced(plain(query, key, mask, 0.5, 5, 37), heads, rows))


@pytest.mark.parametrize("shape", [(1,), (50,), (3, 1), (4, 1, 50), (2, 1, 1, 50), (1, 4, 3, 50)])
def test_masks_are_broadcast(shape: tuple[int, ...]) -> None:
    query, key = inputs(2, 4, 2, 3, 50, 16)
    for mask in (causal(*shape), causal(*shape).bfloat16(), causal(*shape, 2)[..., 1]):
        out = launched(launch.qrow, query, key, mask, 0.5, 0, 50, None, None)
        close(out, plain(query, key, mask, 0.5, 0, 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided(dtype: torch.dtype) -> None:
    """Token-major views, parts of a fused projection, odd offsets, expanded batches."""
    fused = randn(2, 70, 3, 4, 80, dtype=dtype)
    query = fused[:, :3, 0].transpose(1, 2)
    key = fused[:, :, 1].transpose(1, 2)
    pairs = [
        (query, key),
        (query[..., 3:75], key[:, ::2, 5:, 3:75]),
        (query[..., :72], key[..., 8:]),
        (query, key[:1].expand(2, -1, -1, -1)),
        (query[..., ::2], key[..., ::2]),
        (query, key.flip(2)),
    ]
    for q, k in pairs:
        n = k.shape[2]
        out = launched(launch.qrow, q, k, None, 0.1, 17, n - 4, "mean", None)
        close(out, reference(q.float(), k.float(), None, 0.1, 17, n - 4, "mean", None))


def test_empty() -> None:
    for b, n, start, stop in ((0, 9, 0, 9), (2, 9, 4, 4), (2, 0, 0, 0)):
        query, key = inputs(b, 4, 2, 3, n, 8)
        out = launched(launch.qrow, query, key, None, 1.0, start, stop, "mean", None)
        assert out.shape == (b, 3, stop - start)
        assert torch.equal(out, reference(query, key, None, 1.0, start, stop, "mean", None))


@pytest.mark.parametrize("heads,rows", REDUCTIONS)
def test_special_values(heads: str | None, rows: str | None) -> None:
    """Rows that see nothing, and NaN or inf in a key, spoil what torch says; tiles that are not
    seen and huge logits spoil nothing."""
    query, key = inputs(5, 4, 2, 2, 140, 64)
    mask = torch.zeros(5, 4, 2, 140, device=DEVICE)
    mask[0, 1, 1] = NEVER
    mask[1, ..., :130] = NEVER
    key[2, 0, 100, 3] = float("nan")
    key[3, 1, 139, 3] = float("inf")
    query[4] *= 1e3
    out = launched(launch.qrow, query, key, mask, 1.0, 20, 135, heads, rows)
    expected = reference(query, key, mask, 1.0, 20, 135, heads, rows)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert expected[0].isnan().any() and expected[2].isnan().any() and expected[3].isnan().any()
    assert not out[1].isnan().any() and not out[4].isnan().any()
    assert (out[1][..., : 130 - 20] == 0).all()


def test_keys_that_are_equal() -> None:
    query, key = inputs(1, 2, 2, 1, 130, 64)
    key[:] = key[:, :, :1]
    out = launched(launch.qrow, query, key, None, 1.0, 0, 130, "mean", None)
    close(out, torch.full_like(out, 1 / 130))


@pytest.mark.parametrize("heads,rows", REDUCTIONS)
def test_gradients(heads: str | None, rows: str | None) -> None:
    op = OPERATORS["qrow"]
    query, key = (t.double().requires_grad_() for t in inputs(2, 4, 2, 3, 7, 5))
    masks = [causal(2, 1, 3, 7), causal(7), None] if heads == "mean" else [causal(4, 1, 7)]
    for mask in masks:
        wanted = [query, key]
        if mask is not None:
            mask = mask.double().requires_grad_()
            wanted.append(mask)
        expected = reference(query, key, mask, 0.4, 1, 6, heads, rows)
        g = torch.randn_like(expected)
        given = torch.autograd.grad(op(query, key, mask, 0.4, 1, 6, heads, rows), wanted, g)
        torch.testing.assert_close(given, torch.autograd.grad(expected, wanted, g))


def test_gradients_by_difference() -> None:
    query, key = (t.double().requires_grad_() for t in inputs(1, 2, 1, 2, 4, 3))
    mask = randn(2, 1, 4, seed=5).double().requires_grad_()

    def run(*given: Tensor) -> Tensor:
        return OPERATORS["qrow"](*given, 0.4, 1, 4, "mean", None)

    assert torch.autograd.gradcheck(run, (query, key, mask))
    query, key = (t.requires_grad_() for t in inputs(1, 4, 2, 2, 9, 8, torch.bfloat16))
    out = OPERATORS["qrow"](query, key, None, 0.4, 0, 5, "mean", None)
    grads = torch.autograd.grad(out.square().sum(), (query, key))
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() and g.any() for g in grads)


def test_equal_maxima_share_their_gradient() -> None:
    query, key = (t.double().requires_grad_() for t in inputs(1, 2, 1, 2, 4, 3))
    query = query.detach()[:, :1, :1].repeat(1, 2, 2, 1).requires_grad_()
    expected = reference(query, key, None, 0.4, 0, 3, "max", "max")
    out = OPERATORS["qrow"](query, key, None, 0.4, 0, 3, "max", "max")
    g = randn(1, 3, seed=6).double()
    given, wanted = (torch.autograd.grad(t, (query, key), g) for t in (out, expected))
    torch.testing.assert_close(given, wanted)


def test_operator_is_registered_correctly() -> None:
    query, key = (t.requires_grad_() for t in inputs(1, 4, 2, 2, 9, 8))
    mask = causal(1, 1, 2, 9).requires_grad_()
    if not GPU:  # with a GPU the body is a launch, checked by the tests above
        torch.library.opcheck(OPERATORS["qrow"], (query, key, mask, 0.3, 1, 8, "max", None))
    out = OPERATORS["qrow"](query, key, mask, 0.3, 1, 8, "max", None)
    close(out, reduced(plain(query, key, mask, 0.3, 1, 8), "max", None))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(qrow_scores, fullgraph=True, dynamic=True, backend=backend)
    for n in (12, 19):
        query, key = inputs(2, 4, 2, 3, n, 16)
        mask = causal(2, 1, 3, n)
        out = run(query, key, None, mask, 2, n - 1, "mean", "max")
        close(out, qrow_scores(query, key, None, mask, 2, n - 1, "mean", "max"))


def test_public_function() -> None:
    """What is left out: the usual scale, all keys, the mean over heads."""
    query, key = inputs(2, 4, 2, 3, 9, 16)
    close(qrow_scores(query, key), plain(query, key, None, 0.25, 0, 9).mean(1))
    query, key = query.cpu(), key.cpu()
    mapped = torch.vmap(lambda q, k: qrow_scores(q[None], k[None])[0])(query, key)
    close(mapped, qrow_scores(query, key))


def test_errors() -> None:
    query, key = inputs(2, 4, 2, 3, 9, 16)
    for q, k, text in (
        (query[0], key, r"\(4, 3, 16\) and .* both need four axes"),
        (query, key[:1], r"the same batch and the same head width"),
        (query, key[..., :8], r"the same batch and the same head width"),
        (query[:, :3], key, r"query heads must be a multiple of KV heads"),
        (query[:, :, :0], key, r"there must be a row"),
        (query, key.half(), r"query is torch.float32 and key torch.float16: give both in one"),
    ):
        with pytest.raises(ValueError, match=text):
            qrow_scores(q, k)
    for start, stop in ((-3, None), (0, 10), (5, 4)):
        with pytest.raises(ValueError, match=r"of 9: choose 0 <= start <= stop <= 9"):
            qrow_scores(query, key, start=start, stop=stop)
    with pytest.raises(ValueError, match=r"heads is 'sum': choose \"mean\", \"max\" or None"):
        qrow_scores(query, key, heads="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows is 'min': choose"):
        qrow_scores(query, key, rows="min")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask is torch.bool.*use torch.where\(mask, 0.0"):
        qrow_scores(query, key, mask=torch.ones(9, dtype=torch.bool, device=DEVICE))
    for shape in ((8,), (2, 2, 1, 9), (1, 2, 4, 3, 9)):
        with pytest.raises(ValueError, match=r"does not broadcast to \(2, 4, 3, 9\)"):
            qrow_scores(query, key, mask=torch.zeros(*shape, device=DEVICE))
