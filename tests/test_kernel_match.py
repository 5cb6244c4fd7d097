"""bipartite_match: torch against loops, the kernel against torch, gradients, compile."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, DTYPES, GPU, close, launched, randn
from torch import Tensor
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import match as launch
from vtc_kernels.operators import match
from vtc_kernels.operators.match import bipartite_match, reference

NOTHING = float("-inf")


def plain(a: Tensor, b: Tensor, valid: Tensor | None, protect: Tensor | None) -> list[list]:
    """Pair by pair in fp64: [row][token] (cosine, index, distance to the second best)."""
    found = []
    for i in range(a.shape[0]):
        row = []
        for j in range(a.shape[1]):
            scores = []
            for k in range(b.shape[1]):
                if (valid is not None and not valid[i, k]) or (
                    protect is not None and protect[i, j]
                ):
                    scores.append(NOTHING)
                    continue
                x, y = a[i, j].double(), b[i, k].double()
                lengths = max(float(x.norm()), 1e-12) * max(float(y.norm()), 1e-12)
                scores.append(float(x @ y) / lengths)
            best = max(scores, default=NOTHING)
            where = scores.index(best) if scores else 0
            others = [s for k, s in enumerate(scores) if k != where]
            row.append((best, where, best - max(others, default=NOTHING)))
        found.append(row)
    return found


def flags(*shape: int, seed: int, share: float = 0.5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=g) < share).to(DEVICE)


def same(
    out: tuple[Tensor, Tensor],
    a: Tensor,
    b: Tensor,
    valid: Tensor | None = None,
    protect: Tensor | None = None,
) -> None:
    """The cosines are those of torch in fp32, and so are the indices where the best one stands
    out. Every index belongs to its cosine."""
    cosine, index = reference(a.float(), b.float(), valid, protect)
    assert out[1].dtype == torch.int64 and out[0].dtype == torch.float32
    torch.testing.assert_close(out[0], cosine, rtol=1e-5, atol=1e-5)
    if b.shape[1] == 0 or a.shape[2] == 0:
        assert torch.equal(out[1], torch.zeros_like(index))
        return
    unit = torch.nn.functional.normalize
    every = unit(a.float(), dim=-1) @ unit(b.float(), dim=-1).transpose(1, 2)
    if valid is not None:
        every = every.masked_fill(~valid[:, None], NOTHING)
    own = every.gather(2, out[1][..., None])[..., 0]
    live = cosine > NOTHING
    torch.testing.assert_close(own[live], cosine[live], rtol=1e-5, atol=1e-5)
    assert (out[1][~live] == 0).all()
    second = every.scatter(2, index[..., None], NOTHING).amax(2)
    clear = live & (cosine - second > 1e-4)
    assert torch.equal(out[1][clear], index[clear])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_torch_is_the_loop(dtype: torch.dtype) -> None:
    a, b = randn(2, 5, 8, dtype=dtype), randn(2, 4, 8, dtype=dtype, seed=1)
    a[0, 1], b[1, 2] = 0, 0
    valid, protect = flags(2, 4, seed=2), flags(2, 5, seed=3)
    valid[0], valid[1] = False, torch.tensor([False, True, True, True])
    protect[1, 0] = False
    for rest in ((None, None), (valid, None), (None, protect), (valid, protect)):
        cosine, index = reference(a, b, *rest)
        assert cosine.dtype == torch.promote_types(dtype, torch.float32)
        for i, row in enumerate(plain(a, b, *rest)):
            for j, (best, where, gap) in enumerate(row):
                assert float(cosine[i, j]) == pytest.approx(best, abs=1e-5)
                if gap > 1e-4 or best == NOTHING:
                    assert int(index[i, j]) == where


@pytest.mark.parametrize("na", [1, 256, 257, 513])
def test_blocks_meet(na: int) -> None:
    a, b = randn(1, na, 4), randn(1, 7, 4, seed=1)
    cosine, index = reference(a, b, None, None)
    unit = torch.nn.functional.normalize
    expected = (unit(a, dim=-1) @ unit(b, dim=-1).transpose(1, 2)).max(-1)
    close(cosine, expected.values)
    assert torch.equal(index, expected.indices)


@pytest.mark.parametrize("na,nb", [(1, 1), (7, 33), (33, 7), (65, 129), (577, 3), (2, 729)])
@pytest.mark.parametrize("d", [8, 72])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_torch(na: int, nb: int, d: int, dtype: torch.dtype) -> None:
    a, b = randn(2, na, d, dtype=dtype), randn(2, nb, d, dtype=dtype, seed=1)
    same(launched(launch.bipartite, a, b, None, None), a, b, None, None)
    rest = flags(2, nb, seed=2), flags(2, na, seed=3)
    same(launched(launch.bipartite, a, b, *rest), a, b, *rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 33, 1000, 1152])
def test_widths(d: int, dtype: torch.dtype) -> None:
    a, b = randn(1, 5, d, dtype=dtype), randn(1, 6, d, dtype=dtype, seed=1)
    same(launched(launch.bipartite, a, b, None, None), a, b, None, None)


def test_empty() -> None:
    for batch, na, nb in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        a, b = randn(batch, na, 8), randn(batch, nb, 8, seed=1)
        same(launched(launch.bipartite, a, b, None, None), a, b, None, None)
        cosine, index = bipartite_match(a, b)
        assert (cosine == NOTHING).all() and (index == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided(dtype: torch.dtype) -> None:
    """Even and odd tokens, odd offsets, expanded batches, columns that are not contiguous."""
    x = randn(3, 70, 88, dtype=dtype)
    pairs = [
        (x[:, ::2], x[:, 1::2]),
        (x[..., 3:75], x[:, 5:, 3:75]),
        (x[:, ::3, 8:80], x[:, 1::2, :72]),
        (x[:1].expand(3, -1, -1), x[:, :9]),
        (x.transpose(1, 2), x[..., :70]),
    ]
    for a, b in pairs:
        valid = flags(1, b.shape[1], seed=4, share=0.7).expand(3, -1)
        protect = flags(3, 2 * a.shape[1], seed=5)[:, ::2]
        same(launched(launch.bipartite, a, b, valid, protect), a, b, valid, protect)


@pytest.mark.parametrize("run", [launch.bipartite, reference])
def test_ties_go_to_the_lowest_index(run: object) -> None:
    """Within a tile, across tiles, and when the lowest is not valid. All numbers are exact."""
    b = torch.zeros(1, 150, 16)
    b[0, :, :4] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    b[0, [5, 9, 70, 140], :4] = 1.0
    a = torch.zeros(1, 3, 16)
    a[0, 0, :4], a[0, 1, :4] = 1.0, torch.tensor([1.0, 1.0, -1.0, -1.0])
    a, b = a.to(DEVICE), b.to(DEVICE)
    valid = torch.ones(1, 150, dtype=torch.bool, device=DEVICE)
    for invalid, expected in (([], [5, 0, 0]), ([0, 5, 9], [70, 1, 1]), ([5, 9, 70], [140, 0, 0])):
        valid[:] = True
        valid[0, invalid] = False
        cosine, index = launched(run, a, b, valid, None)
        assert index[0].tolist() == expected
        assert cosine[0].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("run", [launch.bipartite, reference])
def test_special_values(run: object) -> None:
    """NaN counts as highest, of lowest index; zero and tiny vectors; nothing valid."""
    a, b = randn(1, 8, 16), randn(1, 80, 16, seed=1)
    a[0, 1, 3] = float("nan")
    a[0, 2, 3] = float("inf")
    a[0, 3] = 0
    a[0, 4] *= 1e-14
    b[0, 4] = -0.0
    cosine, index = launched(run, a, b, None, None)
    assert cosine[0].isnan().tolist() == [False, True, True] + [False] * 5
    assert int(index[0, 1]) == int(index[0, 2]) == int(index[0, 3]) == 0
    assert float(cosine[0, 3]) == 0 and 0 < float(cosine[0, 4]) < 0.1
    b[0, [66, 70], 0] = float("nan")
    cosine, index = launched(run, a, b, None, None)
    assert cosine.isnan().all() and index[0, 4:].tolist() == [66] * 4
    valid = torch.ones(1, 80, dtype=torch.bool, device=DEVICE)
    valid[0, [66, 70]] = False
    cosine, _ = launched(run, a, b, valid, None)
    assert not cosine[0, 3:].isnan().any()
    cosine, index = launched(run, a, b, torch.zeros_like(valid), None)
    assert (cosine == NOTHING).all() and (index == 0).all()
    protect = torch.ones(1, 8, dtype=torch.bool, device=DEVICE)
    cosine, index = launched(run, a, b, None, protect)
    assert (cosine == NOTHING).all() and (index == 0).all()


def test_gradients() -> None:
    op = OPERATORS["bipartite"]
    a = randn(2, 7, 5).double().requires_grad_()
    b = randn(2, 4, 5, seed=1).double().requires_grad_()
    rest = flags(2, 4, seed=2, share=0.7), flags(2, 7, seed=3, share=0.3)
    g = randn(2, 7, seed=4).double()
    for valid, protect in ((None, None), rest, (torch.zeros_like(rest[0]), None)):
        expected = torch.autograd.grad(reference(a, b, valid, protect)[0], (a, b), g)
        given = torch.autograd.grad(op(a, b, valid, protect)[0], (a, b), g)
        torch.testing.assert_close(given, expected)

    def cosines(x: Tensor, y: Tensor) -> Tensor:
        return op(x, y, *rest)[0][~rest[1]]

    assert torch.autograd.gradcheck(cosines, (a, b))
    assert not op(a, b, None, None)[1].requires_grad
    a, b = randn(1, 5, 8, dtype=torch.bfloat16), randn(1, 4, 8, dtype=torch.bfloat16, seed=1)
    a[0, 0], b[0, 1] = 0, 0
    expected = [t.float().requires_grad_() for t in (a, b)]
    (ga, gb) = torch.autograd.grad(reference(*expected, None, None)[0].sum(), expected)
    given = torch.autograd.grad(
        op(a.requires_grad_(), b.requires_grad_(), None, None)[0].sum(), (a, b)
    )
    close(given[0][:, 1:], ga[:, 1:], 4)
    close(given[1], gb, 4)


def test_operator_is_registered_correctly() -> None:
    a, b = randn(2, 7, 8).requires_grad_(), randn(2, 4, 8, seed=1).requires_grad_()
    rest = flags(2, 4, seed=2, share=0.7), flags(2, 7, seed=3, share=0.3)
    if not GPU:  # with a GPU the body is a launch, checked by the tests above
        torch.library.opcheck(OPERATORS["bipartite"], (a, b, *rest))
    same(OPERATORS["bipartite"](a, b, *rest), a, b, *rest)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(bipartite_match, fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 9):
        a, b = randn(2, n, 16), randn(2, n + 1, 16, seed=1)
        rest = flags(2, n + 1, seed=2), flags(2, n, seed=3)
        same(run(a, b, *rest), a, b, *rest)
    if backend == "aot_eager":
        a = randn(1, 300, 16)
        same(run(a, a[:, 1:]), a, a[:, 1:])


def test_public_function() -> None:
    """On a CPU it is the formula; rows that the kernel does not take; vmap."""
    a, b = randn(2, 3, 9000), randn(2, 4, 9000, seed=1)
    assert a.shape[2] > match.WIDEST
    same(bipartite_match(a, b), a, b)
    cosine, index = torch.vmap(lambda x, y: bipartite_match(x[None], y[None]))(a.cpu(), b.cpu())
    expected = reference(a.cpu(), b.cpu(), None, None)
    close(cosine[:, 0], expected[0])
    assert torch.equal(index[:, 0], expected[1])


def test_errors() -> None:
    a, b = randn(2, 3, 4), randn(2, 5, 4)
    for other in (b[0], b[:1], b[..., :3]):
        with pytest.raises(ValueError, match=r"a of shape \(2, 3, 4\) and b .* three axes"):
            bipartite_match(a, other)
    with pytest.raises(ValueError, match=r"give both in one floating point dtype"):
        bipartite_match(a, b.double())
    with pytest.raises(ValueError, match=r"give both in one floating point dtype"):
        bipartite_match(a.int(), b.int())
    with pytest.raises(ValueError, match=r"valid is torch.bool of shape \(2, 3\).*\(2, 5\).* of b"):
        bipartite_match(a, b, valid=flags(2, 3, seed=0))
    with pytest.raises(ValueError, match=r"protect is torch.int64.*torch.bool.*\(2, 3\).* of a"):
        bipartite_match(a, b, protect=flags(2, 3, seed=0).long())
