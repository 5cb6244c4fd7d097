"""The plug-in inside lmms-eval itself: its command line on local tasks, offline, against answers of
the same items that vtc gives by itself. `.ci/harness` makes an environment and runs this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import vtc_zoo
from tqdm import tqdm
from vtc_zoo.moving import write_clips
from vtc_zoo.shapes import write_scenes

import vtc.video
from vtc.commands import demo
from vtc.errors import InvalidInput, UnknownName, UnsupportedModel

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function {name}.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 3, temperature: 0, image_aspect_ratio: original}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
SHAPES = """\
from pathlib import Path
from PIL import Image

def doc_to_visual(doc):
    with Image.open(Path(__file__).parent / doc["image"]) as image:
        return [image.convert("RGB")]
"""
CLIPS = """\
from pathlib import Path

def doc_to_visual(doc):
    return [str(Path(__file__).parent / doc["video"])]
"""
COMPRESSED = "method=divprune,keep=0.25"
RUNS = {
    "dense": ("shapes", "tiny-llava-shapes", ""),
    "compressed": ("shapes", "tiny-llava-shapes", f",{COMPRESSED}"),
    "videos": ("clips", "tiny-llava-video", ",recipe={recipe},frames=8"),
}
RECIPE = {"steps": [{"method": "divprune", "at": "projector", "keep": 0.25}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, code, write in (
        ("shapes", SHAPES, partial(write_scenes, n=20)),
        ("clips", CLIPS, partial(write_clips, n=4)),
    ):
        here = folder / name
        write(here)
        (here / f"{name}.yaml").write_text(TASK.format(name=name, folder=here))
        (here / f"{name}.py").write_text(code)
    vtc.Recipe.load(RECIPE).dump(folder / "recipe.yaml")
    return folder


@pytest.fixture(scope="module")
def ran(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results, answers and log of every run of the command line."""
    out = tmp_path_factory.mktemp("out")
    runs = [
        {
            "model": "vtc",
            "model_args": f"pretrained={model}" + more.format(recipe=data / "recipe.yaml"),
            "tasks": task,
            "include_path": str(data),
            "batch_size": 8,
            "device": "cpu",
            "output_path": str(out / name),
            "log_samples": True,
        }
        for name, (task, model, more) in RUNS.items()
    ]
    (out / "runs.yaml").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "lmms_eval", "--config", str(out / "runs.yaml")]
    places = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
    found: dict[str, Any] = {"log": done.stdout + done.stderr}
    assert done.returncode == 0, found["log"]
    for name in RUNS:
        results = list((out / name).rglob("*_results.json"))
        assert results, found["log"]
        samples = next((out / name).rglob("*_samples_*.jsonl")).read_text().splitlines()
        rows = sorted(map(json.loads, samples), key=lambda row: row["doc_id"])
        found[name] = json.loads(results[0].read_text()), rows
    return found


def answers(rows: list[dict[str, Any]]) -> list[str]:
    return [row["filtered_resps"].strip() for row in rows]


@pytest.mark.parametrize("name", ["dense", "compressed"])
def test_images_score_as_they_do_without_the_harness(
    data: Path, ran: dict[str, Any], name: str
) -> None:
    results, rows = ran[name]
    items = demo.packaged(data / "shapes")
    setting = demo.Setting("divprune", 0.25) if name == "compressed" else demo.Setting()
    model, processor = vtc_zoo.load("tiny-llava-shapes")
    batches = [demo.encode(processor, items[i : i + 5]) for i in range(0, len(items), 5)]
    own = demo.answer(model, processor, items, batches, setting, tqdm(disable=True))
    assert answers(rows) == list(own.answers)
    score = results["results"]["shapes"]["exact_match,none"]
    assert score == pytest.approx(sum(own.right) / len(items))
    assert score == 1.0 if name == "dense" else 0.5 < score < 1.0


def test_tokens_and_flops_are_in_the_results(ran: dict[str, Any]) -> None:
    results, rows = ran["compressed"]
    numbers = results["throughput"]
    assert numbers["avg_visual_tokens_before"] == 144 and numbers["avg_visual_tokens_after"] == 36
    assert 0 < numbers["avg_prefill_gflops"] < 0.5 * numbers["avg_prefill_gflops_dense"]
    assert rows[0]["token_counts"][0]["input_tokens"] > 144
    assert results["efficiency"]["overall"]["docs_with_token_counts"] == len(rows)
    assert "avg_prefill_gflops" not in ran["dense"][0]["throughput"]
    assert "vtc: dense: no recipe" in ran["log"] and "projector  divprune" in ran["log"]
    assert "have no effect: image_aspect_ratio" in ran["log"]


def test_videos_answer_as_they_do_without_the_harness(
    data: Path, ran: dict[str, Any], tmp_path: Path
) -> None:
    results, rows = ran["videos"]
    out = tmp_path / "answers.jsonl"
    model = vtc_zoo.load("tiny-llava-video")
    options: dict[str, Any] = {"recipe": RECIPE, "frames": 8, "max_new_tokens": 3, "workers": 0}
    folder = data / "clips"
    vtc.video.answer_questions(
        *model, folder / "questions.jsonl", folder, out=out, progress=False, **options
    )
    own = [json.loads(line) for line in out.read_text().splitlines()]
    assert answers(rows) == [record["answer"] for record in own]
    right = sum(record["answer"] == record["target"] for record in own)
    score = results["results"]["clips"]["exact_match,none"]
    assert score == pytest.approx(right / len(own)) and score > 0.5


def test_what_is_refused_and_where_answers_end() -> None:
    from lmms_eval.models import get_model

    make = get_model("vtc").create_from_arg_string
    with pytest.raises(UnknownName, match="'kep'. Did you mean 'keep'"):
        make("pretrained=tiny-llava-shapes,method=divprune,kep=0.5")
    with pytest.raises(InvalidInput, match="batch_size='auto'"):
        make("pretrained=tiny-llava-shapes", {"batch_size": "auto"})
    model = make("pretrained=tiny-llava-shapes", {"batch_size": 2, "device": "cpu"})
    for call in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UnsupportedModel, match="output_type generate_until"):
            call([])
    assert model._generation({"until": ["\n\n", "Q:"]}).until == ("Q:",)  # as lmms-eval's own
    model.clean()
    assert not hasattr(model, "chat")
