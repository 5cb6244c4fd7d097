"""temporal_cosine: torch against a loop, the kernel against torch, gradients, compile."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, DTYPES, GPU, close, launched, randn
from torch import Tensor
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import temporal as launch
from vtc_kernels.operators.temporal import reference, temporal_cosine


def plain(x: Tensor) -> Tensor:
    """Token by token, in fp64."""
    b, t, n, _ = x.shape
    out = torch.zeros(b, max(t - 1, 0), n, dtype=torch.float64)
    for i in range(b):
        for frame in range(1, t):
            for j in range(n):
                new, old = x[i, frame, j].double(), x[i, frame - 1, j].double()
                length = max(float(new.norm()), 1e-12) * max(float(old.norm()), 1e-12)
                out[i, frame - 1, j] = float(new @ old) / length
    return out.to(x.device)


def drift(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Frames that change slowly, so that cosines are large and differ."""
    return (randn(*shape) + 2 * randn(shape[0], 1, *shape[2:], seed=1)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_torch_is_the_loop(dtype: torch.dtype) -> None:
    for shape in ((2, 3, 5, 8), (1, 2, 7, 72), (1, 4, 1, 33)):
        x = drift(*shape, dtype=dtype)
        x[0, 1, 0] = 0
        out = reference(x)
        assert out.dtype == torch.promote_types(dtype, torch.float32)
        close(out.float(), plain(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 8, 72, 1152])
def test_kernel_is_torch(d: int, dtype: torch.dtype) -> None:
    """The first and the last token, odd numbers of them, one frame and several chunks."""
    for b, t, n in ((2, 3, 7), (1, 2, 33), (1, 1, 4), (3, 4, 1), (0, 3, 5), (2, 3, 0)):
        x = drift(b, t, n, d, dtype=dtype)
        out = launched(launch.temporal, x)
        assert out.shape == (b, t - 1, n)
        close(out, reference(x.float()))


@pytest.mark.parametrize("n", [577, 729])
def test_many_tokens(n: int) -> None:
    x = drift(1, 2, n, 8, dtype=torch.bfloat16)
    close(launched(launch.temporal, x), reference(x.float()))


@pytest.mark.parametrize("t", [16, 17, 33, 34, 50])
def test_chunks_meet(t: int) -> None:
    x = drift(1, t, 3, 16)
    close(launched(launch.temporal, x), reference(x))


def test_widest_rows() -> None:
    x = drift(1, 3, 2, 4096, dtype=torch.bfloat16)
    close(launched(launch.temporal, x), reference(x.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided(dtype: torch.dtype) -> None:
    """Frames behind tokens, sliced rows, an offset that is odd, a batch that is expanded."""
    x = drift(2, 9, 6, 80, dtype=dtype)
    cut = x[:, ::2, 1:, 3:75]
    views = [x.transpose(1, 2), cut, x[..., 8:], x[:1].expand(3, -1, -1, -1), x.transpose(2, 3)]
    for view in views:
        close(launched(launch.temporal, view), reference(view.float()))


def test_special_values() -> None:
    """Zero has cosine 0 and tiny vectors shrink; NaN and inf spoil both neighbours, no others."""
    x = drift(1, 6, 4, 24)
    x[0, 1, 0] = 0
    x[0, 1, 1] = -0.0
    x[0, 2, 2, 5] = float("nan")
    x[0, 4, 3, 5] = float("inf")
    x[0, 3, 0] *= 1e-14
    out = launched(launch.temporal, x)
    torch.testing.assert_close(out, reference(x), equal_nan=True, rtol=1e-5, atol=1e-5)
    expected = torch.zeros(5, 4, dtype=torch.bool)
    expected[1:3, 2] = expected[3:5, 3] = True
    assert torch.equal(out[0].isnan().cpu(), expected)
    assert (out[0, :2, :2] == 0).all()
    assert 0 < out[0, 2, 0].abs() < 0.1


def test_gradients() -> None:
    op = OPERATORS["temporal"]
    for shape in ((2, 4, 3, 5), (1, 2, 1, 8), (1, 1, 3, 4)):
        x = drift(*shape, dtype=torch.float64).requires_grad_()
        g = randn(shape[0], shape[1] - 1, shape[2], seed=3).double()
        (expected,) = torch.autograd.grad(reference(x), x, g)
        out = op(x)
        (given,) = torch.autograd.grad(out, x, g)
        torch.testing.assert_close(given, expected)
    x = drift(1, 3, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(op, (x,))
    x = drift(1, 3, 2, 8, dtype=torch.bfloat16)
    x[0, 1, 0] = 0
    x.requires_grad_()
    (given,) = torch.autograd.grad(op(x).sum(), x)
    assert given.dtype == torch.bfloat16 and given.isfinite().all()


def test_operator_is_registered_correctly() -> None:
    x = drift(2, 3, 4, 8)
    if not GPU:  # with a GPU the body is a launch, checked by the tests above
        torch.library.opcheck(OPERATORS["temporal"], (x.requires_grad_(),))
    assert OPERATORS["temporal"](x).shape == (2, 2, 4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(temporal_cosine, fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 9):
        x = drift(2, 3, n, 16)
        close(run(x), temporal_cosine(x))


def test_public_function() -> None:
    x = drift(2, 3, 4, 5000)
    assert torch.equal(temporal_cosine(x.cpu()), reference(x.cpu()))
    close(temporal_cosine(x), reference(x))
    mapped = torch.vmap(lambda y: temporal_cosine(y[None])[0])(x.cpu())
    close(mapped, reference(x.cpu()))


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3, 4), torch.zeros(2, 0, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.int32)]
)
def test_errors(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"it must be floating point with four axes"):
        temporal_cosine(x.to(DEVICE))
