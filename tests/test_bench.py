"""The measuring commands: what they count is right, and their files and tables say it."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import vtc_zoo
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from vtc_zoo import shapes

import vtc
from vtc.bench import exams, flops, memory, options, quality, records, speed, stages, synthetic
from vtc.commands.loading import UsageError
from vtc.errors import MissingSignal, UnknownName, VtcError

ENVIRONMENT = {"python", "torch", "transformers", "cpu", "threads", "dtype", "date", "seed"}


def run(command: ModuleType, *words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


# ---------------------------------------------------------------------- records and options


def test_records_round_trip(tmp_path: Path) -> None:
    where = records.environment(torch.bfloat16, seed=3)
    assert set(where) == ENVIRONMENT and where["dtype"] == "bfloat16" and where["cpu"]
    records.write(tmp_path / "r.json", [{"a": 1}, {"a": 2, "seed": 9}], where)
    first, second = records.read(tmp_path / "r.json")
    assert first == {**where, "a": 1} and second == {**where, "a": 2, "seed": 9}


def test_table() -> None:
    rows = [{"what_is": "x", "share": 0.5}, {"what_is": "y", "share": None}]
    text = records.table(rows, {"what_is": "", "share": ".0%", "gone": str})
    assert text.splitlines() == [
        "| what is | share | gone |",
        "| --- | --- | --- |",
        "| x | 50% |  |",
        "| y |  |  |",
    ]


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        (quality, ["--budgets", "0.5,2.5"], "keep=2.5"),
        (quality, ["--scenes", "0"], "below 1"),
        (quality, ["--json", "/no/such/folder/file.json"], "no such folder"),
        (speed, ["--layers", "2"], "below 3"),
        (speed, ["--keep", "a"], "not a whole number"),
        (speed, ["--methods", ","], "at least one name"),
    ],
)
def test_wrong_options(
    command: ModuleType, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, *words)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_budgets_keep_counts_and_shares_apart() -> None:
    assert options.budgets("0.5,64,1.0") == [0.5, 64, 1.0]
    assert [type(keep) for keep in options.budgets("0.5,64,1.0")] == [float, int, float]


@pytest.mark.parametrize("command", [quality, speed, memory, stages])
def test_help(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert "examples:" in capsys.readouterr().out


def test_import_is_light() -> None:
    names = "flops, memory, options, quality, records, speed, stages, synthetic"
    code = f"import sys; from vtc.bench import {names}; sys.exit('transformers' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}
        ).returncode
        == 0
    )


# ---------------------------------------------------------------------- FLOPs

SHAPE = synthetic.Shape(3, hidden=32, intermediate=48, heads=4, kv_heads=2, vocabulary=64)


def by_hand(lengths: list[int], bias: int = 0) -> int:
    """Decoder layers of `lengths` tokens, causal attention; `bias` channels ride along."""
    head, kv = SHAPE.hidden // SHAPE.heads, SHAPE.hidden // SHAPE.heads * SHAPE.kv_heads
    projections = SHAPE.hidden * (2 * SHAPE.hidden + 2 * kv)
    mlp = 3 * SHAPE.hidden * SHAPE.intermediate
    total = 0
    for n in lengths:
        pairs = n * (n + 1) // 2
        total += 2 * n * (projections + mlp) + 2 * SHAPE.heads * pairs * 2 * (head + bias)
    return total


@pytest.fixture(scope="module")
def tiny() -> Any:
    return synthetic.llava(SHAPE, 16, torch.float32, seed=0)


@pytest.fixture(scope="module")
def asked(tiny: Any) -> dict[str, Any]:
    return synthetic.prompt(tiny, 16, 8, seed=0)


def test_flops_of_a_linear_and_of_attention() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    weight, x = torch.randn(5, 8), torch.randn(3, 8)
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(call: Any) -> int:
        with flops.FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as counter:
            call()
        return counter.get_total_flops()

    assert counted(lambda: x @ weight.T) == 2 * 3 * 8 * 5
    assert counted(lambda: attend(q, k, k, is_causal=True, enable_gqa=True)) == 2 * 8 * 21 * 16
    assert counted(lambda: attend(q, k, k, enable_gqa=True)) == 2 * 8 * 36 * 16
    assert counted(lambda: attend(q[:, :, :2], k, k, enable_gqa=True)) == 2 * 8 * 12 * 16


def test_flops_of_a_prefill(tiny: Any, asked: dict[str, Any]) -> None:
    found = flops.measure(tiny, lambda: synthetic.prefill(tiny, asked))
    head = 2 * SHAPE.hidden * SHAPE.vocabulary
    assert found == flops.Flops(by_hand([24] * 3) + head, 0, by_hand([24] * 3))


def test_flops_inside_a_session(tiny: Any, asked: dict[str, Any]) -> None:
    with vtc.attach(tiny, "random", keep=4, at="decoder.1"):
        found = flops.measure(tiny, lambda: synthetic.prefill(tiny, asked))
    assert found.language_model == by_hand([24, 12, 12])
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_flops_of_the_tower_and_of_what_mass_adds(tiny: Any, asked: dict[str, Any]) -> None:
    seen = {k: v for k, v in asked.items() if k != "mm_encoder_outputs"}
    seen["pixel_values"] = torch.randn(1, 3, 16, 16)
    with vtc.attach(tiny, "random", keep=4, at="projector", mass=1.0):
        found = flops.measure(tiny, lambda: synthetic.prefill(tiny, seen))
    patches = 2 * 16 * 16 * 3 * 4 * 4
    blocks = 2 * 17 * (4 * 16 * 16 + 2 * 16 * 16) + 2 * 17 * 17 * 2 * 16
    assert found.tower == patches + blocks
    nearest = 2 * 16 * 4 * SHAPE.hidden
    assert found.language_model == by_hand([12] * 3, bias=8) + nearest


def test_first_layers(tiny: Any, asked: dict[str, Any]) -> None:
    with synthetic.first_layers(tiny, 2):
        found = flops.measure(tiny, lambda: synthetic.prefill(tiny, asked))
    assert found.language_model == by_hand([24] * 2)
    assert tiny.model.language_model.config.num_hidden_layers == 3


# ---------------------------------------------------------------------- speed


def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--layers 3 --heads 1 --visual 16 --text 8 --keep 4,8 --repeats 2 --dtype float32"
    path = tmp_path / "s.json"
    assert run(speed, *words.split(), "--methods", "random,divprune,fastv", "--json", path) == 0
    shown = capsys.readouterr()
    assert "| dense |" in shown.out and "speed:" in shown.err
    assert shown.out.count("not run: 'fastv' works at decoder, not at 'projector'") == 1
    rows = records.read(path)
    assert all(set(row) >= ENVIRONMENT for row in rows)
    cases = {row["case"]: row for row in rows if "promise" not in row}
    for keep in (4, 8):
        for name in ("random projector", "divprune decoder.2", "fastv decoder.2"):
            row = cases[f"{name} {keep}"]
            assert row["keep"] == keep and row["flops"] < cases["dense"]["flops"]
            for number in ("ms", "speedup", "flops_ratio", "limit_ratio", "error"):
                assert math.isfinite(row[number])
            assert 0 < row["method_share"] <= row["decide_share"]
        assert cases[f"random projector {keep} +merge +mass"]["merge"] == "nearest"
        assert f"limit {keep}" in cases and f"limit {keep}, early layers" in cases
    assert cases["random projector all"]["flops_ratio"] == 1
    promised = [(row["promise"], row["case"]) for row in rows if "promise" in row]
    assert ("T is above T(limit) by at most", "random projector 4") in promised
    assert ("time of the method over dense prefill", "divprune projector 8") in promised
    assert ("last-row attention over dense prefill", "fastv decoder.2 4") in promised
    assert ("a session that keeps all tokens costs at most", "fastv decoder.2 all") in promised
    assert all(row["passed"] is (row["value"] <= row["most"]) for row in rows if "promise" in row)


def test_speed_of_an_unknown_method() -> None:
    with pytest.raises(UnknownName, match="divprune"):
        run(speed, "--methods", "divprun", "--layers", "3", "--heads", "1", "--visual", "16")


def test_median_ratio() -> None:
    middle, error = speed.median_ratio([2.0, 3.0, 8.0, 2.0], [1.0, 1.0, 2.0, 1.0])
    assert middle == 2.5 and error == pytest.approx(1.86 * 0.5 / 2)


# ---------------------------------------------------------------------- memory


def test_recorded_counts_what_is_held_at_once() -> None:
    x = torch.ones(1000)
    with memory.recorded() as found:
        y = x + 1  # 4000 bytes
        z = y + x  # 8000 held
        del y
        z = z + 1  # still 8000
        w = x[:500] * 2  # 6000
    assert 8000 <= found.peak < 8100 and found.largest == 4000  # scalars are tensors of 4 bytes
    assert len(z) + len(w) == 1500


def test_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.json"
    assert run(memory, "--n", "4000", "--json", path) == 0
    assert "PASS" in capsys.readouterr().out
    rows = {row["what"]: row for row in records.read(path)}
    assert all(set(row) >= ENVIRONMENT for row in rows.values())
    for name in ("random", "grid", "norm", "divprune", "merge=nearest"):
        row = rows[name]
        assert (row["n"], row["k"], row["width"]) == (4000, 400, 1024)
        assert row["ratio"] <= memory.BOUND and row["passed"]
    assert rows["divprune"]["ratio"] > 1  # normalised tokens at least: the recording sees them
    for at in ("projector", "decoder.1"):
        assert rows[f"mass=1 at {at}, sdpa"]["passed"]
    eager = rows["mass=1 at projector, eager"]
    assert eager["passed"] is None and eager["largest_kb"] >= 4 * eager["mask_kb"]


def test_memory_breaks_a_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "BOUND", 0.5)
    monkeypatch.setattr(memory, "attention", lambda seed: iter(()))
    assert run(memory, "--n", "300", "--width", "64", "--methods", "divprune") == 1


def test_memory_of_a_method_that_reads_a_model() -> None:
    with pytest.raises(MissingSignal, match="attn_last"):
        run(memory, "--n", "100", "--methods", "fastv")


# ---------------------------------------------------------------------- quality


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the zoo's: its processor, a smaller model, random weights."""
    train = pytest.importorskip("vtc_zoo.train_llava_shapes")
    folder = tmp_path_factory.mktemp("untrained")
    special = {"pad_token_id": train.PAD, "bos_token_id": train.BOS, "eos_token_id": train.EOS}
    text = LlamaConfig(
        vocab_size=len(train.VOCABULARY),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=shapes.IMAGE_SIZE,
        patch_size=shapes.PATCH_SIZE,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=train.IMAGE,
        image_seq_length=train.PATCHES,
        tie_word_embeddings=True,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():  # far from zero, so that answers differ
        if weight.ndim > 1:
            weight.data.mul_(8)
    model.save_pretrained(folder)
    train.build_processor().save_pretrained(folder)
    return folder


def settings(model: Any, **changes: Any) -> tuple[list[quality.Setting], list[str]]:
    args = {"methods": ["all"], "budgets": [0.25], "at": None, "merge_mass": "both"}
    return quality.plan(model, argparse.Namespace(**(args | changes)))


def test_quality(untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "q.json", tmp_path / "q.png"
    words = "--budgets 0.25,8 --scenes 3 --seeds 2 --methods divprune,fastv,pdrop --model"
    assert run(quality, *words.split(), untrained, "--json", out, "--plot", picture) == 0
    shown = capsys.readouterr()
    assert quality.WORDING in shown.out and "quality:" in shown.err
    assert "not run: pdrop: keep=8 is a token count" in shown.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = records.read(out)
    assert all(set(row) >= ENVIRONMENT | {"flops", "flops_tower", *shapes.TYPES} for row in rows)
    assert {row["seed"] for row in rows} == {0, 1}
    assert {row["scene_seed"] for row in rows} == {shapes.TEST_SEED, shapes.TEST_SEED + 1000}
    assert all(0 <= row["exact_match"] <= 1 and row["questions"] == 6 for row in rows)
    found = {(row["method"], row["site"], row["keep"], row["merge"], row["mass"]) for row in rows}
    assert len(found) * 2 == len(rows)
    assert ("dense", "", 1.0, None, None) in found
    pyramid = "decoder.1+decoder.2+decoder.3"
    for control in quality.CONTROLS:
        for site in ("projector", "decoder.2", pyramid):
            assert (control, site, 0.25, "none", 0.0) in found
            assert (control, site, 0.25, "nearest", 1.0) in found
    for method, site in (("divprune", "projector"), ("fastv", "decoder.2")):
        assert {(method, site, keep, "none", 0.0) for keep in (0.25, 8)} <= found
    dense = rows[0]["flops_language_model"]
    assert all(row["flops_language_model"] < dense for row in rows if row["method"] != "dense")
    assert all(row["flops_tower"] == rows[0]["flops_tower"] > 0 for row in rows)


def test_all_methods_run_or_are_refused(untrained: Path) -> None:
    model, _ = quality.load(str(untrained))
    runs, refused = settings(model)
    told = " ".join(refused)
    ran = {run.fields["method"] for run in runs}
    assert all(name in ran or name in told for name in vtc.REDUCERS)
    full, _ = settings(model, methods=["divprune"], merge_mass="full")
    own = [run.fields for run in full if run.fields["method"] == "divprune"]
    assert [(f["merge"], f["mass"]) for f in own] == quality.VARIANTS["full"]


def test_quality_elsewhere(untrained: Path) -> None:
    model, _ = quality.load(str(untrained))
    runs, refused = settings(model, methods=["fastv"], at=["projector", "decoder.1"])
    assert {run.fields["site"] for run in runs[1:]} == {"projector", "decoder.1"}
    assert [run.fields["site"] for run in runs if run.fields["method"] == "fastv"] == [
        "decoder.1"
    ] * 2
    assert len(refused) == 1 and "works at decoder" in refused[0]
    with pytest.raises(UnknownName, match="fastv"):
        settings(model, methods=["fastw"])


def test_model_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="Did you mean 'tiny-llava-shapes'"):
        quality.load("tiny-lava-shapes")


def generated(model: Any, processor: Any, seed: int, scenes: int) -> list[str]:
    """Answers of the stock `generate` with the stock processor, in the order of the exam."""
    drawn = shapes.test_set(scenes, 2, exams.scene_seed(seed))
    items = [(scene.image, q) for scene, questions in drawn for q in questions]
    items.sort(key=lambda item: len(item[1].text.split()))
    inputs = processor(
        images=[image for image, _ in items],
        text=[vtc_zoo.prompt(q.text) for _, q in items],
        padding=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def check_agreement(model: Any, processor: Any, scenes: int, whole: bool) -> None:
    """One forward per question says what `generate` says, dense and with every method."""
    exam = exams.set_exam(model, processor, 1, scenes, 2, batch=5)
    still = [  # the others want videos
        name
        for name, cls in ((name, vtc.REDUCERS[name]) for name in vtc.REDUCERS)
        if not cls.frames and not issubclass(cls, vtc.Selector)
    ]
    for setting in settings(model, methods=still)[0]:
        with setting.attach(model, seed=1):
            words = generated(model, processor, 1, scenes)
        with setting.attach(model, seed=1):
            ids = [exams.answer(model, exam, b, setting.reads_tower) for b in exam.batches]
        told = processor.batch_decode(torch.cat(ids)[:, None], skip_special_tokens=True)
        steps = () if setting.recipe is None else setting.recipe.steps
        if whole and all(step.site.kind != "cache" for step in steps):
            assert told == words, setting.fields
        else:  # an untrained model, or one whose cache was cut, may not stop after one word
            assert told == [word.split()[0] if word else "" for word in words], setting.fields


def test_one_forward_equals_generate(untrained: Path) -> None:
    model, processor = quality.load(str(untrained))
    check_agreement(model, processor, scenes=6, whole=False)


def test_one_forward_equals_generate_of_the_trained_model() -> None:
    try:
        model, processor = quality.load("tiny-llava-shapes")
    except VtcError:
        pytest.skip("no weights: python -m vtc_zoo.train_llava_shapes")
    check_agreement(model, processor, scenes=8, whole=True)


def test_exam(untrained: Path) -> None:
    model, processor = quality.load(str(untrained))
    exam = exams.set_exam(model, processor, 0, 4, 3, batch=5)
    assert sum(len(batch.types) for batch in exam.batches) == 12
    for batch in exam.batches:
        assert bool(batch.mask[:, -1].all())  # padded on the left
        assert torch.equal(
            exams.answer(model, exam, batch, False), exams.answer(model, exam, batch, True)
        )
        words = processor.tokenizer.convert_ids_to_tokens(batch.answers.tolist())
        assert set(words) <= set(shapes.WORDS)


# ---------------------------------------------------------------------- stages


def test_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.json"
    words = "--methods mustdrop,zoo_prune:mode=jacobian --keep 16 --visual 81 --text 12 --layers 6"
    more = "--tower-layers 3 --repeats 2 --steps 2 --dtype float32 --json"
    assert run(stages, *words.split(), *more.split(), out) == 0
    shown = capsys.readouterr().out
    assert "| mustdrop 16 |" in shown and "|   cache |" in shown
    rows = {row["case"]: row for row in records.read(out)}
    assert rows["dense"]["over_dense"] == 1.0
    cut = rows["mustdrop 16"]
    assert cut["flops_over_dense"] < 1 and cut["KV_MB"] < rows["dense"]["KV_MB"]
    assert {"probes", "flops_share"} <= set(cut)
    assert rows["zoo_prune:mode=jacobian 16"]["flops_share"] > 0
