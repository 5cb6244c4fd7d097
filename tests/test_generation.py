"""Every way to generate and to train gives what masking the dropped columns gives.

The reference is a second model with the same weights in which nothing is dropped: `maskref` hides
the same columns from it in any mode of `generate`, `oracle` runs it without a cache.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import dense
from support.lookup import Only
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.errors import UnsupportedModel
from vtc.testing import configs, families, maskref, oracle, trace

TOLERANCE = 1e-4  # fp32 logits, standard deviation about 1
STEPS = 6
CHUNK = 48  # cuts through images

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3")
SLIDING = {"gemma3"}

PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "random-projector": ("random", {"keep": 0.25, "at": "projector"}),
    "random-decoder": ("random", {"keep": 0.25, "at": "decoder.1"}),
    "random-schedule": ("random", {"schedule": {1: 0.5, 3: 0.25}}),
    "random-both": ("random", {"at": {"projector": 0.4, "decoder.2": 0.2}}),
    "fastv-decoder": ("fastv", {"keep": 0.25, "at": "decoder.1"}),
    "fastv-schedule": ("fastv", {"schedule": {1: 0.5, 3: 0.25}}),
}
MAIN = ("random-projector", "random-schedule", "random-both", "fastv-schedule")
FEW = ("random-projector", "fastv-schedule")

every_family = pytest.mark.parametrize("name", FAMILIES)
every_plan = pytest.mark.parametrize("plan", PLANS)
main_plans = pytest.mark.parametrize("plan", MAIN)
few_plans = pytest.mark.parametrize("plan", FEW)
with_and_without_mass = pytest.mark.parametrize("mass", [0.0, 1.0], ids=["plain", "mass"])


@functools.cache
def family(name: str) -> families.Family:
    """The model that sessions attach to."""
    return families.make(name)


@functools.cache
def reference(name: str) -> families.Family:
    """The same weights, never attached."""
    return families.make(name)


def attach(fam: families.Family, plan: str, mass: float = 0.0, **more: Any) -> vtc.Session:
    method, options = PLANS[plan]
    if isinstance(places := options.get("at"), dict):
        merge = more.pop("merge", "none")
        own = {"mass": mass, "merge": merge}
        steps = tuple(vtc.Step(method, at, keep, **own) for at, keep in places.items())
        return vtc.attach(fam.model, vtc.Recipe(steps, seed=3), **more)
    return vtc.attach(fam.model, method, seed=3, mass=mass, **options, **more)


def generate(model: nn.Module, inputs: families.Inputs, **options: Any) -> Any:
    dense.need(model, options)
    options = {"max_new_tokens": STEPS} | options
    torch.manual_seed(5)
    with torch.no_grad():
        return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


def worst(a: Any, b: Any) -> float:
    """Largest difference over all steps."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def check(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    assert worst(got.logits, expected.logits) <= TOLERANCE
    if getattr(expected, "sequences_scores", None) is not None:
        assert worst([got.sequences_scores], [expected.sequences_scores]) <= TOLERANCE


def compare(
    name: str, plan: str, mass: float, inputs: families.Inputs, copies: int = 1, **options: Any
) -> None:
    """`generate` with tokens dropped against `generate` with the same columns masked."""
    fam, ref = family(name), reference(name)
    with attach(fam, plan, mass) as session:
        got = generate(fam.model, inputs, **options)
    visual = fam.visual(inputs).repeat_interleave(copies, 0)
    pieces = {}
    if "prefill_chunk_size" in options:
        chunk = options["prefill_chunk_size"]
        offsets = range(0, visual.shape[1], chunk)
        pieces = {"offsets": offsets, "widths": [chunk] * len(offsets)}
    masks = trace.masks(session.trace, visual, mass, **pieces)
    assert masks.keep and not bool(masks.final(visual).all())
    with maskref.masked(ref.model, masks.keep, masks.bias):
        expected = generate(ref.model, inputs, **options)
    check(got, expected)


# --------------------------------------------------------------------------------------------
# modes of generate

MODES: dict[str, tuple[int, dict[str, Any]]] = {  # rows per prompt, options
    "greedy": (1, {}),
    "beams": (3, {"num_beams": 3}),
    "sampling": (3, {"do_sample": True, "num_return_sequences": 3}),
    "static": (1, {"cache_implementation": "static"}),
    "chunked": (1, {"prefill_chunk_size": CHUNK}),
    "static-chunked": (1, {"cache_implementation": "static", "prefill_chunk_size": CHUNK}),
}


@pytest.mark.parametrize("rows", ["batch", "alone"])
@pytest.mark.parametrize("mode", MODES)
@with_and_without_mass
@every_plan
@every_family
def test_generate(name: str, plan: str, mass: float, mode: str, rows: str) -> None:
    fam = family(name)
    inputs = fam.inputs if rows == "batch" else fam.single(1)
    copies, options = MODES[mode]
    if "cache_implementation" in options and name in SLIDING:
        with pytest.raises(UnsupportedModel, match="StaticCache"), attach(fam, plan, mass):
            generate(fam.model, inputs, **options)
        return
    compare(name, plan, mass, inputs, copies, **options)


@pytest.mark.parametrize("rows", ["batch", "alone"])
@with_and_without_mass
@main_plans
@every_family
def test_generate_without_cache(name: str, plan: str, mass: float, rows: str) -> None:
    """Every step is a prefill of its own, with decisions of its own."""
    fam, ref = family(name), reference(name)
    inputs = fam.inputs if rows == "batch" else fam.single(1)
    with attach(fam, plan, mass) as session:
        got = generate(fam.model, inputs, use_cache=False)
    tokens = got.sequences[:, inputs["input_ids"].shape[1] :]
    sites = len(session.recipe.steps)
    assert len(session.trace) == STEPS * sites
    for step in range(STEPS):
        reductions = list(session.trace)[step * sites : (step + 1) * sites]
        masks = trace.masks(reductions, fam.visual(inputs), mass)
        expected, _ = oracle.run(
            ref, inputs, keep=masks.keep, bias=masks.bias, forced=tokens[:, : step + 1]
        )
        assert worst([got.logits[step]], [expected[step]]) <= TOLERANCE


@with_and_without_mass
@main_plans
@every_family
def test_prompt_lookup(name: str, plan: str, mass: float) -> None:
    fam = family(name)
    widths, drafted = [], []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        widths.append(ids.shape[1])
        drafted.append(bool(fam.visual({"input_ids": ids}).any()))

    handle = fam.model.model.register_forward_pre_hook(look, with_kwargs=True)
    inputs = fam.single(1)
    only = LogitsProcessorList([Only(inputs, fam.visual(inputs))])
    compare(
        name,
        plan,
        mass,
        inputs,
        prompt_lookup_num_tokens=4,
        max_new_tokens=16,
        logits_processor=only,
    )
    handle.remove()
    assert max(widths[1:]) > 1  # drafts were checked, several columns at once
    assert len(set(widths)) > 2 or any(drafted[1:])


@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked"])
@pytest.mark.parametrize("images", [(0, 1, 3, 2), (3, 0), (2,)], ids=str)
@few_plans
@every_family
def test_rows_with_no_to_three_images(
    name: str, plan: str, images: tuple[int, ...], mode: str
) -> None:
    copies, options = MODES[mode]
    inputs = families.make(name, images_per_row=images).inputs
    compare(name, plan, 1.0, inputs, copies, **options)


@main_plans
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_images_of_one_prompt_keep_different_numbers(name: str, plan: str) -> None:
    fam = families.make(name, images_per_row=(2, 3))
    with attach(fam, plan) as session:
        generate(fam.model, fam.inputs)
    first = session.trace[0]
    of_last_prompt = {n for n, sample in zip(first.n_out, first.samples, strict=True) if sample}
    assert len(of_last_prompt) == 3
    compare(name, plan, 0.0, fam.inputs)


@few_plans
@every_family
def test_one_budget_for_all_images_of_a_prompt(name: str, plan: str) -> None:
    fam, ref = family(name), reference(name)
    with attach(fam, plan, 1.0, scope="sample") as session:
        got = generate(fam.model, fam.inputs)
    assert session.trace[0].samples == (0, 1)
    masks = trace.masks(session.trace, fam.visual(), 1.0, scope="sample")
    with maskref.masked(ref.model, masks.keep, masks.bias):
        check(got, generate(ref.model, fam.inputs))


# --------------------------------------------------------------------------------------------
# windows count columns of the complete prompt


def _windowed(attn: str, dtype: torch.dtype) -> families.Recipe:
    """LLaVA whose text layers all see the last 24 columns; the config names no layer types."""
    text = transformers.MistralConfig(**families.TEXT, head_dim=16, sliding_window=24)
    config = transformers.LlavaConfig(
        vision_config=configs.clip(), text_config=text, image_token_index=families.IMAGE
    )
    model = transformers.LlavaForConditionalGeneration
    return families.Recipe(configs.build(model, config, attn, dtype), configs.fixed(64))


@pytest.fixture
def windowed(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(families.FAMILIES, "windowed", _windowed)
    return "windowed"


@pytest.mark.parametrize("chunk", [None, 48, 70, 100])
@with_and_without_mass
@main_plans
def test_windows_count_original_columns(
    windowed: str, plan: str, mass: float, chunk: int | None
) -> None:
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    for inputs in (family(windowed).inputs, family(windowed).single(1)):
        compare(windowed, plan, mass, inputs, **options)


@main_plans
def test_windows_cannot_be_told_to_flash_attention(windowed: str, plan: str) -> None:
    """Its window counts stored columns, so a shortened sequence would see too much."""
    fam = family(windowed)
    with (
        flashing(fam.model),
        pytest.raises(UnsupportedModel, match="sliding"),
        attach(fam, plan),
    ):
        generate(fam.model, fam.inputs)


# --------------------------------------------------------------------------------------------
# several turns


def append(fam: families.Family, inputs: families.Inputs, tokens: Tensor) -> families.Inputs:
    """Inputs whose prompt goes on with `tokens` [B, n]; without pixels."""
    more = torch.ones_like(tokens)
    out = {
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], more], 1),
    }
    if fam.recipe.types is not None:
        types = inputs[fam.recipe.types]
        fresh = fam.visual({"input_ids": tokens}).long() if fam.recipe.typed else 0 * more
        out[fam.recipe.types] = torch.cat([types, fresh], 1)
    return out


def some_tokens(batch: int, n: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 490, (batch, n), generator=torch.Generator().manual_seed(seed))


def two_turns(fam: families.Family, inputs: families.Inputs, second: Tensor, **new: Tensor) -> Any:
    """Greedy, then more text on the same cache."""
    first = generate(fam.model, inputs)
    length = inputs["input_ids"].shape[1]
    longer = append(fam, inputs, torch.cat([first.sequences[:, length:], second], 1))
    again = generate(fam.model, longer | new, past_key_values=first.past_key_values)
    return first, again


@pytest.mark.parametrize("rows", ["batch", "alone"])
@with_and_without_mass
@main_plans
@every_family
def test_two_turns_on_one_cache(name: str, plan: str, mass: float, rows: str) -> None:
    fam, ref = family(name), reference(name)
    inputs = fam.inputs if rows == "batch" else fam.single(1)
    second = some_tokens(len(inputs["input_ids"]), 5)
    with attach(fam, plan, mass) as session:
        got = two_turns(fam, inputs, second)
    masks = trace.masks(session.trace, fam.visual(inputs), mass)
    with maskref.masked(ref.model, masks.keep, masks.bias):
        expected = two_turns(ref, inputs, second)
    check(got[0], expected[0])
    check(got[1], expected[1])


@with_and_without_mass
@main_plans
@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3"])
def test_second_turn_with_a_new_image(name: str, plan: str, mass: float) -> None:
    fam, ref = family(name), reference(name)
    image = fam.recipe.image(0, torch.Generator().manual_seed(8))
    second = torch.cat([some_tokens(1, 3)[0], image.ids, some_tokens(1, 4)[0]])[None]
    inputs = fam.single(1)
    with attach(fam, plan, mass) as session:
        got = two_turns(fam, inputs, second, **image.payload)
    length = inputs["input_ids"].shape[1]
    whole = got[1].sequences[:, : length + STEPS + second.shape[1]]
    visual = fam.visual({"input_ids": whole})
    cut = length + STEPS - 1  # the last token of the first turn is not in the cache yet
    masks = trace.masks(
        session.trace, visual, mass, offsets=[0, cut], widths=[cut, whole.shape[1] - cut]
    )
    with maskref.masked(ref.model, masks.keep, masks.bias):
        expected = two_turns(ref, inputs, second, **image.payload)
    check(got[0], expected[0])
    check(got[1], expected[1])


# --------------------------------------------------------------------------------------------
# hand-written loops


@dataclass
class Chat:
    """One cache that is fed token by token, as in a loop that does not use `generate`."""

    model: nn.Module
    inputs: families.Inputs
    positions: bool  # pass position_ids
    masked: bool = True  # pass an attention mask
    cache: Any = None  # the model makes one
    fed: int = 0
    following: Tensor = field(default_factory=lambda: torch.empty(0))  # last position of the prompt

    def start(self) -> Tensor:
        """[B, V] logits after the prompt."""
        more = {}
        if self.positions:
            more["position_ids"] = oracle.encode(self.model, self.inputs).positions
            self.following = more["position_ids"][..., -1:]
        inputs = dict(self.inputs)
        if not self.masked:
            del inputs["attention_mask"]
        with torch.no_grad():
            out = self.model(**inputs, past_key_values=self.cache, use_cache=True, **more)
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Feed tokens [B, n] -> logits [B, V] of the last one."""
        more: dict[str, Tensor] = {}
        n = tokens.shape[1]
        if self.positions:
            more["position_ids"] = self.following + self.fed + torch.arange(1, n + 1)
        self.fed += n
        if self.masked:
            mask = self.inputs["attention_mask"]
            more["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), self.fed)], 1)
        with torch.no_grad():
            out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **more)
        return out.logits[:, -1]


def rewound(chat: Chat, n: int) -> None:
    chat.cache.crop(-n)
    chat.fed -= n


def expect(name: str, session: Any, inputs: families.Inputs, mass: float, fed: Tensor) -> Any:
    """Oracle logits after the prompt and after each token of `fed` [B, n]."""
    ref = reference(name)
    masks = trace.masks(session, ref.visual(inputs), mass)
    last = fed.new_zeros(len(fed), 1)
    forced = torch.cat([fed, last], 1)
    return oracle.run(ref, inputs, keep=masks.keep, bias=masks.bias, forced=forced)[0]


@pytest.mark.parametrize("rows", ["batch", "alone", "no mask"])
@pytest.mark.parametrize("positions", [False, True], ids=["no positions", "positions"])
@with_and_without_mass
@main_plans
@every_family
def test_hand_written_loop(name: str, plan: str, mass: float, positions: bool, rows: str) -> None:
    fam = family(name)
    inputs = fam.inputs if rows == "batch" else fam.single(1)
    fed = some_tokens(len(inputs["input_ids"]), 6)
    with attach(fam, plan, mass) as session:
        chat = Chat(fam.model, inputs, positions, masked=rows != "no mask")
        got = [chat.start()]
        got += [chat.step(fed[:, i : i + 1]) for i in range(4)]
        got.append(chat.step(fed[:, 4:]))  # two tokens at once
        length = inputs["input_ids"].shape[1]
        assert chat.cache.get_seq_length() == length + fed.shape[1]
    expected = expect(name, session.trace, inputs, mass, fed)
    assert worst(got, [*expected[:5], expected[6]]) <= TOLERANCE


@pytest.mark.parametrize("positions", [False, True], ids=["no positions", "positions"])
@with_and_without_mass
@main_plans
@every_family
def test_interleaved_generations(name: str, plan: str, mass: float, positions: bool) -> None:
    fam = family(name)
    prompts = [fam.single(0), fam.single(1), fam.inputs]
    fed = [some_tokens(len(p["input_ids"]), 4, seed) for seed, p in enumerate(prompts)]
    with attach(fam, plan, mass) as session:
        config = fam.model.config.get_text_config()
        chats = [Chat(fam.model, p, positions, cache=DynamicCache(config=config)) for p in prompts]
        got = [[chat.start()] for chat in chats]
        for i in range(4):
            for chat, tokens, logits in zip(chats, fed, got, strict=True):
                logits.append(chat.step(tokens[:, i : i + 1]))
    sites = len(session.recipe.steps)
    for number, (prompt, tokens, logits) in enumerate(zip(prompts, fed, got, strict=True)):
        reductions = list(session.trace)[number * sites : (number + 1) * sites]
        assert worst(logits, expect(name, reductions, prompt, mass, tokens)) <= TOLERANCE


@pytest.mark.parametrize("positions", [False, True], ids=["no positions", "positions"])
@with_and_without_mass
@main_plans
@every_family
def test_copy_of_a_cache_goes_its_own_way(
    name: str, plan: str, mass: float, positions: bool
) -> None:
    fam = family(name)
    fed, other = some_tokens(2, 4), some_tokens(2, 4, 2)
    other[:, :2] = fed[:, :2]
    with attach(fam, plan, mass) as session:
        chat = Chat(fam.model, fam.inputs, positions)
        got = [chat.start(), *(chat.step(fed[:, i : i + 1]) for i in range(2))]
        twin = copy.copy(chat)
        twin.cache = copy.deepcopy(chat.cache)
        own, others = list(got), list(got)
        for i in (2, 3):
            own.append(chat.step(fed[:, i : i + 1]))
            others.append(twin.step(other[:, i : i + 1]))
    assert worst(own, expect(name, session.trace, fam.inputs, mass, fed)) <= TOLERANCE
    assert worst(others, expect(name, session.trace, fam.inputs, mass, other)) <= TOLERANCE


@with_and_without_mass
@main_plans
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in SLIDING])
def test_cache_can_be_cut_back(name: str, plan: str, mass: float) -> None:
    fam = family(name)
    fed, other = some_tokens(2, 5), some_tokens(2, 5, 2)
    other[:, :2] = fed[:, :2]
    with attach(fam, plan, mass) as session:
        chat = Chat(fam.model, fam.inputs, positions=True)
        chat.start()
        for i in range(5):
            chat.step(fed[:, i : i + 1])
        rewound(chat, 3)
        got = [chat.step(other[:, i : i + 1]) for i in range(2, 5)]
    expected = expect(name, session.trace, fam.inputs, mass, other)
    assert worst(got, expected[3:]) <= TOLERANCE


@with_and_without_mass
@main_plans
@every_family
def test_rows_of_a_cache_can_be_repeated_and_selected(name: str, plan: str, mass: float) -> None:
    fam = family(name)
    fed = some_tokens(2, 1)
    wide = some_tokens(6, 1, 2)  # each prompt three times
    chosen = torch.tensor([4, 1])
    last = some_tokens(2, 1, 3)
    with attach(fam, plan, mass) as session:
        chat = Chat(fam.model, fam.inputs, positions=True)
        chat.start()
        chat.step(fed)
        chat.cache.batch_repeat_interleave(3)
        chat.inputs = {k: v.repeat_interleave(3, 0) for k, v in _text(fam.inputs).items()}
        chat.following = chat.following.repeat_interleave(3, -2)
        got = chat.step(wide)
        chat.cache.batch_select_indices(chosen)
        chat.inputs = {k: v[chosen] for k, v in chat.inputs.items()}
        chat.following = chat.following.index_select(-2, chosen)
        after = chat.step(last)
    for column in range(3):
        picked = torch.cat([fed, wide[column::3]], 1)
        expected = expect(name, session.trace, fam.inputs, mass, picked)[2]
        assert worst([got[column::3]], [expected]) <= TOLERANCE
    for row, source in enumerate(chosen.tolist()):
        prompt = source // 3
        both = torch.cat([fed, wide[source].expand(2, 1), last[row].expand(2, 1)], 1)
        expected = expect(name, session.trace, fam.inputs, mass, both)[3]
        assert worst([after[row]], [expected[prompt]]) <= TOLERANCE


@with_and_without_mass
@main_plans
@every_family
def test_rows_of_a_cache_can_change_places(name: str, plan: str, mass: float) -> None:
    fam = family(name)
    fed, swap = some_tokens(2, 3), torch.tensor([1, 0])
    with attach(fam, plan, mass) as session:
        chat = Chat(fam.model, fam.inputs, positions=True)
        chat.start()
        chat.step(fed[:, :1])
        chat.cache.reorder_cache(swap)
        chat.inputs = {k: v[swap] for k, v in _text(fam.inputs).items()}
        chat.following = chat.following.index_select(-2, swap)
        got = [chat.step(fed[swap, i : i + 1])[swap] for i in (1, 2)]
    assert worst(got, expect(name, session.trace, fam.inputs, mass, fed)[2:]) <= TOLERANCE


def _text(inputs: families.Inputs) -> families.Inputs:
    return {k: inputs[k] for k in ("input_ids", "attention_mask")}


# --------------------------------------------------------------------------------------------
# what a single forward returns


@with_and_without_mass
@main_plans
@every_family
def test_hidden_states_keep_their_places(name: str, plan: str, mass: float) -> None:
    fam, ref = family(name), reference(name)
    visual, valid = fam.visual(), fam.inputs["attention_mask"].bool()
    with torch.no_grad(), attach(fam, plan, mass) as session:
        got = fam.model(**fam.inputs, output_hidden_states=True)
    masks = trace.masks(session.trace, visual, mass)
    with torch.no_grad(), maskref.masked(ref.model, masks.keep, masks.bias):
        expected = ref.model(**fam.inputs, output_hidden_states=True)
    left = masks.final(visual) & valid
    assert got.logits.shape == expected.logits.shape
    assert worst([got.logits[left]], [expected.logits[left]]) <= TOLERANCE
    assert len(got.hidden_states) == families.LAYERS + 1
    for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert mine.shape == theirs.shape
        assert worst([mine[left]], [theirs[left]]) <= TOLERANCE


@main_plans
@every_family
def test_prompt_that_ends_with_an_image(name: str, plan: str) -> None:
    """Nothing follows the image: the last kept column speaks for the prompt."""
    fam, ref = family(name), reference(name)
    row = fam.rows[0][:-1]
    inputs = families.collate([row], fam.recipe, "left", torch.float32)
    visual = fam.visual(inputs)
    assert bool(visual[0, -1])
    with attach(fam, plan) as session:
        got = generate(fam.model, inputs)
    masks = trace.masks(session.trace, visual)
    last = masks.final(visual)[0].nonzero()[-1, 0]
    with torch.no_grad(), maskref.masked(ref.model, masks.keep):
        expected = ref.model(**inputs).logits[:, last]
    assert worst([got.logits[0]], [expected]) <= TOLERANCE


# --------------------------------------------------------------------------------------------
# training


def loss_of(logits: Tensor, labels: Tensor, left: Tensor) -> float:
    """Mean cross-entropy of the next token; a dropped column speaks with the one before it."""
    columns = torch.arange(labels.shape[1]).expand_as(left)
    source = torch.where(left, columns, 0).cummax(1).values
    logits = logits.gather(1, source[..., None].expand_as(logits))[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item()


@with_and_without_mass
@main_plans
@every_family
def test_right_padding_with_labels(name: str, plan: str, mass: float) -> None:
    fam, ref = family(name), reference(name)
    inputs = fam.padded("right")
    assert not bool(inputs["attention_mask"][:, -1].all())
    labelled = fam.labelled(inputs)
    visual = fam.visual(inputs)
    with attach(fam, plan, mass) as session:
        out = fam.model(**labelled)
    masks = trace.masks(session.trace, visual, mass)
    (logits,), _ = oracle.run(ref, inputs, keep=masks.keep, bias=masks.bias, steps=1, all_rows=True)
    left = masks.final(visual) & inputs["attention_mask"].bool()
    assert abs(out.loss.item() - loss_of(logits, labelled["labels"], left)) <= TOLERANCE
    assert out.logits.shape[:2] == labelled["labels"].shape
    assert worst([out.logits[left]], [logits[left]]) <= TOLERANCE


def gradients(fam: families.Family, inputs: families.Inputs) -> tuple[float, dict[str, Tensor]]:
    fam.model.zero_grad()
    loss = fam.model(**inputs).loss
    loss.backward()
    named = fam.model.named_parameters()
    return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("merge", ["none", "nearest"])
@with_and_without_mass
@main_plans
@every_family
def test_gradient_checkpointing(
    name: str, plan: str, mass: float, merge: str, reentrant: bool
) -> None:
    fam = families.make(name)
    dense.need_checkpointing(fam.model)
    inputs = fam.labelled()
    fam.model.train()
    with attach(fam, plan, mass, merge=merge) as session:
        loss, expected = gradients(fam, inputs)
        reductions = len(session.trace)
        fam.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again, got = gradients(fam, inputs)
        assert len(session.trace) == 2 * reductions  # decided once, not again in the backward
    assert abs(loss - again) <= 1e-6
    assert got.keys() == expected.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    for parameter, gradient in expected.items():
        assert (got[parameter] - gradient).abs().max().item() <= 1e-6 * max(1.0, scale), parameter


# --------------------------------------------------------------------------------------------
# the model afterwards


@few_plans
@every_family
def test_model_can_be_copied_and_saved_after_detach(name: str, plan: str, tmp_path: Path) -> None:
    fam = families.make(name)
    attach(fam, plan, 1.0).detach()
    pickled = pickle.dumps(fam.model)  # before it runs: transformers installs local functions then
    with attach(fam, plan, 1.0):
        generate(fam.model, fam.inputs)
    expected = generate(fam.model, fam.inputs)
    fam.model.save_pretrained(tmp_path)
    copies = [
        copy.deepcopy(fam.model),
        pickle.loads(pickled),
        type(fam.model).from_pretrained(tmp_path).eval(),
    ]
    for model in copies:
        got = generate(model, fam.inputs)
        assert torch.equal(got.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


# --------------------------------------------------------------------------------------------
# flash attention: 2-D masks, packed sequences read from the positions


def flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What flash_attention_2 computes: causal from the lower right, padding by a 2-D mask, and
    packed sequences wherever one row has positions with a gap."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    seen = torch.ones(batch, queries, keys, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        seen = seen.tril(keys - queries)
    if attention_mask is not None:
        assert attention_mask.ndim == 2 and attention_mask.shape[1] == keys
        seen = seen & attention_mask[:, None].bool()
    elif _is_packed_sequence(position_ids, batch):
        assert queries == keys, "gaps in the positions of a later chunk: read as packed"
        part = (position_ids == position_ids.min()).cumsum(-1)
        seen = seen & (part[:, :, None] == part[:, None, :])
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen[:, None], scale=scaling
    )
    return out.masked_fill(~seen.any(-1)[:, None, :, None], 0.0).transpose(1, 2), None


@contextmanager
def flashing(model: nn.Module) -> Iterator[None]:
    """Use the stand-in in the language model; the tower stays as it is."""
    config = oracle.text_model(model).config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash
    config._attn_implementation = "flash_attention_2"
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]


FLASH = [n for n in FAMILIES if n not in SLIDING]


@pytest.mark.parametrize("rows", ["batch", "alone"])
@pytest.mark.parametrize("name", FLASH)
def test_flash_stand_in_equals_sdpa(name: str, rows: str) -> None:
    fam, ref = family(name), reference(name)
    inputs = fam.inputs if rows == "batch" else fam.single(1)
    with flashing(fam.model):
        got = generate(fam.model, inputs)
    check(got, generate(ref.model, inputs))


@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked"])
@pytest.mark.parametrize("rows", ["batch", "alone"])
@with_and_without_mass
@main_plans
@pytest.mark.parametrize("name", FLASH)
def test_flash_attention(name: str, plan: str, mass: float, rows: str, mode: str) -> None:
    fam = family(name)
    copies, options = MODES[mode]
    with flashing(fam.model):
        compare(
            name, plan, mass, fam.inputs if rows == "batch" else fam.single(1), copies, **options
        )


@with_and_without_mass
@main_plans
@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_in_two_turns(name: str, plan: str, mass: float) -> None:
    fam, ref = family(name), reference(name)
    inputs, second = fam.single(1), some_tokens(1, 5)
    with flashing(fam.model), attach(fam, plan, mass) as session:
        got = two_turns(fam, inputs, second)
    masks = trace.masks(session.trace, fam.visual(inputs), mass)
    with maskref.masked(ref.model, masks.keep, masks.bias):
        expected = two_turns(ref, inputs, second)
    check(got[0], expected[0])
    check(got[1], expected[1])
