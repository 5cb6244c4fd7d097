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
from vtc.testing import dits, families, maskref, oracle, trace

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


# ---------------------------------------------------------------------- wrappers


class Pipeline:
    """As transformers.pipeline makes them."""

    task = "image-text-to-text"

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def test_a_pipeline_of_transformers_is_unwrapped() -> None:
    fam = families.make("llava", row=0)
    pipeline = Pipeline(fam.model)
    with vtc.attach(pipeline, "fastv", keep=0.5) as session:
        fam.model(**fam.inputs)
    assert session.trace
    with vtc.attach(pipeline, "fastv", keep=0.5, strict=False):
        assert vtc.detach(pipeline)
    with pytest.raises(UnsupportedModel, match="list is no torch module, no pipeline of transf"):
        vtc.attach([], "fastv", keep=0.5)


class Wrapper(nn.Module):
    """As sentence-transformers, Lightning or DistributedDataParallel hold a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


def test_a_wrapper_is_refused_with_what_to_attach_to() -> None:
    fam = families.make("llava", row=0)
    says = (
        r"no adapter fits test_environments\.Wrapper\. It holds a LlavaForConditionalGeneration .*"
    )
    with pytest.raises(UnsupportedModel, match=says + "attach to its part 'module'"):
        vtc.attach(Wrapper(fam.model), "fastv", keep=0.5)
    named = Wrapper(fam.model).get_submodule("module")
    vtc.attach(named, "fastv", keep=0.5, strict=False).detach()


def test_replicas_are_refused() -> None:
    fam = families.make("llava", row=0)
    replica = fam.model._replicate_for_data_parallel()
    replica.model = fam.model.model._replicate_for_data_parallel()
    with vtc.attach(fam.model, "random", keep=0.5, strict=False):
        copied = fam.model._replicate_for_data_parallel()
        with pytest.raises(UnsupportedModel, match="nn.DataParallel runs replicas"):
            copied(**fam.inputs)


class DTensor(nn.Parameter):
    """A weight of which this process holds a part; torch's own needs a process group."""


def test_sharded_weights_are_refused_by_name() -> None:
    fam = families.make("llava", row=0)
    layer: Any = oracle.text_model(fam.model).layers[1].self_attn.q_proj
    layer.weight = DTensor(layer.weight.detach())
    with pytest.raises(UnsupportedModel, match=r"q_proj\.weight is sharded over processes"):
        vtc.attach(fam.model, "random", keep=0.5)


def test_cache_dit_beside_a_session_is_refused_by_name() -> None:
    """Enabled before a session and inside one; cache-dit itself needs a GPU for its imports."""
    model: Any = dits.make("dit")
    with vtc.attach(model, "pooled", keep=0.25, at="dit.1", strict=False):
        model._is_cached = True
        with pytest.raises(UnsupportedModel, match="cache-dit is enabled.*disable_cache"):
            dits.call(model, dits.inputs("dit"))


# ---------------------------------------------------------------------- export


def test_export_of_an_attached_model() -> None:
    """An encoder is exported with its reduction inside."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dense = model(x)
    with vtc.attach(model, "divprune", keep=0.5, at="vision.1"):
        wanted = model(x)
        program = torch.export.export(model, (x,), strict=False)
    assert torch.allclose(program.module()(x), wanted, atol=1e-6)
    assert not torch.allclose(wanted, dense) and torch.equal(model(x), dense)
