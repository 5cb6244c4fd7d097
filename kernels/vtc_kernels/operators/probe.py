"""zoo_sensitivity: how far random pushes of a token move the output of a projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend import TRITON, on_gpu, operator
from ..sensitivity import (
    ACTIVATIONS,
    TwoLayer,
    activation_kind,
    algebraic_sensitivity,
    change_norms,
    sides_of,
)

if TYPE_CHECKING or TRITON:
    from ..launch import probe as launch

__all__ = ["activation_kind", "probe_norms", "reference", "zoo_sensitivity"]


def zoo_sensitivity(
    layers: TwoLayer, root: Tensor, x: Tensor, directions: Tensor, h: float
) -> Tensor:
    """mean_j ||f(x_i + h u_j) - f(x_i - h u_j)|| / 2h of a two-layer projector f.

    On a CPU this is `algebraic_sensitivity`. On a GPU the difference of activations is formed
    inside the product with `root` and never stored. The torch formula still runs there for

    - fp64,
    - activations other than gelu, its tanh form, silu, relu and x * sigmoid(1.702 x), which are
      recognised by their values when the layers are first used, and inside torch.compile all
      that were never used outside of it,
    - a norm of more than one group.

    Args:
        layers: f; all tensors in the dtype of x.
        root: [R, H] `triangular_root(layers.w2)`, zero below its diagonal, in fp32, bf16 or fp16:
            its dtype is that of the large product, in which a low one is safe.
        x: [n, U] fp32. directions: [m, U] unit vectors, at least one. h: step, more than 0.
    Returns: [n].
    """
    _check(layers, root, x, directions, h)
    groups = 1 if layers.norm is None else layers.norm.groups
    if groups > 1 or not on_gpu(x, root) or layers.kind is None:
        return algebraic_sensitivity(layers, root, x, directions, h)
    a, v, factors, constant = sides_of(layers, x.float(), directions.float(), h)
    plus, minus = (None, None) if factors is None else (t[0] for t in factors)
    total = probe_norms(a[0], v[0], root, layers.kind, True, h, plus, minus, constant)
    return total / (2 * h * len(directions))


def _check(layers: TwoLayer, root: Tensor, x: Tensor, directions: Tensor, h: float) -> None:
    hidden, width = layers.w1.shape
    for name, t, last in (
        ("x", x, width),
        ("directions", directions, width),
        ("root", root, hidden),
    ):
        if t.ndim != 2 or t.shape[1] != last:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, these layers need [.., {last}]")
    if len(directions) == 0 or not h > 0:
        raise ValueError(
            f"{len(directions)} directions and h={h}: use at least one direction and a step above 0"
        )


def reference(
    a: Tensor,
    v: Tensor,
    root: Tensor,
    act: str,
    triangular: bool,
    h: float,
    plus: Tensor | None,
    minus: Tensor | None,
    constant: Tensor | None,
) -> Tensor:
    """sum_j ||root (act((a_i + v_j) plus_ji + constant) - act((a_i - v_j) minus_ji + constant))||.

    a [n, H], v [m, H] (steps included), root [R, H], plus and minus [m, n] or both None, constant
    [H] or None -> [n]. act is a name in `ACTIVATIONS`. h sizes the steps: differences are divided
    by 2h before they are cast. A root that is not triangular has no zeros that may be skipped.
    """
    factors = None if plus is None or minus is None else (plus[None], minus[None])
    sides = (a[None], v[None], factors, constant)
    return change_norms(sides, root, ACTIVATIONS[act], h, triangular)


def _probe_norms(
    a: Tensor,
    v: Tensor,
    root: Tensor,
    act: str,
    triangular: bool,
    h: float,
    plus: Tensor | None,
    minus: Tensor | None,
    constant: Tensor | None,
) -> Tensor:
    run = launch.probe if on_gpu(a, root) else reference
    return run(a, v, root, act, triangular, h, plus, minus, constant)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, v, root, ctx.act, ctx.triangular, ctx.h, plus, minus, constant = inputs
    ctx.save_for_backward(a, v, root, plus, minus, constant)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """By the torch formula, computed once more."""
    with torch.enable_grad():
        given: list[Any] = [t if t is None else t.detach() for t in ctx.saved_tensors]
        real = [t.requires_grad_() for t in given if t is not None]
        a, v, root, plus, minus, constant = given
        out = reference(a, v, root, ctx.act, ctx.triangular, ctx.h, plus, minus, constant)
        grads = iter(torch.autograd.grad(out, real, g))
    first = [next(grads) for _ in (a, v, root)]
    last = [t if t is None else next(grads) for t in (plus, minus, constant)]
    return *first, None, None, None, *last


probe_norms = operator(_probe_norms)
probe_norms.register_autograd(_backward, setup_context=_setup)
