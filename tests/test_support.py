"""The references themselves: they agree with the untouched models, with each other and with
dropping by hand, and they notice small mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from support import families, maskref, oracle
from torch import Tensor

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
