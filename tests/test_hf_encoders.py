"""Image encoders of transformers: dropping equals masking, results are whole grids, nothing is left
behind. The oracle is the untouched model whose attention function gets the dropped columns masked;
what is pooled, it pools from the rows that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.errors import InvalidInput, UnsupportedModel, UnsupportedSite
from vtc.session import Reduction
from vtc.testing.threads import in_threads

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
    "image_size": 32,
    "initializer_range": 0.3,
    "num_labels": 5,
}
WIDE = TINY | {"image_size": (32, 48)}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
TEXT |= {"intermediate_size": 48, "max_position_embeddings": 16, "projection_size": 32}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
STRETCH = {"interpolate_pos_encoding": True}
DUAL: dict[str, Any] = {"vision_config": TINY, "text_config": TEXT}
SHARED = {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": False}
DROP = 2  # the block before which tokens go


@dataclass(frozen=True)
class Kind:
    """A model, how it is called, and the tokens in front of its patches."""

    make: Callable[[], Any]
    prefix: int
    call: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] = (4, 6)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


def kind(name: str, config: str, options: dict[str, Any], prefix: int, **more: Any) -> Kind:
    return Kind(lambda: getattr(hf, name)(getattr(hf, config)(**options)), prefix, **more)


CLIP, SIGLIP, D3 = "CLIPVisionConfig", "SiglipVisionConfig", "DINOv3ViTConfig"
REGISTERS = TINY | {"num_register_tokens": 3}
KINDS: dict[str, Kind] = {
    "clip": kind("CLIPVisionModel", CLIP, TINY, 1, call=STRETCH),
    "clip_projection": kind("CLIPVisionModelWithProjection", CLIP, TINY, 1, call=STRETCH),
    "clip_mean": kind(
        "CLIPForImageClassification", "CLIPConfig", DUAL | {"num_labels": 5}, 1, grid=(4, 4)
    ),
    "siglip": kind("SiglipVisionModel", SIGLIP, TINY, 0, call=STRETCH),
    "siglip_mean": kind(
        "SiglipForImageClassification", "SiglipConfig", DUAL | {"num_labels": 5}, 0, call=STRETCH
    ),
    "vit": kind("ViTModel", "ViTConfig", WIDE, 1),
    "vit_class": kind("ViTForImageClassification", "ViTConfig", WIDE, 1),
    "deit": kind("DeiTModel", "DeiTConfig", WIDE, 2),
    "deit_class": kind("DeiTForImageClassificationWithTeacher", "DeiTConfig", WIDE, 2),
    "dinov2": kind("Dinov2Model", "Dinov2Config", TINY, 1),
    "dinov2_class": kind("Dinov2ForImageClassification", "Dinov2Config", TINY, 1),
    "registers": kind("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", REGISTERS, 4),
    "registers_class": kind(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", REGISTERS, 4
    ),
    "dinov3": kind("DINOv3ViTModel", D3, REGISTERS, 4),
    "beit": kind("BeitForImageClassification", "BeitConfig", TINY, 1, grid=(4, 4)),
    "beit_shared": kind("BeitModel", "BeitConfig", TINY | SHARED, 1, grid=(4, 4)),
    "ijepa": kind("IJepaForImageClassification", "IJepaConfig", WIDE, 0),
    "aimv2": kind("Aimv2VisionModel", "Aimv2VisionConfig", TINY, 0, grid=(4, 4)),
}
METHODS = ("random", "norm", "divprune", "hf_cls", "hf_keys")


@pytest.fixture(autouse=True, scope="module")
def methods() -> Iterator[None]:
    """Methods of this file: by CLS attention, by keys, and one that keeps uneven numbers."""
    both = frozenset({"vision"})

    @vtc.register("hf_cls")
    @dataclass(frozen=True)
    class Cls(vtc.Scorer):
        sites, needs = both, frozenset({"attn_cls"})

        def score(self, ctx: Any) -> Tensor:
            return ctx.signals["attn_cls"]

    @vtc.register("hf_keys")
    @dataclass(frozen=True)
    class Keys(vtc.Scorer):
        sites, needs = both, frozenset({"vision_keys"})

        def score(self, ctx: Any) -> Tensor:
            return ctx.signals["vision_keys"].norm(dim=-1)

    @vtc.register("hf_uneven")
    @dataclass(frozen=True)
    class Uneven(vtc.Method):
        sites, needs, budgets = both, frozenset[str](), frozenset({"auto"})

        def plan(self, ctx: Any, k: tuple[int, ...]) -> vtc.Plan:
            first = ctx.x[:, :, 0]  # what stays of an image does not depend on the others
            return vtc.Plan.from_mask(first > first.mean(1, keepdim=True))

    yield
    for name in ("hf_cls", "hf_keys", "hf_uneven"):
        del vtc.REDUCERS._items[name]


@cache
def made(name: str) -> Any:
    torch.manual_seed(0)
    model = KINDS[name].make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh tables, scales and biases are all the same
            if parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(name: str, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    height, width = KINDS[name].grid
    return torch.randn(count, 3, 8 * height, 8 * width, generator=generator)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def hooks_of(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def run(name: str, model: Any = None, x: Tensor | None = None, **more: Any) -> Any:
    model = made(name) if model is None else model
    return model(images(name) if x is None else x, **KINDS[name].call, **more)


def pooled(output: Any) -> Tensor:
    found = (output.get(n) for n in ("logits", "image_embeds", "pooler_output"))
    return next(value for value in found if value is not None)


def kept(name: str, entry: Reduction) -> Tensor:
    """[B, tokens] what a reduction kept, prefix included."""
    rows = len(entry.n_in)
    keep = torch.zeros(rows, KINDS[name].patches, dtype=torch.bool).scatter(1, entry.source, True)
    return torch.cat([torch.ones(rows, KINDS[name].prefix, dtype=torch.bool), keep], 1)


@contextmanager
def masked(
    model: nn.Module,
    keep: Tensor,
    bias: Tensor | None = None,
    mix: Tensor | None = None,
    short: bool = False,
) -> Iterator[None]:
    """The untouched model, whose blocks from `DROP` on see the tokens `keep` [B, N] only.

    bias: [B, N] added to the logits of keys. mix: [B, N, N], tokens become mix @ tokens before
    `DROP`. short: behind the blocks only the kept rows go on.
    """
    blocks = blocks_of(model)
    late = {m for block in blocks[DROP:] for m in block.modules()}
    base = ALL_ATTENTION_FUNCTIONS["sdpa"]
    columns = torch.where(keep, 0.0 if bias is None else bias, float("-inf"))[:, None, None]

    def attend(module: Any, q: Any, k: Any, v: Any, attention_mask: Any, **more: Any) -> Any:
        if module in late:
            own = columns.expand(-1, 1, q.shape[2], -1).to(q.dtype)
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                own = own.masked_fill(~attention_mask, float("-inf"))
            elif attention_mask is not None:
                own = own + attention_mask
            attention_mask = own
        return base(module, q, k, v, attention_mask, **more)

    def mixed(module: Any, args: Any) -> Any:
        return args if mix is None else (mix.to(args[0].dtype) @ args[0], *args[1:])

    def cut(module: Any, args: Any, output: Tensor) -> Tensor | None:
        return output[keep].unflatten(0, (len(keep), -1)) if short else None

    handles = [blocks[DROP].register_forward_pre_hook(mixed)]
    handles.append(blocks[-1].register_forward_hook(cut))
    try:
        with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, {"sdpa": attend}):
            yield
    finally:
        for handle in handles:
            handle.remove()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_dropping_equals_masking(name: str, method: str) -> None:
    model, at = made(name), f"vision.{DROP}"
    with torch.no_grad(), vtc.attach(model, method, keep=0.25, at=at, seed=3) as session:
        ours = run(name, output_hidden_states=True)
    keep = kept(name, session.trace[-1])
    assert keep.sum(1).tolist() == [KINDS[name].prefix + KINDS[name].patches // 4] * 3
    layout = session.trace[-1].layout[0]
    assert layout is not None and (layout.height, layout.width) == KINDS[name].grid
    with torch.no_grad(), masked(model, keep):
        full = run(name, output_hidden_states=True)
    with torch.no_grad(), masked(model, keep, short=True):
        close(pooled(ours), pooled(run(name)))
    assert len(ours.hidden_states) == len(full.hidden_states) == 5
    dense = list(zip(ours.hidden_states, full.hidden_states, strict=True))[DROP + 1 :]
    if "last_hidden_state" in ours:
        dense.append((ours.last_hidden_state, full.last_hidden_state))
    for mine, theirs in dense:
        assert mine.shape == theirs.shape and not mine[~keep].any()
        close(mine[keep], theirs[keep])
    for mine, theirs in zip(ours.hidden_states[: DROP + 1], full.hidden_states, strict=False):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["vit", "deit", "siglip", "registers", "dinov3", "beit_shared"])
def test_signals_are_those_of_eager_attention(name: str) -> None:
    model, prefix = made(name), KINDS[name].prefix
    size = KINDS[name].patches // 2
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = run(name, output_attentions=True).attentions[DROP - 1].mean(1)
        row = maps[:, 0] if prefix else maps.mean(1)
        best = row[:, prefix:].argsort(dim=1, descending=True, stable=True)[:, :size].sort(1).values
        with vtc.attach(model, "hf_cls", keep=0.5, at=f"vision.{DROP}") as session:
            eager = run(name)
    model.set_attn_implementation("sdpa")
    assert torch.equal(session.trace[-1].source, best)
    with torch.no_grad(), vtc.attach(model, "hf_cls", keep=0.5, at=f"vision.{DROP}") as session:
        close(pooled(run(name)), pooled(eager))
    assert torch.equal(session.trace[-1].source, best)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["norm", "tome_merge"])
@pytest.mark.parametrize("name", KINDS)
def test_merge_and_mass(name: str, method: str, implementation: str) -> None:
    """Merged rows of the untouched model, the others masked, log(size) on the logits."""
    model = made(name)
    options: dict[str, Any] = {"mass": 1.0, "at": f"vision.{DROP}"}
    if method == "norm":
        options["merge"] = "nearest"
    model.set_attn_implementation(implementation)
    try:
        with torch.no_grad(), vtc.attach(model, method, keep=0.25, **options) as session:
            ours = run(name, output_hidden_states=True)
    finally:
        model.set_attn_implementation("sdpa")
    entry, prefix = session.trace[-1], KINDS[name].prefix
    plan, keep = entry.plan, kept(name, entry)
    assert plan is not None and plan.assign is not None and plan.weight is not None
    assert plan.size is not None and plan.size.sum(1).tolist() == [KINDS[name].patches] * 3
    tokens = prefix + KINDS[name].patches
    mix, bias = torch.eye(tokens).repeat(3, 1, 1), torch.zeros(3, tokens)
    for b in range(3):
        for slot, place in enumerate(plan.index[b].tolist()):
            members = plan.assign[b] == slot
            assert float(plan.size[b, slot]) == float(members.sum())
            mix[b, prefix + place] = 0.0
            mix[b, prefix + place, prefix:] = members / members.sum()
            bias[b, prefix + place] = members.sum().log()
    with torch.no_grad(), masked(model, keep, bias, mix, short=True):
        close(pooled(ours), pooled(run(name)))
    with torch.no_grad(), masked(model, keep, bias, mix):
        full = run(name, output_hidden_states=True).hidden_states[-1]
    whole = ours.hidden_states[-1]
    for b in range(3):  # merged tokens are where they came from
        home = plan.index[b][plan.assign[b]] + prefix
        close(whole[b, prefix:], full[b, home])
        close(whole[b, :prefix], full[b, :prefix])


@pytest.mark.parametrize("name", KINDS)
def test_merging_in_every_block(name: str) -> None:
    """ToMe: images do not mix, results are whole, every patch is counted once."""
    model, x = made(name), images(name)
    with torch.no_grad(), vtc.attach(model, "tome", r=3) as session:
        together = run(name, output_hidden_states=True)
        alone = run(name, x=x[1:2], output_hidden_states=True)
    close(pooled(together)[1], pooled(alone)[0])
    plans = [entry.plan for entry in list(session.trace)[:3]]
    patches = KINDS[name].patches
    assert [plan.m for plan in plans if plan] == [patches - 3, patches - 6, patches - 9]
    for plan in plans:
        assert plan is not None and plan.size is not None
        assert plan.size.sum(1).tolist() == [patches] * 3
    last = together.hidden_states[-1]
    assert last.shape[1] == KINDS[name].prefix + patches and last.any(-1).all()
    close(last[1], alone.hidden_states[-1][0])


@pytest.mark.parametrize("name", KINDS)
def test_keeping_all_is_bit_equal_and_nothing_is_left(name: str) -> None:
    model = made(name)
    run(name, output_hidden_states=True)  # transformers installs its own hooks once
    before, names = run(name), {n: set(vars(m)) for n, m in model.named_modules()}
    hooks = hooks_of(model)
    mapping = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for method in ("random", "hf_cls"):
        with vtc.attach(model, method, keep=1.0, at="vision.1", mass=1.0):
            assert torch.equal(pooled(run(name)), pooled(before))
    with (
        pytest.raises(RuntimeError, match="boom"),
        vtc.attach(model, "hf_cls", keep=0.5, at="vision.1", mass=1.0),
    ):
        run(name)
        raise RuntimeError("boom")
    assert torch.equal(pooled(run(name)), pooled(before))
    assert {n: set(vars(m)) for n, m in model.named_modules()} == names
    assert hooks_of(model) == hooks
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == mapping


def test_a_forward_that_fails_does_not_disturb_the_next_one() -> None:
    model, x = made("vit"), images("vit")
    with torch.no_grad(), vtc.attach(model, "norm", keep=0.25, at="vision.1"):
        wanted = pooled(model(x))
        handle = model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
        assert torch.equal(pooled(model(x)), wanted)
        with pytest.raises(InvalidInput, match="NaN"):
            model(x * float("nan"))
        with pytest.raises(InvalidInput, match="empty batch"):
            model(x[:0])
        assert torch.equal(pooled(model(x)), wanted)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_dual_encoders(name: str) -> None:
    """Both ways to an image's embedding, against the image encoder alone; text is not touched."""
    torch.manual_seed(0)
    model = getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**DUAL)).eval()
    x = torch.randn(3, 3, 32, 32)
    ids = torch.tensor([[3, 4, 5, 1], [6, 7, 8, 1]])
    at = f"vision.{DROP}"
    with torch.no_grad():
        plain = model(pixel_values=x, input_ids=ids)
        with vtc.attach(model, "norm", keep=0.25, at=at) as session:
            out = model(pixel_values=x, input_ids=ids)
            features = model.get_image_features(pixel_values=x)
            bare = model.get_image_features(pixel_values=x, return_dict=False)
            text = model.get_text_features(input_ids=ids).pooler_output
        assert len(session.trace) == 3 and "get_image_features" not in vars(model)
        assert text.equal(model.get_text_features(input_ids=ids).pooler_output)
        with vtc.attach(model.vision_model, "norm", keep=0.25, at=at):
            alone = model.get_image_features(pixel_values=x)
    assert torch.equal(out.text_embeds, plain.text_embeds)
    assert torch.equal(features.pooler_output, alone.pooler_output)
    unit = features.pooler_output / features.pooler_output.norm(dim=-1, keepdim=True)
    close(out.image_embeds, unit)
    assert torch.equal(bare[0], features.last_hidden_state) and type(bare) is tuple
    assert torch.equal(bare[1], features.pooler_output)
    whole = out.vision_model_output.last_hidden_state
    assert torch.equal(whole, alone.last_hidden_state)
    assert whole.shape == plain.vision_model_output.last_hidden_state.shape
    assert whole[:, -16:].any(-1).sum(1).tolist() == [4, 4, 4]


def test_what_is_called_from_outside_returns_whole_grids() -> None:
    model, x = made("vit_class"), images("vit_class")
    with torch.no_grad(), vtc.attach(model, "norm", keep=0.25, at="vision.0"):
        named = model(x, output_hidden_states=True)
        bare = model(x, output_hidden_states=True, return_dict=False)
        inner = model.vit(x)
    assert type(bare) is tuple and torch.equal(bare[0], named.logits)
    assert all(torch.equal(a, b) for a, b in zip(bare[1], named.hidden_states, strict=True))
    assert inner.last_hidden_state.shape == (3, 25, 32)
    assert inner.last_hidden_state.any(-1).sum(1).tolist() == [7, 7, 7]
    assert {h.shape for h in named.hidden_states} == {(3, 25, 32)}
    single = model(x, output_hidden_states=[-2])
    with torch.no_grad(), vtc.attach(model, "norm", keep=0.25, at="vision.3"):
        chosen = model(x, output_hidden_states=[-2])
    assert chosen.hidden_states[-2].equal(single.hidden_states[-2])
    assert chosen.hidden_states[-1] is None


def test_attention_maps_are_refused_when_short() -> None:
    model = made("vit")
    model.set_attn_implementation("eager")
    x = images("vit")
    try:
        with torch.no_grad(), vtc.attach(model, "norm", keep=0.25, at="vision.1"):
            with pytest.raises(UnsupportedModel, match="without output_attentions"):
                model(x, output_attentions=True)
            assert model(x).last_hidden_state.shape == (3, 25, 32)
        with torch.no_grad(), vtc.attach(model, "norm", keep=1.0, at="vision.1"):
            assert model(x, output_attentions=True).attentions[3].shape == (3, 2, 25, 25)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ["clip", "vit_class", "deit_class", "dinov3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_uneven_numbers_where_a_prefix_token_is_pooled(name: str, implementation: str) -> None:
    model, x = made(name), images(name)
    options: dict[str, Any] = {"keep": "auto", "at": f"vision.{DROP}", "mass": 0.5}
    model.set_attn_implementation(implementation)
    try:
        with torch.no_grad(), vtc.attach(model, "hf_uneven", merge="nearest", **options) as session:
            together = run(name, output_hidden_states=True)
            assert len(set(session.trace[-1].n_out)) > 1
            for i in range(3):
                alone = run(name, x=x[i : i + 1], output_hidden_states=True)
                close(pooled(together)[i], pooled(alone)[0])
                close(together.hidden_states[-1][i], alone.hidden_states[-1][0])
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ["siglip", "siglip_mean", "clip_mean", "dinov2_class", "ijepa"])
def test_uneven_numbers_are_refused_where_all_tokens_are_pooled(name: str) -> None:
    model, x = made(name), images(name)
    with vtc.attach(model, "hf_uneven", keep="auto", at="vision.1"):
        with torch.no_grad():
            with pytest.raises(UnsupportedModel, match="pools all of them"):
                run(name)
            assert pooled(run(name, x=x[:1])).isfinite().all()
        with pytest.raises(UnsupportedModel, match=r"under torch\.no_grad"):
            run(name)


def test_a_mask_of_the_caller_stays_in_force() -> None:
    model, x = made("vit"), images("vit")
    mask = torch.ones(3, 25, dtype=torch.long)
    mask[1, 5:15] = 0
    with torch.no_grad(), vtc.attach(model, "norm", keep=0.5, at=f"vision.{DROP}") as session:
        ours = model(x, attention_mask=mask)
    with torch.no_grad(), masked(model, kept("vit", session.trace[-1])):
        close(pooled(ours), pooled(model(x, attention_mask=mask)))


@pytest.mark.parametrize("name", ["clip", "dinov2_class", "dinov3", "siglip"])
def test_gradients_also_with_checkpointing(name: str) -> None:
    model = KINDS[name].make().train()
    options: dict[str, Any] = {"keep": 0.5, "at": "vision.2", "merge": "nearest"}
    options["mass"] = 0.0 if name == "siglip" else 1.0  # its attention takes no keywords
    if name == "dinov3":
        for part in ("shift", "jitter", "rescale"):  # else training draws positions
            setattr(model.config, f"pos_embed_{part}", None)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        x = images(name).requires_grad_()
        with vtc.attach(model, "hf_cls", **options):
            output = run(name, model, x, output_hidden_states=True)
            pooled(output).square().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, again in zip(*grads, strict=True):
        close(plain, again)


def test_mass_that_checkpointing_cannot_replay_is_refused() -> None:
    model = KINDS["siglip"].make().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with (
        vtc.attach(model, "norm", keep=0.5, at="vision.1", mass=1.0),
        pytest.raises(UnsupportedModel, match="cannot replay mass"),
    ):
        run("siglip", model)


@pytest.mark.parametrize("name", KINDS)
def test_low_precision(name: str) -> None:
    low = KINDS[name].make().eval().bfloat16()
    options: dict[str, Any] = {"at": "vision.2", "merge": "nearest", "mass": 1.0}
    with torch.no_grad(), vtc.attach(low, "hf_cls", keep=0.5, **options):
        output = pooled(run(name, low, images(name).bfloat16()))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


@pytest.mark.parametrize("name", ["clip", "siglip", "registers_class", "dinov3"])
def test_alone_equals_in_a_batch_and_in_threads(name: str) -> None:
    model, x = made(name), images(name)
    with torch.no_grad(), vtc.attach(model, "hf_cls", keep=0.25, at="vision.1", mass=1.0):
        together = pooled(run(name))
        alone = torch.cat([pooled(run(name, x=x[i : i + 1])) for i in range(3)])

        def work(one: Tensor) -> Tensor:
            with torch.no_grad():
                return pooled(run(name, x=one[None]))

        results = in_threads([partial(work, one) for one in x])
    close(alone, together)
    assert torch.equal(torch.cat(results), alone)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2_class", "dinov3"])
def test_compile_without_graph_breaks(name: str) -> None:
    model = made(name)
    options: dict[str, Any] = {"keep": 0.25, "at": "vision.2", "merge": "nearest", "mass": 1.0}
    call, x = partial(model, **KINDS[name].call), images(name)
    with torch.no_grad(), vtc.attach(model, "hf_cls", **options):
        eager = pooled(call(x))
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        close(pooled(compiled(x)), eager)
    torch._dynamo.reset()


def test_report_counts_the_encoder() -> None:
    model = made("vit")
    with torch.no_grad(), vtc.attach(model, "random", keep=0.25, at=f"vision.{DROP}") as session:
        run("vit")
    weights = 4 * 32 * 32 + 2 * 32 * 48
    dense, short = (2 * weights * n + 4 * 32 * n * n for n in (25, 7))
    stats = session.stats()
    assert stats["flops_dense"] == 3 * 4 * dense and stats["flops"] == 3 * 2 * (dense + short)
    assert stats["sites"][0]["tokens_out"] == 18 and "image encoder:" in session.report()
    assert "random            at vision.0 and later" in str(vtc.describe(model))


def small(name: str, config: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, name)(getattr(hf, config)(**options))


SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
DPT = TINY | {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4}
DPT |= {"fusion_hidden_size": 8, "is_hybrid": False}
D2V = "Data2VecVisionConfig"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "swin": (small("SwinModel", "SwinConfig", **SWIN), "reshaped_hidden_states"),
    "convnext": (
        small("ConvNextModel", "ConvNextConfig", hidden_sizes=[8] * 4, depths=[1] * 4),
        r"blocks with attention \(this one has none\)",
    ),
    "depth": (small("DPTForDepthEstimation", "DPTConfig", **DPT), "predicted_depth"),
    "segmentation": (small("DPTForSemanticSegmentation", "DPTConfig", **DPT), r"neck\."),
    "detection": (small("YolosForObjectDetection", "YolosConfig", **WIDE), "pred_boxes"),
    "more_tokens": (small("YolosModel", "YolosConfig", **WIDE), "detection_tokens"),
    "backbone": (small("Dinov2Backbone", "Dinov2Config", **TINY), "feature_maps"),
    "masked_images": (small("ViTForMaskedImageModeling", "ViTConfig", **TINY), "reconstruction"),
    "masked_patches": (small("BeitForMaskedImageModeling", "BeitConfig", **TINY), "masked patches"),
    "mae": (small("ViTMAEModel", "ViTMAEConfig", **TINY), "mask_ratio"),
    "pair_bias": (
        small("BeitModel", "BeitConfig", **TINY, use_relative_position_bias=True),
        "relative_position_bias_table",
    ),
    "data2vec": (small("Data2VecVisionModel", D2V, **TINY), "these read relative_position_bias"),
    "naflex": (
        small("Siglip2VisionModel", "Siglip2VisionConfig", **TINY, num_patches=16),
        "spatial_shapes",
    ),
    "text": (small("CLIPTextModel", "CLIPTextConfig", **TEXT), "makes patches"),
    "video": (small("VivitModel", "VivitConfig", **TINY | {"num_frames": 4}), "2-D convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name_and_reason(name: str) -> None:
    make, words = REFUSED[name]
    model = make()
    with pytest.raises(UnsupportedModel, match=words) as error:
        vtc.attach(model, "random", keep=0.5, at="vision.1")
    assert type(model).__name__ in str(error.value)


def test_errors() -> None:
    model, x = made("vit"), images("vit")
    with pytest.raises(UnsupportedSite, match="image encoder without a language model"):
        vtc.attach(model, "random", keep=0.5, at="projector")
    with pytest.raises(UnsupportedSite, match=r"vision\.0 to vision\.3"):
        vtc.attach(model, "random", keep=0.5, at="vision.9")
    with pytest.raises(vtc.VtcError, match=r"read from the block before the site"):
        vtc.attach(model, "hf_cls", keep=0.5, at="vision.0")
    with vtc.attach(model, "hf_cls", keep=0.5, at="vision.1", mass=1.0, strict=False):
        with pytest.raises(UnsupportedModel, match="already attached"):
            vtc.attach(model, "random", keep=0.5, at="vision.1")
        tokens = model.embeddings(x)
        assert torch.equal(model.layers[3](tokens), model.layers[3](tokens))  # a block alone
        model.set_attn_implementation("eager")
        try:
            with pytest.raises(vtc.VtcError, match="implementation changed after attach"):
                model(x)
        finally:
            model.set_attn_implementation("sdpa")
    clip = made("clip")
    with vtc.attach(clip, "random", keep=0.5, at="vision.1", strict=False):
        with pytest.raises(UnsupportedModel, match="convolution made no patches"):
            clip.encoder(torch.randn(2, 17, 32))
        assert pooled(run("clip")).shape == (3, 32)


@pytest.mark.parametrize("name", ["registers_class", "clip", "siglip_mean"])
def test_forward_and_interrupts(name: str) -> None:
    """A direct `forward` is a call like any other; a KeyboardInterrupt leaves nothing behind."""
    model, x = made(name), images(name)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), vtc.attach(model, "hf_cls", keep=0.5, at="vision.1", mass=1.0):
        called = pooled(run(name))
        direct = model.forward(pixel_values=x, **KINDS[name].call)
        assert torch.equal(pooled(direct), called)
        handle = blocks_of(model)[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(name)
        handle.remove()
        assert torch.equal(pooled(run(name)), called)
    with torch.no_grad(), vtc.attach(model, "hf_cls", keep=0.5, at="vision.1"):
        plain = pooled(run(name))
        assert torch.equal(pooled(run(name)), plain) and not torch.equal(plain, called)


def test_one_session_for_a_tower_and_the_model_that_holds_it() -> None:
    from vtc.testing import families

    model = families.make("llava").model
    tower = model.model.vision_tower
    for first, second in ((model, tower), (tower, model)):
        with (
            vtc.attach(first, "random", keep=0.5, at="vision.1", strict=False),
            pytest.raises(UnsupportedModel, match="already attached"),
        ):
            vtc.attach(second, "random", keep=0.5, at="vision.1")
