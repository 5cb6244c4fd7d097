"""What others do to the weights of a model, and every method then: right, or refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import vtc
from vtc.errors import UnsupportedModel
from vtc.testing import families, maskref, trace

CPU = torch.device("cpu")
#: methods of vision-language models, with what they need to act; LangDC needs a trained projector,
#: and mustdrop_cache, which is the last part of mustdrop, acts on what others left
METHODS: dict[str, dict[str, Any]] = {
    name: {"keep": 0.5 if "fixed" in vtc.REDUCERS[name].budgets else "auto"}
    for name in vtc.REDUCERS
    if vtc.REDUCERS[name].sites != {"dit"} and name not in ("langdc", "mustdrop_cache")
}
METHODS |= {"tome": {"r": 2}, "lookupvit": {"grid": (2, 3)}}
METHODS["mustdrop_merge"] = {"keep": "auto", "threshold": -1.0}
METHODS |= {name: METHODS[name] | {"first": 0} for name in ("dycoke", "dycoke_cache")}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def family(method: str) -> families.Family:
    """Images, or a video where the method wants one."""
    wants = vtc.REDUCERS[method].frames or method.startswith("stts")
    return families.make("llava_onevision" if wants else "llava")


def answer(model: Any, method: str, inputs: Any) -> tuple[Tensor, list[tuple[int, ...]]]:
    with vtc.attach(model, method, strict=False, **METHODS[method]) as session:
        logits = model(**inputs).logits
    return logits, [entry.n_out for entry in session.trace]


@functools.cache
def expected(method: str) -> tuple[Tensor, list[tuple[int, ...]]]:
    fam = family(method)
    return answer(fam.model, method, fam.inputs)


# ---------------------------------------------------------------------- weights elsewhere


def to_cpu(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU, offload_buffers=True)


def to_both(model: nn.Module, folder: Path) -> None:
    parts = {name: "cpu" for name, _ in model.model.named_parameters(recurse=False)}  # type: ignore[union-attr]
    parts |= {"vision_tower": "disk", "multi_modal_projector": "cpu", "language_model": "disk"}
    where: dict[str, Any] = {f"model.{part}": device for part, device in parts.items()}
    where["lm_head"] = "cpu"
    accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize(
    ("method", "elsewhere"),
    [
        *((method, where) for method in METHODS for where in (to_cpu, to_disk)),
        *((method, to_both) for method in ("fastv", "zoo_prune", "evs")),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_offloaded_weights_change_no_bit(
    method: str, elsewhere: Callable[..., None], tmp_path: Path
) -> None:
    fam = family(method)
    elsewhere(fam.model, tmp_path)
    assert any(parameter.is_meta for parameter in fam.model.parameters())
    logits, counts = answer(fam.model, method, fam.inputs)
    assert counts == expected(method)[1] and counts
    assert torch.equal(logits, expected(method)[0])


# ---------------------------------------------------------------------- weights of another kind


def dynamic(model: nn.Module) -> nn.Module:
    """Linear layers that know no weight as a tensor, and no device."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


#: what starts from numbers of the model's weights
STARTS = {"lookupvit": "lookupvit starts from the weights of the model, and .* cannot be copied"}
WIDTHS = {"stts": "has no linear layers in its attention and its MLP"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [dynamic, torchao], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights(method: str, kind: Callable[[nn.Module], nn.Module]) -> None:
    fam = family(method)
    model: Any = kind(fam.model)
    dense = model(**fam.inputs).logits
    says = STARTS | (WIDTHS if kind is dynamic else {})
    if method in says:
        with pytest.raises((UnsupportedModel, vtc.errors.InvalidInput), match=says[method]):
            answer(model, method, fam.inputs)
    else:
        logits, counts = answer(model, method, fam.inputs)
        if METHODS[method].get("keep") != "auto":  # thresholds see other numbers
            assert counts == expected(method)[1]
        assert logits.isfinite().all()
        assert vtc.REDUCERS[method].sites == {"cache"} or not torch.equal(logits, dense)
    assert torch.equal(model(**fam.inputs).logits, dense)


@pytest.mark.parametrize("method", ["random", "fastv", "zoo_prune"])
def test_dropping_from_quantised_weights_equals_masking(method: str) -> None:
    fam, ref = families.make("llava"), families.make("llava")
    model, other = torchao(fam.model), torchao(ref.model)
    with vtc.attach(model, method, keep=0.25) as session:
        got: Any = model(**fam.inputs)
    masks = trace.masks(session.trace, fam.visual())
    with maskref.masked(other, masks.keep, masks.bias):  # type: ignore[arg-type]
        wanted = other(**fam.inputs).logits
    real = fam.inputs["attention_mask"].bool() & masks.final(fam.visual())
    assert (got.logits - wanted)[real].abs().max() <= 1e-4


def test_zoo_prune_on_a_quantised_projector_takes_differences() -> None:
    fam = families.make("llava", row=0)
    model = torchao(fam.model)
    with (
        vtc.attach(model, "zoo_prune", keep=0.25, mode="algebraic"),
        pytest.raises(
            UnsupportedModel, match=r"weights that are offloaded or quantised.*mode='zoo'"
        ),
    ):
        model(**fam.inputs)
