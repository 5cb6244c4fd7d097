"""Time of image encoders that merge or drop tokens, against the same model left alone.

Random weights, one thread, process CPU time. Every round runs every case once, in random order, and
right beside it the untouched model, whose fused attention is on; speed-ups are ratios within such a
pair, and their median is shown. `dense again` is that model against itself: the noise."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import vtc

from ..errors import unknown
from . import flops, records
from .options import at_least, names, prepare
from .records import Record
from .speed import Case, measure, median_ratio

KEEP = 0.5  # share of the tokens that random and grid keep
SITE = "vision.1"
NO_LOSS = 0.98  # a session that merges nothing


@dataclass(frozen=True)
class Row:
    """A network, and the speed-ups that are asked of ToMe: {dtype: {r: least}}."""

    model: str
    bars: dict[str, dict[int, float]]


ROWS = (
    Row(
        "vit_base_patch16_224",
        {"float32": {0: NO_LOSS, 13: 1.45, 16: 1.7}, "bfloat16": {0: NO_LOSS, 13: 1.3, 16: 1.5}},
    ),
    Row(
        "vit_small_patch16_384",
        {"float32": {0: NO_LOSS, 23: 1.25, 40: 1.65}, "bfloat16": {0: NO_LOSS, 23: 1.1, 40: 1.3}},
    ),
)
#: LookupViT B/16: compressed grids for each image size, and the share of the FLOPs factor asked
GRIDS = {224: (3, 5, 7, 10), 384: (3, 5, 7, 10, 12, 14)}
LOOKUP_SHARE = 0.85

EPILOG = f"""columns:
  ms           median process CPU time of one batch
  speedup      T(dense) / T(case), and its standard error
  bar          what is asked of it
  flops ratio  FLOPs(dense) / FLOPs(case), both counted
  limit ratio  T(case) / T(limit), each over the dense run beside it. The limit is the untouched
               model whose blocks are given only the tokens that are left, cut by a slice: no
               method, no index, no mask. ToMe takes tokens away between attention and MLP: the
               limit's blocks get the mean of both
  method share time inside the method over T(dense)

With --lookupvit: LookupViT B/16 against the ViT B/16 of timm with the same patches, mean pooling
and no class token; `share` is the speed-up over the ratio of their FLOPs, goal {LOOKUP_SHARE}.
FLOPs of LookupViT are those of the paper's order of products; what is timed takes the cheaper one.

examples:
  vtc bench vit
  vtc bench vit --quick
  vtc bench vit --models vit_small_patch16_384 --dtypes bfloat16 --repeats 11 --json vit.json
  vtc bench vit --lookupvit --sizes 224
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench vit`."""
    prepare(parser, "CPU time of image encoders with random weights: ToMe, random, grid.", EPILOG)
    add = parser.add_argument
    add("--models", type=names, default=[row.model for row in ROWS], help="of the table (all)")
    add("--dtypes", type=names, default="float32,bfloat16", help="(%(default)s)")
    add("--batch", type=at_least(1), default=4, help="images (%(default)s)")
    add("--repeats", type=at_least(1), default=7, help="rounds (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, images and order (%(default)s)")
    add("--lookupvit", action="store_true", help="LookupViT B/16 instead")
    add("--sizes", type=names, default="224,384", help="pixels, for --lookupvit (%(default)s)")
    add("--quick", action="store_true", help="2 blocks, one image, 2 rounds: a rough look, no bars")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    rows = chosen(args)
    depth = 12
    if args.quick:
        args.batch, args.repeats, depth = 1, 2, 2
    found: list[Record] = []
    for dtype in args.dtypes:
        for row in rows:
            make: Any = lookup_cases if args.lookupvit else encoder_cases
            cases: Cases = make(row, getattr(torch, dtype), depth, args)
            measure(cases, forward, args.repeats, args.seed)
            summary = summarise(cases, judged=not args.quick)
            print(
                f"\n{title(row)}, {args.batch} images, {dtype}, {depth} blocks, one thread, median "
                f"of {args.repeats} rounds\n\n{records.table(summary, COLUMNS)}"
            )
            found += summary
            del cases
            gc.collect()
    if args.json:
        where = records.environment(torch.float32, args.seed)
        records.write(args.json, found, where)
    return 0


def chosen(args: argparse.Namespace) -> list[Any]:
    """The rows that were asked for: image sizes for LookupViT, else networks."""
    known: dict[str, Any] = {row.model: row for row in ROWS}
    wanted = args.models
    if args.lookupvit:
        known, wanted = {str(size): size for size in GRIDS}, args.sizes
    for given, allowed in ((wanted, known), (args.dtypes, ("float32", "bfloat16"))):
        for name in given:
            if name not in allowed:
                raise unknown("choice", name, allowed)
    return [known[name] for name in wanted]


def title(row: Row | int) -> str:
    return f"LookupViT B/16 at {row}" if isinstance(row, int) else row.model


def forward(case: Case) -> Any:
    return case.inputs["model"](case.inputs["images"], **case.inputs["options"])


# ---------------------------------------------------------------------- cases


class Cases(dict[str, Case]):
    """Cases of one network by name. All but the first, which is dense, run beside it. `call` runs
    one."""

    def __init__(
        self, images: torch.Tensor, fields: Record, call: Callable[[Case], Any] | None = None
    ) -> None:
        super().__init__()
        self.images, self.fields, self.call = images, fields, call or forward

    def add(
        self,
        name: str,
        model: nn.Module,
        enter: Callable[[], AbstractContextManager[Any]] = nullcontext,
        options: Record | None = None,
        **fields: Any,
    ) -> Case:
        inputs = {"model": model, "images": self.images, "options": options or {}}
        own = {**self.fields, "case": name, **fields}
        case = self[name] = Case(name, inputs, enter, next(iter(self.values()), None), own)
        with enter():
            case.fields["flops"] = flops.total(partial(self.call, case))
        return case


def encoder_cases(row: Row, dtype: torch.dtype, depth: int, args: argparse.Namespace) -> Cases:
    """The dense model twice, ToMe, random and grid, and the limit of each."""
    model = encoder(row.model, dtype, args.seed, depth=depth)
    bars = row.bars[str(dtype).removeprefix("torch.")]
    cases = Cases(pictures(model, dtype, args), {"model": row.model, "dtype": str(dtype)[6:]})
    cases.add("dense", model)
    cases.add("dense again", model)

    def attached(name: str, limit: str, bar: float | None, *parts: Any, **options: Any) -> None:
        enter = partial(vtc.attach, model, *parts, seed=args.seed, **options)
        case = cases.add(name, model, enter, method=parts[0], limit=limit, bar=bar)
        with torch.inference_mode(), enter() as session:
            forward(case)
        if limit not in cases:
            cases.add(limit, model, partial(shortened, model, widths(session, model)))

    for r, bar in bars.items():
        attached(f"tome r={r}", f"limit r={r}" if r else "dense again", bar, "tome", r=r)
    for method in ("random", "grid"):
        attached(f"{method} {KEEP:.0%}", f"limit {KEEP:.0%}", None, method, keep=KEEP, at=SITE)
    return cases


def encoder(name: str, dtype: torch.dtype, seed: int, **options: Any) -> Any:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, pretrained=False, **options).to(dtype).eval()


def pictures(model: Any, dtype: torch.dtype, args: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randn(args.batch, 3, *model.patch_embed.img_size, generator=generator).to(dtype)


def widths(session: vtc.Session, model: Any) -> list[int]:
    """Tokens that each block worked on in the last forward, the mean of its two halves."""
    prefix, now = model.num_prefix_tokens, model.patch_embed.num_patches
    left = {entry.site: entry.n_out[0] for entry in session.trace}
    out = []
    for i in range(len(model.blocks)):
        attention = left.get(f"vision.{i}", now)
        now = left.get(f"vision.{i}.mlp", attention)
        out.append(prefix + (attention + now) // 2)
    return out


@contextmanager
def shortened(model: Any, tokens: Sequence[int]) -> Iterator[None]:
    """Inside, block i is given the first tokens[i] tokens only."""

    def cut(n: int, module: nn.Module, args: Any) -> Any:
        return (args[0][:, :n].contiguous(), *args[1:]) if n < args[0].shape[1] else None

    handles = [
        block.register_forward_pre_hook(partial(cut, n))
        for block, n in zip(model.blocks, tokens, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lookup_cases(size: int, dtype: torch.dtype, depth: int, args: argparse.Namespace) -> Cases:
    """ViT B/16 twice, and LookupViT with every compressed grid."""
    from ..modules.lookup_side import LookupSide
    from ..modules.lookupvit import LookupViT

    options: Record = {"img_size": size, "class_token": False, "global_pool": "avg"}
    vit = encoder("vit_base_patch16_224", dtype, args.seed, depth=depth, **options)
    grids = GRIDS[size][:2] if args.quick else GRIDS[size]
    images = pictures(vit, dtype, args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        lookup = LookupViT(img_size=(size, size), depth=depth).to(dtype).eval()
    cases = Cases(images, {"model": f"LookupViT B/16 at {size}", "dtype": str(dtype)[6:]})
    cases.add("dense", vit)
    cases.add("dense again", vit)
    layers = [m for m in lookup.modules() if isinstance(m, LookupSide)]
    for layer in layers:
        layer.reorder = False  # FLOPs are counted as the paper does, time is what it takes
    for side in grids:
        tokens = side * side
        cases.add(
            f"M = {tokens}",
            lookup,
            options={"grid": (side, side)},
            tokens=tokens,
            share_bar=LOOKUP_SHARE,
        )
    for layer in layers:
        layer.reorder = True
    return cases


# ---------------------------------------------------------------------- results


def summarise(cases: Cases, judged: bool) -> list[Record]:
    """One record per case; `judged`: with its bar, and whether it was reached."""
    dense = cases["dense"]
    out = []
    for case in cases.values():
        fields = dict(case.fields)
        bar, share_bar = (fields.pop(name, None) for name in ("bar", "share_bar"))
        row = {**fields, "ms": 1e3 * statistics.median(case.seconds)}
        row["flops_ratio"] = dense.fields["flops"] / case.fields["flops"]
        if case.beside:
            row["speedup"], row["error"] = median_ratio(case.beside, case.seconds)
        if "limit" in fields:
            row["limit_ratio"] = median_ratio(relative(case), relative(cases[fields["limit"]]))[0]
            row["method_share"] = median_ratio(case.method, case.beside)[0]
        if share_bar is not None:
            row["share"] = row["speedup"] / row["flops_ratio"]
        value, least = (row.get("share"), share_bar) if share_bar else (row.get("speedup"), bar)
        if judged and least is not None and value is not None:
            row |= {"bar": least, "passed": value >= least}
        out.append(row)
    return out


def relative(case: Case) -> list[float]:
    """Seconds over those of the dense run beside it: a busy machine slows both."""
    return [a / b for a, b in zip(case.seconds, case.beside, strict=True)]


COLUMNS: dict[str, Any] = {
    "case": "",
    "ms": ".1f",
    "speedup": ".3f",
    "error": ".3f",
    "flops_ratio": ".2f",
    "share": ".2f",
    "limit_ratio": ".3f",
    "method_share": ".1%",
    "bar": ".2f",
    "passed": records.verdict,
}
