"""What people and strangers write into recipes: refused at once, in one line that says where."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from vtc.commands.loading import value_of
from vtc.errors import InvalidRecipe, UnknownName
from vtc.recipe import Recipe, Step
from vtc.strict_yaml import read

STEP = "steps:\n- method: divprune\n  at: projector\n  keep: "
NINE = ", ".join(f"&x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 10))
BOMB = f"[&x0 [{', '.join('abcdefghij')}], {NINE}]"
ALIAS = "anchors and aliases (&, *) are not read: write the value again."
NO_NUMBER = "is no number that can be read (whole numbers have at most 18 digits)."

REFUSED = {
    "an alias bomb as seed": (f"seed: {BOMB}\n{STEP}0.5\n", f"recipe, line 1: {ALIAS}"),
    "an alias bomb in params": (f"{STEP}0.5\n  params: {BOMB}\n", f"recipe, line 5: {ALIAS}"),
    "a value that holds itself": (f"{STEP}&a [*a]\n", f"recipe, line 4: {ALIAS}"),
    "a key twice in a step": (
        f"{STEP}0.5\n  keep: 0.1\n",
        "recipe, line 5: 'keep' is there twice (first in line 4): keep one.",
    ),
    "a key twice at the top": (
        f"seed: 1\n{STEP}0.5\nseed: 2\n",
        "recipe, line 6: 'seed' is there twice (first in line 1): keep one.",
    ),
    "a key twice in one line": (
        "steps: [{method: evs, at: projector, keep: 1, keep: 2}]\n",
        "recipe, line 1: 'keep' is there twice (first in line 1): keep one.",
    ),
    "keys that are merged": (f"{STEP}0.5\n  <<: {{at: cache}}\n", "a key is a word, and not <<."),
    "a key that is a list": (f"{STEP}0.5\n? [a]\n: 1\n", "recipe, line 5: a key is a word"),
    "a date that there is not": (
        f"{STEP}2001-99-99\n",
        "recipe, step 1: keep: '2001-99-99' is not float | int | 'auto'.",
    ),
    "a date": (
        f"{STEP}2001-01-01\n",
        "recipe, step 1: keep: '2001-01-01' is not float | int | 'auto'.",
    ),
    "a tag": (f"{STEP}!!int abc\n", "recipe, line 4: tags (!) are not read: leave them out."),
    "a tag that runs code": (
        f"{STEP}!!python/object/apply:os.system [ls]\n",
        "recipe, line 4: tags (!) are not read: leave them out.",
    ),
    "a number of 5,000 digits": (f"{STEP}{'9' * 5000}\n", f"9' {NO_NUMBER}"),
    "a number of 19 digits": (f"seed: {10**18}\n{STEP}0.5\n", f"'{10**18}' {NO_NUMBER}"),
    "a number without digits": (f"{STEP}0b_\n", f"recipe, line 4: '0b_' {NO_NUMBER}"),
    "a number beyond floats": (f"{STEP}{'1:' * 400}1.5\n", f"1.5' {NO_NUMBER}"),
    "lists 3,000 deep": (f"{STEP}{'[' * 3000}{']' * 3000}\n", "line 4: more than 16 levels"),
    "mappings 200 deep": (
        "seed:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 200)),
        "recipe, line 16: more than 16 levels",
    ),
    "dashes 3,000 deep": ("- " * 3000 + "a\n", "recipe, line 1: more than 16 levels"),
    "a text of 5,000 characters": (f"{STEP}{'x' * 5000}\n", "is a text of 5,000 characters"),
    "60,000 steps": (
        "steps:\n" + "- {method: evs, at: projector, keep: 0.5}\n" * 60_000,
        "recipe has more than 262,144 characters, which is the most.",
    ),
    "1,001 steps": (
        f"steps: [{'a, ' * 1001}]\n",
        "recipe has 1,001 steps: 1,000 are the most.",
    ),
    "a character that YAML does not have": (f"{STEP}0.5\0\n", "recipe is not YAML: unacceptable"),
    "a tab": (f"{STEP}\t0.5\n", "recipe is not YAML: line 4: while scanning"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "expected a single document in the stream"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_that_cannot_be_meant_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, said = REFUSED[name]
    with pytest.raises(InvalidRecipe) as caught:
        Recipe.load(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRecipe, match=r"mine\.yaml"):
        Recipe.load(file)


def test_the_most_that_is_read_is_read_in_seconds() -> None:
    words = "[a,b,c]," * 9_000
    before = time.process_time()
    with pytest.raises(InvalidRecipe, match="more than 10,000 values"):
        Recipe.load(f"steps: [{words}]\n")
    assert time.process_time() - before < 20


def test_plain_data_has_the_same_bounds() -> None:
    itself: list[Any] = []
    itself.append(itself)
    wide: Any = "a"
    for _ in range(9):
        wide = [wide] * 10
    for value, said in (
        (itself, "recipe: more than 16 levels of lists and mappings."),
        (wide, "recipe: more than 10,000 values."),
        (10**5000, "recipe: a number of more than 18 digits."),
        ("x" * 10**6, "is a text of 1,000,000 characters: 4,096 are the most."),
    ):
        with pytest.raises(InvalidRecipe) as caught:
            Recipe.load({"steps": [{"method": "evs", "at": "projector", "keep": value}]})
        assert said in str(caught.value) and len(str(caught.value)) < 400
    step = {"method": "evs", "at": "projector", "keep": 0.5}
    with pytest.raises(InvalidRecipe, match="recipe has 1,100 steps: 1,000 are the most"):
        Recipe.load({"steps": [step] * 1100})
    with pytest.raises(InvalidRecipe, match="recipe has 1,100 steps: 1,000 are the most"):
        Recipe((Step(**step),) * 1100)


def test_files_without_an_end_and_names_that_are_none() -> None:
    for path, said in (
        ("/dev/zero", "recipe '/dev/zero' has more than 262,144 characters"),
        ("/", "cannot read recipe '/': .*directory"),
        ("a\0b", r"cannot read recipe 'a\\x00b'"),
        ("x" * 5000, r"cannot read recipe 'x+\.\.\.x+'"),
    ):
        with pytest.raises(InvalidRecipe, match=said) as caught:
            Recipe.load(path)
        assert len(str(caught.value)) < 400


def test_values_on_a_command_line_are_read_alike() -> None:
    for text, value in (
        ("0.5", 0.5),
        ("3", 3),
        ("auto", "auto"),
        ("[projector, decoder.2]", ["projector", "decoder.2"]),
        ("2001-99-99", "2001-99-99"),
        ("", None),
        ("[[1.0, 0.5], [1e-3, -2]]", [[1.0, 0.5], ["1e-3", -2]]),
    ):
        assert value_of("x", text) == value
    for text, said in (
        (BOMB, "line 1: anchors"),
        ("[" * 3000, "16 levels"),
        ("{a: 1, a: 2}", "'a' is there twice"),
        ("!!int abc", "tags"),
    ):
        with pytest.raises(InvalidRecipe, match=f"^x=.*is no value that YAML can read.*{said}"):
            value_of("x", text)


def test_a_table_of_shares_is_read_alike(tmp_path: Path) -> None:
    file = tmp_path / "table.yaml"
    file.write_text(f"table: {BOMB}\n", encoding="utf-8")
    with pytest.raises(InvalidRecipe, match=r"cannot read a table from .*line 1: anchors"):
        Recipe.build("scheduled_cache", 2, table=file).steps[0].build()


def test_what_recipes_hold_is_read_as_before() -> None:
    text = "a: [1, 0x10, -2.5, .nan, true, null, '1', \"b\\n\", x y]\nb: {1: c}\n"
    data = read(text, "text")
    assert data["a"][:3] == [1, 16, -2.5] and data["a"][3] != data["a"][3]
    assert data["a"][4:] == [True, None, "1", "b\n", "x y"] and data["b"] == {1: "c"}


# ---------------------------------------------------------------------- steps that can never act

NEVER = [
    ("projector", 0.1, "decoder.2", 0.5),
    ("projector", 0.5, "decoder.2", 0.5),
    ("decoder.1", 0.25, "decoder.3", 0.5),
    ("projector", 0.25, "cache", 0.25),
    ("vision.1", 0.5, "vision.3", 0.6),
    ("projector", 64, "decoder.2", 64),
    ("projector", 16, "decoder.2", 64),
    ("projector", 1, "decoder.2", 0.5),
]
MAY = [
    ("projector", 0.5, "decoder.2", 0.1),
    ("projector", 0.5, "decoder.2", 1.0),  # says itself that nothing is dropped
    ("projector", 1.0, "decoder.2", 0.5),
    ("projector", 0.1, "decoder.2", 64),  # images above 640 tokens
    ("projector", 64, "decoder.2", 0.5),  # images below 128 tokens
    ("projector", "auto", "decoder.2", 0.5),
    ("decoder.2", 0.1, "cache", 0.5),  # the first layers hold all
    ("vision.1", 0.1, "projector", 0.5),  # tiles there, images here
    ("dit.1", 0.1, "dit.3", 0.5),  # tokens come back
    ("projector", 64, "decoder.2", 32),
]


def of(first: str, kept: Any, second: str, left: Any, **more: Any) -> Recipe:
    method = "dycoke_ttm" if kept == "auto" else "random"
    return Recipe((Step("random", second, left, **more), Step(method, first, kept)))


@pytest.mark.parametrize(("first", "kept", "second", "left"), NEVER)
def test_a_step_that_can_never_drop_is_refused(
    first: str, kept: Any, second: str, left: Any
) -> None:
    said = f"{second}: keep={left} can never drop a token after {first} with keep={kept}: "
    with pytest.raises(InvalidRecipe) as caught:
        of(first, kept, second, left)
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("or leave the step out.")
    assert ("shares refer to the tokens that an image had at first" in str(caught.value)) == (
        isinstance(kept, float)
    )


@pytest.mark.parametrize(("first", "kept", "second", "left"), MAY)
def test_a_step_that_may_drop_is_left(first: str, kept: Any, second: str, left: Any) -> None:
    assert [step.keep for step in of(first, kept, second, left).steps] == [kept, left]


def test_steps_that_count_other_tokens_or_act_without_dropping_are_left() -> None:
    of("projector", 0.1, "decoder.2", 0.5, scope="sample")  # of the prompt, not of every image
    of("projector", 0.1, "decoder.2", 0.5, positions="renumber")  # closes the gaps of the first
    Recipe((Step("evs", "projector", 0.1), Step("random", "decoder.2", 0.5)))  # videos, frames


def test_arguments_of_attach_are_asked_too() -> None:
    said = "decoder.2: keep=0.25 can never drop a token after projector with keep=0.25"
    with pytest.raises(InvalidRecipe, match=said):
        Recipe.build("random", 4, 0.25, at=["projector", "decoder.2"])
    with pytest.raises(InvalidRecipe, match="decoder.3: keep=0.5 can never drop"):
        Recipe.build("fastv", 4, schedule={1: 0.5, 3: 0.5})
    with pytest.raises(UnknownName, match="'nothing'"):
        Recipe.load({"steps": [{"method": "nothing", "at": "projector", "keep": 0.5}]})
