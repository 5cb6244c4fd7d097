"""The references themselves: they agree with the untouched models, with each other and with
dropping by hand, and they notice small mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vtc.testing import families, maskref, oracle, towerref, trace

TOLERANCE = 1e-4  # fp32 logits, standard deviation about 1
NOTICED = 10 * TOLERANCE  # a deliberate mistake has to be at least this large
STEPS = 6


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generate(family: families.Family, inputs: families.Inputs, **options):
    """Greedy by default; (logits per step, new tokens, full output)."""
    out = family.model.generate(
        **inputs,
        max_new_tokens=STEPS,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.logits, out.sequences[:, inputs["input_ids"].shape[1] :], out


def worst(a: list[Tensor] | tuple[Tensor, ...], b: list[Tensor] | tuple[Tensor, ...]) -> float:
    """Largest difference over all steps."""
    assert len(a) == len(b)
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def random_keep(visual: Tensor, share: float, seed: int) -> Tensor:
    """All text and about `share` of the visual tokens, [B, L]."""
    gen = torch.Generator().manual_seed(seed)
    return (torch.rand(visual.shape, generator=gen) < share) | ~visual


def pyramid(family: families.Family, inputs: families.Inputs) -> dict[oracle.Stage, Tensor]:
    visual = family.visual(inputs)
    shares: dict[oracle.Stage, float] = {"projector": 0.7, 1: 0.6, 2: 0.6, 3: 0.4}
    return {s: random_keep(visual, p, seed) for seed, (s, p) in enumerate(shares.items())}


def everything_but(inputs: families.Inputs, row: int, column: int) -> Tensor:
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    keep[row, column] = False
    return keep


# --------------------------------------------------------------------------------------------
# families


@pytest.mark.parametrize("name", families.FAMILIES)
def test_row_alone_equals_row_in_batch(name: str) -> None:
    family = families.make(name)
    together, tokens, _ = generate(family, family.inputs)
    for row in range(2):
        single = family.single(row)
        assert single["attention_mask"].all()
        alone, alone_tokens, _ = generate(family, single)
        assert worst([x[row : row + 1] for x in together], alone) < TOLERANCE
        assert torch.equal(tokens[row : row + 1], alone_tokens)
        again = families.make(name, row=row).inputs
        assert again.keys() == single.keys()
        assert all(torch.equal(again[k], single[k]) for k in again)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_default_batch_is_ragged(name: str) -> None:
    family = families.make(name)
    mask, visual = family.inputs["attention_mask"], family.visual()
    assert not mask[0, 0] and mask[:, -1].all()
    assert 0 < visual[0].sum() < visual[1].sum()
    config = family.model.config.get_text_config()
    assert (config.num_hidden_layers, config.hidden_size) == (4, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert not family.model.training


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("images", [(0, 3), (0, 0), (2, 0, 1)])
def test_images_per_row(name: str, images: tuple[int, ...]) -> None:
    family = families.make(name, images_per_row=images)
    visual = family.visual()
    assert [bool(v.any()) for v in visual] == [n > 0 for n in images]
    with torch.no_grad():
        together = family.model(**family.inputs).logits[:, -1]
        for row in range(len(images)):
            alone = family.model(**family.single(row)).logits[:, -1]
            assert worst([together[row : row + 1]], [alone]) < TOLERANCE


def test_make_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = families.make("qwen3_vl"), families.make("qwen3_vl")
    assert torch.equal(torch.get_rng_state(), state)
    weights = second.model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in first.model.state_dict().items())
    assert all(torch.equal(v, second.inputs[k]) for k, v in first.inputs.items())
    other = families.make("qwen3_vl", seed=2, data_seed=1)
    assert not torch.equal(other.model.lm_head.weight, first.model.lm_head.weight)
    assert not torch.equal(other.inputs["pixel_values"], first.inputs["pixel_values"])


@pytest.mark.parametrize("name", families.NAMED)
def test_bfloat16_keeps_the_positions_exact(name: str) -> None:
    family = families.make(name, dtype=torch.bfloat16)
    assert {p.dtype for p in family.model.parameters()} == {torch.bfloat16}
    buffers = dict(oracle.text_model(family.model).rotary_emb.named_buffers())
    assert {b.dtype for b in buffers.values()} == {torch.float32}
    reference = families.make(name)
    with torch.no_grad():
        low = family.model(**family.inputs).logits[:, -1].float()
        high = reference.model(**reference.inputs).logits[:, -1]
    assert (low - high).abs().mean() < 0.1 * high.std()


# --------------------------------------------------------------------------------------------
# the oracle without drops


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_oracle_equals_generate_when_nothing_is_dropped(name: str, attn: str) -> None:
    family = families.make(name, attn)
    logits, tokens, _ = generate(family, family.inputs)
    expected, expected_tokens = oracle.run(family, family.inputs, steps=STEPS)
    assert worst(logits, expected) < TOLERANCE
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_oracle_rows_and_gradients_equal_training_with_right_padding(name: str) -> None:
    family = families.make(name, padding="right")
    inputs = family.labelled()
    weights = dict(family.model.named_parameters())
    out = family.model(**inputs)
    out.loss.backward()
    grads = {k: p.grad for k, p in weights.items() if p.grad is not None}
    family.model.zero_grad()
    (rows,), _ = oracle.run(family, inputs, steps=1, all_rows=True, grad=True)
    real = inputs["attention_mask"].bool()
    assert worst([out.logits[real]], [rows[real]]) < TOLERANCE
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    loss = torch.nn.functional.cross_entropy(rows.flatten(0, 1), shifted.flatten())
    loss.backward()
    assert abs(loss.item() - out.loss.item()) < TOLERANCE
    assert any("vision" in k or "visual" in k for k in grads)
    for key, grad in grads.items():
        assert torch.allclose(weights[key].grad, grad, atol=1e-4, rtol=1e-3), key


# --------------------------------------------------------------------------------------------
# the two references agree on drops and biases


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_masked_model_equals_oracle(name: str, attn: str) -> None:
    family = families.make(name, attn)
    keep = pyramid(family, family.inputs)
    gen = torch.Generator().manual_seed(9)
    shape = family.inputs["input_ids"].shape
    stages: tuple[oracle.Stage, ...] = ("projector", 2)
    bias = {stage: torch.randn(shape, generator=gen) for stage in stages}
    with maskref.masked(family.model, keep, bias):
        logits, tokens, _ = generate(family, family.inputs)
    expected, expected_tokens = oracle.run(family, family.inputs, keep=keep, bias=bias, steps=STEPS)
    assert worst(logits, expected) < TOLERANCE
    assert torch.equal(tokens, expected_tokens)


MODES = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 13},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}
MODE_FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "gemma3")


# Assisted decoding takes one row.  A chunk border inside an image changes the bidirectional block
# of gemma3, with and without masks.
MODE_CASES = [
    (name, mode, batch)
    for name in MODE_FAMILIES
    for mode in MODES
    for batch in ("padded", "single")
    if (mode, batch) != ("prompt lookup", "padded")
    and (name, mode) != ("gemma3", "chunked prefill")
]


@pytest.mark.parametrize(("name", "mode", "batch"), MODE_CASES)
def test_greedy_modes_of_the_masked_model(name: str, mode: str, batch: str) -> None:
    family = families.make(name)
    inputs = family.inputs if batch == "padded" else family.single(1)
    keep = pyramid(family, inputs)
    with maskref.masked(family.model, keep):
        logits, tokens, _ = generate(family, inputs, **MODES[mode])
    expected, expected_tokens = oracle.run(family, inputs, keep=keep, steps=STEPS)
    assert worst(logits, expected) < TOLERANCE
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("name", MODE_FAMILIES)
def test_sampling_of_the_masked_model(name: str) -> None:
    family = families.make(name)
    keep = pyramid(family, family.inputs)
    with torch.random.fork_rng(devices=[]), maskref.masked(family.model, keep):
        torch.manual_seed(0)
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
        logits, tokens, _ = generate(family, family.inputs, **options)
    assert not torch.equal(tokens[0], tokens[1])
    for r in range(3):
        expected, _ = oracle.run(family, family.inputs, keep=keep, forced=tokens[r::3])
        assert worst([x[r::3] for x in logits], expected) < TOLERANCE


@pytest.mark.parametrize("name", MODE_FAMILIES)
def test_beam_search_of_the_masked_model(name: str) -> None:
    family = families.make(name)
    keep = pyramid(family, family.inputs)
    with maskref.masked(family.model, keep):
        options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
        _, tokens, out = generate(family, family.inputs, **options)
    for r in range(2):
        forced = tokens[r::2]  # [B, steps]
        logits, _ = oracle.run(family, family.inputs, keep=keep, forced=forced)
        logprobs = torch.stack(logits, 1).log_softmax(-1)  # [B, steps, V]
        scores = logprobs.gather(-1, forced[..., None]).sum((1, 2)) / STEPS
        assert worst([scores], [out.sequences_scores[r::2]]) < TOLERANCE


@pytest.mark.parametrize("name", MODE_FAMILIES)
def test_second_turn_of_the_masked_model(name: str) -> None:
    family = families.make(name)
    first = family.inputs
    keep = pyramid(family, first)
    with maskref.masked(family.model, keep):
        _, _, out = generate(family, first)
        extra = torch.randint(2, 490, (2, 5), generator=torch.Generator().manual_seed(3))
        second = dict(first)
        second["input_ids"] = torch.cat([out.sequences, extra], 1)
        new = STEPS + extra.shape[1]
        second["attention_mask"] = torch.nn.functional.pad(
            first["attention_mask"], (0, new), value=1
        )
        for key in ("mm_token_type_ids", "token_type_ids"):
            if key in first:
                second[key] = torch.nn.functional.pad(first[key], (0, new))
        text_only = {k: v for k, v in second.items() if v.shape == second["input_ids"].shape}
        logits, tokens, _ = generate(family, text_only, past_key_values=out.past_key_values)
    longer = {s: torch.nn.functional.pad(k, (0, new), value=True) for s, k in keep.items()}
    expected, _ = oracle.run(family, second, keep=longer, forced=tokens)
    assert worst(logits, expected) < TOLERANCE


# --------------------------------------------------------------------------------------------
# dropping and merging by hand: the same numbers without any mask


def text_call(family: families.Family, inputs: families.Inputs) -> dict[str, Tensor]:
    """The arguments of the text model in a plain forward."""
    seen: dict[str, Tensor] = {}
    text = oracle.text_model(family.model)
    handle = text.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        family.model(**inputs)
    handle.remove()
    if seen.get("position_ids") is None:
        seen["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    return seen


def by_hand(
    family: families.Family,
    inputs: families.Inputs,
    index: Tensor,
    embeds: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Last logits of one unpadded row of which only the columns `index` [K] are computed."""
    call = text_call(family, inputs)
    embeds = call["inputs_embeds"][:, index] if embeds is None else embeds
    positions = call["position_ids"][..., index] if positions is None else positions
    deep = {}
    if call.get("deepstack_visual_embeds") is not None:
        visual = call["visual_pos_masks"]  # [1, L]
        kept = torch.isin(visual[0].nonzero()[:, 0], index)
        deep["visual_pos_masks"] = visual[:, index]
        deep["deepstack_visual_embeds"] = [d[kept] for d in call["deepstack_visual_embeds"]]
    with torch.no_grad():
        out = oracle.text_model(family.model)(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=torch.ones(1, embeds.shape[1]) if mask is None else mask,
            use_cache=False,
            **deep,
        )
        return family.model.lm_head(out.last_hidden_state[:, -1])


BY_HAND = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")


@pytest.mark.parametrize("name", BY_HAND)
def test_masking_equals_dropping_at_original_positions_only(name: str) -> None:
    family = families.make(name)
    inputs = family.single(1)
    keep = random_keep(family.visual(inputs), 0.4, 5)  # [1, L]
    index = keep[0].nonzero()[:, 0]
    (expected,), _ = oracle.run(family, inputs, keep={"projector": keep}, steps=1)
    assert worst([by_hand(family, inputs, index)], [expected]) < TOLERANCE
    compact = text_call(family, inputs)["position_ids"][..., : len(index)]
    wrong = by_hand(family, inputs, index, positions=compact)
    assert worst([wrong], [expected]) > NOTICED
    shifted = text_call(family, inputs)["position_ids"][..., index].clone()
    shifted[..., len(index) // 2] += 1  # a single token off by one
    wrong = by_hand(family, inputs, index, positions=shifted)
    assert worst([wrong], [expected]) > NOTICED


def causal_bias(columns: Tensor, bias: Tensor) -> Tensor:
    """Additive mask [1, 1, K, K]; equal columns see each other."""
    allowed = columns[None, :] <= columns[:, None]
    mask = bias[None, :].expand(len(columns), -1)
    return mask.masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_mix_and_bias_equal_merging_by_hand(name: str) -> None:
    family = families.make(name)
    inputs = family.single(1)
    visual = family.visual(inputs)[0].nonzero()[:, 0]
    length = inputs["input_ids"].shape[1]
    groups = visual[:12].view(4, 3)  # each group is averaged into its first column
    mix = torch.eye(length)
    mix[groups[:, 0]] = 0
    mix[groups[:, 0].repeat_interleave(3), groups.flatten()] = 1 / 3
    keep = torch.ones(1, length, dtype=torch.bool)
    keep[0, groups[:, 1:].flatten()] = False
    bias = torch.zeros(1, length)
    bias[0, groups[:, 0]] = math.log(3)
    (expected,), _ = oracle.run(
        family,
        inputs,
        keep={"projector": keep},
        mix={"projector": mix[None]},
        bias={"projector": bias},
        steps=1,
    )
    index = keep[0].nonzero()[:, 0]
    merged = (mix @ text_call(family, inputs)["inputs_embeds"])[:, index]
    mask = causal_bias(index, bias[0, index])
    got = by_hand(family, inputs, index, embeds=merged, mask=mask)
    assert worst([got], [expected]) < TOLERANCE
    unbiased = by_hand(family, inputs, index, embeds=merged)
    assert worst([unbiased], [expected]) > NOTICED


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_bias_of_log_n_equals_n_copies(name: str) -> None:
    family = families.make(name)
    inputs = family.single(0)
    column = family.visual(inputs)[0].nonzero()[2, 0]
    length = inputs["input_ids"].shape[1]
    bias = torch.zeros(1, length)
    bias[0, column] = math.log(3)
    (expected,), _ = oracle.run(family, inputs, bias={"projector": bias}, steps=1)
    copies = torch.cat([torch.arange(length), column.repeat(2)]).sort().values
    mask = causal_bias(copies, torch.zeros(len(copies)))
    got = by_hand(family, inputs, copies, mask=mask)
    assert worst([got], [expected]) < TOLERANCE


@pytest.mark.parametrize("name", families.NAMED)
def test_mix_stages(name: str) -> None:
    family = families.make(name)
    batch, length = family.inputs["input_ids"].shape
    identity = torch.eye(length).expand(batch, -1, -1)
    plain, tokens = oracle.run(family, family.inputs, steps=2)
    same, _ = oracle.run(family, family.inputs, mix={"projector": identity, 2: identity}, steps=2)
    assert worst(plain, same) == 0
    last = family.visual()[0].nonzero()[-1, 0]
    average = identity.clone()
    average[0, last, [last - 1, last]] = 0.5
    for stage in ("projector", 1, 3):
        mixed, _ = oracle.run(family, family.inputs, mix={stage: average}, forced=tokens)
        assert all((a[0] - b[0]).abs().max() > TOLERANCE for a, b in zip(plain, mixed, strict=True))
        assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, mixed, strict=True))


def test_mixed_deepstack_features_change_the_result() -> None:
    family = families.make("qwen3_vl")
    batch, length = family.inputs["input_ids"].shape
    average = torch.eye(length).repeat(batch, 1, 1)
    column = family.visual()[0].nonzero()[3, 0]
    average[0, column, [column, column + 1]] = 0.5
    own, _ = oracle.run(family, family.inputs, mix={1: average}, steps=1)
    shared, _ = oracle.run(family, family.inputs, mix={1: average}, steps=1, mix_deepstack=True)
    assert worst(own, shared) > NOTICED
    late = {3: average}  # all three deepstack features were added before
    own, _ = oracle.run(family, family.inputs, mix=late, steps=1)
    shared, _ = oracle.run(family, family.inputs, mix=late, steps=1, mix_deepstack=True)
    assert worst(own, shared) == 0


# --------------------------------------------------------------------------------------------
# dropping and merging inside the tower

# of Molmo2 the contracts of methods inside the tower test both, model and reference
TOWERS = [name for name in families.FAMILIES if name not in ("mistral3", "molmo2")]
PIXELS = ("pixel_values", "pixel_values_videos")


def tower_units(family: families.Family, inputs: families.Inputs) -> list[list[int]]:
    """Units of every tile, image or video, per tower call."""
    tower, _, projector = towerref.parts(family.model)
    grids = [inputs[k] for k in ("image_grid_thw", "video_grid_thw") if k in inputs]
    if grids:
        return [(grid.prod(-1) // 4).tolist() for grid in grids]
    shapes: list[torch.Size] = []
    handle = projector.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    oracle.encode(family.model, inputs)
    handle.remove()
    return [[shape[1]] * shape[0] for shape in shapes]


def on_tokens(
    family: families.Family, inputs: families.Inputs, call: int, units: list[Tensor], tokens: int
) -> Tensor:
    """Values of raster units as values of the tower's tokens [T, N]; 1 at class tokens."""
    tower, _, _ = towerref.parts(family.model)
    if not hasattr(tower, "blocks"):
        side = math.isqrt(tokens)
        square = math.isqrt(len(units[0]))
        s = side // square
        wide = torch.stack(units).view(-1, square, square)
        wide = wide.repeat_interleave(s, 1).repeat_interleave(s, 2).flatten(1)
        return torch.nn.functional.pad(wide, (tokens - side**2, 0), value=1)
    out = []
    grids = inputs["video_grid_thw" if call else "image_grid_thw"]
    for values, (_, h, w) in zip(units, (grids // torch.tensor([1, 2, 2])).tolist(), strict=True):
        order = list(range(len(values)))
        if family.name == "qwen2_5_vl":  # windows of 2 x 2 units
            rows_columns = [(u // (h * w), u // w % h, u % w) for u in order]
            order.sort(key=lambda u: [(t, r // 2, c // 2, r, c) for t, r, c in rows_columns][u])
        out.append(values[order].repeat_interleave(4))
    return torch.cat(out)[None]


def reduce_tower(
    family: families.Family, units: list[list[int]], **given: list[list[Tensor]]
) -> list[list[towerref.TowerReduction]]:
    """One reduction before block 1 in every call; none for the pooled video of llava_onevision."""
    calls = [
        [towerref.TowerReduction(1, **{key: value[call] for key, value in given.items()})]
        for call in range(len(units))
    ]
    return [calls[0], []] if family.name == "llava_onevision" else calls


def some_times(units: list[list[int]]) -> list[list[Tensor]]:
    """How often each unit is there: 0, 1 or 3 times, equally many in equal images."""
    gen = torch.Generator().manual_seed(4)
    pattern = torch.tensor([1, 0, 3, 1, 0])
    return [[pattern[torch.randperm(n, generator=gen) % 5] for n in call] for call in units]


@pytest.mark.parametrize("name", TOWERS)
def test_tower_that_keeps_everything_is_untouched(name: str) -> None:
    family = families.make(name)
    units = tower_units(family, family.inputs)
    keep = [[torch.ones(n, dtype=torch.bool) for n in call] for call in units]
    mix = [[torch.eye(n) for n in call] for call in units]
    plain = oracle.encode(family.model, family.inputs)
    with towerref.masked_tower(family, reduce_tower(family, units, keep=keep, mix=mix)):
        same = oracle.encode(family.model, family.inputs)
    assert torch.equal(plain.embeds, same.embeds)
    assert all(torch.equal(a, b) for a, b in zip(plain.deepstack, same.deepstack, strict=True))
    zero = [[torch.zeros(n) for n in call] for call in units]
    with towerref.masked_tower(family.model, reduce_tower(family, units, keep=keep, bias=zero)):
        same = oracle.encode(family.model, family.inputs)
    assert worst([plain.embeds], [same.embeds]) < TOLERANCE


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWERS)
def test_masked_tower_equals_missing_and_repeated_units(name: str, attn: str) -> None:
    family = families.make(name, attn)
    _, blocks, _ = towerref.parts(family.model)
    units = tower_units(family, family.inputs)
    times = some_times(units)
    keep = [[t > 0 for t in call] for call in times]
    bias = [[t.clamp(min=1).log() for t in call] for call in times]
    calls: list[list[tuple]] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        if module is blocks[0]:
            calls.append([])
        calls[-1].append((module, args, kwargs, out))

    with towerref.masked_tower(family, reduce_tower(family, units, keep=keep, bias=bias)):
        handles = [b.register_forward_hook(record, with_kwargs=True) for b in blocks]
        oracle.encode(family.model, family.inputs)
    for handle in handles:
        handle.remove()
    if name == "llava_onevision":
        del calls[1]
    for call, seen in enumerate(calls):
        packed = "cu_seqlens" in seen[0][2]
        x = seen[0][3][None] if packed else seen[0][3]  # [T, N, C]
        count = on_tokens(family, family.inputs, call, times[call], x.shape[1])  # [T, N]
        place = torch.arange(x.shape[1])
        index = torch.stack([place.repeat_interleave(c) for c in count])  # [T, K]
        rows = torch.arange(len(x))[:, None]
        x = x[rows, index]
        starts = torch.nn.functional.pad(count[0].cumsum(0), (1, 0))
        for module, args, kwargs, _ in seen[1:]:
            changed = dict(kwargs)
            if packed:
                new = starts[kwargs["cu_seqlens"].long()].unique_consecutive()
                changed["cu_seqlens"] = new.to(kwargs["cu_seqlens"].dtype)
                cos, sin = kwargs["position_embeddings"]
                changed["position_embeddings"] = (cos[index[0]], sin[index[0]])
                x = module(x[0], **changed)[None]
            else:
                if "attention_mask" in changed:
                    changed["attention_mask"] = None
                x = module(x, *[None for _ in args[1:]], **changed)
        masked = seen[-1][3][None] if packed else seen[-1][3]
        assert worst([x], [masked[rows, index]]) < 1e-5


@pytest.mark.parametrize("name", TOWERS)
def test_dropped_units_are_zero_rows_that_nobody_sees(name: str) -> None:
    family = families.make(name)
    _, blocks, _ = towerref.parts(family.model)
    units = tower_units(family, family.inputs)
    keep = [[t > 0 for t in call] for call in some_times(units)]
    reductions = reduce_tower(family, units, keep=keep)
    with towerref.masked_tower(family, reductions):
        clean = oracle.encode(family.model, family.inputs).embeds
    with towerref.masked_tower(family, reductions):
        zero = towerref.zero_columns(family, family.inputs)
    assert torch.equal(zero, family.visual() & (clean == 0).all(-1))
    if name not in ("llava_next", "llava_onevision"):
        row_major = torch.cat([k for call in keep for k in call])
        if family.recipe.video is not None:  # image of row 0, image and video of row 1
            assert len(units) == 2
        assert torch.equal(zero[family.visual()], ~row_major)
    calls: list[None] = []

    def disturb(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        x = args[0] if args else kwargs["hidden_states"]
        call = len(calls)
        calls.append(None)
        if not reductions[call]:
            return None
        tokens = x.shape[-2]
        there = on_tokens(family, family.inputs, call, [k.long() for k in keep[call]], tokens)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        x = torch.where(there.view(*x.shape[:-1], 1) > 0, x, 10 * noise)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    handle = blocks[1].register_forward_pre_hook(disturb, with_kwargs=True)
    with towerref.masked_tower(family, reductions):
        disturbed = oracle.encode(family.model, family.inputs).embeds
    handle.remove()
    assert torch.equal(disturbed, clean)


@pytest.mark.parametrize("name", TOWERS)
def test_one_dropped_unit_is_one_raster_position(name: str) -> None:
    family = families.make(name)
    units = tower_units(family, family.inputs)
    for image, unit in ((0, 3), (len(units[0]) - 1, 5)):
        if image and name in ("llava_next", "llava_onevision"):
            continue  # the tiles are laid out anew
        keep = [[torch.ones(n, dtype=torch.bool) for n in call] for call in units]
        keep[0][image][unit] = False
        with towerref.masked_tower(family, reduce_tower(family, units, keep=keep)):
            zero = towerref.zero_columns(family, family.inputs)
        images = family.inputs["input_ids"] == families.IMAGE
        column = sum(units[0][:image]) + unit
        assert zero[images].nonzero().tolist() == [[column]] and zero.sum() == 1


@pytest.mark.parametrize("name", TOWERS)
def test_units_mix_place_by_place(name: str) -> None:
    family = families.make(name)
    _, blocks, _ = towerref.parts(family.model)
    units = tower_units(family, family.inputs)
    keep = [[torch.ones(n, dtype=torch.bool) for n in call] for call in units]
    mix = [[torch.eye(n) for n in call] for call in units]
    mix[0][-1][2, [2, 5]] = torch.tensor([0.25, 0.75])
    seen: list[Tensor] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = blocks[1].register_forward_pre_hook(record, with_kwargs=True)
    oracle.encode(family.model, family.inputs)
    handle.remove()
    calls = len(seen)
    with towerref.masked_tower(family, reduce_tower(family, units, keep=keep, mix=mix)):
        handle = blocks[1].register_forward_pre_hook(record, with_kwargs=True)
        oracle.encode(family.model, family.inputs)
    handle.remove()
    plain, mixed = seen[0], seen[calls]
    number = [torch.full((n,), -1) for n in units[0]]
    number[-1][[2, 5]] = torch.tensor([2, 5])
    label = on_tokens(family, family.inputs, 0, number, plain.shape[-2]).view(plain.shape[:-1])
    expected = plain.clone()
    expected[label == 2] = 0.25 * plain[label == 2] + 0.75 * plain[label == 5]
    assert worst([mixed], [expected]) < 1e-6
    assert worst([mixed], [plain]) > NOTICED


def test_tower_reductions_add_up() -> None:
    family = families.make("internvl")
    gen = torch.Generator().manual_seed(0)
    first, second = (torch.rand(3, 16, generator=gen) < 0.7 for _ in range(2))
    bias = torch.rand(3, 16, generator=gen)

    def features(*steps: tuple) -> Tensor:
        with towerref.masked_tower(family, [[towerref.TowerReduction(*s) for s in steps]]):
            return oracle.encode(family.model, family.inputs).embeds

    twice = features((3, second), (1, first))
    assert torch.equal(twice, features((1, first), (3, first & second)))
    assert worst([twice], [features((1, first & second))]) > NOTICED
    held = features((1, first, None, bias), (3, second))
    assert torch.equal(held, features((1, first, None, bias), (3, second, None, bias)))
    replaced = features((1, first, None, bias), (3, second, None, 0 * bias))
    assert worst([held], [replaced]) > NOTICED


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "glm4v", "llava"])
def test_image_without_visible_units_is_finite(name: str) -> None:
    family = families.make(name)
    units = tower_units(family, family.inputs)
    keep = [[torch.ones(n, dtype=torch.bool) for n in call] for call in units]
    keep[0][0][:] = False
    with towerref.masked_tower(family, reduce_tower(family, units, keep=keep)):
        embeds = oracle.encode(family.model, family.inputs).embeds
    assert embeds.isfinite().all()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_oracle_inside_a_masked_tower(name: str) -> None:
    family = families.make(name)
    inputs = family.single(1)
    units = tower_units(family, inputs)
    keep = [[t > 0 for t in call] for call in some_times(units)]
    reductions = reduce_tower(family, units, keep=keep)
    with towerref.masked_tower(family, reductions):
        left = ~towerref.zero_columns(family, inputs)
    assert not left.all()
    with towerref.masked_tower(family, reductions):
        (expected,), _ = oracle.run(family, inputs, keep={"projector": left}, steps=1, grad=True)
    expected.square().sum().backward()
    for parameter in towerref.parts(family.model)[1][0].parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    with towerref.masked_tower(family, reductions):
        embeds = oracle.encode(family.model, inputs).embeds
    index = left[0].nonzero()[:, 0]
    got = by_hand(family, inputs, index, embeds=embeds[:, index])
    assert worst([got], [expected]) < TOLERANCE
    assert worst([by_hand(family, inputs, index)], [expected]) > NOTICED


def test_masked_tower_restores_the_model() -> None:
    family = families.make("llava_onevision", "eager")
    tower, blocks, projector = towerref.parts(family.model)
    mapping = dict(towerref.ALL_ATTENTION_FUNCTIONS._local_mapping)
    with pytest.raises(KeyError), towerref.masked_tower(family, [[]]):
        assert tower.config._attn_implementation == "sdpa"
        raise KeyError
    assert tower.config._attn_implementation == "eager"
    assert towerref.ALL_ATTENTION_FUNCTIONS._local_mapping == mapping
    assert "apply_pooling" not in vars(family.model.model)
    modules = [*tower.modules(), projector]
    assert not any(m._forward_pre_hooks for m in modules) and not projector._forward_hooks


def test_masked_tower_refuses_bad_requests() -> None:
    with pytest.raises(NotImplementedError, match="Pixtral"):
        towerref.masked_tower(families.make("mistral3"), [[]]).__enter__()
    family = families.make("llava_onevision")
    units = tower_units(family, family.inputs)
    ones = [[torch.ones(n, dtype=torch.bool) for n in call] for call in units]
    calls = [[towerref.TowerReduction(0, call)] for call in ones]
    with pytest.raises(RuntimeError, match="calls"), towerref.masked_tower(family, calls[:1]):
        oracle.encode(family.model, family.inputs)
    for step in (
        towerref.TowerReduction(0, [k.float() for k in ones[0]]),
        towerref.TowerReduction(0, [k[1:] for k in ones[0]]),
        towerref.TowerReduction(0, ones[0], mix=ones[0]),
        towerref.TowerReduction(4, ones[0]),
    ):
        with pytest.raises(ValueError), towerref.masked_tower(family, [[step], []]):
            oracle.encode(family.model, family.inputs)


# --------------------------------------------------------------------------------------------
# eviction behind the prompt


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma"])
def test_evicting_nothing_changes_nothing(name: str) -> None:
    family = families.make(name)
    everything = torch.ones_like(family.inputs["input_ids"], dtype=torch.bool)
    by_step = everything[:, None].expand(-1, STEPS, -1)
    plain, _ = oracle.run(family, family.inputs, steps=STEPS)
    same, _ = oracle.run(family, family.inputs, evict={0: everything, 3: by_step}, steps=STEPS)
    assert worst(plain, same) == 0


def shorter_cache(
    family: families.Family, inputs: families.Inputs, evict: dict[int, Tensor], tokens: Tensor
) -> list[Tensor]:
    """Logits of one unpadded row; `evict` [1, steps, L] removes columns from a real cache."""
    position = text_call(family, inputs)["position_ids"][..., -1:]
    left = {layer: torch.arange(inputs["input_ids"].shape[1]) for layer in evict}
    with torch.no_grad():
        out = family.model(**inputs, use_cache=True)
        logits, cache = [out.logits[:, -1]], out.past_key_values
        for step in range(tokens.shape[1] - 1):
            for layer, visible in evict.items():
                stays = visible[0, step][left[layer]]
                left[layer] = left[layer][stays]
                states = cache.layers[layer]
                stays = torch.nn.functional.pad(stays, (0, step), value=True)
                states.keys, states.values = states.keys[:, :, stays], states.values[:, :, stays]
            out = oracle.text_model(family.model)(
                inputs_embeds=family.model.get_input_embeddings()(tokens[:, step : step + 1]),
                position_ids=position + step + 1,
                past_key_values=cache,
            )
            logits.append(family.model.lm_head(out.last_hidden_state[:, -1]))
    return logits


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_eviction_equals_a_shorter_cache(name: str) -> None:
    family = families.make(name)
    inputs = family.single(1)
    visual = family.visual(inputs)
    evict: dict[int, Tensor] = {}
    for layer in (0, 2, 3):
        once = [random_keep(visual, 0.7, 10 * layer + step) for step in range(4)]
        evict[layer] = torch.stack(once, 1).cumprod(1).bool()  # [1, 4, L], never comes back
    got, tokens = oracle.run(family, inputs, evict=evict, steps=4)
    assert worst(got, shorter_cache(family, inputs, evict, tokens)) < 1e-5
    first = {layer: visible[:, 0] for layer, visible in evict.items()}
    constant = {layer: v[:, None].expand(-1, 4, -1) for layer, v in first.items()}
    got, tokens = oracle.run(family, inputs, evict=first, steps=4)
    assert worst(got, shorter_cache(family, inputs, constant, tokens)) < 1e-5


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_eviction_of_the_masked_model_equals_oracle(name: str, attn: str) -> None:
    family = families.make(name, attn)
    keep = pyramid(family, family.inputs)
    evict = {i: random_keep(family.visual(), 0.4, 20 + i) for i in (1, 2)}
    with maskref.masked(family.model, keep, evict=evict):
        logits, tokens, _ = generate(family, family.inputs)
    expected, expected_tokens = oracle.run(
        family, family.inputs, keep=keep, evict=evict, steps=STEPS
    )
    assert worst(logits, expected) < TOLERANCE
    assert torch.equal(tokens, expected_tokens)
    by_step = {i: visible[:, None].expand(-1, STEPS, -1) for i, visible in evict.items()}
    same, _ = oracle.run(family, family.inputs, keep=keep, evict=by_step, steps=STEPS)
    assert worst(expected, same) == 0
    plain, _ = oracle.run(family, family.inputs, keep=keep, forced=tokens)
    assert worst(plain[:1], expected[:1]) == 0  # the first token comes from the prompt alone
    assert all((a - b).abs().max() > NOTICED for a, b in zip(plain[1:], expected[1:], strict=True))


@pytest.mark.parametrize("mode", ["static cache", "no cache", "prompt lookup"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_eviction_in_greedy_modes_of_the_masked_model(name: str, mode: str) -> None:
    family = families.make(name)
    inputs = family.single(1)
    evict = {i: random_keep(family.visual(inputs), 0.4, 20 + i) for i in (0, 3)}
    with maskref.masked(family.model, evict=evict):
        logits, _, _ = generate(family, inputs, **MODES[mode])
    expected, _ = oracle.run(family, inputs, evict=evict, steps=STEPS)
    assert worst(logits, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_eviction_in_beam_search_of_the_masked_model(name: str) -> None:
    family = families.make(name)
    evict = {i: random_keep(family.visual(), 0.4, 20 + i) for i in (0, 3)}
    with maskref.masked(family.model, evict=evict):
        options = {"num_beams": 3, "output_scores": True}
        _, tokens, out = generate(family, family.inputs, **options)
    logits, _ = oracle.run(family, family.inputs, evict=evict, forced=tokens)
    logprobs = torch.stack(logits, 1).log_softmax(-1)  # [B, steps, V]
    scores = logprobs.gather(-1, tokens[..., None]).sum((1, 2)) / STEPS
    assert worst([scores], [out.sequences_scores]) < TOLERANCE


# --------------------------------------------------------------------------------------------
# traces


def reduction(
    site: str, source_in: list[list[int]], plan: Any, samples: tuple[int, ...] = ()
) -> Any:
    """A recorded step; shorter rows of `source_in` are filled with their last number."""
    from vtc.session import Reduction

    n_in = tuple(len(row) for row in source_in)
    filled = [row + row[-1:] * (max(n_in) - len(row)) for row in source_in]
    return Reduction(
        site=site,
        method="hand",
        n_in=n_in,
        n_out=n_in if plan is None else plan.kept,
        seconds=0.0,
        plan=plan,
        source_in=torch.tensor(filled),
        layout=(None,) * len(n_in),
        samples=samples,
    )


def keeping(index: list[list[int]], n: int, **more: Any) -> Any:
    """A plan from the kept numbers of each row."""
    from vtc.plan import Plan

    counts = tuple(len(row) for row in index)
    filled = [row + row[-1:] * (max(counts) - len(row)) for row in index]
    return Plan(torch.tensor(filled), n, None if len({*counts}) == 1 else counts, **more)


def test_cache_reductions_close_columns_for_later_queries() -> None:
    visual = torch.zeros(2, 10, dtype=torch.bool)
    visual[0, 2:6] = True  # one image of 4
    visual[1, 1:4] = visual[1, 6:9] = True  # two images of 3
    samples = (0, 1, 1)
    places = [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2]]
    seen = [
        reduction("vision.0", [[0, 1]], keeping([[1]], 2)),
        reduction("projector", places, keeping([[0, 1, 3], [0, 2], [1, 2]], 4), samples),
        reduction("cache.2", [[0, 1, 3], [0, 2], [1, 2]], keeping([[0, 2], [1], [0]], 3), samples),
        reduction("cache.1", [[0, 1, 3], [0, 2], [1, 2]], None, samples),
        reduction("cache.2", [[0, 3], [2], [1]], keeping([[1], [0], [0]], 2), samples),
    ]
    masks = trace.masks(seen, visual)
    assert masks.keep.keys() == {"projector"} and masks.evict.keys() == {2}
    assert (~masks.evict[2]).nonzero().tolist() == [
        [0, 2], [0, 3], [0, 4], [1, 1], [1, 2], [1, 6], [1, 8]
    ]  # fmt: skip
    before = trace.masks(seen[:3], visual)
    assert (~before.evict[2]).nonzero().tolist() == [
        [0, 3], [0, 4], [1, 1], [1, 2], [1, 6], [1, 8]
    ]  # fmt: skip
    assert torch.equal(masks.repeat(2).evict[2], masks.evict[2].repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="samples"):
        trace.masks([reduction("cache.2", places, None, (0, 0, 1))], visual)


def test_vision_reductions_become_tower_reductions() -> None:
    assign = torch.tensor([[0, 1, 0, 1], [0, 1, -1, -1]])
    weight = torch.tensor([[0.5, 0.25, 0.5, 0.75], [1.0, 1.0, 0.0, 0.0]])
    size = torch.tensor([[2.0, 3.0], [1.0, 4.0]])
    merge = keeping([[0, 1], [0, 1]], 4, assign=assign, weight=weight, size=size)
    drop = keeping([[0, 2, 3, 5], [1, 2]], 6)
    images = [list(range(6)), list(range(3))]
    seen = [
        reduction("vision.1", images, drop),
        reduction("vision.3", [[0, 2, 3, 5], [1, 2]], merge),
        reduction("vision.1", [[0, 1], [0, 1]], None),
        reduction("decoder.1", images, None, (0, 1)),
        reduction("vision.3", [[0, 1], [0, 1]], keeping([[1], [0]], 2)),
    ]
    (first, second), (third,) = trace.tower_reductions(seen, 2, {"vision.3": 0.5})
    assert (first.layer, second.layer, third.layer) == (1, 3, 3)
    assert (first.mix, first.bias, third.mix, third.bias) == (None, None, None, None)

    def lists(values: Any) -> list[list[Any]]:
        return [value.tolist() for value in values]

    assert lists(first.keep) == [[1, 0, 1, 1, 0, 1], [0, 1, 1]]
    assert lists(second.keep) == [[1, 0, 1, 0, 0, 0], [0, 1, 1]]
    assert lists(third.keep) == [[0, 1], [1, 0]]
    expected = torch.eye(6)
    expected[0, [0, 3]] = 0.5
    expected[2, [2, 5]] = torch.tensor([0.25, 0.75])
    assert second.mix is not None and second.bias is not None
    assert torch.equal(second.mix[0], expected) and torch.equal(second.mix[1], torch.eye(3))
    logs = torch.tensor([[math.log(2), 0, math.log(3), 0, 0, 0]]) / 2
    assert torch.allclose(second.bias[0], logs[0])
    assert torch.allclose(second.bias[1], torch.tensor([0, 0, math.log(4) / 2]))
    with pytest.raises(ValueError, match="3 call"):
        trace.tower_reductions(seen, 3)
    assert trace.tower_reductions(seen[3:4], 2) == [[], []]


def test_traced_tower_reductions_run() -> None:
    family = families.make("qwen2_5_vl")
    units = tower_units(family, family.inputs)
    times = some_times(units)
    seen = []
    for call, sizes in zip(times, units, strict=True):
        kept = [t.nonzero()[:, 0].tolist() for t in call]
        plan = keeping(kept, max(sizes))
        seen.append(reduction("vision.1", [list(range(n)) for n in sizes], plan))
    with towerref.masked_tower(family, trace.tower_reductions(seen, 2)):
        traced = oracle.encode(family.model, family.inputs).embeds
    keep = [[t > 0 for t in call] for call in times]
    with towerref.masked_tower(family, reduce_tower(family, units, keep=keep)):
        given = oracle.encode(family.model, family.inputs).embeds
    assert torch.equal(traced, given)


# --------------------------------------------------------------------------------------------
# the comparison can fail


@pytest.mark.parametrize("name", families.FAMILIES)
def test_drops_are_visible_at_every_stage_and_step(name: str) -> None:
    family = families.make(name)
    keep = random_keep(family.visual(), 0.5, 5)
    plain, tokens = oracle.run(family, family.inputs, steps=STEPS)
    for stage in ("projector", 0, 1, 2, 3):
        dropped, _ = oracle.run(family, family.inputs, keep={stage: keep}, forced=tokens)
        for a, b in zip(plain, dropped, strict=True):
            assert ((a - b).abs().amax(-1) > NOTICED).all()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_one_column_left_visible_is_noticed(name: str) -> None:
    family = families.make(name)
    keep = random_keep(family.visual(), 0.5, 5)
    expected, tokens = oracle.run(family, family.inputs, keep={1: keep}, steps=STEPS)
    leak = keep.clone()
    dropped = (~keep[1]).nonzero()[:, 0]
    leak[1, dropped[len(dropped) // 2]] = True
    with maskref.masked(family.model, {1: leak}):
        leaking, _, _ = generate(family, family.inputs)
    assert (leaking[0][1] - expected[0][1]).abs().max() > NOTICED
    assert (leaking[0][0] - expected[0][0]).abs().max() < TOLERANCE
    late, _ = oracle.run(family, family.inputs, keep={2: keep}, forced=tokens)
    assert worst(late, expected) > NOTICED  # right columns, one layer too late


@pytest.mark.parametrize("name", families.NAMED)
def test_each_visual_column_matters(name: str) -> None:
    family = families.make(name)
    inputs = family.single(0)
    (plain,), _ = oracle.run(family, inputs, steps=1)
    columns = family.visual(inputs)[0].nonzero()[::8, 0]
    for column in columns.tolist():
        keep = {"projector": everything_but(inputs, 0, column)}
        (dropped,), _ = oracle.run(family, inputs, keep=keep, steps=1)
        assert (plain - dropped).abs().max() > NOTICED


def test_stages_add_up() -> None:
    family = families.make("qwen3_vl")
    a, b = (random_keep(family.visual(), 0.6, seed) for seed in (1, 2))

    def run(keep: dict[oracle.Stage, Tensor]) -> list[Tensor]:
        return oracle.run(family, family.inputs, keep=keep, steps=1)[0]

    assert worst(run({"projector": a, 0: b}), run({0: a & b})) == 0
    assert worst(run({1: a, 2: b}), run({1: a, 2: a & b})) == 0
    assert worst(run({1: a, 2: b}), run({1: a & b})) > NOTICED


def test_a_later_bias_replaces_an_earlier_one() -> None:
    family = families.make("llava")
    bias = torch.randn(family.inputs["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros_like(bias)

    def run(biases: dict[oracle.Stage, Tensor] | None) -> list[Tensor]:
        return oracle.run(family, family.inputs, bias=biases, steps=2)[0]

    assert worst(run({"projector": bias, 0: zero}), run(None)) == 0
    assert worst(run({1: bias, 2: zero}), run(None)) > NOTICED
    assert worst(run({1: bias, 2: zero}), run({1: bias})) > NOTICED


# --------------------------------------------------------------------------------------------
# manners


def test_oracle_refuses_a_patched_model() -> None:
    family = families.make("llava")
    layer = family.model.model.language_model.layers[1]
    handle = layer.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(RuntimeError, match="patched"):
        oracle.run(family, family.inputs, steps=1)
    handle.remove()
    oracle.run(family, family.inputs, steps=1)


def test_oracle_refuses_bad_requests() -> None:
    family = families.make("llava")
    ids = family.inputs["input_ids"]
    keep = torch.ones_like(ids, dtype=torch.bool)
    bad = [
        {"keep": {0: keep[:, 1:]}},
        {"keep": {0: keep.float()}},
        {"keep": {4: keep}},
        {"keep": {0: everything_but(family.inputs, 1, ids.shape[1] - 1)}},
        {"mix": {0: torch.eye(ids.shape[1])}},
        {"evict": {4: keep}},
        {"evict": {0: keep.float()}},
        {"evict": {0: keep[:, None].expand(-1, 2, -1)}, "steps": 4},
        {"forced": ids[:, :2], "steps": 3},
    ]
    for options in bad:
        with pytest.raises(ValueError):
            oracle.run(family, family.inputs, **options)
    with pytest.raises(ValueError, match="right-padded"):
        oracle.run(family, family.padded("right"), steps=1)


def test_oracle_and_mask_restore_the_model() -> None:
    family = families.make("gemma3")
    text = oracle.text_model(family.model)
    keep = {"projector": random_keep(family.visual(), 0.5, 1)}
    before, _, _ = generate(family, family.inputs)
    with pytest.raises(KeyError), maskref.masked(family.model, keep):
        raise KeyError
    with pytest.raises(ValueError):
        oracle.run(family, family.inputs, keep={9: keep["projector"]})
    assert text.config._attn_implementation == "sdpa"
    assert not any(layer._forward_pre_hooks for layer in text.layers)
    after, _, _ = generate(family, family.inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
