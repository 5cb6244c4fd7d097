"""Every error a user can meet: its class, and that its text says what was given and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

import vtc
from vtc import errors
from vtc.plan import Plan
from vtc.recipe import Recipe, Step
from vtc.reducer import Method
from vtc.testing import configs, families
from vtc.testing.families import Family

LLAVA = families.make("llava", row=0)
STEP = {"method": "random", "at": "projector", "keep": 0.5}


@contextmanager
def raises(kind: type[errors.VtcError], *words: str) -> Iterator[None]:
    """The error is of this class, and every one of the words is in its text."""
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    text = str(caught.value)
    for word in words:
        assert word in text, text


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """A refused or failed session leaves no hook behind."""
    yield
    for module in LLAVA.model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # transformers leaves hooks of its own at the first forward
            owner = getattr(hook, "func", hook)
            assert not owner.__module__.startswith("vtc"), owner


def attach(method: Any, **options: Any) -> vtc.Session:
    return vtc.attach(LLAVA.model, method, **options)


def run(family: Family, inputs: Mapping[str, Any] | None = None, **more: Any) -> None:
    with torch.no_grad():
        family.model(**{**(family.inputs if inputs is None else inputs), **more})


def test_errors_are_also_the_builtin_ones_people_catch():
    for kind, builtin in (
        (errors.UnknownName, LookupError),
        (errors.UnsupportedModel, TypeError),
        (errors.InvalidBudget, ValueError),
        (errors.NothingReduced, RuntimeError),
    ):
        assert issubclass(kind, builtin) and issubclass(kind, vtc.VtcError)


# ---------------------------------------------------------------------- names and budgets


def test_unknown_method():
    known = ", ".join(vtc.REDUCERS)
    with raises(
        errors.UnknownName, "unknown method 'divprun'", "mean 'divprune'?", known, "vtc list"
    ):
        attach("divprun", keep=0.5)
    with raises(errors.UnknownName, "unknown method 'zzzzzz'. Known: ", known):
        attach("zzzzzz", keep=0.5)
    with raises(errors.UnknownName, "unknown method 'divprun'", "mean 'divprune'?"):
        Recipe.load({"steps": [STEP | {"method": "divprun"}]})


def test_unknown_parameter_of_a_method():
    with raises(errors.UnknownName, "unknown parameter of 'fastv' 'pol'", "mean 'pool'?", "mass"):
        attach("fastv", keep=0.5, pol="max")
    with raises(errors.UnknownName, "parameter of 'fastv' 'pol'", "mean 'pool'?"):
        Recipe.load({"steps": [STEP | {"method": "fastv", "params": {"pol": "max"}}]})
    with raises(errors.UnknownName, "parameter of 'random' 'pool'", "(it has none)"):
        Step("random", "projector", 0.5, params={"pool": 1}).build()
    with raises(errors.InvalidRecipe, "fastv.pool: 'sum' is not", "'mean'", "'max'"):
        attach("fastv", keep=0.5, pool="sum")


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "keep=0: a token count must be at least 1"),
        (-1, "keep=-1: a token count must be at least 1"),
        (1.5, "keep=1.5: a share must be above 0 and at most 1.0."),
        (0.0, "a share must be above 0"),
        (-0.25, "keep=-0.25: a share must be above 0"),
        (64.0, "For a token count write an int: keep=64."),
        (True, "keep=True: give a share like 0.25, a token count like 64, or 'auto'"),
        (math.nan, "keep=nan: a share"),
        (math.inf, "keep=inf: a share"),
        ("0.5", "keep='0.5': give a share"),
    ],
)
@pytest.mark.parametrize("method", ["random", "fastv", "pdrop"])
@pytest.mark.parametrize("at", [None, "decoder.1"])
def test_budgets_that_make_no_sense(keep: Any, words: str, method: str, at: str | None):
    with raises(errors.InvalidBudget, words):
        attach(method, keep=keep, at=at)
    with raises(errors.InvalidBudget, words):
        attach("random", schedule={1: keep})


def test_budgets_that_are_missing_or_given_twice():
    with raises(errors.InvalidRecipe, "'random' needs a budget", "keep=0.25 or keep=64"):
        attach("random")
    with raises(errors.InvalidRecipe, "how many tokens stay at 'decoder.1'", "keep=0.25"):
        attach("random", at="decoder.1")
    for more in ({"keep": 0.5}, {"at": "decoder.1"}):
        with raises(errors.InvalidRecipe, "give `schedule` alone"):
            attach("random", schedule={1: 0.5}, **more)


def test_pdrop_needs_a_share():
    with raises(errors.InvalidBudget, "keep=16 is a token count", "share", "keep=0.125"):
        attach("pdrop", keep=16)
    with raises(errors.InvalidBudget, "more than 3 decoder layers, this has 3"):
        vtc.REDUCERS["pdrop"]().places(3, None)


def test_hyper_parameters_out_of_range():
    with raises(errors.InvalidBudget, "contextual=1.0", "0 <= share < 1"):
        attach("visionzip", keep=9, contextual=1.0)
    with raises(errors.InvalidBudget, "visual_pivots >= 1"):
        attach("dart", keep=9, visual_pivots=0)


# ---------------------------------------------------------------------- sites and signals


def test_sites_that_do_not_exist():
    with raises(
        errors.UnsupportedSite, "no site 'decoder.99'", "projector, decoder.0 to decoder.3, cache"
    ):
        attach("random", keep=0.5, at="decoder.99")
    for text in ("decoder", "projector.1", "decoder.x", "decoder.-1", "", "vit.1"):
        with raises(errors.UnsupportedSite, f"not a site: {text!r}", "'decoder.<i>'"):
            attach("random", keep=0.5, at=text)


def test_wrong_kind_of_site_for_a_method():
    with raises(errors.UnsupportedSite, "'fastv' works at decoder, not at 'projector'"):
        attach("fastv", keep=0.5, at="projector")
    with raises(errors.UnsupportedSite, "'visionzip' works at projector, not at 'decoder.1'"):
        attach("visionzip", keep=0.5, at="decoder.1")
    with raises(errors.UnsupportedSite, "'dart' works at decoder, not at 'vision.1'"):
        attach("dart", keep=0.5, at="vision.1")


def test_signals_that_are_missing():
    with raises(
        errors.MissingSignal, "'fastv' at 'decoder.0' needs attn_last", "decoder.1 on", "Offered: "
    ):
        attach("fastv", keep=0.5, at="decoder.0")


def test_signals_that_a_method_did_not_declare():
    signals = vtc.context.Signals({"text": lambda: torch.zeros(1)})
    with raises(errors.MissingSignal, "'keys' was not declared in `needs`", "Offered: text"):
        signals["keys"]


# ---------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": "0.5"}, "step 1: keep: '0.5' is not float | int | 'auto'"),
        ({"keep": True}, "step 1: keep: True is not"),
        ({"keep": None}, "step 1: keep: None is not"),
        ({"at": 2}, "step 1: at: 2 is not str"),
        ({"method": ["random"]}, "step 1: method: ['random'] is not str"),
        ({"merge": True}, "step 1: merge: True is not"),
        ({"merge": "mean"}, "step 1: merge: 'mean' is not"),
        ({"mass": "full"}, "step 1: mass: 'full' is not float"),
        ({"mass": False}, "step 1: mass: False is not float"),
        ({"scope": "batch"}, "step 1: scope: 'batch' is not"),
        ({"params": [1]}, "step 1: params: [1] is not"),
    ],
)
def test_recipe_values_of_the_wrong_type(change: dict[str, Any], words: str):
    with raises(errors.InvalidRecipe, words):
        Recipe.load({"steps": [STEP | change]})


@pytest.mark.parametrize("missing", ["method", "at", "keep"])
def test_recipe_keys_that_are_missing(missing: str):
    step = {key: value for key, value in STEP.items() if key != missing}
    with raises(errors.InvalidRecipe, f"step 2: missing {missing}."):
        Recipe.load({"steps": [STEP | {"at": "decoder.1"}, step]})


def test_recipe_keys_that_do_not_exist():
    with raises(errors.UnknownName, "key in recipe, step 1 'kep'", "mean 'keep'?"):
        Recipe.load({"steps": [{"method": "random", "at": "projector", "kep": 0.5}]})
    with raises(errors.UnknownName, "key in recipe 'sed'", "mean 'seed'?", "Known: seed, steps"):
        Recipe.load({"steps": [STEP], "sed": 1})


def test_recipes_that_are_no_recipe(tmp_path: Path):
    path = tmp_path / "r.yaml"
    with raises(errors.InvalidRecipe, "cannot read recipe", "r.yaml", "No such file"):
        attach(path)
    path.write_text("steps: [\n")
    with raises(errors.InvalidRecipe, "r.yaml' is not YAML: line 2: "):
        attach(path)
    path.write_bytes(b"\xff\xfe\x00\x81")
    with raises(errors.InvalidRecipe, "cannot read recipe"):
        attach(str(path))
    for text in ("just words\n", "- 1\n- 2\n", "steps: 3\n", "seed: 1\n", "\n"):
        with raises(errors.InvalidRecipe, "a recipe is a mapping with a list `steps`"):
            Recipe.load(text)
    with raises(errors.InvalidRecipe, "recipe, step 1: expected keys such as method, at, keep"):
        Recipe.load("steps:\n- random\n")
    with raises(errors.InvalidRecipe, "at least one step"):
        Recipe.load({"steps": []})
    with raises(errors.InvalidRecipe, "seed: '3' is not int"):
        Recipe.load({"steps": [STEP], "seed": "3"})


def test_two_steps_at_one_site():
    with raises(errors.InvalidRecipe, "two steps at one site: projector, decoder.1, projector"):
        Recipe.load({"steps": [STEP, STEP | {"at": "decoder.1"}, STEP]})
    with raises(errors.InvalidRecipe, "two steps at one site"):
        Recipe.load({"steps": [STEP | {"at": "decoder.1"}, STEP | {"at": "decoder.01"}]})


def test_a_recipe_and_arguments():
    recipe = Recipe((Step(**STEP),))
    for more in ({"keep": 0.5}, {"at": "projector"}, {"mass": 1.0}, {"pool": "max"}):
        with raises(errors.InvalidRecipe, "a recipe already says keep"):
            attach(recipe, **more)


@pytest.mark.parametrize("mass", [-0.1, 1.1, math.nan, math.inf])
def test_mass_out_of_range(mass: float):
    with raises(errors.InvalidRecipe, f"mass={mass}: use a number from 0 (off) to 1 (full)"):
        attach("random", keep=0.5, mass=mass)


def test_other_options_of_a_step_out_of_range():
    for threshold in (-1.1, 1.5, math.nan):
        with raises(errors.InvalidRecipe, f"merge_threshold={threshold}: a cosine"):
            attach("random", keep=0.5, merge="nearest", merge_threshold=threshold)
    with raises(errors.InvalidRecipe, "merge='mean': use 'none' or 'nearest'"):
        attach("random", keep=0.5, merge="mean")
    with raises(errors.InvalidRecipe, "scope='batch': use 'image' or 'sample'"):
        attach("random", keep=0.5, scope="batch")


def test_scopes_cannot_be_mixed():
    second = STEP | {"at": "decoder.1", "scope": "sample"}
    with raises(errors.UnsupportedModel, "share one `scope`"):
        attach({"steps": [STEP, second]})


# ---------------------------------------------------------------------- models


def test_two_sessions_on_one_model():
    with (
        attach("random", keep=0.5, strict=False),
        raises(errors.UnsupportedModel, "already attached", "Detach it first", "one recipe"),
    ):
        attach("fastv", keep=0.5)
    attach("fastv", keep=0.5).detach()


def test_models_no_adapter_knows():
    with raises(
        errors.UnsupportedModel, "no adapter fits torch.nn.modules.linear.Linear", "hf_vlm: "
    ):
        vtc.attach(nn.Linear(2, 2), "random", keep=0.5)
    with raises(errors.UnsupportedModel, "no adapter fits"):
        vtc.describe(nn.Linear(2, 2))


def meta(name: str, **config: Any) -> nn.Module:
    """A model of transformers without weights."""
    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**config))


def test_models_that_read_images_by_cross_attention():
    text = {
        **{k: v for k, v in families.TEXT.items() if not k.endswith("os_token_id")},
        "num_hidden_layers": 2,
        "cross_attention_layers": [1],
        "vocab_size": 600,
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 32,
        "intermediate_layers_indices": [1],
        "vision_output_dim": 64,
    }
    model = meta("MllamaForConditionalGeneration", text_config=text, vision_config=vision)
    with raises(errors.UnsupportedModel, "MllamaForConditionalGeneration", "by cross-attention"):
        vtc.attach(model, "random", keep=0.5)


def test_encoder_decoder_models():
    model = meta("Florence2ForConditionalGeneration")
    with raises(errors.UnsupportedModel, "Florence2ForConditionalGeneration", "Looked for: "):
        vtc.attach(model, "random", keep=0.5)
    config = transformers.LlavaConfig(
        vision_config=dict(configs.GRID_TOWER, model_type="clip_vision_model"),
        text_config=transformers.LlamaConfig(**families.TEXT),
        is_encoder_decoder=True,
    )
    with torch.device("meta"):
        other = transformers.LlavaForConditionalGeneration(config)
    with raises(errors.UnsupportedModel, "this one is encoder-decoder"):
        vtc.attach(other, "random", keep=0.5)


def test_attention_implementations_that_cannot_work(monkeypatch: pytest.MonkeyPatch):
    config = LLAVA.model.config.get_text_config()
    monkeypatch.setattr(config, "_attn_implementation_internal", "flex_attention")
    with raises(errors.UnsupportedModel, "not possible with flex_attention: use sdpa or eager"):
        attach("random", keep=0.5, mass=1.0)
    monkeypatch.setattr(config, "_attn_implementation_internal", "paged|sdpa")
    with raises(errors.UnsupportedModel, "paged", "cannot be shortened"):
        attach("random", keep=0.5)


# ---------------------------------------------------------------------- while running


def test_a_run_that_reduced_nothing():
    text = {"input_ids": torch.arange(2, 9)[None], "attention_mask": torch.ones(1, 7).long()}
    session = attach("fastv", keep=0.5)
    run(LLAVA, text)
    with raises(
        errors.NothingReduced, "ran 1 forward(s)", "at decoder.2", "strict=False", "images"
    ):
        session.detach()
    with attach("fastv", keep=0.5, strict=False):
        run(LLAVA, text)
    with attach("fastv", keep=0.5):  # the model never ran: nothing to complain about
        pass


def test_an_exception_of_the_user_is_not_replaced():
    text = {"input_ids": torch.arange(2, 9)[None]}
    with pytest.raises(ZeroDivisionError), attach("random", keep=0.5):
        run(LLAVA, text)
        raise ZeroDivisionError


@pytest.mark.parametrize("method", ["random", "divprune", "fastv"])
def test_nan_pixels(method: str):
    inputs = dict(LLAVA.inputs)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][0, 0, 3, 3] = math.nan
    with raises(errors.InvalidInput, "NaN", "check the images"), attach(method, keep=0.5):
        run(LLAVA, inputs)


@dataclass(frozen=True)
class Broken(Method):
    """Returns the plan it is given."""

    plan_to_return: ClassVar[Plan]
    sites: ClassVar[frozenset[str]] = frozenset({"projector", "decoder"})

    def plan(self, ctx: vtc.Context, k: tuple[int, ...]) -> Plan:
        return self.plan_to_return


@pytest.fixture
def broken() -> Iterator[type[Broken]]:
    vtc.register("test_errors_broken")(Broken)
    yield Broken
    del vtc.REDUCERS._items["test_errors_broken"]


@pytest.mark.parametrize(
    ("index", "n", "words"),
    [
        ([[0, 64]], 64, "in [0, 64)"),
        ([[-1, 3]], 64, "in [0, 64)"),
        ([[5, 3]], 64, "ascend strictly"),
        ([[3, 3]], 64, "ascend strictly"),
        ([[0, 1]], 63, "one row per context row"),
        ([[0, 1], [0, 1]], 64, "one row per context row"),
    ],
)
@pytest.mark.parametrize("at", ["projector", "decoder.1"])
def test_plans_that_break_the_contract(
    index: list[list[int]], n: int, words: str, at: str, broken: type[Broken]
):
    broken.plan_to_return = Plan(torch.tensor(index), n)
    with (
        raises(errors.InvalidPlan, words),
        attach("test_errors_broken", keep=2, at=at),
    ):
        run(LLAVA)


def test_a_plan_that_keeps_padding():
    valid = torch.tensor([[True, True, False]])
    with raises(errors.InvalidPlan, "keeps a padding token"):
        Plan(torch.tensor([[0, 2]]), 3).check(valid)


def gemma3_with_static_cache() -> tuple[Family, Any]:
    family = families.make("gemma3", row=0)
    config = family.model.config.get_text_config()
    return family, transformers.StaticCache(config=config, max_cache_len=128)


@pytest.mark.parametrize("at", ["projector", "decoder.1"])
def test_a_static_cache_with_sliding_layers(at: str):
    family, cache = gemma3_with_static_cache()
    with (
        raises(errors.UnsupportedModel, "StaticCache with sliding-window", "default cache"),
        vtc.attach(family.model, "random", keep=0.5, at=at),
    ):
        run(family, past_key_values=cache, use_cache=True)


def test_a_cache_without_layers():
    class Cache(transformers.DynamicCache):
        def __getattribute__(self, name: str) -> Any:
            if name == "layers":
                raise AttributeError(name)
            return super().__getattribute__(name)

    from vtc.adapters.vlm.cache_kinds import check_layers

    with raises(errors.UnsupportedModel, "cache Cache has no layers: use a DynamicCache"):
        check_layers(object.__new__(Cache))
    with raises(errors.UnsupportedModel, "cache SimpleNamespace has no layers"):
        check_layers(SimpleNamespace())
    check_layers(transformers.DynamicCache())
    check_layers(None)


def test_ready_made_features_have_no_tower_scores():
    with torch.no_grad():
        features = LLAVA.model.model.get_image_features(LLAVA.inputs["pixel_values"])
        table = LLAVA.model.get_input_embeddings()(LLAVA.inputs["input_ids"])
    place: Tensor = LLAVA.visual()
    table[place] = torch.cat(list(features.pooler_output)).to(table.dtype)
    inputs = {"inputs_embeds": table, "attention_mask": LLAVA.inputs["attention_mask"]}
    session = attach("visionzip", keep=0.5)
    run(LLAVA, inputs)  # the image cannot be told from text any more
    with raises(errors.NothingReduced, "at projector"):
        session.detach()


def test_the_messages_end_like_sentences():
    assert re.fullmatch(
        r"unknown thing 'ab'\. Did you mean 'abc'\? Known: abc, xyz\. Look\.",
        str(errors.unknown("thing", "ab", ["xyz", "abc"], " Look.")),
    )
