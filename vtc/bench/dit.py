"""Time of diffusion transformers with fewer tokens, against the same model left alone.

A DiT-XL/2 with random weights: its width, heads and tokens, fewer blocks. A case is a short run of
the sampler on a guidance pair, because caches and schedules differ from step to step. One thread,
process CPU time; every round runs every case once, in random order, and right beside it the
untouched model; speed-ups are ratios within such a pair, and their median is shown. `dense again`
is that model against itself: the noise."""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vtc

from ..errors import VtcError
from . import records
from .options import at_least, counts, prepare
from .records import Record
from .speed import Case, measure
from .vit import Cases, summarise

#: share of the FLOPs factor that is asked as speed-up
SHARE = 0.85
WIDTH, HEADS = 72, 16

EPILOG = f"""columns:
  ms           median process CPU time of one run of the sampler
  speedup      T(dense) / T(case), and its standard error
  flops ratio  FLOPs(dense) / FLOPs(case), both counted as they run
  share        speedup over flops ratio; goal {SHARE}
  limit ratio  T(case) / T(limit), each over the dense run beside it. The limit is the untouched
               model whose middle blocks are given the first tokens only, and zeros behind them
  output       of the package tomesd, where it is installed: whether it changes anything

examples:
  vtc bench dit
  vtc bench dit --quick
  vtc bench dit --pixels 512 --blocks 6 --rounds 5 --json dit.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench dit`."""
    prepare(parser, "CPU time of a DiT-XL/2 with random weights and fewer tokens.", EPILOG)
    add = parser.add_argument
    add("--pixels", type=counts, default="256,512", help="of the images; latents have an 8th "
        "(%(default)s)")  # fmt: skip
    add("--blocks", type=at_least(4), default=8, help="28 in full (%(default)s)")
    add("--images", type=at_least(1), default=1, help="guidance pairs in a batch (%(default)s)")
    add("--steps", type=at_least(1), default=6, help="of the sampler in a run (%(default)s)")
    add("--rounds", type=at_least(1), default=5, help="(%(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--seed", type=int, default=0, help="of weights, noise and order (%(default)s)")
    add("--quick", action="store_true", help="256 pixels, 4 blocks, 2 steps, 2 rounds: no goal")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    if args.quick:
        args.pixels, args.blocks, args.steps, args.rounds = [256], 4, 2, 2
    found: list[Record] = []
    for pixels in args.pixels:
        cases = cases_of(pixels, args)
        measure(cases, sampled, args.rounds, args.seed)
        rows = summarise(cases, judged=not args.quick)
        for row in rows[2:]:
            row.pop("method_share", None)
            row["share"] = row["speedup"] / row["flops_ratio"]
        print(
            f"\nDiT-XL/2 of {args.blocks} blocks, {pixels} pixels, {args.steps} steps, guidance "
            f"pairs: {args.images}, {args.dtype}, one thread, median of {args.rounds} rounds\n\n"
            f"{records.table(rows, COLUMNS)}"
        )
        found += rows
        del cases
        gc.collect()
    if args.json:
        where = records.environment(getattr(torch, args.dtype), args.seed)
        records.write(args.json, found, where)
    return 0


def cases_of(pixels: int, args: argparse.Namespace) -> Cases:
    """The dense model twice, then every method."""
    model, side = denoiser(pixels // 8, args), pixels // 16
    generator = torch.Generator().manual_seed(args.seed)
    size = (args.images, 4, pixels // 8, pixels // 8)
    noise = torch.randn(*size, generator=generator).repeat(2, 1, 1, 1)
    options = {"steps": args.steps}
    cases = Cases(noise.to(getattr(torch, args.dtype)), {"pixels": pixels}, sampled)
    cases.add("dense", model, options=options)
    cases.add("dense again", model, options=options)
    for name, request in requests(args.blocks, side).items():
        enter = partial(vtc.attach, model, seed=args.seed, **request)
        fields = {"method": request["method"]}
        if "until" in request and "noise" not in request:
            fields["limit"] = f"limit {request['keep']:.0%}"
            if fields["limit"] not in cases:
                kept = round(request["keep"] * side * side)
                cases.add(fields["limit"], model, partial(shortened, model, kept), options)
        cases.add(name, model, enter, options, **fields)
    package = tomesd_package(model)
    if package is not None:
        case = cases.add("package tomesd 50 %", package, options=options)
        same = torch.equal(sampled(case), sampled(cases["dense"]))
        case.fields["output"] = "unchanged" if same else "changed"
    return cases


def requests(blocks: int, side: int) -> dict[str, dict[str, Any]]:
    """What is timed: name -> arguments of `attach`."""
    middle = {"at": "dit.1", "until": f"dit.{blocks - 1}"}
    chosen: dict[str, dict[str, Any]] = {
        "tomesd 50 %": {"method": "tomesd", "keep": 0.5},
        "tomesd 50 %, whole blocks": {"method": "tomesd", "keep": 0.5, **middle},
        "random 50 %": {"method": "random", "keep": 0.5, **middle},
        "pooled 25 %": {"method": "pooled", "keep": 0.25, **middle},
        "pooled 25 %, early": {"method": "pooled", "keep": 0.25, "noise": (0.5, 1.0), **middle},
    }
    for name in ("toca", "duca", "flexdit"):
        if name in vtc.REDUCERS:
            chosen[name] = {"method": name}
    if "flexdit" in chosen:
        group = (1, max(blocks - 5, 0), 1, min(blocks - 4, 1))
        chosen["flexdit"] |= {"poolingformers": 1, "modules": 1, "group": group, "top": 1}
    return chosen


def denoiser(side: int, args: argparse.Namespace) -> Any:
    """A DiT-XL/2 with fewer blocks, whose gates are open."""
    try:
        import diffusers
    except ImportError as error:
        raise VtcError(
            f"`vtc bench dit` needs diffusers (pip install diffusers): {error}."
        ) from error

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model: Any = diffusers.DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH,
            in_channels=4,
            out_channels=8,
            num_layers=args.blocks,
            sample_size=side,
            num_embeds_ada_norm=1000,
        )
    return model.to(getattr(torch, args.dtype)).eval()


def sampled(case: Case) -> Tensor:
    """One run of the sampler: what the model says at every step, from noise to data."""
    model, x, steps = (case.inputs[k] for k in ("model", "images", "options"))
    labels, out = torch.arange(len(x)), x
    for i in range(steps["steps"]):
        time = torch.full((len(x),), 999 * (1 - i / steps["steps"]))
        out = model(x, time, labels).sample
    return out


@contextmanager
def shortened(model: Any, tokens: int) -> Iterator[None]:
    """Inside, all blocks but the first and the last are given that many tokens only."""
    blocks, whole = model.transformer_blocks, model.config.sample_size**2 // 4

    def cut(module: Any, args: Any) -> Any:
        return (args[0][:, :tokens].contiguous(), *args[1:])

    def fill(module: Any, args: Any) -> Any:
        return (torch.nn.functional.pad(args[0], (0, 0, 0, whole - tokens)), *args[1:])

    handles = [
        blocks[1].register_forward_pre_hook(cut),
        blocks[-1].register_forward_pre_hook(fill),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tomesd_package(model: Any) -> Any:
    """A copy patched by the package tomesd, which is for U-Nets, where it is installed."""
    if importlib.util.find_spec("tomesd") is None:
        return None
    import tomesd  # pyright: ignore[reportMissingImports]

    patched = copy.deepcopy(model)
    tomesd.apply_patch(patched, ratio=0.5)
    return patched


COLUMNS: dict[str, Any] = {
    "case": "",
    "ms": ".0f",
    "speedup": ".3f",
    "error": ".3f",
    "flops_ratio": ".2f",
    "share": ".2f",
    "limit_ratio": ".3f",
    "output": "",
}
