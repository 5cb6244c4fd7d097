"""kill -9 in the middle of a real model: every question answered once, as if nobody had killed."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import video_models
from support.videoqa import end, fork, job_of, some_rows, untimed, write_clips, write_lines

from vtc.video import run as runs
from vtc.video.decode import Clip, read
from vtc.video.journal import Journal, decode, lines

COUNT = 24


def test_a_compressed_model_killed_at_random_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is loaded once and forked, so that a start costs milliseconds."""
    clips = write_clips(tmp_path)
    name = "llava_onevision"
    model, processor = video_models.model(name), video_models.processor(name)
    known: dict[str, Clip] = {}  # read here: decoders and forks do not go together

    def known_clip(path: str, *options: Any) -> Clip:
        return known[Path(path).name]

    for path in clips.rglob("[a-d].mp4"):
        known[path.name] = read(path, 4)
    monkeypatch.setattr(runs.Readers, "_read", staticmethod(known_clip))
    questions = write_lines(tmp_path / "q.jsonl", some_rows(COUNT))
    calm, out, dice = tmp_path / "calm.jsonl", tmp_path / "out.jsonl", random.Random(7)
    request = {"method": "divprune", "keep": 0.25}

    def work(linked: Any, target: Path = out) -> None:
        def make() -> Any:
            return runs.answering(model, processor, request, 3, 3, None)

        runs.run(job_of(questions, clips, target), make, linked)

    (child,) = fork(1, lambda linked: work(linked, calm))
    child.join(120)
    assert child.exitcode == 0
    kills, until = 0, time.monotonic() + 120
    while not out.exists():
        assert time.monotonic() < until
        children = fork(dice.choice((1, 2)), work)
        last = kills >= 6  # nobody is killed any more
        while any(child.is_alive() for child in children):
            time.sleep(0.005)
            if not last and len(Journal(out).found()) > COUNT * (kills + dice.random()) / 7:
                break
        kills += any(child.is_alive() for child in children)
        end(children)
    assert kills >= 3
    records = [decode(line) for part in Journal(out).parts() for _, line in lines(part)]
    counts = Counter(int(entry[0].partition("-")[0]) for entry in records if entry is not None)
    assert counts == {number: 1 for number in range(1, COUNT + 1)}
    assert untimed(out) == untimed(calm)
