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
      recognised by their values,
    - a norm of more than one group,
    - torch.compile.

    Args:
        layers: f; all tensors in the dtype of x.
        root: [R, H] `triangular_root(layers.w2)`, zero below its diagonal, in fp32, bf16 or fp16:
            its dtype is that of the large product, in which a low one is safe.
        x: [n, U] fp32. directions: [m, U] unit vectors, at least one. h: step, more than 0.
    Returns: [n].
    """
    _check(layers, root, x, directions, h)
    groups = 1 if layers.norm is None else layers.norm.groups
    kind = None  # found by values, which a graph does not have
    if groups == 1 and on_gpu(x, root) and not torch.compiler.is_compiling():
        kind = activation_kind(layers.act)
    if kind is None:
        return algebraic_sensitivity(layers, root, x, directions, h)
    a, v, factors, constant = sides_of(layers, x.float(), directions.float(), h)
    plus, minus = (None, None) if factors is None else (t[0] for t in factors)
    total = probe_norms(a[0], v[0], root, kind, True, h, plus, minus, constant)
    return total / (2 * h * len(directions))


def _check(layers: TwoLayer, root: Tensor, x: Tensor, directions: Tensor, h: float) -> None:
    if not isinstance(layers, TwoLayer):
        raise ValueError(f"layers are {type(layers).__name__}: describe them as a TwoLayer")
    if layers.w1.dtype != x.dtype or directions.dtype != x.dtype:
        raise ValueError(
            f"x is {x.dtype}, directions {directions.dtype}, weights {layers.w1.dtype}: give all "
            f"in one dtype, float32 for small steps"
        )
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
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        a, v, root, plus, minus, constant = given = ctx.saved_tensors
        asked = [t is not None and t.requires_grad for t in given]
        real = [t for t, wanted in zip(given, asked, strict=True) if wanted]
        out = reference(a, v, root, ctx.act, ctx.triangular, ctx.h, plus, minus, constant)
        grads = iter(torch.autograd.grad(out, real, g, create_graph=twice))
    made = [next(grads) if wanted else None for wanted in asked]
    return *made[:3], None, None, None, *made[3:]


probe_norms = operator(_probe_norms)
probe_norms.register_autograd(_backward, setup_context=_setup)
