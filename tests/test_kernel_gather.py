"""gather_tokens: torch against plain indexing, the kernel against torch, gradients, compile."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, DTYPES, indices, launched, randn
from torch import Tensor
from torch.library import opcheck
from vtc_kernels import TokenMap, gather_tokens
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import gather as launch


def plain(x: Tensor, index: Tensor, axis: int = 1) -> Tensor:
    """Row by row, by indexing."""
    rows = [x[b if x.shape[0] > 1 else 0].movedim(axis - 1, 0)[i] for b, i in enumerate(index)]
    return torch.stack([r.movedim(0, axis - 1) for r in rows])


@pytest.mark.parametrize("n", [1, 7, 33, 577])
@pytest.mark.parametrize("d", [8, 72, 1000])
def test_rows_of_all_sizes(n: int, d: int) -> None:
    x = randn(2, 1, n, d, dtype=torch.bfloat16)
    for k in sorted({0, 1, n - 1, n} if n < 577 else {144}):
        index = indices(2, n, k)
        expected = plain(x[:, 0], index)
        assert torch.equal(gather_tokens(index, x[:, 0])[0], expected)
        assert torch.equal(launched(launch.gather, [x], index)[0][:, 0], expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("itype", [torch.int32, torch.int64])
def test_bits_of_every_dtype(dtype: torch.dtype, itype: torch.dtype) -> None:
    """NaN, infinities and -0 are bits like others; odd rows move as narrower words."""
    index = indices(2, 33, 9).to(itype)
    for width in (1, 3, 10, 72):
        x = (randn(2, 3, 33, width) * 3).to(dtype)
        if dtype.is_floating_point:
            x[:, :, index[0, 0].long(), 0] = torch.tensor(float("nan"), device=DEVICE).to(dtype)
            x[:, :, index[0, 1].long(), 0] = -0.0
        raw = torch.uint8 if dtype == torch.bool else torch.int8
        expected = plain(x, index, 2).view(raw)
        assert torch.equal(launched(launch.gather, [x], index)[0].view(raw), expected)
        assert torch.equal(gather_tokens(index, x, axis=2)[0].view(raw), expected)


def test_one_launch_moves_what_an_attention_layer_needs() -> None:
    """Hidden states, rotary tables shared by the batch, planes of positions, a mask."""
    b, n, k = 2, 33, 9
    hidden, table = randn(b, n, 72, dtype=torch.bfloat16), randn(1, n, 16, seed=1)
    places = torch.arange(3 * b * n, device=DEVICE).reshape(3, b, n).transpose(0, 1)
    seen = randn(b, n) > 0
    index = indices(b, n, k)
    expected = [plain(hidden, index), plain(table, index), plain(places, index, 2)]
    expected.append(plain(seen, index))
    out = gather_tokens(index, hidden, table, places, seen, axis=[1, 1, 2, 1])
    shapes = [hidden[:, None], table.expand(b, -1, -1)[:, None], places[..., None]]
    moved = launched(launch.gather, [*shapes, seen[:, None, :, None]], index)
    for o, m, e in zip(out, moved, expected, strict=True):
        assert torch.equal(o, e) and torch.equal(m.reshape(e.shape), e)


@pytest.mark.parametrize("case", ["strided", "offset", "sliced", "transposed", "expanded"])
def test_views_are_read_in_place(case: str) -> None:
    store = randn(4, 70, 3, 80, dtype=torch.bfloat16)
    x = {
        "strided": store[::2, 1::2],
        "offset": store[1:3, 5:38],
        "sliced": store[:2, :33, :, 3:75],
        "transposed": store.transpose(0, 1)[:2, :3].transpose(1, 2),
        "expanded": store[:1, :33].expand(2, -1, -1, -1),
    }[case]
    index = torch.tensor([[0, 0, 2], [1, 2, 2]], device=DEVICE)  # tokens may repeat
    planes = x.transpose(1, 2)  # [B, P, N, W]
    expected = plain(planes, index, 2)
    assert torch.equal(launched(launch.gather, [planes], index)[0], expected)
    assert torch.equal(gather_tokens(index, planes, axis=2)[0], expected)


def test_nothing_to_move() -> None:
    index = torch.zeros(0, 3, dtype=torch.long, device=DEVICE)
    assert gather_tokens(index, randn(0, 5, 4))[0].shape == (0, 3, 4)
    assert launched(launch.gather, [randn(0, 1, 5, 4)], index)[0].shape == (0, 1, 3, 4)
    assert gather_tokens(indices(2, 5, 3), randn(2, 5, 0))[0].shape == (2, 3, 0)
    assert gather_tokens(index) == []


def test_more_tensors_than_one_launch_holds() -> None:
    index, xs = indices(2, 9, 4), [randn(2, 9, 3 + i, seed=i) for i in range(6)]
    for x, y in zip(xs, gather_tokens(index, *xs), strict=True):
        assert torch.equal(y, plain(x, index))


def test_gradients() -> None:
    """The registered gradient against that of plain indexing, with tokens taken twice."""
    index = torch.tensor([[0, 2, 2, 5], [1, 1, 1, 0]], device=DEVICE)
    x, y = (randn(2, p, 6, 5, seed=p).requires_grad_() for p in (1, 3))
    seeds = [randn(2, p, 4, 5, seed=9) for p in (1, 3)]
    places = torch.arange(12, device=DEVICE).reshape(2, 1, 6, 1)

    def loss(out: list[Tensor]) -> Tensor:
        return sum((o * s).sum() for o, s in zip(out, seeds, strict=False))  # type: ignore[return-value]

    expected = torch.autograd.grad(loss([plain(x, index, 2), plain(y, index, 2)]), (x, y))
    ours = torch.autograd.grad(loss(OPERATORS["gather"]([x, y, places], index)[:2]), (x, y))
    public = torch.autograd.grad(loss(gather_tokens(index, x, y, axis=2)), (x, y))
    for e, o, p in zip(expected, ours, public, strict=True):
        torch.testing.assert_close(o, e)
        torch.testing.assert_close(p, e)


def test_registration() -> None:
    x = randn(2, 3, 9, 5).requires_grad_()
    for index in (indices(2, 9, 4), indices(2, 9, 4).int()):
        results = opcheck(OPERATORS["gather"], ([x, x.detach().long()], index))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    """One graph for any number of tokens kept."""
    compiled = torch.compile(gather_tokens, fullgraph=True, dynamic=True, backend=backend)
    x, places = randn(2, 33, 16), torch.arange(66, device=DEVICE).reshape(2, 33)
    for k in (5, 9, 30):
        index = indices(2, 33, k)
        out = compiled(index, x, places)
        assert torch.equal(out[0], plain(x, index)) and torch.equal(out[1], plain(places, index))


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(3, 9, 4\) does not go with an index of 2 rows"):
        gather_tokens(indices(2, 9, 4), randn(3, 9, 4))
    with pytest.raises(ValueError, match="2 tensors need as many axes, 1 were given"):
        gather_tokens(indices(2, 9, 4), randn(2, 9, 4), randn(2, 9), axis=[1])


def test_wrong_indices_are_refused() -> None:
    """Another image of the batch must not be read in silence."""
    x = randn(2, 9, 4).cpu()
    with pytest.raises(ValueError, match="index goes from -1 to 12, but 0 to 8 are there"):
        gather_tokens(torch.tensor([[0, 12], [-1, 3]]), x)
    with pytest.raises(ValueError, match="torch.bool: token numbers are int32 or int64"):
        gather_tokens(torch.ones(2, 9, dtype=torch.bool), x)
    with pytest.raises(ValueError, match="index has shape .2, 9, 4.: it must have 2 axes"):
        gather_tokens(x, x)
    with pytest.raises(ValueError, match="what is gathered is list"):
        gather_tokens(torch.zeros(2, 1, dtype=torch.long), [x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis=3 of a tensor with 3 axes"):
        gather_tokens(torch.zeros(2, 1, dtype=torch.long), x, axis=3)
    with pytest.raises(ValueError, match="on cpu, meta: move them to one device"):
        gather_tokens(torch.zeros(2, 1, dtype=torch.long), x.to("meta"))


def test_strided_narrow_rows_and_complex_ones() -> None:
    """Positions with a strided token axis; complex rotary tables with their gradient."""
    index = indices(2, 9, 4)
    places = torch.arange(36, device=DEVICE).reshape(2, 18)[:, ::2]
    out = launched(launch.gather, [places[:, None, :, None]], index)[0]
    assert torch.equal(out[:, 0, :, 0], plain(places, index))
    table = torch.view_as_complex(randn(2, 9, 3, 2)).requires_grad_()
    seed = torch.view_as_complex(randn(2, 4, 3, 2, seed=1))
    grads = [
        torch.autograd.grad((y * seed).sum().real, table)[0]
        for y in (OPERATORS["gather"]([table[:, None]], index)[0][:, 0], plain(table, index))
    ]
    torch.testing.assert_close(*grads)


def test_a_map_is_as_good_as_its_index() -> None:
    to, x = TokenMap.keep(indices(2, 9, 4), 9), randn(2, 9, 4)
    assert torch.equal(gather_tokens(to, x)[0], plain(x, to.index))
    assert repr(to) == "TokenMap(2 rows, 9 tokens into 4 slots)"
