"""The projector of a vision-language model as a function of single units, and what it is made of.

A unit is everything the projector turns into one token: a feature of the tower, or all patches that
are merged into that token, concatenated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from itertools import chain
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import InvalidInput, UnsupportedModel
from ..modules.borrowed import readable
from ..ops import Norm, TwoLayer

__all__ = ["Norm", "Projector", "TwoLayer"]

T = TypeVar("T")
#: units that a decomposition is checked on, and the error allowed as a share of their scale
SAMPLE, TOLERANCE = 8, 1e-3


class _Bare(nn.Module):
    """Calls `run(inner, x)`, so that casting weights around it leaves inner's own hooks silent."""

    def __init__(self, inner: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


class Projector:
    """Maps units [n, width] to embeddings [n, D] in whatever dtype it is called with.

    Args:
        module: the projector; its weights, dtype and hooks are never changed.
        run: arranges units as the module wants them and calls `module.forward` (not the module, so
            that hooks on it do not fire).
        width: length of a unit.
    """

    def __init__(
        self, module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], width: int
    ) -> None:
        self.module, self.run, self.width = _double(module), run, width
        self._bare = _Bare(self.module, run)
        self._made_of = _made_of(module)
        self._weights: tuple[Hashable, ...] = ()
        self._memo: dict[Hashable, object] = {}

    def fits(self, module: nn.Module, width: int) -> bool:
        """Whether this is still that module, made of the same parts, in units of this width."""
        return width == self.width and self._made_of == _made_of(module)

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, width] -> [n, D], computed in the dtype of x, as in evaluation."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise InvalidInput(
                f"projector: units of shape {tuple(x.shape)}, use [n, {self.width}]."
            )
        same = all(t.dtype == x.dtype for t in self._tensors() if t.is_floating_point())
        if same or not self._readable():
            return self.run(self.module, x)
        cast = self.memo(("cast", x.dtype), lambda: self._cast(x.dtype))
        return torch.func.functional_call(self._bare, cast, (x,))

    @property
    def layers(self) -> TwoLayer | None:
        """[norm ->] Linear -> elementwise activation -> Linear in fp32, or None when the projector
        is not that. Found from the calls of its leaf modules and confirmed by its outputs."""
        return self.memo("layers", self._decompose)

    @property
    def structure(self) -> str:
        """The leaf modules in the order they are called, for messages: "Linear -> GELU -> ..."."""

        def names() -> str:
            called = [type(m).__name__ for m in self._calls()]
            return " -> ".join(called) or type(self.module).__name__

        return self.memo("structure", names)

    def sensitivity(
        self,
        x: Tensor,
        directions: Tensor,
        step: float,
        mode: str = "auto",
        rank: int | None = None,
        product: torch.dtype = torch.float32,
    ) -> Tensor:
        """Mean norm of the derivative along `directions` [m, width] at each unit x [n, width].

        Args:
            step: h of the central differences.
            mode: "zoo" runs the projector on perturbed units in the dtype of x; "algebraic" and
                "jacobian" (the root mean square over all directions) use `layers`, x in fp32;
                "auto" is algebraic where there are `layers`, otherwise zoo.
            rank: cut both linear layers to this many singular values.
            product: dtype of the large product of the algebraic mode.
        Returns: [n] fp32.
        Raises: `UnsupportedModel` when mode or rank need `layers` and there are none.
        """
        layers = None if mode == "zoo" and rank is None else self.layers
        if layers is None and (mode not in ("auto", "zoo") or rank is not None):
            away = "" if self._readable() else " with weights that are offloaded or quantised"
            raise UnsupportedModel(
                f"mode={mode!r} with rank={rank} needs a projector of the form [norm ->] Linear -> "
                f"activation -> Linear; this one is: {self.structure}{away}. Use mode='zoo', "
                f"rank=None."
            )
        if layers is None:
            return ops.difference_sensitivity(self, x, directions, step)
        if rank is not None:
            full = layers
            layers = self.memo(("low rank", rank), lambda: ops.low_rank(full, rank))
        two = layers
        if mode == "zoo":
            return ops.difference_sensitivity(two.to(x.dtype), x, directions, step)
        if mode == "jacobian":
            products = self.memo(("products", rank), lambda: ops.jacobian_products(two))
            root = None if two.norm is None else self._root(two, rank, x.dtype)
            return ops.jacobian_sensitivity(two, products, root, x)
        return ops.zoo_sensitivity(two, self._root(two, rank, product), x, directions, step)

    def _root(self, layers: TwoLayer, rank: int | None, dtype: torch.dtype) -> Tensor:
        """Triangular root of the second layer; QR itself runs in fp32."""
        return self.memo(("root", rank, dtype), lambda: ops.triangular_root(layers.w2).to(dtype))

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, remembered until a weight of the projector changes (a new tensor, or an
        in-place change that PyTorch counts). Inside `torch.compile` only what is remembered."""
        if torch.compiler.is_compiling():
            if key not in self._memo:
                raise UnsupportedModel(
                    f"projector: {key!r} is not prepared. Run the attached model once before "
                    f"torch.compile, with the same inputs."
                )
            return self._memo[key]  # type: ignore[return-value]
        weights = tuple(
            (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device, t.shape)
            for t in self._tensors()
        )
        if weights != self._weights:
            self._memo, self._weights = {}, weights
        if key not in self._memo:
            with torch.inference_mode(False), torch.no_grad():
                self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]

    def _tensors(self) -> Iterator[Tensor]:
        return chain(self.module.parameters(), self.module.buffers())

    def _readable(self) -> bool:
        """Others neither bring its weights in for single calls nor keep them as another kind."""
        return all(map(readable, self._tensors()))

    def _cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        named = chain(self._bare.named_parameters(), self._bare.named_buffers())
        return {name: t.detach().to(dtype) for name, t in named if t.is_floating_point()}

    def _sample(self) -> Tensor:
        """[SAMPLE, width] fp32 units with a mean, and entries of size 1 (even rows) or 1e-3 (odd
        rows, where the eps of a norm shows)."""
        real = (t.device for t in self._tensors() if not t.is_meta)
        where = next(real, torch.device("cpu"))
        x = ops.unit_directions(SAMPLE, self.width, 0, where) * self.width**0.5 + 0.5
        x[1::2] *= 1e-3
        return x

    def _calls(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """First input and output of every leaf module that did something, in the order of calls.
        Empty when the module is a leaf itself, or when a leaf is called twice."""
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []

        def note(leaf: nn.Module, args: tuple[object, ...], out: object) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                calls.append((leaf, args[0], out))

        leaves = [m for m in self.module.modules() if next(m.children(), None) is None]
        handles = [m.register_forward_hook(note) for m in leaves if m is not self.module]
        try:
            self(self._sample())
        finally:
            for handle in handles:
                handle.remove()
        kept = [c for c in calls if _weighted(c[0]) or not _equal(c[1], c[2])]
        found = {leaf: (x, y) for leaf, x, y in kept}
        return found if len(found) == len(kept) else {}

    def _decompose(self) -> TwoLayer | None:
        if not self._readable():
            return None
        calls = self._calls()
        leaves = list(calls)
        norm = None
        if len(leaves) == 4:
            norm = _norm(leaves[0], *calls[leaves[0]], self.width)
            if norm is None:
                return None
        if len(leaves) not in (3, 4):
            return None
        first, act, second = leaves[-3:]
        if not (_plain(first) and _plain(second)) or first.out_features != second.in_features:
            return None  # gated activations halve what comes between
        a, b = calls[act]
        if _weighted(act) or a.shape != b.shape or first.in_features != self.width:
            return None
        # elementwise: every entry alone gives what it gives among the others
        if not _close(act.forward(a.reshape(-1, 1)).reshape(b.shape), b):
            return None
        layers = TwoLayer(
            _fp32(first.weight),
            None if first.bias is None else _fp32(first.bias),
            act.forward,
            _fp32(second.weight),
            None if second.bias is None else _fp32(second.bias),
            norm,
        )
        x = self._sample()
        if not _close(layers(x), self(x)):
            return None
        self._memo.pop(("cast", torch.float32), None)  # `layers` holds these weights once more
        return layers


def _norm(leaf: nn.Module, x: Tensor, y: Tensor, width: int) -> Norm | None:
    """The LayerNorm or RMS norm that `leaf` is, from its parameters and one call."""
    names = {name for name, _ in leaf.named_parameters()}
    part = x.shape[-1]
    if x.shape != y.shape or width % part or not names <= {"weight", "bias"}:
        return None
    weight, bias = (getattr(leaf, name, None) for name in ("weight", "bias"))
    if any(t is not None and t.shape != (part,) for t in (weight, bias)):
        return None
    eps = next((v for k, v in vars(leaf).items() if "eps" in k and isinstance(v, float)), None)
    if eps is None:  # nn.RMSNorm(eps=None)
        eps = torch.finfo(torch.float32).eps
    weight, bias = (None if t is None else _fp32(t) for t in (weight, bias))
    for center in (False, True):
        norm = Norm(center, weight, bias, eps, width // part)
        if _close(Norm(center, weight, bias, eps)(x.reshape(-1, part)), y.reshape(-1, part)):
            return norm
    return None


def _made_of(module: nn.Module) -> list[object]:
    """Its modules, and what others have put in place of their `forward`."""
    return [part for m in module.modules() for part in (m, vars(m).get("forward"))]


def _double(module: nn.Module) -> nn.Module:
    """A module that shares weights with this one, but neither hooks nor the mode: it may be hooked
    and is always in evaluation, whatever other threads do with the model."""
    double = copy.copy(module)
    own = vars(double)
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            own[name] = type(value)()
    own["_modules"] = type(module._modules)(
        (name, None if child is None else _double(child)) for name, child in module._modules.items()
    )
    own["training"] = False
    return double


def _plain(leaf: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer whose weight is the matrix itself, not packed bits."""
    if not isinstance(leaf, nn.Linear):
        return False
    weight = leaf.weight
    return weight.is_floating_point() and weight.shape == (leaf.out_features, leaf.in_features)


def _weighted(leaf: nn.Module) -> bool:
    return next(leaf.parameters(), None) is not None


def _fp32(t: Tensor) -> Tensor:
    return t.detach().float()


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x, y)


def _close(x: Tensor, y: Tensor) -> bool:
    """Equal rows up to TOLERANCE of the largest entry of each row."""
    if x.shape != y.shape:
        return False
    scale = y.abs().amax(-1, keepdim=True)
    return bool(((x - y).abs() <= TOLERANCE * scale + 1e-12).all())
