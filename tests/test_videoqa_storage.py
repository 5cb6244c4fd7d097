"""Disks that are full, read-only or broken: one error that says what to do, and no answer lost."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.videoqa import Echo, answered_by, fork, job_of, some_rows, untimed

from vtc.errors import OutputRefused
from vtc.video import Clip, VideoInfo
from vtc.video import run as runs
from vtc.video.journal import Journal, parts_folder

COUNT = 9
STAYS = "What is recorded stays: run the same command again when this is mended"


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names of videos; nothing is decoded."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    for row in some_rows():
        (folder / row["video"]).touch()
    info = VideoInfo(1, 1.0, 1.0, 8, 8, 0, "none")
    clip = Clip(np.zeros((1, 8, 8, 3), np.uint8), (0.0,), (0,), info)
    monkeypatch.setattr(runs.Readers, "_read", staticmethod(lambda *args: clip))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "answers").mkdir()
    return tmp_path / "answers" / "out.jsonl"


def ask(clips: Path, out: Path, asked: list[str] | None = None, **options: Any) -> None:
    """Answer; notes the ids of what was asked."""

    class Noting(Echo):
        def one(self, group: Any, question: Any) -> Any:
            if asked is not None:
                asked.append(question.id)
            return super().one(group, question)

    answered_by(job_of(some_rows(COUNT), clips, out, **options), Noting())


class Disk:
    """Fails the n-th call of a function of `os` that is about the answers."""

    def __init__(self, name: str, code: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, real = 0, getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            if name != "open" or "answers" in os.fspath(args[0]):
                self.calls += 1
                if self.calls == at:
                    raise OSError(code, os.strerror(code), str(args[0]))
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    "name", ["mkdir", "open", "write", "pwrite", "ftruncate", "fsync", "replace"]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_any_call(
    name: str, code: int, clips: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = out.with_name("calm.jsonl")
    ask(clips, calm)
    failed = 0
    while True:
        target = out.with_name(f"{failed}.jsonl")
        with monkeypatch.context() as patch:
            disk = Disk(name, code, failed + 1, patch)
            try:
                ask(clips, target)
            except OutputRefused as error:
                assert f": {os.strerror(code)}. {STAYS}" in str(error)
        if disk.calls <= failed:  # it went through
            break
        failed += 1
        there, asked = len(Journal(target).found()), list[str]()
        ask(clips, target, asked)
        assert len(asked) == COUNT - there
        assert untimed(target) == untimed(calm)
        assert not list(out.parent.rglob("*.new"))
    assert failed >= {"mkdir": 1, "pwrite": 1, "ftruncate": 1, "replace": 2}.get(name, 4)


def test_files_that_may_not_grow(clips: Path, out: Path) -> None:
    """A full disk by the kernel itself: a write goes out in part, the next one not at all."""
    calm = out.with_name("calm.jsonl")
    ask(clips, calm)
    size = max(path.stat().st_size for path in [calm, *parts_folder(calm).iterdir()])
    for limit in range(1, size + size // 7, size // 7):
        target = out.with_name(f"{limit}.jsonl")

        def work(_: Any, limit: int = limit, target: Path = target) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                ask(clips, target)
            except OutputRefused as error:
                short = "a line went out in part only (is the disk full?)" in str(error)
                assert (short or "File too large" in str(error)) and STAYS in str(error)
                raise SystemExit(7) from error

        (child,) = fork(1, work)
        child.join(60)
        assert child.exitcode == (7 if limit < size else 0), limit
        ask(clips, target)
        assert untimed(target) == untimed(calm)


def test_a_finished_run_on_a_disk_that_became_read_only(
    clips: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(clips, out)
    whole = out.read_bytes()
    real = os.open

    def read_only(path: Any, flags: int, *more: Any) -> int:
        if "answers" in str(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OutputRefused, match=f"cannot write .*lock: Read-only file system. {STAYS}"):
        ask(clips, out)
    assert out.read_bytes() == whole


RUNS = {
    "empty": b"",
    "garbled": b"\x00\xff\x00" * 9,
    "cut off": b'{"settings": {}, "sta',
    "a list": b"[1, 2]",
    "a number": b"7",
    "no settings": b'{"starts": 1}',
    "starts that are no number": b'{"settings": {}, "starts": "1"}',
}


@pytest.mark.parametrize("what", RUNS)
def test_a_damaged_run_file_is_refused_and_may_be_overwritten(
    what: str, clips: Path, out: Path
) -> None:
    ask(clips, out)
    before = untimed(out)
    run = parts_folder(out) / "run.json"
    whole = run.read_bytes()
    run.write_bytes(RUNS[what])
    with pytest.raises(OutputRefused, match=r"run.json is damaged \(.*--overwrite to begin anew"):
        ask(clips, out)
    run.write_bytes(whole)
    asked: list[str] = []
    ask(clips, out, asked)
    assert asked == [] and untimed(out) == before
    run.write_bytes(RUNS[what])
    ask(clips, out, asked, overwrite=True)
    assert len(asked) == COUNT and untimed(out) == before


@pytest.mark.parametrize("overwrite", [True, False])
def test_answers_stay_until_the_new_run_is_on_the_disk(
    overwrite: bool, clips: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are removed when what replaces them is written down, not before."""
    ask(clips, out)
    before = untimed(out)
    with monkeypatch.context() as patch:
        Disk("replace", errno.ENOSPC, 1, patch)
        with pytest.raises(OutputRefused, match=STAYS):
            ask(clips, out, overwrite=overwrite)
    assert len(Journal(out).found()) == COUNT and untimed(out) == before
    asked: list[str] = []
    ask(clips, out, asked)
    assert asked == [] and untimed(out) == before


def test_parts_that_were_given_up_and_cannot_be_removed(
    clips: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not come back, and nothing says that they stay."""
    ask(clips, out)
    with monkeypatch.context() as patch:
        Disk("unlink", errno.EIO, 1, patch)
        with pytest.raises(OutputRefused, match="cannot remove .*answers were given up") as caught:
            ask(clips, out, overwrite=True)
    assert "stays" not in str(caught.value)
    assert list(parts_folder(out).glob("0001-*")) and not Journal(out).found()
    asked: list[str] = []
    ask(clips, out, asked)
    assert len(asked) == COUNT and not list(parts_folder(out).glob("0001-*"))


def folder_of(part: Path) -> None:
    part.mkdir()


def link_of(part: Path) -> None:
    part.symlink_to(part.with_name("gone"))


@pytest.mark.parametrize("make", [folder_of, link_of, os.mkfifo])
def test_a_part_that_is_no_file(make: Callable[[Path], None], clips: Path, out: Path) -> None:
    ask(clips, out)
    before = untimed(out)
    strange = parts_folder(out) / "0001-0001.jsonl"
    make(strange)
    for overwrite in (False, True):
        with pytest.raises(
            OutputRefused, match=r"0001-0001.jsonl is not a file, but a folder, a li"
        ):
            ask(clips, out, overwrite=overwrite)
    strange.rmdir() if strange.is_dir() else strange.unlink()
    asked: list[str] = []
    ask(clips, out, asked)
    assert asked == [] and untimed(out) == before


def test_a_file_where_the_folder_of_parts_should_be(clips: Path, out: Path) -> None:
    parts_folder(out).touch()
    with pytest.raises(OutputRefused, match="cannot make .*out.jsonl.parts: File exists"):
        ask(clips, out)
