"""zoo_sensitivity: torch against loops, the kernel against torch, gradients, compile, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kernels import DEVICE, close, launched, randn
from torch import Tensor, nn
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import probe as launch
from vtc_kernels.operators import probe
from vtc_kernels.operators.probe import activation_kind, zoo_sensitivity
from vtc_kernels.sensitivity import ACTIVATIONS, Norm, TwoLayer, triangular_root, unit_directions

H = 0.01
GELU = nn.GELU().forward
ROOTS = {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}


def tensors(n: int, m: int, hidden: int, outputs: int, which: str = "") -> list[Any]:
    """a, v, root, plus, minus, constant; `which` names the last ones that are there."""
    a, v = randn(n, hidden, seed=1), H * randn(m, hidden, seed=2)
    root = randn(outputs, hidden, seed=3).triu() / hidden**0.5
    plus = minus = constant = None
    if "n" in which:
        plus = 0.5 + torch.rand(m, n, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        minus = plus * (1 + H * randn(m, n, seed=5))
    if "c" in which:
        constant = randn(hidden, seed=6)
    return [a, v, root, plus, minus, constant]


def plain(given: list[Any], act: Callable[[Tensor], Tensor]) -> Tensor:
    """Token by token and direction by direction, in fp64."""
    a, v, root, plus, minus, constant = (None if t is None else t.double() for t in given)
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for i in range(len(a)):
        for j in range(len(v)):
            up, down = a[i] + v[j], a[i] - v[j]
            if plus is not None:
                up, down = up * plus[j, i], down * minus[j, i]
            if constant is not None:
                up, down = up + constant, down + constant
            total[i] += (root @ (act(up) - act(down))).norm()
    return total


def ratio(out: Tensor, expected: Tensor) -> float:
    """RMS of the error over RMS of the expected values."""
    error = (out.double() - expected.double()).square().mean()
    return float((error / expected.double().square().mean()).sqrt())


def call(run: Callable[..., Tensor], given: list[Any], act: str, triangular: bool = True) -> Tensor:
    a, v, root, plus, minus, constant = given
    return run(a, v, root, act, triangular, H, plus, minus, constant)


def kernel(given: list[Any], act: str, triangular: bool = True) -> Tensor:
    a, v, root, plus, minus, constant = given
    return launched(launch.probe, a, v, root, act, triangular, H, plus, minus, constant)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ROOTS)
def test_activations(act: str, dtype: torch.dtype) -> None:
    given = tensors(9, 3, 40, 40, "nc")
    given[2] = given[2].to(dtype)
    expected = plain(given, ACTIVATIONS[act])
    for run in (lambda: call(probe.reference, given, act), lambda: kernel(given, act)):
        out = run()
        assert out.dtype == torch.float32
        assert ratio(out, expected) < ROOTS[dtype]


@pytest.mark.parametrize("which", ["", "n", "c", "nc"])
@pytest.mark.parametrize("n,m,hidden,outputs", [(1, 1, 8, 3), (33, 2, 72, 72), (70, 1, 145, 140)])
def test_sizes(n: int, m: int, hidden: int, outputs: int, which: str) -> None:
    given = tensors(n, m, hidden, outputs, which)
    expected = plain(given, ACTIVATIONS["gelu"])
    for dtype, bound in ROOTS.items():
        bound *= 5 if n == 1 else 1  # rounding has nothing to average over
        low = [*given[:2], given[2].to(dtype), *given[3:]]
        assert ratio(call(probe.reference, low, "gelu"), expected) < bound
        assert ratio(kernel(low, "gelu"), expected) < bound


def test_a_root_without_zeros_below_its_diagonal() -> None:
    given = tensors(5, 2, 150, 140)
    given[2] = randn(140, 150, seed=9)
    for dtype, bound in ROOTS.items():
        low = [*given[:2], given[2].to(dtype), *given[3:]]
        expected = plain(low, ACTIVATIONS["silu"])
        for out in (call(probe.reference, low, "silu", False), kernel(low, "silu", False)):
            assert ratio(out, expected) < bound
    skipped = kernel(given, "silu", True)  # what lies below the diagonal of blocks is never read
    given[2] = given[2].clone()
    given[2][128:, :128] = float("nan")
    assert torch.equal(kernel(given, "silu", True), skipped)


def test_small_differences_survive_a_root_in_fp16() -> None:
    given = tensors(6, 2, 64, 64)
    given[1] = given[1] * 1e-4
    expected = plain(given, ACTIVATIONS["gelu_tanh"])
    given = [t if t is None else t.double() for t in given]
    a, v, root = given[:3]
    low = probe.reference(a, v, root.half(), "gelu_tanh", True, H * 1e-4, None, None, None)
    assert ratio(low, expected) < 2e-3
    flat = [t.float() for t in (torch.zeros_like(a), v)]
    out = launched(launch.probe, *flat, root.half(), "relu", True, H * 1e-4, None, None, None)
    expected = plain([*flat, root, None, None, None], ACTIVATIONS["relu"])
    assert ratio(out, expected) < 2e-3


def test_empty() -> None:
    a, v, root = tensors(3, 2, 8, 8)[:3]
    for run in (probe.reference, launch.probe):
        none = run(a[:0], v, root, "gelu", True, H, None, None, None)
        assert none.shape == (0,)
        zero = run(a, v[:0], root, "gelu", True, H, None, None, None)
        assert zero.tolist() == [0.0] * 3


def test_views() -> None:
    given = [None if t is None else t[:, ::2] for t in tensors(20, 4, 144, 72, "n")]
    given[0] = given[0][::2]  # [10, 72], as plus and minus [4, 10] want
    assert ratio(kernel(given, "gelu", False), plain(given, ACTIVATIONS["gelu"])) < 2e-5


# -- the public function ---------------------------------------------------------------------------


def layers(groups: int | None, act: Callable[[Tensor], Tensor] = GELU) -> TwoLayer:
    width, hidden, out = 12, 24, 20
    norm = None
    if groups is not None:
        part = width // groups
        norm = Norm(True, 1 + 0.1 * randn(part, seed=7), randn(part, seed=8), 1e-6, groups)
    w1, w2 = randn(hidden, width, seed=1) / 3, randn(out, hidden, seed=2) / 5
    return TwoLayer(w1, randn(hidden, seed=3), act, w2, randn(out, seed=4), norm)


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_public_function_equals_perturbed_layers(groups: int | None) -> None:
    two, x, u = layers(groups), randn(7, 12), unit_directions(5, 12, 0, DEVICE)
    wide, root = two.to(torch.float64), triangular_root(two.w2)
    expected = torch.stack(
        [(wide(x.double() + H * d) - wide(x.double() - H * d)).norm(dim=1) for d in u.double()]
    ).mean(0) / (2 * H)
    assert ratio(zoo_sensitivity(two, root, x, u, H), expected) < 2e-5
    assert ratio(zoo_sensitivity(two, root.bfloat16(), x, u, H), expected) < 2e-3


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_public_function_through_the_operator(
    groups: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the kernel gets what the torch formula gets, or is not asked."""
    two, x, u = layers(groups), randn(7, 12), unit_directions(5, 12, 0, DEVICE)
    root, calls = triangular_root(two.w2), []

    def count(*args: Any) -> Tensor:
        calls.append(args[3])
        return launched(launch.probe, *args)

    monkeypatch.setattr(probe, "on_gpu", lambda *_: True)
    monkeypatch.setattr(probe, "probe_norms", count)
    out = zoo_sensitivity(two, root, x, u, H)
    expected = probe.algebraic_sensitivity(two, root, x, u, H)
    assert ratio(out, expected) < 2e-5
    assert calls == ([] if groups == 3 else ["gelu"])
    zoo_sensitivity(replace(two, act=torch.tanh), root, x, u, H)
    assert len(calls) == (groups != 3)


def test_activation_kind() -> None:
    assert {activation_kind(f) for f in ACTIVATIONS.values()} == set(ACTIVATIONS)
    named = {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU("tanh"),
        "silu": nn.SiLU(),
        "relu": lambda x: x.clamp(min=0),
        "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    }
    for name, act in named.items():
        assert activation_kind(act) == name
    for act in (torch.tanh, nn.LeakyReLU(), nn.PReLU(), nn.ReLU6(), lambda x: None):
        assert activation_kind(act) is None
    assert activation_kind(layers(1).act) == "gelu" and activation_kind(torch.tanh) is None


# -- gradients, registration -----------------------------------------------------------------------


@pytest.mark.parametrize("which", ["", "nc"])
def test_gradients(which: str) -> None:
    given = [None if t is None else t.double().requires_grad_() for t in tensors(3, 2, 5, 4, which)]
    leaves, pull = [t for t in given if t is not None], randn(3, seed=9).double()
    op = OPERATORS["probe_norms"]
    got = torch.autograd.grad(call(op, given, "gelu"), leaves, pull)
    want = torch.autograd.grad(call(probe.reference, given, "gelu"), leaves, pull)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert torch.autograd.gradcheck(lambda *_: call(op, given, "gelu", False), leaves)


def test_operator() -> None:
    for which in ("", "nc"):
        a, v, root, *rest = [
            None if t is None else t.requires_grad_() for t in tensors(5, 2, 8, 6, which)
        ]
        args = a, v, root, "silu", True, H, *rest
        torch.library.opcheck(OPERATORS["probe_norms"], args)
        close(OPERATORS["probe_norms"](*args), probe.reference(*args))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    two, u = layers(1), unit_directions(5, 12, 0, DEVICE)
    root = triangular_root(two.w2)
    kind = activation_kind(two.act)
    assert kind == "gelu"

    def whole(x: Tensor) -> Tensor:
        return zoo_sensitivity(two, root, x, u, H)

    def operator(x: Tensor) -> Tensor:
        a, v = x @ two.w1.T, u @ two.w1.T
        return OPERATORS["probe_norms"](a, v, root, kind, True, H, None, None, None)

    for run in (operator,) if backend == "inductor" else (whole, operator):
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
        for n in (7,) if backend == "inductor" else (7, 9):
            x = randn(n, 12)
            assert torch.allclose(compiled(x), run(x), rtol=1e-4)


def test_errors() -> None:
    two, x, u = layers(None), randn(7, 12), unit_directions(5, 12, 0, DEVICE)
    root = triangular_root(two.w2)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        (r"x has shape \(7, 11\), these layers need \[.., 12\]", (root, x[:, 1:], u, H)),
        (r"directions has shape \(12,\), these layers need \[.., 12\]", (root, x, u[0], H)),
        (r"root has shape \(20, 23\), these layers need \[.., 24\]", (root[:, 1:], x, u, H)),
        (r"0 directions and h=0.01: use at least one", (root, x, u[:0], H)),
        (r"5 directions and h=0: use .* a step above 0", (root, x, u, 0)),
    ]
    for text, args in calls:
        with pytest.raises(ValueError, match=text):
            zoo_sensitivity(two, *args)
