"""A slow reference: every token stays, dropped tokens are masked.

The whole sequence is recomputed for every generated token, without a cache, at full length and
with the positions of the complete prompt.  Only the modules of the model are used (embeddings,
vision tower, decoder layers, final norm, head); the masks are built here, as 4-D float tensors.

A *stage* is ``"projector"`` (the input embeddings, before decoder layer 0) or an int ``i`` (the
input of decoder layer ``i``).  All columns are columns of the original prompt, padding included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import IMAGE, VIDEO, Family

Stage = str | int


@dataclass(frozen=True)
class Prompt:
    """The prompt after the merge of text and vision."""

    embeds: Tensor  # [B, L, C]
    valid: Tensor  # [B, L] bool, False at padding
    positions: Tensor  # [B, L], or [3, B, L] for multimodal RoPE
    blocks: Tensor  # [B, L] tokens with equal non-negative numbers see each other both ways
    deepstack: tuple[Tensor, ...]  # [B, L, C] for each of the first layers, 0 at text
    sample: Tensor  # [B, L] number of the sample that a column belongs to, 0 without packing


@dataclass(frozen=True)
class Plan:
    """What happens at each stage; stages are layer numbers here."""

    keep: Mapping[int, Tensor]  # [B, L] bool
    bias: Mapping[int, Tensor]  # [B, L]
    mix: Mapping[int, Tensor]  # [B, L, L]
    mix_deepstack: bool
    evict: Mapping[int, Tensor] = field(default_factory=dict)  # [B, L] or [B, steps, L] bool
    seen: Mapping[str, Tensor] = field(default_factory=dict)  # [B, L, L] bool


def run(
    family_or_model: Family | PreTrainedModel,
    inputs: Mapping[str, Tensor],
    *,
    keep: Mapping[Stage, Tensor] | None = None,
    bias: Mapping[Stage, Tensor] | None = None,
    mix: Mapping[Stage, Tensor] | None = None,
    evict: Mapping[int, Tensor] | None = None,
    steps: int | None = None,
    forced: Tensor | None = None,
    all_rows: bool = False,
    mix_deepstack: bool = False,
    seen: Mapping[str, Tensor] | None = None,
    grad: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Greedy (or teacher-forced) decoding; returns the logits of every step and the tokens.

    inputs: without `attention_mask` every column is real; `position_ids` [B, L] that start again
            pack several samples into a row (one step).
    keep:   {stage: [B, L] bool}, prompt columns that stay visible from that stage on.  Stages
            add up (AND), also with the padding.
    bias:   {stage: [B, L] float}, added to the attention logits of these key columns in all
            heads, until the next stage that has a bias.  Generated tokens have bias 0.
    mix:    {stage: [B, L, L] float}, prompt hidden states h become ``mix @ h`` at that stage.
    evict:  {layer: [B, L] or [B, steps, L] bool}, prompt columns that the queries of generated
            tokens still see at this one layer; prompt queries see what `keep` allows.  With 3
            dimensions the t-th generated token (fed in forward t + 1) sees `[:, t]`.
    steps:  number of tokens, by default 8 or as many as `forced` has.
    forced: [B, steps] tokens to feed instead of the most likely ones.
    all_rows: each logits entry is [B, L + step, V] instead of [B, V].  Needed for right padding.
    mix_deepstack: later deepstack features are mixed as well (a merged token then gets the
            average feature instead of the feature at its own column).
    seen:   {kind of layer: [B, L, L] bool}, what every column sees of the others, in place of
            causality, windows, chunks, blocks and padding (one step).
    grad:   record gradients.
    """
    model = family_or_model.model if isinstance(family_or_model, Family) else family_or_model
    text = text_model(model)
    if forced is not None and steps is not None and forced.shape[1] < steps:
        raise ValueError(f"{steps} steps need as many forced tokens, got {forced.shape[1]}")
    if steps is None:
        steps = 8 if forced is None else forced.shape[1]
    refuse_hooks(model, text)
    plan = Plan(
        by_layer(keep, torch.logical_and),
        by_layer(bias, lambda _, later: later),
        by_layer(mix, lambda first, later: later @ first),
        mix_deepstack,
        evict or {},
        seen or {},
    )
    logits: list[Tensor] = []
    tokens: list[Tensor] = []
    with torch.set_grad_enabled(grad), eager(text):
        prompt = encode(model, inputs)
        _check(plan, prompt, len(text.layers), steps, all_rows)
        generated = prompt.embeds[:, :0]  # [B, t, C]
        for step in range(steps):
            hidden = forward(model, text, prompt, generated, plan)  # [B, L + t, C]
            scores = head(model, hidden if all_rows else hidden[:, -1])
            logits.append(scores)
            last = scores[:, -1] if all_rows else scores  # [B, V]
            token = last.argmax(-1) if forced is None else forced[:, step]  # [B]
            tokens.append(token)
            embed = model.get_input_embeddings()(token)[:, None]
            generated = torch.cat([generated, embed], 1)
    return logits, torch.stack(tokens, 1)


def encode(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Prompt:
    """Merge text and vision and collect everything that depends on the whole prompt."""
    base = model.model
    ids = inputs["input_ids"]  # [B, L]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    embeds = model.get_input_embeddings()(ids)  # [B, L, C]
    deepstack: dict[int, Tensor] = {}
    for token, features, deep in _vision(base, inputs):
        place = ids == token
        features = features.to(embeds.dtype)
        if model.config.model_type == "molmo2":  # adds them to the embedding of the placeholder
            features = features + embeds[place]
        embeds = embeds.masked_scatter(place[..., None], features)
        for i, feature in enumerate(deep):
            dense = deepstack.get(i, torch.zeros_like(embeds))
            deepstack[i] = dense.masked_scatter(place[..., None], feature.to(embeds.dtype))
    return Prompt(
        embeds,
        valid,
        _positions(model, inputs),
        _blocks(model, inputs),
        tuple(deepstack[i] for i in sorted(deepstack)),
        _samples(inputs),
    )


def forward(
    model: PreTrainedModel, text: Any, prompt: Prompt, generated: Tensor, plan: Plan
) -> Tensor:
    """One pass over the prompt and the generated tokens; the normed states, [B, L + t, C]."""
    batch, length = prompt.valid.shape
    extra = generated.shape[1]
    hidden = torch.cat([prompt.embeds, generated], 1)
    # The last prompt column is never padding when something was generated, see _check.
    following = prompt.positions[..., -1:] + torch.arange(1, extra + 1)
    positions = torch.cat([prompt.positions, following], -1)  # [B, L + t] or [3, B, L + t]
    visible = prompt.valid  # [B, L]
    bias = torch.zeros(batch, length)
    deepstack = list(prompt.deepstack)
    rope = _rope(text, hidden, positions)
    near = {kind: _near(text, kind, prompt, extra) for kind in _kinds(text)}
    for i, layer in enumerate(text.layers):
        if i in plan.keep:
            visible = visible & plan.keep[i]
        if i in plan.bias:
            bias = plan.bias[i]
        if i in plan.mix:
            matrix = plan.mix[i].to(hidden.dtype)
            hidden = torch.cat([matrix @ hidden[:, :length], hidden[:, length:]], 1)
            if plan.mix_deepstack:
                deepstack = [d if j < i else matrix @ d for j, d in enumerate(deepstack)]
        kind = _kind(text, i)
        mask = _mask(
            nn.functional.pad(visible, (0, extra), value=True),
            nn.functional.pad(bias, (0, extra)),
            nn.functional.pad(prompt.blocks, (0, extra), value=-1),
            near[kind],
            hidden.dtype,
            _visible_later(plan, i, extra),
            plan.seen.get(kind),
        )
        cos_sin = rope[text.config.layer_types[i]] if isinstance(rope, dict) else rope
        out = layer(hidden, attention_mask=mask, position_embeddings=cos_sin)
        hidden = out[0] if isinstance(out, tuple) else out
        if i < len(deepstack):
            hidden = hidden + nn.functional.pad(deepstack[i], (0, 0, 0, extra))
    return text.norm(hidden)


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Vocabulary logits."""
    logits = model.lm_head(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def text_model(model: PreTrainedModel) -> Any:
    """The module that owns the decoder layers."""
    base = model.model
    return base.language_model if hasattr(base, "language_model") else base.text_model


@contextmanager
def eager(text: Any) -> Iterator[None]:
    """Use the plain attention of the model file, whatever attention the model was built with."""
    config = text.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def refuse_hooks(model: PreTrainedModel, text: Any) -> None:
    """A reference that runs through somebody's hooks is none."""
    patchable = {"forward", "get_image_features", "get_video_features"}
    for module in (model, model.model, *text.modules()):
        if module._forward_pre_hooks or patchable & vars(module).keys():
            raise RuntimeError(f"{type(module).__name__} is patched: use an untouched model")


def by_layer(
    given: Mapping[Stage, Tensor] | None, join: Callable[[Tensor, Tensor], Tensor]
) -> dict[int, Tensor]:
    """Replace "projector" by layer 0, joining it with what is given for layer 0."""
    merged: dict[int, Tensor] = {}
    given = given or {}
    for stage in sorted(given, key=lambda s: -1 if s == "projector" else s):
        layer = 0 if stage == "projector" else int(stage)
        value = given[stage]
        merged[layer] = join(merged[layer], value) if layer in merged else value
    return merged


def _check(plan: Plan, prompt: Prompt, layers: int, steps: int, all_rows: bool) -> None:
    batch, length = prompt.valid.shape
    for name, given in (("keep", plan.keep), ("bias", plan.bias)):
        for i, value in given.items():
            if value.shape != (batch, length):
                raise ValueError(f"{name}[{i}] must be {(batch, length)}, got {value.shape}")
    if any(k.dtype != torch.bool for k in (*plan.keep.values(), *plan.evict.values())):
        raise ValueError("keep and evict masks must be bool")
    for i, value in plan.evict.items():
        middle = value.shape[1:-1]  # () or (steps,)
        fits = value.ndim in (2, 3) and all(n >= steps - 1 for n in middle)
        if not fits or value.shape != (batch, *middle, length):
            raise ValueError(f"evict[{i}] must be {(batch, length)} or {(batch, steps, length)}")
    if any(m.shape != (batch, length, length) for m in plan.mix.values()):
        raise ValueError(f"mix matrices must be {(batch, length, length)}")
    if any(not 0 <= i < layers for i in (*plan.keep, *plan.bias, *plan.mix, *plan.evict)):
        raise ValueError(f"stages must be 'projector' or 0..{layers - 1}")
    if steps > 1 and (plan.seen or bool(prompt.sample.any())):
        raise ValueError("packed samples and given masks need steps=1")
    right_padded = not bool(prompt.valid[:, -1].all())
    if right_padded and (steps > 1 or not all_rows):
        raise ValueError("right-padded prompts need all_rows=True and steps=1")
    if not right_padded and any(not bool(k[:, -1].all()) for k in plan.keep.values()):
        raise ValueError("the last prompt column must be kept")


def _vision(
    base: nn.Module, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """Placeholder id, features [n, C] and deepstack features [n, C] per modality."""
    sources = (
        (IMAGE, "get_image_features", ("pixel_values", "image_grid_thw", "image_sizes")),
        (VIDEO, "get_video_features", ("pixel_values_videos", "video_grid_thw")),
    )
    if "video_grids" in inputs:
        names = ("pixel_values_videos", "video_token_pooling", "video_grids")
        sources = ((IMAGE, "get_video_features", names),)
    for token, method, names in sources:
        if names[0] not in inputs:
            continue
        args = [inputs[name] for name in names if name in inputs]
        out = getattr(base, method)(*args, return_dict=True)
        deep = getattr(out, "deepstack_features", None) or []
        features = out.pooler_output
        missing = int((inputs["input_ids"] == token).sum()) - len(_rows(features))
        if missing:  # before transformers 5.19 LLaVA-OneVision ends videos with a newline later on
            newline: Any = base.image_newline
            newline = newline.expand(missing, 1, -1)
            features = torch.cat([features, newline.to(features.dtype)], 1)
        yield token, _rows(features), [_rows(d) for d in deep]


def _rows(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    if isinstance(features, Tensor):
        return features.flatten(0, -2)  # [n, C]
    return torch.cat([f.flatten(0, -2) for f in features])


def _positions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    if "position_ids" in inputs:
        return inputs["position_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    if hasattr(model.model, "get_rope_index"):
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            attention_mask=mask,
        )
        return positions  # [3, B, L]
    first = 1 if model.config.model_type == "paligemma" else 0
    return (mask.cumsum(1) - 1).clamp(min=0) + first  # [B, L]


def _blocks(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Numbers of the bidirectional blocks, -1 for causal tokens."""
    ids = inputs["input_ids"]
    blocks = torch.full_like(ids, -1)
    types = inputs.get("token_type_ids")
    if model.config.model_type == "paligemma" and types is not None:
        blocks[types == 0] = 0  # the whole prompt
    if model.config.model_type == "molmo2":
        blocks[inputs["mm_token_type_ids"] == 1] = 0  # all frames are one block
    if model.config.model_type == "gemma3" and types is not None:
        for b in range(ids.shape[0]):
            number, inside = -1, False
            for j in range(ids.shape[1]):
                image = bool(types[b, j] == 1)
                number += int(image and not inside)
                inside = image
                if image:
                    blocks[b, j] = number
    return blocks  # [B, L]


def _rope(
    text: Any, hidden: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor] | dict[str, tuple[Tensor, Tensor]]:
    """(cos, sin), or one pair for every layer type."""
    if text.config.model_type == "gemma3_text":
        kinds = sorted(set(text.config.layer_types))
        return {kind: text.rotary_emb(hidden, positions, kind) for kind in kinds}
    return text.rotary_emb(hidden, positions)


def _samples(inputs: Mapping[str, Tensor]) -> Tensor:
    """Packed samples begin where positions fall."""
    sample = torch.zeros_like(inputs["input_ids"])
    if "position_ids" in inputs:
        line = inputs["position_ids"]
        for j in range(1, line.shape[1]):
            sample[:, j] = sample[:, j - 1] + (line[:, j] < line[:, j - 1]).long()
    return sample  # [B, L]


def _kind(text: Any, layer: int) -> str:
    kinds = getattr(text.config, "layer_types", None)
    return "full_attention" if kinds is None else kinds[layer]


def _kinds(text: Any) -> set[str]:
    return {_kind(text, i) for i in range(len(text.layers))}


def _near(text: Any, kind: str, prompt: Prompt, extra: int) -> Tensor:
    """Where window, chunk and sample of a layer let a query see a key, [B, T, T]."""
    sample = nn.functional.pad(prompt.sample, (0, extra))
    # Columns count from the first real one of their own sample.
    columns = []
    for b, ids in enumerate(sample.tolist()):
        count, row = -int(prompt.valid[b].long().argmax()), []
        for j, mine in enumerate(ids):
            if j and mine != ids[j - 1]:
                count = 0
            row.append(count)
            count += 1
        columns.append(row)
    column = torch.tensor(columns)
    query, key = column[:, :, None], column[:, None, :]
    near = sample[:, :, None] == sample[:, None, :]
    if kind == "sliding_attention":
        near = near & (query - key < text.config.sliding_window)
    if kind == "chunked_attention":
        size = text.config.attention_chunk_size
        near = near & (
            query.div(size, rounding_mode="floor") == key.div(size, rounding_mode="floor")
        )
    return near


def _visible_later(plan: Plan, layer: int, extra: int) -> Tensor | None:
    """Prompt columns that each generated token sees at a layer, [B, t, L]."""
    if layer not in plan.evict:
        return None
    left = plan.evict[layer]
    return left[:, :extra] if left.ndim == 3 else left[:, None].expand(-1, extra, -1)


def _mask(
    visible: Tensor,
    bias: Tensor,
    blocks: Tensor,
    near: Tensor,
    dtype: torch.dtype,
    later: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Additive mask [B, 1, T, T] from key visibility, key bias and the block numbers.

    near: [B, T, T], what is not out of reach. later: [B, t, L], further limits the prompt keys of
    the last t = T - L queries. given: [B, T, T], in place of all but `visible` and `bias`.
    """
    total = visible.shape[1]
    index = torch.arange(total)
    query, key = index[:, None], index[None, :]
    same_block = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0)
    allowed = ((key <= query) | same_block) & near if given is None else given  # [B, T, T]
    allowed = allowed & visible[:, None, :]
    if later is not None:
        extra, length = later.shape[1:]
        allowed = allowed & nn.functional.pad(later, (0, extra, length, 0), value=True)
    # A masked token may look at itself: nobody reads it, and no row is empty.
    allowed = allowed | torch.eye(total, dtype=torch.bool)
    scores = bias[:, None, :].to(dtype).expand(-1, total, -1)
    return scores.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
