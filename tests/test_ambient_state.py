"""State of torch around a call that is none of the library's business: default dtype and device,
inference mode, deterministic algorithms, autocast. Every method decides as without it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import vtc
from vtc.reducer import Selector
from vtc.testing import dits, families

#: what methods need to act on a tiny model
AUTO: dict[str, dict[str, Any]] = {
    "mustdrop_merge": {"threshold": 0.0},
    "lookupvit": {"grid": (2, 3)},
    "langdc": {"base": (1, 2), "pool": (2, 2), "clip_frames": 2, "max_len": 3},
}
PARAMS: dict[str, dict[str, Any]] = {
    "dycoke": {"first": 0},
    "dycoke_cache": {"first": 0},
    "scheduled_cache": {"table": [[1.0] * 4, [0.25] * 4], "score": "random"},
    "flexdit": {"group": (1, 1, 1, 0)},
    "toca": {"interval": 4, "steps": 0, "share": 0.5},
    "duca": {"interval": 4, "steps": 0, "share": 0.5},
    "random": {"seed": 3},
}
DIFFUSING = [m for m in vtc.REDUCERS if vtc.REDUCERS[m].sites == {"dit"}]
#: `mustdrop` has it as its last step; alone it acts on nothing
NEVER_ALONE = ("mustdrop_cache",)


@dataclass(frozen=True)
class Case:
    method: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method}-{self.kind}"


def cases() -> Iterator[Case]:
    for method in vtc.REDUCERS:
        cls = vtc.REDUCERS[method]
        given = {"keep": 0.5} | PARAMS.get(method, {})
        if method in AUTO:
            given = AUTO[method] | {"keep": "auto"}
        if method in DIFFUSING:
            if method in ("toca", "duca", "scheduled_cache", "flexdit"):
                del given["keep"]
            yield Case(method, "dit", given | ({"at": "dit.1"} if method == "pooled" else {}))
        elif issubclass(cls, Selector):
            yield Case(method, "video", given | {"at": "vision.1"})
        elif method not in NEVER_ALONE:
            yield Case(method, "vlm", given)
    yield Case("tome", "encoder", {"r": 3})
    yield Case("fastervlm", "encoder", {"keep": 0.5, "at": "vision.1"})
    yield Case(
        "divprune", "encoder", {"keep": 0.5, "at": "vision.1", "merge": "nearest", "mass": 1.0}
    )
    yield Case("divprune", "dit", {"keep": 0.5, "at": "dit.1"})


@functools.cache
def made(kind: str) -> tuple[Any, Callable[[], Tensor]]:
    """A model, and one call of it."""
    if kind == "dit":
        model, given = dits.make("dit"), [dits.inputs("dit", time=t) for t in (0.9, 0.8)]
        return model, lambda: [dits.call(model, g) for g in given][-1]
    if kind == "encoder":
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, depth=3)
        pictures = torch.randn(2, 3, 64, 64)
        return model.eval(), lambda: model(pictures)
    fam: Any = families.make("llava" if kind == "vlm" else "llava_onevision")
    return fam.model, lambda: fam.model(**fam.inputs).logits


def run(case: Case) -> tuple[list[list[int]], Tensor]:
    """Places that every step kept, and what the model returned."""
    model, call = made(case.kind)
    with torch.no_grad(), vtc.attach(model, case.method, **case.options) as session:
        for module in session.modules.values():
            with torch.random.fork_rng():
                torch.manual_seed(1)
                for parameter in module.parameters():
                    drawn = torch.randn(parameter.shape, dtype=torch.float32, device="cpu")
                    parameter.copy_(0.1 * drawn)
        out = call()
    return [step.source.tolist() for step in session.trace], out


@functools.cache
def usual(case: str) -> tuple[list[list[int]], Tensor]:
    return run(CASES[case])


CASES = {str(case): case for case in cases()}
over_cases = pytest.mark.parametrize("case", CASES)


@contextmanager
def dtype(default: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: dtype(torch.bfloat16),
    "float64": lambda: dtype(torch.float64),
    "other-device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "deterministic": deterministic,
}


@pytest.mark.parametrize("state", STATES)
@over_cases
def test_methods_decide_as_in_the_usual_state(case: str, state: str) -> None:
    """These models themselves give the same, bit by bit, in all of these states."""
    want_places, want = usual(case)
    with STATES[state]():
        places, got = run(CASES[case])
    assert places == want_places
    assert got.dtype == want.dtype and torch.equal(got, want)
