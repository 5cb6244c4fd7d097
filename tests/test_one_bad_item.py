"""One picture, line or item that cannot be used costs itself: it is left out, counted and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import vtc_zoo
from PIL import Image
from vtc_zoo import shapes

import vtc
from vtc.bench import records
from vtc.commands import cli, demo
from vtc.commands.leftout import LeftOut
from vtc.errors import InvalidInput, InvalidQuestions, VtcError
from vtc.tune import items, loyalty

MODEL = ("--model", "tiny-llava-shapes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_scenes(tmp_path_factory.mktemp("scenes"), 4, questions_per_scene=1)


@pytest.fixture
def scenes(whole: Path, tmp_path: Path) -> Path:
    """Four pictures; the second is damaged."""
    folder = shutil.copytree(whole.parent, tmp_path / "scenes")
    (folder / "scene_2.png").write_bytes((folder / "scene_2.png").read_bytes()[:90])
    return folder


def test_loyalty_without_the_damaged_picture(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "l.json"
    more = ("--methods", "divprune", "--keep", "0.1", "--no-baselines", "--max-new-tokens", "2")
    ask = ("--prompt", "how many objects are there ?")

    def run(*pictures: str) -> dict[str, Any]:
        words = ("--images", *pictures, *ask, *more, "--json", str(out))
        code = cli.main(["bench", "loyalty", *MODEL, *words])
        assert code == (3 if str(scenes) in pictures else 0)
        row = records.read(out)[1]
        return {key: row[key] for key in ("exact", "kl", "kl_se", "items", "media", "flops")}

    got = run(str(scenes))
    said = capsys.readouterr().out
    bad = scenes / "scene_2.png"
    assert f"\n1 item was left out:\n  {bad}: not an image that can be read: {bad}." in said
    assert "tiny-llava-shapes, 3 items, dense" in said and got["items"] == 3
    assert got == run(*(str(scenes / f"scene_{n}.png") for n in (1, 3, 4)))


def test_tune_goes_on_without_it_and_is_found_again(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = tmp_path / "r.yaml"
    (scenes / "questions.jsonl").open("a").write("no json\n")
    reference = loyalty.reference

    def broken(model: Any, inputs: Any, most: int) -> Any:
        seen = inputs["pixel_values"]
        if any((one == mark).all() for one in seen for mark in marks):
            raise loyalty.NotNumbers("NaN.")
        return reference(model, inputs, most)

    monkeypatch.setattr(loyalty, "reference", broken)
    model, processor = vtc_zoo.load("tiny-llava-shapes")
    third = items.encode(model, processor, [items.Item(scenes / "scene_3.png", "image", "x")])
    marks = third["pixel_values"]
    words = ("--questions", str(scenes / "questions.jsonl"), "--loyalty", "0.01", "--holdout", "0")
    more = ("--methods", "divprune", "--budgets", "0.5,0.3", "--merge-mass", "off")
    told = []
    for _ in range(2):  # the second start measures nothing
        code = cli.main(["tune", *MODEL, *words, *more, "--max-new-tokens", "2", "--out", str(out)])
        said = capsys.readouterr().out
        assert code == 3 and vtc.Recipe.load(out).steps[0].keep == 0.3
        assert "3 items were left out:" in said and f"  {scenes / 'scene_3.png'}: NaN." in said
        assert f"  {scenes / 'questions.jsonl'}, line 5: no JSON" in said
        assert f"  {scenes / 'scene_2.png'}: not an image" in said
        assert ", 2 items\n" in out.read_text()
        told.append(out.read_text())
        marks = marks[:0]
    assert told[0] == told[1]
    assert cli.main(["tune", *MODEL, *words, *more, "--out", str(out), "--dry-run"]) == 3
    assert "3 items to choose on, 0 held out" in capsys.readouterr().out


def test_the_demo_without_it(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = LeftOut()
    monkeypatch.setattr(demo, "PICTURES", scenes)
    assert len(demo.load_items(3, left_out)) == 3
    assert [name for name, _ in left_out.found] == ["scene_2.png"]


def test_where_nothing_can_be_read_nothing_is_begun(
    scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--images", str(scenes / "scene_2.png"), "--methods", "grid")
    assert cli.main(["bench", "loyalty", *MODEL, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vtc: none of the 1 files can be read. The first: not an image that")


# ---------------------------------------------------------------------- lines


LINES: list[tuple[Any, str]] = [
    ({"image": "scene_1.png"}, "'question' is missing: give a text that is not empty"),
    ({"image": 5, "question": "?"}, "'image' is 5: give a text that is not empty"),
    ({"image": "", "question": "?"}, "'image' is '': give a text that is not empty"),
    ({"image": "gone.png", "question": "?"}, "no such image: "),
    ({"image": "../video.png", "question": "?"},
        "image '../video.png' leaves the folder of images: give a path inside it"),
    ({"question": "?"}, "'image' or 'video' is missing: name a file"),
    ({"video": "gone.mp4", "question": "?"}, "no such video: "),
    (["scene_1.png"], "a JSON object was expected, not "),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), LINES)
def test_a_line_that_cannot_be_used(line: Any, says: str, whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    good = {"image": "scene_1.png", "question": "what ?", "id": 1}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n\n{json.dumps(good)}\n")
    left_out = LeftOut()
    found = items.read_questions(file, [whole.parent], left_out)
    assert [item.media.name for item in found] == ["scene_1.png"] * 2
    [(name, why)] = left_out.found
    assert name == f"{file}, line 2" and why.startswith(says)
    assert "video" not in why.replace("video.png", "") or "image" not in line
    file.write_text(json.dumps(line))
    with pytest.raises(InvalidQuestions, match='such as {"image": "a.png", "question"'):
        items.read_questions(file, [whole.parent])


# ---------------------------------------------------------------------- batches


def test_a_batch_goes_on_without_what_fails_alone() -> None:
    left_out, tried = LeftOut(), []

    def double(some: list[int]) -> list[int]:
        tried.append(list(some))
        if min(some) < 0:
            raise InvalidInput(f"{min(some)} is negative")
        return [2 * n for n in some]

    assert left_out.sound([1, 2], double, str) == ([1, 2], [2, 4]) and len(tried) == 1
    assert left_out.sound([3, -1, 4, -2], double, str) == ([3, 4], [6, 8])
    assert left_out.sound([-3], double, str) is None
    assert left_out.sound([-4, -5], double, str) is None
    assert [name for name, _ in left_out.found] == ["-1", "-2", "-3", "-4", "-5"]
    assert str(left_out).startswith("5 items were left out:\n  -1: -1 is negative\n")
    assert tried[1:7] == [[3, -1, 4, -2], [3], [-1], [4], [-2], [3, 4]]


def test_what_fails_only_together_is_no_item_s_fault() -> None:
    def alone(some: list[int]) -> int:
        if len(some) > 1:
            raise InvalidInput("sizes differ: use --batch-size 1")
        return some[0]

    with pytest.raises(InvalidInput, match="--batch-size 1"):
        LeftOut().sound([1, 2], alone, str)


def test_three_failures_before_anything_is_fine_end_a_run() -> None:
    def never(_: list[int]) -> int:
        raise VtcError("NaN.")

    left_out = LeftOut()
    assert left_out.sound([1], never, str) is None and left_out.sound([2], never, str) is None
    with pytest.raises(VtcError, match="^NaN"):
        left_out.sound([3], never, str)


def test_many_are_counted_and_some_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    left_out = LeftOut()
    assert left_out.tell() == 0 and capsys.readouterr().out == ""
    for number in range(23):
        left_out.add(number, "why\nso")
    assert left_out.tell() == 3
    said = capsys.readouterr().out
    assert "23 items were left out:\n  0: why so\n" in said and said.endswith("  and 3 more\n")


def test_what_a_processor_cannot_read_is_the_item_s_own(whole: Path) -> None:
    def processor(**_: Any) -> Any:
        raise ValueError("absolute aspect ratio must be smaller than 200")

    processor.image_token = "<image>"  # type: ignore[attr-defined]
    Image.new("RGB", (2, 2)).save(whole.parent / "small.png")
    item = items.Item(whole.parent / "small.png", "image", "x")
    with pytest.raises(InvalidInput, match="cannot read this image: absolute aspect ratio"):
        items.encode(None, processor, [item])
