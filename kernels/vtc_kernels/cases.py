"""The production shapes that the gate compiles, the report counts and the bench times.

One function per operator makes a `Case` for any shape; CASES holds the named ones. Small shapes
from the same functions are what the tests count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .operators import pack
from .operators.attention import qrow_scores
from .operators.cache import kv_compact
from .operators.expand import expand_tokens
from .operators.gather import gather_tokens
from .operators.match import bipartite_match
from .operators.maxmin import maxmin_select, maxmin_tokens
from .operators.merge import merge_tokens
from .operators.norm import gather_norm
from .operators.pack import PackMap, pack_varlen, unpack_varlen
from .operators.pool import unpool_tokens
from .operators.probe import zoo_sensitivity
from .operators.select import select_topk
from .operators.temporal import temporal_cosine
from .sensitivity import TwoLayer, activation_kind, sides_of, triangular_root, unit_directions
from .token_map import TokenMap, window_slots

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One operator on one set of shapes.

    Attributes:
        operator, name: together the key, "gather/llava-1.5".
        make: tensors for the calls below.
        ours: the public function. On a CPU this is the torch formula.
        launch: the launch of the kernels, on the same tensors.
        eager: the formulation in use today; it returns what `ours` returns.
        bound: compulsory bytes: every input that is needed read once, every output written once,
            in the dtypes of the caller. A merge needs 4 bytes of map per token.
        moved: bytes that our kernels read and write, each address counted once per launch.
        around: the operations of torch that `launch` needs beside its kernels, None without any;
            they are counted like eager ones and added to ours.
        copied: bytes of the tensor whose copy is the yardstick of the bench.
        batch: rows of the batch.
        kernels: launches of kernels.
        wide: kernels that move rows -> "load", "store" or "both": what must be 128 bits wide.
        dots: kernels that must use a matrix instruction.
        limit: the most that all bytes of ours / bound may be. Above 1.10 only with a `reason`.
        most: target for the time of ours / time of the yardstick on a CPU, None without one.
        most_eager: target for the time of ours / time of the eager formulation on a CPU.
        eager_on_meta: False where the eager formulation needs values.
        graph: what torch.compile traces where `ours` waits for values.
        on_cpu: False where one run on a CPU takes many seconds: not timed there.
    """

    operator: str
    name: str
    make: Callable[[Make], Tensors]
    ours: Callable[[Tensors], Any]
    launch: Callable[[Tensors], Any]
    eager: Callable[[Tensors], Any]
    bound: Callable[[Tensors], int]
    moved: Callable[[Tensors], int]
    copied: Callable[[Tensors], int]
    batch: int = 8
    around: Callable[[Tensors], Any] | None = None
    kernels: int = 1
    wide: dict[str, str] = field(default_factory=dict)
    dots: tuple[str, ...] = ()
    limit: float = 1.10
    reason: str = ""
    most: float | None = None
    most_eager: float = 1.0
    eager_on_meta: bool = True
    graph: Callable[[Tensors], Any] | None = None
    on_cpu: bool = True

    @property
    def key(self) -> str:
        return f"{self.operator}/{self.name}"

    def tensors(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        batch: int | None = None,
        values: bool = True,
    ) -> Tensors:
        """Inputs, the same in every call. values=False leaves floating-point rows empty."""
        return self.make(Make(torch.device(device), dtype, batch or self.batch, values))


class Make:
    """Makes the tensors of a case; maps and indices always hold real values."""

    def __init__(self, device: torch.device, dtype: torch.dtype, batch: int, values: bool) -> None:
        self.device, self.dtype, self.b, self.values = device, dtype, batch, values
        self.generator = torch.Generator().manual_seed(0)

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of the dtype of the case."""
        dtype = dtype or self.dtype
        if not self.values:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def shuffled(self, n: int, rows: int | None = None) -> Tensor:
        """[rows, n]: the numbers 0 to n - 1 in another order for every row."""
        rows = self.b if rows is None else rows
        return torch.rand(rows, n, generator=self.generator).argsort(1).to(self.device)

    def index(self, n: int, k: int) -> Tensor:
        """[B, k] of n, ascending, without repetition."""
        return self.shuffled(n)[:, :k].sort(1).values


def size(*tensors: Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def launcher(name: str) -> Any:
    """The module of launches, imported when it is used: it needs Triton."""
    return import_module(f".launch.{name}", __package__)


def _gather_expanded(x: Tensor, index: Tensor) -> Tensor:
    """torch.gather with an expanded index: what most published code does."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


# -- gather ----------------------------------------------------------------------------------------


def gather(name: str, n: int, k: int, d: int, rotary: int = 128, **more: Any) -> Case:
    """Hidden states, two rotary tables and positions; or, with rotary=0, hidden states alone,
    which is where the time of a copy is a target."""

    def make(m: Make) -> Tensors:
        xs = [m.rows(m.b, n, d)]
        if rotary:
            xs += [m.rows(m.b, n, rotary), m.rows(m.b, n, rotary)]
            xs += [torch.arange(n, device=m.device).expand(m.b, n).contiguous()]
        return {"index": m.index(n, k), "xs": xs}

    def flat(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:1], 1, n, -1)

    def eager(t: Tensors) -> Any:
        index = t["index"]
        return [_gather_expanded(x, index) if x.ndim == 3 else x.gather(1, index) for x in t["xs"]]

    def kept(t: Tensors) -> int:
        return size(*t["xs"]) // n * k

    def moved(t: Tensors) -> int:
        return 2 * kept(t) + size(t["index"])

    return Case(
        "gather",
        name,
        make,
        ours=lambda t: gather_tokens(t["index"], *t["xs"]),
        launch=lambda t: launcher("gather").gather([flat(x) for x in t["xs"]], t["index"]),
        eager=eager,
        bound=moved,
        moved=moved,
        copied=kept,
        wide={"gather_kernel": "both"},
        **{"most": None if rotary else 1.3, **more},
    )


def gather_heads(name: str, heads: int, n: int, k: int, d: int, **more: Any) -> Case:
    """Keys and values [B, heads, N, d], every head with the same index."""

    def kept(t: Tensors) -> int:
        return size(*t["xs"]) // n * k

    def moved(t: Tensors) -> int:
        return 2 * kept(t) + size(t["index"])

    def eager(t: Tensors) -> Any:
        index = t["index"][:, None, :, None].expand(-1, heads, -1, d)
        return [x.gather(2, index) for x in t["xs"]]

    return Case(
        "gather",
        name,
        make=lambda m: {
            "index": m.index(n, k),
            "xs": [m.rows(m.b, heads, n, d), m.rows(m.b, heads, n, d)],
        },
        ours=lambda t: gather_tokens(t["index"], *t["xs"], axis=2),
        launch=lambda t: launcher("gather").gather(t["xs"], t["index"]),
        eager=eager,
        bound=moved,
        moved=moved,
        copied=kept,
        wide={"gather_kernel": "both"},
        **more,
    )


# -- expand ----------------------------------------------------------------------------------------


def expand(name: str, n: int, k: int, d: int, **more: Any) -> Case:
    """Kept tokens return to their places with a gate, beside the residual of all tokens."""

    def make(m: Make) -> Tensors:
        index = m.index(n, k)
        return {
            "index": index,
            "to": TokenMap.keep(index, n),
            "y": m.rows(m.b, k, d),
            "residual": m.rows(m.b, n, d),
            "gate": m.rows(m.b, d),
        }

    def eager(t: Tensors) -> Any:
        y = t["y"]
        full = y.new_zeros(t["residual"].shape)
        full = full.scatter(1, t["index"][..., None].expand(-1, -1, d), y)
        return t["residual"] + t["gate"][:, None] * full

    def bound(t: Tensors) -> int:
        return size(t["y"], t["residual"], t["residual"], t["gate"], t["to"].inverse)

    def launch(t: Tensors) -> Any:
        return launcher("expand").expand(t["y"], t["to"].inverse, t["residual"], t["gate"], None)

    return Case(
        "expand",
        name,
        make,
        ours=lambda t: expand_tokens(t["y"], t["to"], t["residual"], t["gate"]),
        launch=launch,
        eager=eager,
        bound=bound,
        moved=bound,
        copied=lambda t: size(t["residual"]),
        wide={"expand_kernel": "both"},
        **more,
    )


def unmerge(name: str, n: int, r: int, d: int, **more: Any) -> Case:
    """The way back of a ToMe merge: every token reads the slot that it went into."""

    def make(m: Make) -> Tensors:
        return {**_bipartite(m, n, r), "y": m.rows(m.b, n - r, d)}

    def eager(t: Tensors) -> Any:
        y, unmerged = t["y"], n // 2 + n % 2 - r
        wide = (-1, -1, d)
        out = y.new_zeros(y.shape[0], n, d)
        own, rest = y[:, :unmerged], y[:, unmerged:]
        out[:, 1::2] = rest
        out.scatter_(1, (2 * t["alone"]).expand(wide), own)
        return out.scatter_(
            1, (2 * t["source"]).expand(wide), rest.gather(1, t["target"].expand(wide))
        )

    def bound(t: Tensors) -> int:
        return size(t["y"], t["to"].inverse) + size(t["y"]) // (n - r) * n

    return Case(
        "expand",
        name,
        make,
        ours=lambda t: expand_tokens(t["y"], t["to"]),
        launch=lambda t: launcher("expand").expand(t["y"], t["to"].inverse, None, None, None),
        eager=eager,
        bound=bound,
        moved=bound,
        copied=lambda t: size(t["y"]) // (n - r) * n,
        wide={"expand_kernel": "both"},
        **more,
    )


# -- merge -----------------------------------------------------------------------------------------


def _bipartite(m: Make, n: int, r: int) -> Tensors:
    """A ToMe merge of r even tokens into odd ones: the three published indices, and our map."""
    even, odd = (n + 1) // 2, n // 2
    order = m.shuffled(even)
    source, alone = order[:, :r], order[:, r:].sort(1).values
    target = m.shuffled(odd).repeat(1, r // odd + 1)[:, :r]
    slot = torch.empty(m.b, n, dtype=torch.int64, device=m.device)
    unmerged = torch.arange(even - r, device=m.device).expand(m.b, -1)
    slot.scatter_(1, 2 * alone, unmerged)
    slot[:, 1::2] = even - r + torch.arange(odd, device=m.device)
    slot.scatter_(1, 2 * source, even - r + target)
    return {
        "alone": alone[..., None],
        "source": source[..., None],
        "target": target[..., None],
        "to": TokenMap.merge(slot, n - r),
    }


def merge(name: str, n: int, r: int, d: int, **more: Any) -> Case:
    """ToMe's merge_wavg: means weighted by the number of original tokens."""

    def make(m: Make) -> Tensors:
        sizes = torch.randint(1, 4, (m.b, n), generator=m.generator)
        return {
            **_bipartite(m, n, r),
            "x": m.rows(m.b, n, d),
            "size": sizes.to(m.device, m.dtype),
        }

    def eager(t: Tensors) -> Any:
        def total(v: Tensor) -> Tensor:
            wide = (-1, -1, v.shape[-1])
            even, odd = v[:, ::2], v[:, 1::2]
            moving = even.gather(1, t["source"].expand(wide))
            odd = odd.scatter_reduce(1, t["target"].expand(wide), moving, "sum")
            return torch.cat([even.gather(1, t["alone"].expand(wide)), odd], 1)

        weight = t["size"][..., None]
        sizes = total(weight)
        return total(t["x"] * weight) / sizes, sizes[..., 0]

    def launch(t: Tensors) -> Any:
        to = t["to"]
        order, offsets = to.csr()
        return launcher("merge").merge(t["x"], t["size"], to.inverse, order, offsets, to.k, True)

    def rows(t: Tensors) -> int:
        return size(t["x"], t["size"]) + size(t["x"]) // n * (n - r) + 4 * t["to"].index.numel()

    def bound(t: Tensors) -> int:
        return rows(t) + 4 * t["to"].inverse.numel()

    def moved(t: Tensors) -> int:
        order, offsets = t["to"].csr()
        return rows(t) + size(order, offsets[:-1])

    return Case(
        "merge",
        name,
        make,
        ours=lambda t: merge_tokens(t["x"], t["to"], t["size"]),
        launch=launch,
        eager=eager,
        bound=bound,
        moved=moved,
        copied=lambda t: size(t["x"]),
        wide={"merge_kernel": "both"},
        **{"most": 1.2 if d >= 512 else None, **more},
    )


# -- select ----------------------------------------------------------------------------------------


def select(name: str, n: int, k: int, **more: Any) -> Case:
    """The k highest scores as ascending indices, and the slot of every token."""

    def eager(t: Tensors) -> Any:
        index = t["scores"].topk(k, 1).indices.sort(1).values
        b = index.shape[0]
        slot = torch.arange(k, device=index.device).expand(b, k)
        lost = torch.full((b, n), -1, dtype=torch.int64, device=index.device)
        return index, lost.scatter(1, index, slot)

    def ours(t: Tensors) -> Any:
        to = select_topk(t["scores"], k)
        return to.index, to.inverse

    def moved(t: Tensors) -> int:
        b = t["scores"].shape[0]
        return size(t["scores"]) + 8 * b * k + 4 * b * n

    return Case(
        "select",
        name,
        make=lambda m: {"scores": m.rows(m.b, n, dtype=torch.float32)},
        ours=ours,
        launch=lambda t: launcher("select").select(t["scores"], k, 0, None, None),
        eager=eager,
        bound=moved,
        moved=moved,
        copied=lambda t: size(t["scores"]),
        wide={"select_kernel": "load"},
        **more,
    )


# -- pack ------------------------------------------------------------------------------------------


def _ragged(m: Make, n: int, k: int) -> Tensors:
    """A mask that keeps k to n tokens per row, its packed map, and the flat kept tokens."""
    counts = torch.linspace(k, n, m.b).long()[:, None].to(m.device)
    keep = m.shuffled(n) < counts
    return {"keep": keep, "to": PackMap.of(keep), "tokens": keep.reshape(-1).nonzero()[:, 0]}


def pack_map(name: str, n: int, k: int, **more: Any) -> Case:
    """Where kept tokens lie when they are packed: eager is what unpadding for varlen does, and the
    way back."""

    def eager(t: Tensors) -> Any:
        lengths = t["keep"].sum(-1, dtype=torch.int32)
        tokens = torch.nonzero(t["keep"].flatten()).flatten()
        longest = int(lengths.max())
        starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        back = torch.full((t["keep"].numel(),), -1, dtype=torch.int32, device=tokens.device)
        back[tokens] = torch.arange(tokens.numel(), dtype=torch.int32, device=tokens.device)
        return tokens, back.view(t["keep"].shape), starts, longest

    def ours(t: Tensors) -> Any:
        to = PackMap.of(t["keep"])
        return to.source, to.inverse, to.cu_seqlens, to.max_seqlen

    def graph(t: Tensors) -> Any:
        to = PackMap.of(t["keep"], capacity=t["tokens"].numel())
        return to.source, to.inverse, to.cu_seqlens

    def launch(t: Tensors) -> Any:
        starts = pack._starts(t["keep"])
        total, _ = pack._sizes(starts)
        return launcher("pack").pack(t["keep"], starts, total, True)

    def moved(t: Tensors) -> int:
        to = t["to"]
        return size(t["keep"], to.source, to.inverse) + 4 * t["keep"].shape[0]

    return Case(
        "pack",
        name,
        make=lambda m: _ragged(m, n, k),
        ours=ours,
        launch=launch,
        eager=eager,
        bound=lambda t: moved(t) + 4,
        moved=moved,
        around=lambda t: pack._sizes(pack._starts(t["keep"])),
        copied=lambda t: size(t["keep"]),
        eager_on_meta=False,
        graph=graph,
        limit=1.25,
        reason="the start of a row needs the mask of all rows before it, so the mask is read twice",
        **more,
    )


def pack_rows(name: str, n: int, k: int, d: int, **more: Any) -> Case:
    """Kept tokens one after another."""

    def launch(t: Tensors) -> Any:
        flat = t["x"].reshape(1, -1, d)
        return launcher("expand").expand(flat, t["to"].source[None], None, None, None)

    def moved(t: Tensors) -> int:
        rows = t["to"].source.numel() * d * t["x"].element_size()
        return 2 * rows + size(t["to"].source)

    return Case(
        "pack",
        name,
        make=lambda m: {**_ragged(m, n, k), "x": m.rows(m.b, n, d)},
        ours=lambda t: pack_varlen(t["x"], t["to"]),
        launch=launch,
        eager=lambda t: t["x"].reshape(-1, d)[t["tokens"]],
        bound=moved,
        moved=moved,
        copied=lambda t: t["to"].source.numel() * d * t["x"].element_size(),
        wide={"expand_kernel": "both"},
        **more,
    )


def unpack_rows(name: str, n: int, k: int, d: int, **more: Any) -> Case:
    """Packed tokens back to [B, N, D], zeros elsewhere."""

    def make(m: Make) -> Tensors:
        t = _ragged(m, n, k)
        return {**t, "y": m.rows(t["to"].source.numel(), d)}

    def eager(t: Tensors) -> Any:
        out = t["y"].new_zeros(t["keep"].numel(), d)
        out[t["tokens"]] = t["y"]
        return out.reshape(-1, n, d)

    def launch(t: Tensors) -> Any:
        inverse = t["to"].inverse.reshape(1, -1)
        return launcher("expand").expand(t["y"][None], inverse, None, None, None)

    def copied(t: Tensors) -> int:
        return t["keep"].numel() * d * t["y"].element_size()

    def moved(t: Tensors) -> int:
        return size(t["y"], t["to"].inverse) + copied(t)

    return Case(
        "pack",
        name,
        make,
        ours=lambda t: unpack_varlen(t["y"], t["to"]),
        launch=launch,
        eager=eager,
        bound=moved,
        moved=moved,
        copied=copied,
        wide={"expand_kernel": "both"},
        **more,
    )


# -- cache -----------------------------------------------------------------------------------------


def cache(name: str, heads: int, n: int, k: int, d: int, prefix: int = 0, **more: Any) -> Case:
    """Keys and values keep k of n columns in place; eager makes a second cache."""

    def make(m: Make) -> Tensors:
        late = m.index(n - prefix, k - prefix) + prefix
        first = torch.arange(prefix, device=m.device).expand(m.b, -1)
        xs = [m.rows(m.b, heads, n, d), m.rows(m.b, heads, n, d)]
        return {"index": torch.cat([first, late], 1), "xs": xs}

    def eager(t: Tensors) -> Any:
        index = t["index"][:, None, :, None].expand(-1, heads, -1, d)
        return [x.gather(2, index) for x in t["xs"]]

    def moved(t: Tensors) -> int:
        columns = size(*t["xs"]) // n * (k - prefix)
        return 2 * columns + size(t["index"][:, prefix:])

    return Case(
        "cache",
        name,
        make,
        ours=lambda t: kv_compact(t["index"], *t["xs"], prefix=prefix),
        launch=lambda t: launcher("cache").compact(t["index"], *t["xs"], prefix),
        eager=eager,
        bound=moved,
        moved=moved,
        copied=lambda t: size(*t["xs"]) // n * (k - prefix),
        wide={"compact_kernel": "both"},
        **more,
    )


# -- pool ------------------------------------------------------------------------------------------


def unpool(name: str, side: int, window: int, d: int, **more: Any) -> Case:
    """A pooled token returns to all tokens of its window, with a gate, beside the residual."""
    n, small, grid = side * side, side // window, (side, side)

    def make(m: Make) -> Tensors:
        return {
            "y": m.rows(m.b, small * small, d),
            "residual": m.rows(m.b, n, d),
            "gate": m.rows(m.b, d),
        }

    def eager(t: Tensors) -> Any:
        image = t["y"].reshape(-1, small, small, d).permute(0, 3, 1, 2)
        image = F.interpolate(image, scale_factor=window, mode="nearest")
        rows = image.permute(0, 2, 3, 1).reshape(-1, n, d)
        return t["residual"] + t["gate"][:, None] * rows

    def around(t: Tensors) -> Any:
        slots = window_slots(grid, (window, window), t["y"].device)
        return slots.expand(len(t["y"]), -1).contiguous()

    def launch(t: Tensors) -> Any:
        return launcher("expand").expand(t["y"], around(t), t["residual"], t["gate"], None)

    def bound(t: Tensors) -> int:
        return size(t["y"], t["residual"], t["residual"], t["gate"])

    def ours(t: Tensors) -> Any:
        return unpool_tokens(t["y"], grid, (window, window), t["residual"], t["gate"])

    return Case(
        "pool",
        name,
        make,
        ours=ours,
        launch=launch,
        eager=eager,
        bound=bound,
        moved=lambda t: bound(t) + 4 * len(t["y"]) * n,
        around=around,
        copied=lambda t: size(t["residual"]),
        wide={"expand_kernel": "both"},
        **more,
    )


# -- attention -------------------------------------------------------------------------------------


def attention(
    name: str,
    heads: int,
    kv: int,
    n: int,
    d: int,
    start: int,
    stop: int,
    whole: bool = False,
    **more: Any,
) -> Case:
    """What the last query row pays to keys [start, stop), as the mean over heads. Eager computes
    the `whole` attention of all rows, or only that of the last row with KV heads repeated."""

    def make(m: Make) -> Tensors:
        return {
            "query": m.rows(m.b, heads, n if whole else 1, d),
            "key": m.rows(m.b, kv, n, d),
        }

    def eager(t: Tensors) -> Any:
        key = t["key"]
        if kv != heads:
            key = key[:, :, None].expand(-1, -1, heads // kv, -1, -1).reshape(-1, heads, n, d)
        logits = t["query"] @ key.transpose(2, 3) * d**-0.5
        share = logits.softmax(-1, dtype=torch.float32).to(logits.dtype)
        return share.mean(1)[:, -1:, start:stop]

    def rows(t: Tensors) -> Tensor:
        return t["query"][:, :, -1:]

    def ours(t: Tensors) -> Any:
        return qrow_scores(rows(t), t["key"], start=start, stop=stop)

    def launch(t: Tensors) -> Any:
        return launcher("attention").qrow(
            rows(t), t["key"], None, d**-0.5, start, stop, "mean", None
        )

    def bound(t: Tensors) -> int:
        return size(rows(t), t["key"]) + 4 * len(t["key"]) * (stop - start)

    def moved(t: Tensors) -> int:
        """Logits are written in whole groups of 16 columns and read once; so are a maximum and a
        sum per tile of keys."""
        width = 1 << max(4, (d - 1).bit_length())
        columns = max(16, min(128, 16384 // (width * t["key"].element_size())))
        tiles = -(-n // columns)
        stored = min(-(-stop // 16) * 16, tiles * columns) - start // 16 * 16
        return bound(t) + 4 * len(t["key"]) * heads * (stored + stop - start + 4 * tiles)

    return Case(
        "attention",
        name,
        make,
        ours=ours,
        launch=launch,
        eager=eager,
        bound=bound,
        moved=moved,
        kernels=2,
        copied=lambda t: size(t["key"]),
        wide={"logits_kernel": "load"},
        dots=("logits_kernel",),
        **more,
    )


# -- match -----------------------------------------------------------------------------------------


def match(name: str, na: int, nb: int, d: int, **more: Any) -> Case:
    """The most similar token of b for every token of a; with na - nb of 0 or 1 they are the even
    and odd tokens of one tensor, read in place."""

    def make(m: Make) -> Tensors:
        if na - nb in (0, 1):
            x = m.rows(m.b, na + nb, d)
            return {"a": x[:, ::2], "b": x[:, 1::2]}
        return {"a": m.rows(m.b, na, d), "b": m.rows(m.b, nb, d)}

    def eager(t: Tensors) -> Any:
        wide = (t["a"].float(), t["b"].float())  # as ours: bf16 cosines would mostly be ties
        a, b = (v / v.norm(dim=-1, keepdim=True) for v in wide)
        return tuple((a @ b.transpose(1, 2)).max(-1))

    def bound(t: Tensors) -> int:
        return size(t["a"], t["b"]) + 12 * len(t["a"]) * na

    return Case(
        "match",
        name,
        make,
        ours=lambda t: bipartite_match(t["a"], t["b"]),
        launch=lambda t: launcher("match").bipartite(t["a"], t["b"], None, None),
        eager=eager,
        bound=bound,
        moved=bound,
        copied=lambda t: size(t["a"], t["b"]),
        wide={"match_kernel": "load"},
        dots=("match_kernel",),
        **more,
    )


# -- temporal --------------------------------------------------------------------------------------


def temporal(name: str, frames: int, n: int, d: int, **more: Any) -> Case:
    """Cosine of every token with its place in the frame before."""

    def bound(t: Tensors) -> int:
        return size(t["x"]) + 4 * len(t["x"]) * (frames - 1) * n

    return Case(
        "temporal",
        name,
        make=lambda m: {"x": m.rows(m.b, frames, n, d)},
        ours=lambda t: temporal_cosine(t["x"]),
        launch=lambda t: launcher("temporal").temporal(t["x"]),
        eager=lambda t: F.cosine_similarity(t["x"][:, 1:], t["x"][:, :-1], dim=-1),
        bound=bound,
        moved=bound,
        copied=lambda t: size(t["x"]),
        wide={"temporal_kernel": "load"},
        **{"batch": 1, **more},
    )


# -- max-min ---------------------------------------------------------------------------------------


def _reslicing(distance: Tensor, k: int) -> Tensor:
    """The published loop of DivPrune: every step gathers all rows that were taken."""
    taken = torch.empty(k, dtype=torch.int64, device=distance.device)
    for i in range(k):
        if i == 0:
            score = distance.topk(2, dim=0, largest=False).values[1]
        else:
            score = distance.index_select(0, taken[:i]).min(0).values
        taken[i] = score.argmax()
    return taken


def maxmin(name: str, n: int, k: int, **more: Any) -> Case:
    """k diverse tokens from their similarities; the first is the most isolated one."""

    def make(m: Make) -> Tensors:
        unit = F.normalize(torch.randn(m.b, n, 64, generator=m.generator), dim=-1)
        return {"similarity": (unit @ unit.transpose(1, 2)).to(m.device)}

    def eager(t: Tensors) -> Any:
        return torch.stack([_reslicing(1 - s, k) for s in t["similarity"]])

    def bound(t: Tensors) -> int:
        return size(t["similarity"]) + 8 * len(t["similarity"]) * k

    return Case(
        "maxmin",
        name,
        make,
        ours=lambda t: maxmin_select(t["similarity"], k),
        launch=lambda t: launcher("maxmin").maxmin(t["similarity"], k, None, None, None),
        eager=eager,
        bound=bound,
        moved=lambda t: bound(t) + 4 * len(t["similarity"]) * n * (2 + k - 1),
        kernels=2,
        copied=lambda t: size(t["similarity"]),
        wide={"isolation_kernel": "load", "select_kernel": "load"},
        **{
            "batch": 1,
            "limit": 1.3,
            "reason": "the first pick needs all similarities, the others k rows of them again",
            **more,
        },
    )


def maxmin_features(name: str, n: int, k: int, d: int, **more: Any) -> Case:
    """The same from features, without similarities where those are larger than the features."""

    def around(t: Tensors) -> Any:
        x = F.normalize(t["x"].float(), dim=-1).contiguous()
        return x if n <= d else torch.empty(len(x), n, device=x.device).argmax(1)

    def eager(t: Tensors) -> Any:
        x = t["x"].float()  # as ours: greedy picks amplify every rounding
        unit = x / x.norm(dim=-1, keepdim=True)
        return torch.stack([_reslicing(1 - u @ u.transpose(0, 1), k) for u in unit])

    def bound(t: Tensors) -> int:
        return size(t["x"]) + 8 * len(t["x"]) * k

    def moved(t: Tensors) -> int:
        b = len(t["x"])
        features, row = 4 * b * n * d, 4 * b * n
        if n <= d:  # the similarities: written, read for the first pick, k - 1 rows read again
            return features + 2 * row * n + row * (2 + k - 1) + 8 * b * k
        # the first pick, then per pick: features, distances (read and written), block maxima
        blocks = -(-n // (16 if n <= 8192 else 32))
        steps = (k - 1) * (features + 2 * row + 16 * b * blocks) - row
        return features + row + steps + 16 * b * k - 8 * b * (k - 1)

    return Case(
        "maxmin",
        name,
        make=lambda m: {"x": m.rows(m.b, n, d)},
        ours=lambda t: maxmin_tokens(t["x"], k),
        launch=lambda t: launcher("maxmin").tokens(t["x"], k, None, None, None),
        eager=eager,
        bound=bound,
        moved=moved,
        around=around,
        kernels=3 if n <= d else k + 1,
        copied=lambda t: size(t["x"]),
        **{"batch": 1, **more},
    )


# -- norm ------------------------------------------------------------------------------------------


def norm(name: str, n: int, k: int, d: int, kind: str, **more: Any) -> Case:
    """Kept rows and their norm: kind "rms" (language models), "layer" (encoders) or "adaptive"
    (diffusion transformers: no weight, but a scale and a shift per sample)."""
    adaptive, layer = kind == "adaptive", kind != "rms"

    def make(m: Make) -> Tensors:
        t = {"index": m.index(n, k), "x": m.rows(m.b, n, d)}
        weight = None if adaptive else m.rows(d)
        bias = m.rows(d) if kind == "layer" else None
        scale, shift = (m.rows(m.b, d), m.rows(m.b, d)) if adaptive else (None, None)
        return {**t, "weight": weight, "bias": bias, "scale": scale, "shift": shift}

    def eager(t: Tensors) -> Any:
        rows, weight = _gather_expanded(t["x"], t["index"]), t["weight"]
        if layer:
            y = F.layer_norm(rows, (d,), weight, t["bias"], 1e-6)
            return rows, y * (1 + t["scale"][:, None]) + t["shift"][:, None] if adaptive else y
        y = rows.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return rows, weight * y.to(rows.dtype)

    def ours(t: Tensors) -> Any:
        return gather_norm(
            t["x"],
            t["index"],
            t["weight"],
            t["bias"],
            kind="layer" if layer else "rms",
            scale=t["scale"],
            shift=t["shift"],
        )

    def launch(t: Tensors) -> Any:
        return launcher("norm").norm(
            t["x"], t["index"], t["weight"], t["bias"], 1e-6, layer, t["scale"], t["shift"]
        )

    def copied(t: Tensors) -> int:
        return t["index"].numel() * d * t["x"].element_size()

    def moved(t: Tensors) -> int:
        vectors = size(t["weight"], t["bias"], t["scale"], t["shift"])
        return 3 * copied(t) + size(t["index"]) + vectors

    return Case(
        "norm",
        name,
        make,
        ours=ours,
        launch=launch,
        eager=eager,
        bound=moved,
        moved=moved,
        copied=copied,
        wide={"norm_kernel": "both"},
        **more,
    )


# -- probe -----------------------------------------------------------------------------------------


def probe(name: str, n: int, pushes: int, width: int, hidden: int, out: int, **more: Any) -> Case:
    """Sensitivity of a projector (width, hidden, out) to so many directions. Eager pushes every
    token along every direction, both ways, through the projector."""
    h = 0.01

    def make(m: Make) -> Tensors:
        activation_kind(F.gelu)  # found once in use, not once per call
        w1 = m.rows(hidden, width, dtype=torch.float32) / width**0.5
        w2 = m.rows(out, hidden, dtype=torch.float32) / hidden**0.5
        root = triangular_root(w2) if m.values else m.rows(hidden, hidden, dtype=torch.float32)
        return {
            "w1": w1,
            "b1": m.rows(hidden, dtype=torch.float32),
            "w2": w2,
            "root": root.to(m.dtype).contiguous(),
            "x": m.rows(n, width, dtype=torch.float32),
            "directions": unit_directions(pushes, width, 0, m.device),
        }

    def layers(t: Tensors) -> TwoLayer:
        return TwoLayer(t["w1"], t["b1"], F.gelu, t["w2"], None)

    def eager(t: Tensors) -> Any:
        f, x = layers(t), t["x"]
        total = x.new_zeros(n)
        for u in t["directions"]:
            total = total + (f(x + h * u) - f(x - h * u)).norm(dim=-1)
        return total / (2 * h * pushes)

    def sides(t: Tensors) -> Any:
        return sides_of(layers(t), t["x"], t["directions"], h)

    def launch(t: Tensors) -> Any:
        a, v, _, constant = sides(t)
        total = launcher("probe").probe(
            a[0], v[0], t["root"], "gelu", True, h, None, None, constant
        )
        return total / (2 * h * pushes)

    def squares(t: Tensors) -> tuple[int, int, int]:
        return -(-hidden // (256 if t["root"].element_size() == 2 else 64)), pushes, n

    def around(t: Tensors) -> Any:
        total = torch.empty(squares(t), device=t["x"].device).sum(0).sqrt().sum(0) * (2 * h)
        return sides(t), total / (2 * h * pushes)

    def bound(t: Tensors) -> int:
        return size(t["w1"], t["b1"], t["root"], t["x"], t["directions"]) + 4 * n

    def moved(t: Tensors) -> int:
        blocks = squares(t)[0]
        return 4 * (n + pushes) * hidden + size(t["root"]) + 4 * blocks * pushes * n

    return Case(
        "probe",
        name,
        make,
        ours=lambda t: zoo_sensitivity(layers(t), t["root"], t["x"], t["directions"], h),
        launch=launch,
        eager=eager,
        bound=bound,
        moved=moved,
        around=around,
        copied=lambda t: size(t["w1"], t["root"]),
        wide={"probe_kernel": "load"},
        dots=("probe_kernel",),
        **{"batch": 1, **more},
    )


_ARITHMETIC = "bound by arithmetic, not by bytes: hidden layer and partial sums are stored in fp32"
#: every production case, in the order of the tables
CASES: tuple[Case, ...] = (
    attention("llava-1.5 fastv", 32, 32, 640, 128, 35, 611, whole=True, batch=1),
    attention(
        "qwen2.5-vl last row",
        heads=28,
        kv=4,
        n=1024,
        d=128,
        start=16,
        stop=1000,
        batch=2,
        limit=1.25,
        reason="7 query heads share a KV head, so their logits (written, read) weigh 0.2 of the "
        "keys",
    ),
    attention("so400m heads", 16, 16, 729, 72, 0, 729, batch=2),
    maxmin("llava-1.5", 576, 144),
    maxmin("llava-next", 2880, 320, most_eager=0.05),
    maxmin_features(
        "tower features",
        n=576,
        k=64,
        d=1024,
        limit=14,
        reason="fp32 unit features and their similarities are stored; the bound is one read of x",
    ),
    maxmin_features(
        "llava-next features",
        n=2880,
        k=320,
        d=1024,
        limit=660,
        reason="every pick is one pass over fp32 unit features, so that no N x N is stored; the "
        "bound is one read of x",
        on_cpu=False,
    ),
    probe(
        "llava-1.5 projector",
        n=576,
        pushes=64,
        width=1024,
        hidden=4096,
        out=4096,
        limit=2.3,
        reason=_ARITHMETIC,
        on_cpu=False,
    ),
    probe("small projector", 144, 8, 1024, 1024, 1024, limit=2.1, reason=_ARITHMETIC),
    gather("llava-1.5 hidden", 576, 144, 1024, rotary=0),
    gather("llava-1.5 tower", 576, 144, 1024),
    gather("llava-1.5 lm", 576, 144, 4096, batch=2),
    gather("so400m tower", 729, 182, 1152),
    gather("llava-next lm", 2880, 320, 4096, batch=1),
    gather_heads("so400m heads", 16, 729, 182, 72),
    norm("llava-1.5 lm rms", 576, 144, 4096, "rms", batch=2),
    norm("so400m layer", 729, 182, 1152, "layer"),
    norm("dit-xl adaptive", 1024, 512, 1152, "adaptive"),
    expand("dit-xl", 1024, 512, 1152),
    expand("head 72", 1024, 512, 72),
    unmerge("tome tower", 576, 144, 1024),
    unpool("dit-xl", 32, 2, 1152),
    merge("tome tower", 576, 144, 1024),
    merge("tome so400m", 729, 182, 1152),
    merge("tome head 72", 729, 182, 72),
    match("tome tower", 288, 288, 64),
    match("so400m head 72", 365, 364, 72),
    match("tomesd", 3072, 1024, 320, batch=2),
    select("llava-1.5", 576, 144),
    select("llava-next", 2880, 320),
    pack_map("map", 729, 182),
    pack_rows("so400m rows", 729, 182, 1152),
    unpack_rows("so400m back", 729, 182, 1152),
    temporal("video", 32, 196, 1024),
    temporal("video so400m", 32, 196, 1152),
    cache("qwen2.5-vl", 4, 1024, 256, 128, prefix=16),
    cache("head 72", 16, 729, 182, 72),
)


# -- what cases leave out --------------------------------------------------------------------------


def _variants() -> tuple[Case, ...]:
    """The other branches of the kernels. Only `launch` counts: they are compiled, not timed."""

    def flags(t: Tensor) -> Tensor:
        return torch.ones(t.shape[:2], dtype=torch.bool, device=t.device)

    def variant(case: Case, name: str, launch: Callable[[Tensors], Any]) -> Case:
        return replace(case, name=name, launch=launch)

    def select_all(t: Tensors) -> Any:
        s = t["scores"]
        counts = torch.ones(len(s), dtype=torch.int64, device=s.device)
        return launcher("select").select(s.to(torch.bfloat16), 144, 1, flags(s), counts)

    def attention_all(t: Tensors) -> Any:
        q, key = t["query"], t["key"]
        mask = torch.zeros(len(q), 1, 1, key.shape[2], device=q.device)
        return launcher("attention").qrow(q, key, mask, 1.0, 0, 640, "max", "max")

    def expand_fill(t: Tensors) -> Any:
        fill = t["y"][0, 0].contiguous()
        return launcher("expand").expand(t["y"], t["to"].inverse, None, None, fill)

    def merge_sum(t: Tensors) -> Any:
        to = t["to"]
        return launcher("merge").merge(t["x"], None, to.inverse, *to.csr(), to.k, False)

    def match_flags(t: Tensors) -> Any:
        return launcher("match").bipartite(t["a"], t["b"], flags(t["b"]), flags(t["a"]))

    def maxmin_all(t: Tensors) -> Any:
        s = t["similarity"]
        first = torch.zeros(len(s), dtype=torch.int64, device=s.device)
        return launcher("maxmin").maxmin(s, 144, flags(s), first, s[:, 0].contiguous())

    def pack_capacity(t: Tensors) -> Any:
        return launcher("pack").pack(t["keep"], t["to"].cu_seqlens, 1024, False)

    def probe_norm(t: Tensors) -> Any:
        x, v = t["x"], t["directions"]
        factor, constant = x.new_ones(len(v), len(x)), x.new_ones(x.shape[1])
        return launcher("probe").probe(
            x, v, t["root"], "silu", False, 0.01, factor, factor, constant
        )

    return (
        variant(select("", 576, 144), "valid, counts, bf16", select_all),
        variant(attention("", 32, 32, 640, 64, 0, 640), "mask, maxima", attention_all),
        variant(unmerge("", 576, 144, 1152), "fill", expand_fill),
        variant(merge("", 576, 144, 1152), "unweighted sum", merge_sum),
        variant(match("", 288, 288, 64), "valid, protect", match_flags),
        replace(
            variant(maxmin("", 576, 144), "valid, first, priority", maxmin_all),
            wide={"select_kernel": "load"},
        ),
        variant(pack_map("", 729, 182), "capacity", pack_capacity),
        variant(probe("", 144, 8, 1024, 1024, 1024), "norm, silu, square root", probe_norm),
    )


#: compiled by the gate beside CASES
VARIANTS = _variants()


def chosen(patterns: Sequence[str], cases: Iterable[Case] = CASES) -> list[Case]:
    """Cases whose key, operator or name matches a pattern with * and ?. No pattern: all."""
    cases = list(cases)

    def words(case: Case) -> tuple[str, ...]:
        public = PUBLIC.get(case.operator, ())
        return (case.key, case.operator, case.name, *public)

    for p in patterns:
        if not any(fnmatch(word, p) for c in cases for word in words(c)):
            known = sorted({word for c in cases for word in words(c)})
            close = get_close_matches(p, known, n=1)
            raise ValueError(
                f"no case is called {p!r}{f', did you mean {close[0]!r}?' if close else '.'} "
                f"Operators: {', '.join(dict.fromkeys(c.operator for c in cases))}. The name of a "
                f"case, of a function, or a pattern with * works too."
            )
    return [
        c
        for c in cases
        if not patterns or any(fnmatch(word, p) for p in patterns for word in words(c))
    ]


#: functions that users call, by the operator whose cases they belong to
PUBLIC = {
    "attention": ("qrow_scores",),
    "cache": ("kv_compact",),
    "expand": ("expand_tokens",),
    "gather": ("gather_tokens",),
    "match": ("bipartite_match",),
    "maxmin": ("maxmin_select", "maxmin_tokens"),
    "merge": ("merge_tokens",),
    "norm": ("gather_norm",),
    "pack": ("pack_varlen", "unpack_varlen"),
    "pool": ("unpool_tokens",),
    "probe": ("zoo_sensitivity",),
    "select": ("select_topk",),
    "temporal": ("temporal_cosine",),
}
