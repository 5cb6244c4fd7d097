"""Loyalty is what it says: against plain forwards, against free answers, alone and in a batch."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vtc_zoo
from PIL import Image
from support import video_models
from vtc_zoo import moving, shapes

import vtc
import vtc.video
from vtc.bench import records
from vtc.commands import cli
from vtc.errors import InvalidInput, InvalidQuestions, InvalidVideo
from vtc.tune import items, loyalty


@pytest.fixture(scope="module")
def zoo() -> Any:
    return vtc_zoo.load("tiny-llava-shapes")


@pytest.fixture(scope="module")
def wordy(zoo: Any) -> Any:
    """The same model without an end token: answers of as many tokens as are asked for."""
    model = copy.deepcopy(zoo[0])
    model.generation_config.eos_token_id = None
    return model, zoo[1]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, two questions each."""
    return shapes.write_scenes(tmp_path_factory.mktemp("scenes"), 3)


@pytest.fixture(scope="module")
def asked(scenes: Path) -> list[items.Item]:
    return items.read_questions(scenes)


# ---------------------------------------------------------------------- the measures


def test_divergence_by_hand() -> None:
    dense = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    other = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]).log()
    wanted = torch.tensor([0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)])
    torch.testing.assert_close(loyalty.divergence(dense, other + 3).float(), wanted)
    assert loyalty.divergence(dense, dense).tolist() == [0.0, 0.0]


def test_interval_by_hand() -> None:
    low, high = loyalty.interval(0.8, 10, 1.96)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert loyalty.interval(1.0, 20, 1.645)[1] == pytest.approx(1.0)


def test_the_dense_model_is_loyal_to_itself(zoo: Any, asked: list[items.Item]) -> None:
    model, processor = zoo
    inputs = items.encode(model, processor, asked)
    wanted = loyalty.reference(model, inputs, 4)
    told = loyalty.summary([loyalty.outcome(model, inputs, wanted, None)])
    assert [told[name] for name in loyalty.MEASURES] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert told["flops"] is None and told["kl_se"] == 0.0


def plain_run(
    model: Any, inputs: dict[str, Any], tokens: list[int], recipe: vtc.Recipe | None
) -> list[torch.Tensor]:
    """Log probabilities in front of every one of `tokens`, by forwards that nothing else steers."""
    prompt = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        if recipe is None:  # without a cache
            ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]], dtype=torch.long)], 1)
            pixels = {"pixel_values": inputs["pixel_values"]}
            logits = model(input_ids=ids, **pixels).logits[0, prompt - 1 :]
            return list(logits.double().log_softmax(-1))
        with vtc.attach(model, recipe):
            out = model(**inputs, use_cache=True)
            steps = [out.logits[0, -1]]
            for token in tokens[:-1]:
                out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
                steps.append(out.logits[0, -1])
    return [step.double().log_softmax(-1) for step in steps]


@pytest.mark.parametrize(("method", "keep"), [("random", 0.1), ("fastv", 0.25)])
def test_kl_and_agreement_equal_plain_forwards(
    wordy: Any, asked: list[items.Item], method: str, keep: float
) -> None:
    model, processor = wordy
    host = vtc.session.adapter_for(model)
    recipe = vtc.Recipe.build(method, host.depth, keep)
    for item in asked[:3]:
        inputs = items.encode(model, processor, [item])
        wanted = loyalty.reference(model, inputs, 5)
        assert wanted.lengths == (5,)
        with vtc.attach(model, recipe) as session:
            [row], _ = loyalty.compare(model, inputs, wanted)
            free = loyalty.said(model, inputs, 5)[0].tolist()
        stats = session.stats()
        tokens = wanted.tokens[0].tolist()
        dense, short = (plain_run(model, inputs, tokens, r) for r in (None, recipe))
        assert [int(step.argmax()) for step in dense] == tokens
        far = [float((p.exp() * (p - q)).sum()) for p, q in zip(dense, short, strict=True)]
        same = [int(q.argmax()) == token for q, token in zip(short, tokens, strict=True)]
        before = next((i for i in range(5) if free[i] != tokens[i]), 5)
        assert row["kl"] == pytest.approx(sum(far) / 5, rel=1e-4, abs=1e-4)
        assert row["first_kl"] == pytest.approx(far[0], rel=1e-4, abs=1e-4)
        assert row["tokens"] == sum(same) / 5
        assert row["prefix"] == before / 5 and row["exact"] == (free == tokens)
        assert 0 < stats["flops"] < stats["flops_dense"]


def test_a_batch_measures_what_its_items_do_alone(zoo: Any, asked: list[items.Item]) -> None:
    model, processor = zoo
    prompts = ("what ?", "how many objects are there in this picture ?")
    mixed = [*asked[:3], *(items.Item(asked[3].media, "image", text) for text in prompts)]
    assert len({len(item.prompt.split()) for item in mixed}) > 1

    alone = [_measured(model, processor, [item])[0] for item in mixed]
    assert len({row["kl"] for row in alone}) == len(mixed)
    for one, other in zip(_measured(model, processor, mixed), alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "mark"), [("qwen2_5_vl", "<start> <image> <end> "), ("internvl", "<image> ")]
)
def test_families_of_many_shapes_in_a_batch(name: str, mark: str, tmp_path: Path) -> None:
    """Pictures of three sizes, and videos, with the stock processors."""
    model, chat = video_models.model(name), video_models.CHAT.replace("'video'", "'image'")
    pictures, videos = (video_models.processor(name) for _ in range(2))
    pictures.chat_template = chat.replace("VIDEO", repr(mark))
    for seed, size in enumerate([(48, 64), (64, 48), (56, 56)]):
        frames = video_models.frames(seed, 4, *size)
        Image.fromarray(frames[0]).save(tmp_path / f"{seed}.png")
        vtc.video.write(tmp_path / f"{seed}.mp4", frames)
    kinds: list[tuple[items.Kind, Any]] = [("image", pictures), ("video", videos)]
    for kind, processor in kinds:
        found = items.asked([tmp_path], kind, ["what moves", "what moves left left"])
        mixed = found if kind == "image" else found[:2]  # videos of a batch are of one shape
        parts = (mixed, *([item] for item in mixed))
        together, *alone = (_measured(model, processor, part) for part in parts)
        for one, [other] in zip(together, alone, strict=True):
            assert one["kl"] > 1e-3 and one == pytest.approx(other, abs=1e-4)


def _measured(model: Any, processor: Any, some: list[items.Item]) -> list[dict[str, float]]:
    inputs = items.encode(model, processor, some, "4")
    wanted = loyalty.reference(model, inputs, 4)
    with vtc.attach(model, "divprune", keep=0.1):
        return loyalty.compare(model, inputs, wanted)[0]


def test_what_makes_no_batch_says_what_to_do(zoo: Any, asked: list[items.Item]) -> None:
    def processor(**_: Any) -> Any:
        raise ValueError("sizes differ")

    processor.image_token = "<image>"  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput, match="2 of these images.*sizes differ.*--batch-size 1"):
        items.encode(zoo[0], processor, asked[:2])
    with pytest.raises(InvalidInput, match="cannot read this image: sizes differ"):
        items.encode(zoo[0], processor, asked[:1])


def test_what_vtc_refuses_is_told_as_it_is(zoo: Any, asked: list[items.Item]) -> None:
    def processor(**_: Any) -> Any:
        raise InvalidVideo("the clip is damaged")

    processor.image_token = "<image>"  # type: ignore[attr-defined]
    with pytest.raises(InvalidVideo, match="^the clip is damaged"):
        items.encode(zoo[0], processor, asked[:2])


def test_positions_end_with_the_end_token(zoo: Any) -> None:
    tokens = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 0, 0, 0]])
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 3]))
    assert loyalty._lengths(model, tokens) == (2, 4, 1)


def test_nan_is_an_error(zoo: Any, asked: list[items.Item]) -> None:
    model, processor = zoo
    inputs = items.encode(model, processor, asked[:1])
    wanted = loyalty.reference(model, inputs, 2)
    hook = model.lm_head.register_forward_hook(lambda *given: given[-1] * float("nan"))
    try:
        with pytest.raises(loyalty.NotNumbers, match="NaN or infinities"):
            loyalty.compare(model, inputs, wanted)
    finally:
        hook.remove()


def test_a_word_that_is_ruled_out_is_an_error(zoo: Any, asked: list[items.Item]) -> None:
    """Its KL is infinite, while all scores add up to a finite one."""
    model, processor = zoo
    inputs = items.encode(model, processor, asked[:1])
    wanted = loyalty.reference(model, inputs, 2)

    def ruled_out(*given: Any) -> Any:
        given[-1][..., int(wanted.tokens[0, 0])] = -torch.inf

    hook = model.lm_head.register_forward_hook(ruled_out)
    try:
        with pytest.raises(loyalty.NotNumbers, match="KL of a next word is not finite"):
            loyalty.compare(model, inputs, wanted)
    finally:
        hook.remove()


def test_standard_errors_of_pictures_by_hand() -> None:
    # two pictures with means 1 and 0: as if there were two items
    alike = loyalty.standard_error([1, 1, 1, 0, 0, 0], "aaabbb")
    assert alike == pytest.approx(statistics.stdev([1, 0]) / 2**0.5)
    # the mean is 0.5; the pictures are off by 1 - 0.5, 0.5 - 0.5 and 0 - 2 * 0.5 + 0.5 in sum
    assert loyalty.standard_error([1, 1, 0, 0], "abbc") == pytest.approx(
        (3 / 2 * (0.25 + 0 + 0.25)) ** 0.5 / 4
    )
    assert loyalty.standard_error([1, 0], "aa") is None


def test_summary_by_hand() -> None:
    def row(exact: float, kl: float) -> dict[str, float]:
        return dict.fromkeys(("tokens", "prefix", "first_kl"), 0.5) | {"exact": exact, "kl": kl}

    def batch(rows: list[Any], seconds: float, flops: float, visual: float) -> dict[str, Any]:
        more = {"seconds": seconds, "seconds_dense": 2.0, "flops": flops, "flops_dense": 100.0}
        return {"items": rows, "visual_tokens": visual, **more}

    told = loyalty.summary(
        [
            batch([row(1, 0.0), row(0, 3.0)], 1.0, 50.0, 8.0),
            batch([row(1, 0.0)], 3.0, 20.0, 5.0),
            batch([row(1, 1.0)], 2.0, 20.0, 5.0),
        ]
    )
    assert told["items"] == 4 and told["exact"] == 0.75 and told["kl"] == 1.0
    assert told["exact_se"] == pytest.approx(0.5 / 2) and told["kl_se"] == pytest.approx(2**0.5 / 2)
    assert told["media"] == 4
    assert told["time"] == 1.0 and told["flops"] == 0.3 and told["visual_tokens"] == 6.5


# ---------------------------------------------------------------------- items


def test_items_are_pictures_times_prompts(scenes: Path) -> None:
    found = items.asked([scenes.parent, scenes.parent / "scene_1.png"], "image", ["a ?", "b ?"])
    names = [(item.media.name, item.prompt) for item in found]
    assert names[:3] == [("scene_1.png", "a ?"), ("scene_1.png", "b ?"), ("scene_2.png", "a ?")]
    assert len(found) == 6
    [item] = items.asked([scenes.parent / "scene_1.png"], "image")
    assert item.prompt == "Describe the image in detail."


def test_questions_know_what_is_right(scenes: Path, asked: list[items.Item]) -> None:
    rows = [json.loads(line) for line in scenes.read_text().splitlines()]
    assert [item.prompt for item in asked] == [row["question"] for row in rows]
    assert asked[0].right(rows[0]["answer"]) is True and asked[0].right("nothing") is False


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no json", "line 1: no JSON"),
        ('{"image": "scene_1.png"}', "line 1: 'question' is missing"),
        ('{"image": "gone.png", "question": "what ?"}', "line 1: no such image"),
        ('{"image": "../x.png", "question": "what ?"}', "leaves the folder"),
    ],
)
def test_bad_lines(scenes: Path, line: str, says: str) -> None:
    file = scenes.parent / "bad.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InvalidQuestions, match=says):
        items.read_questions(file)


def test_files_given_twice_are_asked_about_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    twice = [tmp_path / "a.png", tmp_path / "sub" / ".." / "a.png", tmp_path]
    assert [item.media.name for item in items.asked(twice, "image")] == ["a.png"]


def test_copies_of_a_picture_are_never_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for n in range(10):
        (tmp_path / f"{n}.png").write_bytes(b"%d" % n)
        (tmp_path / f"copy{n}.png").write_bytes(b"%d" % n)
        (tmp_path / f"link{n}.png").symlink_to(tmp_path / f"{n}.png")
    names = ("{}.png", "sub/../{}.png", "copy{}.png", "link{}.png")
    paths = [(n, tmp_path / name.format(n)) for name in names for n in range(10)]
    found = [items.Item(path, "image", str(n)) for n, path in paths]
    chosen, held = items.split(found, 0.3, seed=0)
    assert len(chosen) == 28 and len(held) == 12
    assert not {item.prompt for item in chosen} & {item.prompt for item in held}
    with pytest.raises(InvalidInput, match="only one picture"):
        items.split(found[::10], 0.3, seed=0)


def test_the_first_items_are_about_many_pictures(files: list[Path]) -> None:
    found = [items.Item(path, "image", f"{n}") for path in files for n in range(3)]
    for part in items.split(found, 0.3, seed=1):
        pictures = len({item.media for item in part})
        assert len(part) == 3 * pictures
        assert len({item.media for item in part[:pictures]}) == pictures


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """20 that differ."""
    out = [tmp_path / f"{n}.png" for n in range(20)]
    for n, path in enumerate(out):
        path.write_bytes(b"%d" % n)
    return out


def test_a_split_keeps_pictures_apart(files: list[Path]) -> None:
    found = [items.Item(files[n % 20], "image", f"{n}") for n in range(60)]
    chosen, held = items.split(found, 0.3, seed=1)
    assert not {item.media for item in chosen} & {item.media for item in held}
    assert sorted(int(i.prompt) for i in chosen + held) == list(range(60)) and len(held) == 18
    assert items.split(found, 0.3, seed=1) == (chosen, held)
    assert items.split(found, 0.0, seed=1)[1] == []
    with pytest.raises(InvalidInput, match="only one picture"):
        items.split(found[:1], 0.3, seed=1)


def test_a_fingerprint_sees_files_prompts_and_order(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"x" * 10)
    found = [items.Item(file, "image", "what ?") for file in files]
    first = items.fingerprint(found)
    assert items.fingerprint(found[::-1]) != first == items.fingerprint(list(found))
    assert items.fingerprint([found[0], items.Item(files[1], "image", "who ?")]) != first
    files[1].write_bytes(b"x" * 9 + b"y")
    assert items.fingerprint(found) != first


def test_batches_are_of_one_kind() -> None:
    kinds = ["image"] * 3 + ["video"] * 2
    found = [items.Item(Path(str(n)), kind, "?") for n, kind in enumerate(kinds)]  # type: ignore[arg-type]
    assert [len(part) for part in items.batches(found, 2)] == [2, 1, 2]


# ---------------------------------------------------------------------- the command


def bench(*words: str | Path) -> int:
    return cli.main(["bench", "loyalty", *map(str, words)])


def test_command(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loyalty.json"
    words = ("--model", "tiny-llava-shapes", "--questions", scenes, "--max-new-tokens", 4)
    assert bench(*words, "--methods", "divprune", "--keep", "0.1", "--json", out) == 0
    rows = {row["method"]: row for row in records.read(out)}
    assert list(rows) == ["dense", "random", "grid", "divprune"]
    assert rows["dense"]["exact"] == 1.0 and rows["dense"]["kl"] == 0.0
    assert rows["divprune"]["flops"] < 0.2 and rows["divprune"]["items"] == 6
    model, processor = vtc_zoo.load("tiny-llava-shapes")
    with vtc.attach(model, "divprune", keep=0.1):  # one by one
        told = []
        for item in items.read_questions(scenes):
            ids = loyalty.said(model, items.encode(model, processor, [item]), 4)
            told.append(item.right(processor.decode(ids[0], skip_special_tokens=True)))
    assert rows["divprune"]["right"] == sum(map(bool, told)) / 6
    assert "| divprune | projector | 0.1 |" in capsys.readouterr().out


def test_a_row_that_computes_no_numbers_fails_alone(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    measure, out = loyalty.outcome, tmp_path / "loyalty.json"

    def broken(model: Any, inputs: Any, wanted: Any, session: Any) -> Any:
        method = "dense" if session is None else session.recipe.steps[0].method
        if method == bad:
            raise loyalty.NotNumbers("NaN.")
        return measure(model, inputs, wanted, session)

    monkeypatch.setattr(loyalty, "outcome", broken)
    words = ("--model", "tiny-llava-shapes", "--questions", scenes, "--max-new-tokens", 2)
    more = ("--methods", "divprune", "--keep", "0.1", "--json", out)
    bad = "grid"
    assert bench(*words, *more) == 1
    assert [row["method"] for row in records.read(out)] == ["dense", "random", "divprune"]
    assert {row["media"] for row in records.read(out)} == {3}  # six questions
    assert "not run: grid at projector keep=0.1: NaN." in capsys.readouterr().out
    bad = "dense"
    assert bench(*words, *more) == 1
    assert "the dense model, run again, cannot be measured" in capsys.readouterr().err


def test_command_with_a_recipe_alone(scenes: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "loyalty.json"
    vtc.Recipe((vtc.Step("grid", "projector", 0.5), vtc.Step("fastv", "decoder.2", 0.1))).dump(
        recipe
    )
    words = ("--images", scenes.parent / "scene_1.png", "--prompt", "what ?", "--recipe", recipe)
    assert bench("--model", "tiny-llava-shapes", *words, "--json", out) == 0
    assert [(row["method"], row["site"]) for row in records.read(out)] == [
        ("dense", ""),
        ("mine.yaml", "projector+decoder.2"),
    ]


def test_videos(tmp_path: Path) -> None:
    moving.write_clips(tmp_path, 2)
    out = tmp_path / "loyalty.json"
    words = ("--videos", tmp_path, "--prompt", "how many flashes are there ?", "--no-baselines")
    more = ("--methods", "evs", "--keep", "0.25", "--max-new-tokens", 2, "--json", out)
    assert bench("--model", "tiny-llava-video", *words, *more) == 0
    dense, evs = records.read(out)
    assert dense["kl"] == 0.0 and evs["items"] == 2 and evs["flops"] < 0.5


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "nothing to ask about"),
        (("--images", "gone.png"), 2, "no such image: gone.png"),
        (("--images", "{}", "--methods", "nonsense"), 2, "unknown method 'nonsense'"),
        (("--images", "{}"), 2, "give --methods or --recipe"),
        (("--questions", "{}/questions.jsonl", "--prompt", "what ?"), 2, "leave out --prompt"),
    ],
)
def test_what_cannot_be_measured_says_why(
    scenes: Path, words: tuple[str, ...], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tuple(word.format(scenes.parent) for word in words)
    assert bench("--model", "tiny-llava-shapes", *words) == code
    assert says in capsys.readouterr().err
