"""How strongly a projector reacts to a small push of its input: mean norm of J(x) u over random
unit directions u, by finite differences, by algebra on two linear layers, or in closed form.

All functions compute in the dtype of `x` and hold a bounded number of elements at once: directions
and tokens are worked on in chunks, nothing of size directions x tokens x width is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .draws import hash_uniform

#: row blocks of a triangular product (32 multiply by 1 / 32 of the zeros) and their least height
TRIANGLE_BLOCKS, LEAST_ROWS = 32, 128
#: activations that a kernel knows
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


@lru_cache(maxsize=64)
def activation_kind(act: Callable[[Tensor], Tensor]) -> str | None:
    """The name in `ACTIVATIONS` of the function that has the values of `act` on 64 points in fp64
    on the CPU; None when there is none, or when `act` does not run there."""
    with torch.inference_mode(False), torch.no_grad():
        x = torch.linspace(-10, 10, 64, dtype=torch.float64)  # without 0
        try:
            y = act(x.clone())
        except (RuntimeError, TypeError, ValueError):
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape or y.device != x.device:
            return None
        for name, known in ACTIVATIONS.items():
            if torch.allclose(y.double(), known(x), rtol=1e-9, atol=1e-12):
                return name
    return None


@dataclass(frozen=True)
class Norm:
    """LayerNorm (`center`) or RMS norm of `groups` equal, consecutive parts of a vector.

    Attributes:
        center: subtract the mean of each part.
        weight, bias: [U / groups], or None for ones and zeros.
        eps: added to the variance (or mean square) of a part.
    """

    center: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    groups: int = 1

    def parts(self, x: Tensor) -> Tensor:
        """x [n, U] -> [groups, n, U / groups], each part minus its mean where `center`."""
        x = x.unflatten(-1, (self.groups, -1)).transpose(0, 1)
        return x - x.mean(-1, keepdim=True) if self.center else x

    def __call__(self, x: Tensor) -> Tensor:
        part = self.parts(x)
        part = part * (part.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        part = part if self.weight is None else part * self.weight
        part = part if self.bias is None else part + self.bias
        return part.transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class TwoLayer:
    """x [n, U] -> w2 act(w1 norm(x) + b1) + b2 [n, D], with an elementwise `act`.

    Attributes: w1 [H, U], b1 [H] or None, w2 [D, H], b2 [D] or None, norm or None.
    """

    w1: Tensor
    b1: Tensor | None
    act: Callable[[Tensor], Tensor]
    w2: Tensor
    b2: Tensor | None
    norm: Norm | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        return F.linear(self.act(F.linear(x, self.w1, self.b1)), self.w2, self.b2)

    def to(self, dtype: torch.dtype) -> TwoLayer:
        """The same layers with tensors of this dtype."""

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        norm = self.norm
        if norm is not None:
            norm = replace(norm, weight=cast(norm.weight), bias=cast(norm.bias))
        w1, w2 = self.w1.to(dtype), self.w2.to(dtype)
        return TwoLayer(w1, cast(self.b1), self.act, w2, cast(self.b2), norm)

    def inner(self) -> tuple[Tensor, Tensor | None]:
        """The first layer behind the division by sigma: weights [groups, H, U / groups] with the
        norm's scale (and centring) folded in, and the constant [H] of its shift and b1."""
        if self.norm is None:
            return self.w1[None], self.b1
        w = self.w1.unflatten(1, (self.norm.groups, -1)).transpose(0, 1)
        constant = self.b1
        if self.norm.bias is not None:
            shift = (w @ self.norm.bias).sum(0)
            constant = shift if constant is None else constant + shift
        w = w if self.norm.weight is None else w * self.norm.weight
        w = w - w.mean(-1, keepdim=True) if self.norm.center else w
        return w, constant


def unit_directions(m: int, width: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """[m, width] fp32 unit vectors, uniform on the sphere: normalised N(0, I) by Box-Muller from
    `hash_uniform`, so no generator is used and every device draws the same numbers."""
    place = torch.arange(m * width, device=device) * 2
    radius = (-2 * torch.log1p(-hash_uniform(place, seed))).sqrt()
    normal = radius * torch.cos(2 * math.pi * hash_uniform(place + 1, seed))
    return F.normalize(normal.reshape(m, width), dim=-1, eps=1e-12)


def _chunks(n: int, m: int, width: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Token and direction ranges whose product with `width` stays below a number of elements."""
    limit = 2**20 if device.type == "cpu" else 2**26
    tokens = max(1, min(n, limit // width))
    directions = max(1, limit // (tokens * width))
    for start in range(0, n, tokens):
        for first in range(0, m, directions):
            yield slice(start, start + tokens), slice(first, first + directions)


def difference_sensitivity(
    function: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, h: float
) -> Tensor:
    """mean_j ||f(x_i + h u_j) - f(x_i - h u_j)|| / 2h. x [n, U], directions [m, U] -> [n] fp32
    (fp64 for fp64). Perturbs and evaluates in the dtype of x; 2 m n rows go through `function`."""
    (n, width), m = x.shape, len(directions)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(n, dtype=wide, device=x.device)
    push = directions.to(x.dtype) * h
    for rows, some in _chunks(n, m, width, x.device):
        point, step = x[rows], push[some, None]
        change = function((point + step).flatten(0, 1)) - function((point - step).flatten(0, 1))
        norm = torch.linalg.vector_norm(change, dim=-1, dtype=wide)
        total[rows] += norm.reshape(-1, len(point)).sum(0)
    return total / (2 * h * m)


def triangular_root(w2: Tensor) -> Tensor:
    """R [min(D, H), H], zero below its diagonal, with ||R d|| = ||w2 d|| for every d: R of QR."""
    return torch.linalg.qr(w2, mode="r").R.contiguous()


def _root_norm(root: Tensor, d: Tensor, triangular: bool = True) -> Tensor:
    """||root d|| for d [n, H] -> [n], in blocks of rows that skip the zeros of a triangle. The
    product runs in the dtype of `root`, its squares are summed in the dtype of d."""
    size = max(LEAST_ROWS, -(-len(root) // TRIANGLE_BLOCKS))
    total = torch.zeros(len(d), dtype=d.dtype, device=d.device)
    low = d.to(root.dtype)
    for start in range(0, len(root), size):
        left = start if triangular else 0
        part = low[:, left:] @ root[start : start + size, left:].T
        total = total + part.to(d.dtype).square().sum(-1)
    return total.sqrt()


#: a [G, n, H], v [G, m, H], factors [G, m, n] of both sides or None, constant [H] or None
Sides = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Tensor | None]


def sides_of(layers: TwoLayer, x: Tensor, directions: Tensor, h: float) -> Sides:
    """What the activation takes in at x_i +- h u_j: the sum over parts g of
    (a[g, i] +- v[g, j]) * factor[g, j, i], plus the constant."""
    w, constant = layers.inner()
    norm = layers.norm
    x, u = (t[None] if norm is None else norm.parts(t) for t in (x, directions))  # [G, ., C]
    a, v = x @ w.transpose(1, 2), (u @ w.transpose(1, 2)) * h  # [G, n, H], [G, m, H]
    if norm is None:
        return (a if constant is None else a + constant), v, None, None
    even = x.square().mean(-1)[:, None] + h * h * u.square().mean(-1)[..., None] + norm.eps
    odd = 2 * h * (u @ x.transpose(1, 2)) / x.shape[-1]  # [G, m, n]
    return a, v, ((even + odd).rsqrt(), (even - odd).rsqrt()), constant


def change_norms(
    sides: Sides,
    root: Tensor,
    act: Callable[[Tensor], Tensor],
    h: float,
    triangular: bool = True,
) -> Tensor:
    """[n] sum over directions of ||root (act(plus side) - act(minus side))||.

    For a root in fp16 the difference is divided by 2h before it is cast, so that it is not lost
    among the smallest numbers."""
    a, v, factors, constant = sides
    (_, n, wide), m = a.shape, v.shape[1]
    gain = 0.5 / h if root.dtype == torch.float16 else 1.0
    total = torch.zeros(n, dtype=a.dtype, device=a.device)
    for rows, some in _chunks(n, m, wide, a.device):
        both = []
        for sign, inverse in zip((1, -1), factors or (None, None), strict=True):
            side = None
            for g in range(len(a)):
                part = torch.add(a[g, rows], v[g, some, None], alpha=sign)
                part = part if inverse is None else part * inverse[g, some, rows, None]
                side = part if side is None else side + part
            assert side is not None
            both.append(act(side if constant is None else side + constant))
        change = (both[0] - both[1]).flatten(0, 1)
        change = change if gain == 1.0 else change * gain
        norm = _root_norm(root, change, triangular)
        total[rows] += norm.reshape(-1, a[:, rows].shape[1]).sum(0)
    return total / gain


def algebraic_sensitivity(
    layers: TwoLayer, root: Tensor, x: Tensor, directions: Tensor, h: float
) -> Tensor:
    """`difference_sensitivity` of `layers`, with the linear layers moved out of the difference.

    w1 x_i and w1 u_j are formed once. The biases of the second layer cancel, so one product with
    the difference of activations is left, and of that only the norm: `root` replaces w2 and half
    of the product is skipped. With an input norm the two sides differ by their sigma alone,
    sigma^2 = (|x|^2 +- 2h x.u + h^2 |u|^2) / C + eps per part, which needs no perturbed vectors.

    Args:
        root: `triangular_root(layers.w2)`; its dtype is that of the large product. A low dtype is
            safe there: the difference is already formed in the dtype of x.
        x: [n, U]. directions: [m, U]. h: step.
    Returns: [n].
    """
    total = change_norms(sides_of(layers, x, directions, h), root, layers.act, h)
    return total / (2 * h * len(directions))


def jacobian_products(layers: TwoLayer) -> Tensor:
    """[groups, H, H] products (w2^T w2) o (w w^T) that `jacobian_sensitivity` needs, once per set
    of weights; w is the first layer with the norm's scale folded in."""
    w, _ = layers.inner()
    return (layers.w2.T @ layers.w2) * (w @ w.transpose(1, 2))


def jacobian_sensitivity(
    layers: TwoLayer, products: Tensor, root: Tensor | None, x: Tensor
) -> Tensor:
    """sqrt(||J(x_i)||_F^2 / U), the root of the exact mean of ||J u||^2 over unit directions.

    Without a norm ||J||_F^2 = p^T [(w2^T w2) o (w1 w1^T)] p with p = act'(w1 x + b1). With one,
    each part adds (p^T K p - (2 - |t|^2) ||w2 (p o w t)||^2) / sigma^2, t = x / (sqrt(C) sigma).

    Args:
        products: of `jacobian_products`. root: of `triangular_root`, read only with a norm.
        x: [n, U].
    Returns: [n].
    """
    w, constant = layers.inner()
    width, norm = x.shape[-1], layers.norm
    if norm is None:
        q, sigma2, rho = [x @ w[0].T], None, None
        a = q[0]
    else:
        part = norm.parts(x)
        sigma2 = part.square().mean(-1) + norm.eps  # [G, n]
        t = part * (sigma2 * part.shape[-1]).rsqrt()[..., None]
        q, rho = t @ w.transpose(1, 2), t.square().sum(-1)
        a = q.sum(0) * math.sqrt(part.shape[-1])
    slope = _derivative(layers.act, a if constant is None else a + constant)
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for g, product in enumerate(products):
        frobenius = ((slope @ product) * slope).sum(-1)
        if sigma2 is None or rho is None or root is None:
            total = total + frobenius
        else:
            along = _root_norm(root, slope * q[g]).square()
            total = total + (frobenius - (2 - rho[g]) * along) / sigma2[g]
    return (total.clamp(min=0) / width).sqrt()


def _derivative(act: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """act'(a), elementwise. Derivatives need ordinary tensors, not those of inference mode."""
    if torch.compiler.is_compiling():
        return torch.func.grad(lambda t: act(t).sum())(a)
    with torch.inference_mode(False), torch.enable_grad():
        point = a.clone().detach().requires_grad_()
        return torch.autograd.grad(act(point).sum(), point)[0]


def low_rank(layers: TwoLayer, rank: int) -> TwoLayer:
    """Both linear layers cut to `rank` singular values.

    The second keeps S V^T only, [rank, H]: dropping U with its orthonormal columns (and b2) leaves
    every norm of a difference of outputs, hence the sensitivity, as it is.
    """
    u, s, vt = torch.linalg.svd(layers.w1, full_matrices=False)
    w1 = (u[:, :rank] * s[:rank]) @ vt[:rank]
    _, s, vt = torch.linalg.svd(layers.w2, full_matrices=False)
    return replace(layers, w1=w1, w2=s[:rank, None] * vt[:rank], b2=None)
