"""Video files that lie or overreach: right frames, or one error, in bounded time and memory."""

from __future__ import annotations

import importlib.util
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support import videos
from support.videoqa import Echo, answered_by, command, job_of, read_lines, write_lines

from vtc.commands import cli
from vtc.errors import InvalidInput, InvalidVideo
from vtc.video import Readers, Sampling, files, pool, probe, read
from vtc.video.by_pyav import Video
from vtc.video.mp4 import Mp4

COUNT = 25
needs_decord = pytest.mark.skipif(
    importlib.util.find_spec("decord") is None, reason="decord has no wheel for this machine"
)


def stamped(source: Path, path: Path, time_of: Callable[[int], int]) -> Path:
    """The same packets with these times, in the order in which they are stored."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = (packet for packet in old.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = time_of(number)
            packet.time_base, packet.stream = old.streams.video[0].time_base, stream
            new.mux(packet)
    return path


def bidirectional(path: Path) -> Path:
    return videos.encode(path, videos.moving(COUNT), options={"bf": "2"})


def plain(path: Path) -> Path:
    return videos.encode(path, videos.moving(COUNT), options={"bf": "0"})


def stored(name: str) -> Callable[[Path], Path]:
    return lambda folder: stamped(bidirectional(folder / "a.avi"), folder / name, lambda i: i)


def alike(name: str, times: Callable[[int], int]) -> Callable[[Path], Path]:
    return lambda folder: stamped(plain(folder / "a.avi"), folder / name, times)


# where the times of a file do not say which frame is which

KINDS: dict[str, tuple[Callable[[Path], Path], list[float]]] = {
    "B-frames in AVI": (
        lambda folder: bidirectional(folder / "c.avi"),
        [i / 25 for i in range(25)],
    ),
    "B-frames of MPEG-4 in AVI": (
        lambda folder: videos.encode(
            folder / "m.avi", videos.moving(COUNT), "mpeg4", {"bf": "2"}, gop=8
        ),
        [i / 25 for i in range(25)],
    ),
    "times of storage in mp4": (stored("s.mp4"), [i / 25 for i in range(25)]),
    "times of storage in Matroska": (stored("s.mkv"), [i / 25 for i in range(25)]),
    "all at once in Matroska": (alike("o.mkv", lambda i: 0), [0.0] * 25),
    "all at once in mp4": (alike("o.mp4", lambda i: 0), [0.0] * 25),
    "pairs in Matroska": (alike("p.mkv", lambda i: i // 2), [i // 2 / 25 for i in range(25)]),
}


@pytest.mark.parametrize("backend", [pytest.param("decord", marks=needs_decord), "pyav", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_that_a_player_shows(tmp_path: Path, kind: str, backend: str) -> None:
    make, times = KINDS[kind]
    path = make(tmp_path)
    frames, _ = videos.decoded(path)  # from the start, in the decoder's order
    assert len(frames) == COUNT
    try:
        clip = read(path, Sampling(frames=tuple(range(COUNT))), backend)
    except InvalidVideo as error:
        assert backend == "decord" and "left to PyAV" in str(error)
        return
    np.testing.assert_allclose(clip.times, times, atol=1e-3)
    assert np.abs(clip.frames.astype(int) - frames).max() <= 2
    for index in (0, 1, 7, 12, 13, 24):
        one = read(path, Sampling(frames=(index,)), backend)
        assert np.abs(one.frames[0].astype(int) - frames[index]).max() <= 2, index


def test_a_lost_frame_is_noticed_where_frames_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, start = bidirectional(tmp_path / "c.avi"), Video._start

    def lossy(self: Video) -> Any:
        return (frame for number, frame in enumerate(start(self)) if number != 20)

    monkeypatch.setattr(Video, "_start", lossy)
    with pytest.raises(InvalidVideo, match="24 frames came out of 25 packets: write it anew"):
        read(path, "frames:0")


# numbers that no camera writes


def test_a_clock_of_sixty_years(tmp_path: Path) -> None:
    """An AVI file of one frame in 2^31 seconds."""
    path = plain(tmp_path / "a.avi")
    data = bytearray(path.read_bytes())
    at = data.index(b"strh") + 28
    data[at : at + 8] = struct.pack("<II", 2**31, 1)
    path.write_bytes(data)
    info = probe(path)
    assert info.fps == pytest.approx(2.0**-31) and info.duration == pytest.approx(25 * 2.0**31)
    assert info.frames == COUNT and len(read(path, "2fps")) == COUNT


@pytest.mark.parametrize("name", ["a.avi", "a.gif", "a.mkv", "a.ts"])
def test_damaged_headers_raise_nothing_else(tmp_path: Path, name: str) -> None:
    codec, pixels = ("gif", "rgb8") if name == "a.gif" else ("mpeg4", "yuv420p")
    path = videos.encode(tmp_path / name, videos.moving(4, 32, 32), codec, {}, pixels)
    whole, dice = path.read_bytes(), np.random.default_rng(2)
    for _ in range(30):
        data = bytearray(whole)
        for place in dice.integers(0, min(len(data), 600), 3):
            data[place] = dice.integers(256)
        path.write_bytes(data)
        try:
            read(path, "3", "pyav")
        except InvalidVideo:
            continue


# pixels and memory


def screen(path: Path, side: int) -> Path:
    """A small GIF film that says it has `side` x `side` pixels."""
    videos.encode(path, videos.moving(40, 16, 16), "gif", {}, "rgb8")
    data = bytearray(path.read_bytes())
    data[6:10] = struct.pack("<HH", side, side)
    path.write_bytes(data)
    return path


def test_frames_of_too_many_pixels(tmp_path: Path) -> None:
    path, start = screen(tmp_path / "a.gif", 6000), time.monotonic()
    for backend in ("auto", "pyav"):
        for reader in (lambda b: probe(path, b), lambda b: read(path, "8", b)):
            with pytest.raises(InvalidVideo, match="6000 x 6000 pixels, and at most 33,554,432"):
                reader(backend)
    assert time.monotonic() - start < 10
    small = plain(tmp_path / "a.mp4")
    for backend in ("auto", "pyav"):
        assert len(read(small, "2", backend, max_pixels=96 * 64)) == 2
        with pytest.raises(InvalidVideo, match=r"96 x 64 .*6,143 are read: give a higher max_pix"):
            read(small, "2", backend, max_pixels=96 * 64 - 1)
    with pytest.raises(InvalidInput, match="max_pixels=0: give a whole number"):
        probe(small, max_pixels=0)


def test_a_video_that_needs_more_memory_costs_one_video(tmp_path: Path) -> None:
    """40 frames of 75 MB, for a decoder that may have 1 GiB."""
    large, small = screen(tmp_path / "a.gif", 5000), plain(tmp_path / "a.mp4")
    with Readers(1, "40", memory=2**30) as readers:
        for path in (large, small):
            readers.submit(path.name, path)
        first, second = readers
    assert first.error is not None and "too much memory" in str(first.error)
    assert second.clip is not None and len(second.clip) == COUNT
    with pytest.raises(InvalidInput, match="memory=1000: give bytes for a decoder, 1,073,741,824"):
        Readers(1, "40", memory=1000)


def test_the_limits_of_a_run(tmp_path: Path) -> None:
    plain(tmp_path / "a.mp4")
    rows = [{"video": "a.mp4", "question": "what ?"}]
    for most, errors in ((96 * 64, 0), (1000, 1)):
        out = tmp_path / f"{most}.jsonl"
        assert answered_by(job_of(rows, tmp_path, out, max_pixels=most), Echo()).errors == errors
        (record,) = read_lines(out)
        assert bool(record["error"]) == bool(errors)
        assert not errors or "at most 1,000 are read" in record["error"]


# time


def test_an_index_that_points_into_a_hole(tmp_path: Path) -> None:
    """8 KB on the disk, 16 MB of zeros to look for a picture in, once for every key frame."""
    path = videos.encode(tmp_path / "a.mp4", videos.moving(12), options={"bf": "0"}, gop=1)
    data = bytearray(path.read_bytes())
    at = data.index(b"stco") + 8
    for place in range(at + 4, at + 4 + 4 * int.from_bytes(data[at : at + 4]), 4):
        data[place : place + 4] = struct.pack(">I", len(data) + 100)
    path.write_bytes(data)
    os.truncate(path, 2**24)
    start = time.monotonic()
    kind = Mp4.of(str(path))
    assert kind is not None and not kind.closed
    with pytest.raises(InvalidVideo, match="cannot read"):
        probe(path)
    assert time.monotonic() - start < 5


def test_more_frames_than_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_FRAMES", 20)
    for path in (plain(tmp_path / "a.mp4"), plain(tmp_path / "a.mkv")):
        with pytest.raises(
            InvalidVideo, match=r"lists 2\d frames, and at most 20 are read: cut it"
        ):
            probe(path, "pyav")


def test_a_dry_run_gives_up_on_a_video_as_a_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hang").write_bytes(b"a decoder that never ends")
    monkeypatch.setattr(pool.Planners, "_read", staticmethod(videos.misbehaving))
    questions = write_lines(tmp_path / "q.jsonl", [{"video": "hang", "question": "what ?"}])
    call = command("tiny-llava-video", tmp_path, questions, tmp_path / "out.jsonl")
    start = time.monotonic()
    assert cli.main([*call, "--dry-run", "--workers", "1", "--timeout", "2"]) == 3
    said = capsys.readouterr().out
    assert "hang (1 questions): cannot read" in said and "longer than 2 s and was ended" in said
    assert time.monotonic() - start < 30
    monkeypatch.undo()
    plain(tmp_path / "hang.mp4").replace(tmp_path / "hang")
    assert cli.main([*call, "--dry-run", "--workers", "1", "--max-pixels", "1000"]) == 3
    assert "96 x 64 pixels, and at most 1,000 are read" in capsys.readouterr().out
