"""torch.compile: an attached model has no more graph breaks than the model has itself, and the
compiled model computes what the attached model computes.

The model runs once before it is compiled, as `generate` would, so that lazily created state is
there. `capture_scalar_outputs` is what models need to be traced whole with an image.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import vtc
from vtc.testing import families

FAMILY = families.make("llava", row=0)
INPUTS: dict[str, Any] = {**FAMILY.inputs, "use_cache": False}
#: a scorer, a greedy loop with merging and bias, the attention of a layer, the tower's, new tokens
SETTINGS: dict[str, dict[str, Any]] = {
    "random": {"keep": 0.25},
    "divprune": {"keep": 16, "merge": "nearest", "mass": 1.0},
    "fastv": {"keep": 0.25},
    "visionzip": {"keep": 16},
    "lookupvit": {"grid": (2, 3)},
}


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    """Fresh caches and the configuration of this file, both undone afterwards."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.no_grad():
        yield
    torch._dynamo.reset()
    counters.clear()


def compiled(model: nn.Module, *args: Tensor, **inputs: Any) -> tuple[Any, dict[str, int], int]:
    """Output of the compiled model, its graph breaks by reason, and the number of graphs."""
    torch._dynamo.reset()
    counters.clear()
    out = torch.compile(model, backend="eager")(*args, **inputs)
    return out, dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


def test_a_graph_break_is_noticed():
    def cut(module: nn.Module, args: Any) -> None:
        torch._dynamo.graph_break()

    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert compiled(two, torch.ones(1, 2))[1:] == ({}, 1)
    two[1].register_forward_pre_hook(cut)
    _, found, graphs = compiled(two, torch.ones(1, 2))
    assert sum(found.values()) >= 1 and graphs != 1


def test_the_model_alone_has_no_graph_breaks():
    FAMILY.model(**INPUTS)
    assert torch._dynamo.explain(FAMILY.model)(**INPUTS).graph_break_count == 0


def test_frames_of_a_video_without_graph_breaks():
    ids = INPUTS["input_ids"][0].tolist()
    n, start = ids.count(families.IMAGE), ids.index(families.IMAGE)
    ids[start:start] = [families.IMAGE] * 2 * n  # three images that touch
    gen = torch.Generator().manual_seed(0)
    clip: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(3, 3, 56, 56, generator=gen),
        "use_cache": False,
    }
    steps = [("vidcom2", "projector", 0.5), ("framefusion_merge", "decoder.1", 0.25)]
    recipe = vtc.Recipe(tuple(vtc.Step(*step) for step in steps))
    with vtc.attach(FAMILY.model, recipe) as session:
        expected = FAMILY.model(**clip).logits
        assert session.trace[0].layout == (vtc.context.Layout(3, 8, 8),)
        out, found, graphs = compiled(FAMILY.model, **clip)
    assert found == {} and graphs == 1
    assert (out.logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("method", SETTINGS)
def test_no_graph_break_and_the_same_output(method: str):
    dense = FAMILY.model(**INPUTS).logits
    with vtc.attach(FAMILY.model, method, **SETTINGS[method]):
        expected = FAMILY.model(**INPUTS).logits
        out, found, graphs = compiled(FAMILY.model, **INPUTS)
    assert found == {} and graphs == 1
    assert (expected - dense).abs().max() > 1e-2  # tokens were dropped
    assert (out.logits - expected).abs().max() < 1e-5


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_draws_compile_with_a_seed_that_is_a_symbol():
    """Seeds of a diffusion run differ from step to step, so that compilers make them symbols."""
    draw = torch.compile(vtc.ops.hash_uniform, dynamic=True)
    place = torch.arange(64)[None].repeat(2, 1)
    for seed in (0, 12345, 2**40 + 1):
        assert torch.equal(draw(place, seed), vtc.ops.hash_uniform(place, seed))
