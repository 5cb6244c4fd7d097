"""Others wrap, offload, cast, adapt, copy and replace the modules of a model before a session,
inside one, and around its beginning. A session then computes what it computes on a model that was
so from the start, or refuses at the first call; afterwards the model is as its user left it."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import accelerate
import peft
import pytest
import timm
import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from diffusers import hooks as offloading
from torch import Tensor, nn

import vtc
from vtc.errors import UnsupportedModel
from vtc.hooks import Hook, Wrapped
from vtc.testing import dits, families

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY |= {"intermediate_size": 48, "patch_size": 8, "image_size": 32, "initializer_range": 0.3}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def images(seed: int = 0, size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@dataclass(frozen=True)
class Kind:
    """A model, a call of it that gives one tensor, ways to attach, linears that can be adapted."""

    make: Callable[[], nn.Module]
    call: Callable[[Any], Tensor]
    methods: tuple[dict[str, Any], ...]
    linears: str


def _llava(model: Any) -> Tensor:
    inputs = families.make("llava", row=0).inputs
    pixels = inputs["pixel_values"].to(_dtype(model))
    return model(**{**inputs, "pixel_values": pixels}).logits


def _images(model: Any) -> Tensor:
    out = model(images().to(_dtype(model)))
    return out if torch.is_tensor(out) else out.last_hidden_state


def _clip(model: Any) -> Tensor:
    return model.encode_image(images().to(_dtype(model)))


def _denoise(model: Any) -> Tensor:
    """Three steps of a sampler, so that caches of tokens are used."""
    given = dits.inputs("dit")
    x = given["hidden_states"].to(_dtype(model))
    for time in (1.0, 0.8, 0.6):
        step = {"hidden_states": x, "timestep": torch.full((2,), 1000 * time)}
        x = x - 0.1 * dits.call(model, given | step)[:, :4]
    return x


def _dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in, where its weights may be stored as something else."""
    return next(p.dtype for p in model.parameters() if p.dtype.itemsize > 1)


def _open_clip() -> nn.Module:
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=3, width=32, head_width=16, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    return open_clip.model.CLIP(16, vision, text)


KINDS: dict[str, Kind] = {
    "vlm": Kind(
        lambda: families.make("llava").model,
        _llava,
        (
            {"method": "visionzip", "keep": 0.25},
            {"method": "fastv", "keep": 0.5},
            {"method": "zoo_prune", "keep": 0.25},
        ),
        r".*language_model.*q_proj|.*linear_1",
    ),
    "timm": Kind(
        lambda: seeded(
            partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3)
        ),
        _images,
        ({"method": "tome", "r": 2},),
        r".*attn\.qkv",
    ),
    "open_clip": Kind(
        lambda: seeded(_open_clip),
        _clip,
        ({"method": "random", "keep": 0.5, "at": "vision.1"},),
        r".*visual.*c_fc",
    ),
    "encoder": Kind(
        lambda: seeded(lambda: transformers.ViTModel(transformers.ViTConfig(**TINY))),
        _images,
        ({"method": "random", "keep": 0.5, "at": "vision.1"},),
        r".*q_proj|.*query",
    ),
    "dit": Kind(
        lambda: dits.make("dit"),
        _denoise,
        ({"method": "toca"}, {"method": "pooled", "keep": 0.25, "at": "dit.1"}),
        r".*to_q",
    ),
}


# ---------------------------------------------------------------------- what others do


def offload(kind: Kind, model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def load(kind: Kind, model: nn.Module) -> None:
    remove_hook_from_module(model, recurse=True)


def group_offload(kind: Kind, model: nn.Module) -> None:
    offloading.apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    )


def group_load(kind: Kind, model: nn.Module) -> None:
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)


def cast_layers(kind: Kind, model: nn.Module) -> None:
    offloading.apply_layerwise_casting(
        model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def add_lora(kind: Kind, model: nn.Module) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=kind.linears)
    peft.inject_adapter_in_model(config, model)
    model.eval()


def _each_lora(model: nn.Module, change: Callable[[Any], None]) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            change(module)
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], module.get_base_layer())


def remove_lora(kind: Kind, model: nn.Module) -> None:
    _each_lora(model, lambda layer: None)


def merge_lora(kind: Kind, model: nn.Module) -> None:
    _each_lora(model, lambda layer: layer.merge())


def replace_linear(kind: Kind, model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if re.fullmatch(kind.linears, path) and isinstance(module, nn.Linear):
            torch.manual_seed(5)
            new = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], new.eval())


def to_half(kind: Kind, model: nn.Module) -> None:
    model.to(torch.bfloat16)


def to_single(kind: Kind, model: nn.Module) -> None:
    model.float()


#: what is done, and how it is undone
ENVIRONMENTS: dict[str, tuple[Callable[..., None], Callable[..., None] | None]] = {
    "offload": (offload, load),
    "group offload": (group_offload, group_load),
    "layerwise casting": (cast_layers, None),
    "LoRA": (add_lora, remove_lora),
    "merged LoRA": (add_lora, merge_lora),
    "other linears": (replace_linear, None),
    "bfloat16": (to_half, to_single),
}


def residue(model: nn.Module) -> list[str]:
    """What a session has left on modules."""
    found = [
        f"{path}: {type(hook).__name__}"
        for path, m in model.named_modules()
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        if isinstance(hook, Hook)
    ]
    for path, m in model.named_modules():
        found += [f"{path}.{n}" for n, v in vars(m).items() if type(v).__name__ == "_Method"]
    return found


#: where the model itself fails, as nn.MultiheadAttention reads its weights past all hooks
FAILS = {("open_clip", "offload"), ("open_clip", "layerwise casting")}
CELLS = [
    pytest.param(kind, environment, options, id=f"{name}-{environment}-{options['method']}")
    for name, kind in KINDS.items()
    for environment in ENVIRONMENTS
    for options in kind.methods
    if (name, environment) not in FAILS
]


@pytest.mark.parametrize(("kind", "environment", "options"), CELLS)
def test_right_or_refused_before_inside_and_around(
    kind: Kind, environment: str, options: dict[str, Any]
) -> None:
    do, undo = ENVIRONMENTS[environment]
    model, other = kind.make(), kind.make()
    do(kind, other)
    dense = kind.call(other)
    with vtc.attach(other, **options):  # before
        changed = kind.call(other)
    assert torch.equal(kind.call(other), dense) and not residue(other)

    session = vtc.attach(model, **options)  # inside
    kind.call(model)
    do(kind, model)
    right_or_refused(kind, model, changed)
    if undo is None:
        session._remove()
        assert torch.equal(kind.call(model), dense) and not residue(model)
        return
    undo(kind, model)
    session._remove()
    undo(kind, other)
    restored = kind.call(other)
    assert torch.equal(kind.call(model), restored) and not residue(model)

    again = kind.make()  # around
    do(kind, again)
    session = vtc.attach(again, **options)
    kind.call(again)
    undo(kind, again)
    with vtc.attach(other, **options):
        expected = kind.call(other)
    right_or_refused(kind, again, expected)
    session._remove()
    assert torch.equal(kind.call(again), restored) and not residue(again)


def right_or_refused(kind: Kind, model: nn.Module, expected: Tensor) -> None:
    try:
        got = kind.call(model)
    except UnsupportedModel as refusal:
        assert "is now another module" in str(refusal) and "vtc.detach(model)" in str(refusal)
        return
    assert torch.equal(got, expected)


# ---------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", KINDS)
def test_a_copy_of_an_attached_model_is_a_working_model_without_a_session(name: str) -> None:
    kind = KINDS[name]
    model = kind.make()
    dense = kind.call(model)
    for options in kind.methods:
        with vtc.attach(model, **options):
            reduced = kind.call(model)
            twin = copy.deepcopy(model)
            with pytest.raises(UnsupportedModel, match=r"cannot be pickled.*vtc.detach\(model\)"):
                pickle.dumps(model)
            assert torch.equal(kind.call(model), reduced)
        assert torch.equal(kind.call(twin), dense) and not residue(twin)
        for parameter in model.parameters():
            parameter.add_(1)  # a copy that runs the methods of the original would see it
        assert torch.equal(kind.call(twin), dense)
        with vtc.attach(twin, **options):
            assert torch.equal(kind.call(twin), reduced)
        model = twin
        assert torch.equal(kind.call(copy.deepcopy(model)), dense)


def test_a_session_is_not_copied() -> None:
    with vtc.attach(KINDS["timm"].make(), "tome", r=2) as session:
        for copied in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(UnsupportedModel, match="session.recipe"):
                copied(session)


def test_an_average_of_weights_is_made_of_an_attached_model() -> None:
    kind = KINDS["encoder"]
    model = kind.make()
    dense = kind.call(model)
    with vtc.attach(model, "random", keep=0.5, at="vision.1"):
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
    assert torch.equal(kind.call(average.module), dense)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_adapters_that_copy_modules_to_save(when: str) -> None:
    kind, config = (
        KINDS["vlm"],
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]),
    )
    model = kind.make()
    if when == "before":
        peft.get_peft_model(model, config)
        with vtc.attach(model, "grid", keep=0.5) as session:
            kind.call(model)
        assert session.trace[-1].n_out == (32,)
        return
    session = vtc.attach(model, "grid", keep=0.5)
    peft.get_peft_model(model, config)
    with pytest.raises(UnsupportedModel, match="multi_modal_projector of this model is now"):
        kind.call(model)
    assert vtc.detach(model) and not residue(model)
    with vtc.attach(model, "grid", keep=0.5) as session:
        kind.call(model)
    assert session.trace[-1].n_out == (32,)


# ---------------------------------------------------------------------- offloading by others


def test_a_pipeline_that_offloads_its_models_after_every_call() -> None:
    pipe, one = _pipeline(), _pipeline()
    options: dict[str, Any] = {"keep": 0.25, "at": "dit.1"}
    with vtc.attach(one, "pooled", **options):
        expected = [_picture(one, seed) for seed in range(2)]
    pipe.enable_model_cpu_offload(device="cpu")
    with vtc.attach(pipe, "pooled", **options) as session:
        got = [_picture(pipe, seed) for seed in range(2)]
        assert session.stats()["prefills"] == 4
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    dense = _picture(_pipeline(), 0)
    assert torch.equal(_picture(pipe, 0), dense) and not residue(pipe.transformer)


def _pipeline() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        **blocks,
    )
    pipe = DiTPipeline(dits.make("dit"), vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _picture(pipe: Any, seed: int) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    out = pipe(
        [1], guidance_scale=1.0, generator=dice, num_inference_steps=2, output_type="np"
    ).images
    return torch.as_tensor(out)


def test_offloading_that_ends_inside_a_session_leaves_the_model_whole() -> None:
    kind = KINDS["dit"]
    model, dense = kind.make(), kind.call(kind.make())
    offload(kind, model)
    session = vtc.attach(model, "pooled", keep=0.25, at="dit.1")
    load(kind, model)
    session._remove()
    assert torch.equal(kind.call(model), dense)
    offload(kind, model)
    assert torch.equal(kind.call(model), dense)


def test_an_encoder_pools_what_is_left_when_its_forward_was_replaced_meanwhile() -> None:
    """Its dense methods would be the outermost ones, and give whole grids to its pooling."""
    kind = KINDS["timm"]
    model = kind.make()
    with vtc.attach(model, "tome", r=2):
        expected = kind.call(model)
        del vars(model)["forward"]
        assert torch.equal(kind.call(model), expected)
        assert "forward" in vars(model)
        assert torch.equal(kind.call(model), expected)
    assert "forward" not in vars(model)


def test_an_interrupted_call_of_a_replaced_forward_ends_with_the_next_one() -> None:
    kind = KINDS["timm"]
    model = kind.make()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with vtc.attach(model, "tome", r=2) as session:
        expected, grid = kind.call(model), model.forward_features(images())
        before = session.stats()["prefills"]
        del vars(model)["forward"]
        handle = model.blocks[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            kind.call(model)
        handle.remove()
        assert torch.equal(kind.call(model), expected)
        assert torch.equal(model.forward_features(images()), grid)
        assert session.stats()["prefills"] == before + 2


def test_a_compiled_model_around_and_inside_a_session() -> None:
    kind = KINDS["encoder"]
    options = kind.methods[0]
    model = kind.make()
    dense = kind.call(model)
    with vtc.attach(model, **options):
        expected = kind.call(model)
        inside = torch.compile(model, backend="eager")
        assert torch.allclose(kind.call(inside), expected, atol=1e-5)
    torch._dynamo.reset()
    assert torch.equal(kind.call(model), dense)
    around = torch.compile(model, backend="eager")
    with vtc.attach(model, **options):
        assert torch.allclose(kind.call(around), expected, atol=1e-5)
    torch._dynamo.reset()
    assert torch.allclose(kind.call(around), dense, atol=1e-5)


# ---------------------------------------------------------------------- without a handle


def test_a_session_whose_handle_is_gone_is_detached_by_its_model() -> None:
    kind = KINDS["vlm"]
    model, dense = kind.make(), kind.call(kind.make())
    vtc.attach(model, "grid", keep=0.5)
    with pytest.raises(UnsupportedModel, match=r"already attached.*vtc\.detach\(model\)"):
        vtc.attach(model, "grid", keep=0.5)
    assert vtc.detach(model)
    assert not vtc.detach(model)
    assert torch.equal(kind.call(model), dense) and not residue(model)
    pipe = _pipeline()
    vtc.attach(pipe, "pooled", keep=0.25, at="dit.1")
    assert vtc.detach(pipe)
    assert "set_timesteps" not in vars(pipe.scheduler)
    with pytest.raises(UnsupportedModel, match="no torch module"):
        vtc.detach("model")


def test_a_wrapped_method_returns_to_what_its_user_made_of_it() -> None:
    class Owner:
        def say(self) -> str:
            return "own"

    owner = Owner()
    wrapped = Wrapped(owner, "say", lambda original: lambda: f"<{original()}>")
    wrapped.settle()
    ours = owner.say
    owner.say = lambda: f"theirs {ours()}"  # over ours
    wrapped.settle()
    assert owner.say() == "<theirs own>"
    wrapped.remove()
    assert owner.say() == "theirs own"
    wrapped = Wrapped(owner, "say", lambda original: lambda: f"<{original()}>")
    wrapped.settle()
    owner.say = lambda: "in its place"
    wrapped.remove()
    assert owner.say() == "in its place"
