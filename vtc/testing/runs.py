"""Runs of tiny models, with and without a method, remembered: most checks look at the same ones."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..session import Reduction
from . import families, oracle, towerref, trace
from .cells import Cell
from .errors import ContractBroken

TOLERANCE = 1e-4  # fp32 logits, standard deviation about 1
STEPS = 6  # the prefill and five decode steps

Logits = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Run:
    """Greedy decoding of the default batch."""

    logits: tuple[Tensor, ...]  # [B, V] per step
    tokens: Tensor  # [B, STEPS]
    trace: tuple[Reduction, ...]


@functools.cache
def family(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> families.Family:
    return families.make(name, attn, dtype)


@functools.cache
def reference(name: str, attn: str = "sdpa") -> families.Family:
    """The same weights in a model that no session ever touches."""
    return families.make(name, attn)


@functools.cache
def newlines(name: str) -> Tensor:
    """Newlines in the default batch."""
    return towerref.newlines(reference(name), reference(name).inputs)


def generate(model: Any, inputs: families.Inputs, **options: Any) -> Run:
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return Run(out.logits, out.sequences[:, inputs["input_ids"].shape[1] :], ())


def reduce(
    cell: Cell, fam: families.Family, inputs: families.Inputs | None = None, **options: Any
) -> Run:
    with cell.attach(fam.model, **options) as session:
        run = generate(fam.model, fam.inputs if inputs is None else inputs)
    return Run(run.logits, run.tokens, tuple(session.trace))


@functools.cache
def untouched(name: str, dtype: torch.dtype = torch.float32) -> Run:
    fam = families.make(name, dtype=dtype)
    return generate(fam.model, fam.inputs)


@functools.cache
def reduced(cell: Cell, attn: str = "sdpa", merged: bool = False) -> Run:
    return reduce(cell, family(cell.family, attn), **cell.merged(merged))


def worst(a: Logits, b: Logits) -> float:
    """Largest difference over all steps."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def same(a: Logits, b: Logits) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


Choice = tuple[str, tuple[tuple[int, ...], ...]]


def choices(run: Run, sample: int | None = None) -> list[Choice]:
    """Site and kept places of every image (of one sample; tower images have none)."""
    return [
        (
            r.site,
            tuple(
                tuple(r.source[row, : r.n_out[row]].tolist())
                for row, owner in enumerate(r.samples)
                if sample is None or owner == sample
            ),
        )
        for r in run.trace
        if sample is None or not r.site.startswith("vision")
    ]


def tower_choices(*runs: Run) -> list[tuple[str, tuple[int, ...]]]:
    """Kept units of all tower images, in an order that does not tell which run they are of."""
    found = (c for run in runs for c in choices(run) if c[0].startswith("vision"))
    return sorted((site, units) for site, images in found for units in images)


@contextmanager
def masking(
    fam: families.Family,
    seen: Iterable[Reduction],
    mass: float,
    inputs: families.Inputs,
    scope: str = "image",
) -> Iterator[trace.Masks]:
    """What the reference has to mask; inside, its vision tower masks too."""
    seen = list(seen)
    sites = [r.site for r in seen if r.site.startswith("vision")]
    if not sites:
        yield trace.masks(seen, fam.visual(inputs), mass=mass, scope=scope)
        return
    calls = sites.count(sites[0])
    drops = trace.tower_reductions(seen, calls, mass=mass)
    everything = torch.ones_like(fam.visual(inputs))
    with towerref.masked_tower(fam, drops):
        gone = towerref.zero_columns(fam, inputs)
    breaks = towerref.newlines(fam, inputs)
    masks = trace.masks(seen, fam.visual(inputs), mass=mass, gone=gone, newline=breaks)
    masks.keep["projector"] = masks.keep.get("projector", everything) & ~gone
    if mass and "projector" not in masks.bias:
        with towerref.masked_tower(fam, drops) as tower:
            masks.bias["projector"] = tower.bias_columns(inputs)
    with towerref.masked_tower(fam, drops):
        yield masks


@contextmanager
def layer_inputs(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Hidden states [B, K, C] and rotary table [..., B, K, D] that each decoder layer receives."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        tables = kwargs["position_embeddings"]
        seen.append((hidden, tables if torch.is_tensor(tables) else torch.cat(tables, -1)))

    layers = oracle.text_model(model).layers
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


State = dict[str, Any]


def state_of(model: nn.Module) -> State:
    """All that a session could leave behind: hooks, attributes, classes, attention functions."""
    modules = {
        name: (
            type(module),
            sorted(vars(module)),
            {k: list(v.values()) for k, v in vars(module).items() if k.endswith("_hooks")},
            {k: list(v) for k, v in vars(module).items() if "_hooks_with" in k},
        )
        for name, module in model.named_modules()
    }
    configs = {
        name: getattr(module.config, "_attn_implementation", None)
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }
    mapping = ALL_ATTENTION_FUNCTIONS
    functions = dict(mapping._local_mapping), dict(mapping._global_mapping), set(vars(mapping))
    return {"modules": modules, "configs": configs, "functions": functions}


class Stop(Exception):
    """Raised by a check in the middle of a forward."""


@contextmanager
def breaking(layer: nn.Module) -> Iterator[None]:
    """The layer raises in the forward inside; that error ends here and may not get lost before."""

    def stop(*_: Any) -> None:
        raise Stop

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield
    except Stop:
        return
    finally:
        handle.remove()
    raise ContractBroken("an exception in a forward got lost.")


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, grads, strict=True) if g is not None}


def loss_of(logits: Tensor, labels: Tensor, left: Tensor) -> Tensor:
    """Mean cross-entropy of the next token; a dropped column speaks with the one before it."""
    columns = torch.arange(labels.shape[1]).expand_as(left)
    source = torch.where(left, columns, 0).cummax(1).values  # last kept column up to here
    logits = logits.gather(1, source[..., None].expand_as(logits))[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
