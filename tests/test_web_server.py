"""The web page as it is served: what may be uploaded, what is refused, what can be reached."""

from __future__ import annotations

import importlib.util
import io
import json
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from vtc import video
from vtc.commands import cli
from vtc.errors import InvalidInput, InvalidVideo, VtcError
from vtc.web import answers, app, gate, media, page, serve
from vtc.web.models import Models

REPO = Path(__file__).parents[1]
SHAPES = "tiny-llava-shapes"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def client(models: Models, uploads: Path) -> Iterator[TestClient]:
    """The whole server, without a socket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        with TestClient(app.server(app.build(models)), "http://127.0.0.1") as found:
            yield found


def scene(number: int) -> media.Media:
    return media.examples()[f"scene {number}"]


# ---------------------------------------------------------------------- uploads


def png(width: int, height: int) -> bytes:
    """A file that claims that size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def picture(size: tuple[int, int] = (40, 30), kind: str = "PNG", **more: Any) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(stream, kind, **more)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"MZ\x90\0 a program", "neither an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither an image"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "neither an image"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "neither an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "neither an image"),
        (b"GIF89a" + b"\0" * 20, "(damaged|neither)"),
        (picture()[:60], "(damaged|neither)"),
        (png(30_000, 30_000), "(30000 x 30000 pixels: give at most 24 million|too large)"),
        (b"\0" * (media.MOST_BYTES + 1), "25 MB"),
    ],
)
def test_files_that_are_no_pictures(data: bytes, words: str):
    with pytest.raises(InvalidInput, match=words):
        media.read(data)


def test_pictures_are_upright_and_bounded():
    assert media.read(picture()).pictures[0].size == (40, 30)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    assert media.read(picture(kind="JPEG", exif=turned)).pictures[0].size == (30, 40)
    assert media.read(picture((3000, 1500))).pictures[0].size == (1024, 512)


def movie(folder: Path, frames: int, fps: float, side: int = 32) -> bytes:
    path = folder / "movie.mp4"
    video.write(path, np.zeros((frames, side, side, 3), np.uint8), fps)
    return path.read_bytes()


def test_videos_are_read_in_a_child_and_leave_no_file(tmp_path: Path, monkeypatch: Any):
    data = movie(tmp_path, 20, 10)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    found = media.read(data, frames=5)
    assert len(found.pictures) == 5 and found.clip.info.duration == 2.0
    assert "5 frames of 2.0 s, 32 x 32 pixels" in found.about
    with pytest.raises(InvalidVideo) as wrong:
        media.read(data[:200])
    assert "the upload" in str(wrong.value) and str(tmp_path) not in str(wrong.value)
    with pytest.raises(InvalidInput, match="33 frames"):
        media.read(data, frames=33)
    assert not list((tmp_path / "own").iterdir())


def test_a_video_that_lasts_too_long(tmp_path: Path):
    with pytest.raises(InvalidInput, match="lasts 150 s: give at most 120 s"):
        media.read(movie(tmp_path, 150, 1))


def test_a_preview_does_not_wait_for_uploads_of_others():
    busy = pytest.raises(VtcError, match="uploads of others are being read")
    with media.AT_ONCE, media.AT_ONCE, busy:
        media.read(picture(), wait=False)
    assert media.read(picture(), wait=False).pictures


# ---------------------------------------------------------------------- the server


def aside(client: TestClient, inputs: int, data: list[Any]) -> list[Any]:
    """What the event of the dropdown Method with that many inputs answers, beside the queue."""
    config = client.get("/config").json()
    labels = {one["id"]: one["props"].get("label") for one in config["components"]}
    number = next(
        one["id"]
        for one in config["dependencies"]
        if len(one["inputs"]) == inputs
        and one["targets"]
        and labels[one["targets"][0][0]] == "Method"
    )
    session = {"session_hash": "a1b2c3", "fn_index": number, "data": data}
    return client.post("/gradio_api/run/predict", json=session).json()["data"]


def test_a_run_keeps_no_other_visitor_waiting(client: TestClient, models: Models):
    """More visitors than the server has threads, while somebody uses the model."""
    with ThreadPoolExecutor(50) as pool, models.using(SHAPES):
        jobs = [pool.submit(aside, client, 2, [SHAPES, "pdrop"]) for _ in range(50)]
        shown = pool.submit(client.get, "/")
        told = [job.result(30) for job in jobs]
        assert shown.result(30).status_code == 200
    assert all("decoder.1, decoder.2" in str(one) for one in told)


def call(client: TestClient, target: str, data: list[Any]) -> dict[str, Any]:
    """One request through the queue, as the page makes it: the last message about it."""
    config = client.get("/config").json()
    number = next(
        dependency["id"]
        for dependency in config["dependencies"]
        if any(
            component["id"] == dependency["targets"][0][0]
            and component["props"].get("elem_id") == target
            for component in config["components"]
            if dependency["targets"]
        )
    )
    session = {"session_hash": "a1b2c3", "fn_index": number, "data": data}
    direct = client.post("/gradio_api/run/predict", json=session)
    assert direct.status_code == 404 and "join the queue" in direct.text  # nobody jumps it
    joined = client.post("/gradio_api/queue/join", json=session)
    assert joined.status_code == 200, joined.text
    with client.stream("GET", "/gradio_api/queue/data?session_hash=a1b2c3") as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("the stream ended without an answer")


def given(**change: Any) -> list[Any]:
    """What the page sends when Run is pressed at first."""
    first = {
        "picked": "scene 1",
        "data": None,
        "question": scene(1).answers[0][0],
        "name": SHAPES,
        "method": "divprune",
        "at": "",
        "share": 25,
        "own": False,
        "merge": False,
        "mass": 0,
        "frames": 8,
        "words": 16,
    }
    return list((first | change).values())


def test_a_run_through_the_queue(client: TestClient, uploads: Path):
    done = call(client, "run", given())
    cards, slider, pictures, stages = done["output"]["data"]
    assert "144 → 36 vision tokens" in cards and "✓" in cards
    assert slider["maximum"] == 1 and pictures.count("<figure") == 2 and "<td>divprune" in stages
    assert not [path for path in uploads.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "no-such-model"},
        {"name": "tiny-dit-digits"},
        {"picked": "../../etc/passwd"},
        {"question": "<script>alert(1)</script><image>"},
        {"method": "mustdrop_filter", "own": True, "mass": 1, "merge": True, "at": "decoder.1"},
    ],
)
def test_errors_are_words_on_the_page(client: TestClient, change: dict[str, Any]):
    cards, slider, pictures, stages = call(client, "run", given(**change))["output"]["data"]
    assert 'role="alert"' in cards and "Traceback" not in cards and "<script>" not in cards
    assert slider["visible"] is False and pictures == stages == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share": 0}, "less than minimum"),
        ({"words": 10_000}, "greater than maximum"),
        ({"at": "dit.1"}, "not in the list of choices"),
        ({"method": "nothing"}, "not in the list of choices"),
    ],
)
def test_values_that_the_page_does_not_have(client: TestClient, change: dict[str, Any], words: str):
    done = call(client, "run", given(**change))
    assert done["success"] is False and words in done["output"]["error"]


def test_a_bug_is_words_on_the_page_too(client: TestClient, monkeypatch: Any, caplog: Any):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("<b>of some library\nTraceback")

    monkeypatch.setattr(answers, "compare", broken)
    cards = call(client, "run", given())["output"]["data"][0]
    assert "ZeroDivisionError: &lt;b&gt;of some library" in cards and "Traceback" not in cards
    assert "a request failed" in caplog.text  # with the traceback, for whoever runs the server


def test_the_answer_may_differ_in_what_does_not_matter():
    shown = page._card("", "Red.", "red", ())
    assert "✓" in shown and "✗" in page._card("", "green", "red", ()) and "Red." in shown


def upload(client: TestClient, name: str, data: bytes) -> str:
    answer = client.post("/gradio_api/upload", files={"files": (name, data)})
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def file_of(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}


def test_an_upload_is_read_and_told_by_its_content(client: TestClient):
    path = upload(client, "a.exe", picture((96, 96)))
    cards = call(client, "run", given(picked="", data=file_of(path)))["output"]["data"][0]
    assert "144 → 36" in cards and "right answer" not in cards
    path = upload(client, "really.png", b"MZ a program")
    cards = call(client, "run", given(picked="", data=file_of(path)))["output"]["data"][0]
    assert 'role="alert"' in cards and "neither an image" in cards
    assert client.get(f"/gradio_api/file={path}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        str(REPO / "demos" / "pictures" / "scene_1.png"),
        "../../../../etc/passwd",
        "/proc/self/environ",
        "http://127.0.0.1:1/a.png",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "",
        "\0",
        "a" * 5000,
        "{uploads}/" + "a" * 5000,
        ["/etc/passwd"],
    ],
)
def test_a_path_of_the_server_is_no_upload(client: TestClient, uploads: Path, path: Any):
    path = path.replace("{uploads}", str(uploads)) if isinstance(path, str) else path
    for field in ("data", "question"):
        done = call(client, "run", given(**{"picked": "", field: file_of(path)}))
        assert done["success"] is False
        assert "Only files that were uploaded here" in done["output"]["error"]


def test_a_path_that_leaves_the_folder_of_uploads(client: TestClient, uploads: Path):
    path = upload(client, "a.png", picture())
    for beside in (f"{path}/../../../../../../../../etc/passwd", str(uploads / ".." / "x.png")):
        done = call(client, "run", given(picked="", data=file_of(beside)))
        assert "Only files that were uploaded here" in done["output"]["error"]
    (uploads / "link.png").symlink_to(REPO / "demos" / "pictures" / "scene_1.png")
    done = call(client, "run", given(picked="", data=file_of(str(uploads / "link.png"))))
    assert "Only files that were uploaded here" in done["output"]["error"]
    (uploads / "link.png").unlink()
    Path(path).unlink()
    done = call(client, "run", given(picked="", data=file_of(path)))
    assert "The upload is gone" in done["output"]["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=//etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        f"/gradio_api/file={REPO}/pyproject.toml",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=https://example.org/",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=https://example.org/",
        "/file=/etc/passwd",
        "/static/../../../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2fblocks.py",
        "/gradio_api/deep_link",
        "/gradio_api/vibe-code",
        "/monitoring",
        "/docs",
        "/openapi.json",
    ],
)
def test_nothing_else_of_the_machine_is_served(client: TestClient, path: str):
    answer = client.get(path)
    assert answer.status_code == 404 and answer.text == "There is nothing here."


def test_the_page_reaches_nothing_outside(client: TestClient):
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    assert "fonts.googleapis" not in client.get("/theme.css").text
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False


def test_an_upload_that_is_too_large(client: TestClient, uploads: Path):
    before = len(list(uploads.rglob("*")))
    big = {"files": ("a.png", b"\0" * (media.MOST_BYTES + 1))}
    assert client.post("/gradio_api/upload", files=big).status_code == 413
    assert len([p for p in uploads.rglob("*") if p.is_file()]) <= before


def test_requests_that_are_too_long(client: TestClient):
    """Before anything reads them."""
    long = client.post("/gradio_api/queue/join", content=b"x" * (2**20 + 1))
    several = {f"files{i}": (f"{i}.png", b"\0" * (media.MOST_BYTES // 3)) for i in range(4)}
    many = client.post("/gradio_api/upload", files=several)
    endless = client.post("/gradio_api/upload", content=iter([b"x"]))  # says nothing of its length
    for answer in (long, many, endless):
        assert answer.status_code == 413 and answer.text.startswith("This is too long")


def test_uploads_together_have_a_limit(client: TestClient, uploads: Path, monkeypatch: Any):
    room = gate._size(uploads) + 3 * gate.LEAST
    monkeypatch.setattr(gate, "MOST_STORED", room)
    answers = []
    for i in range(4):  # equal ones would be stored once
        files = {"files": ("a.png", picture((50 + i, 30)))}
        answers.append(client.post("/gradio_api/upload", files=files))
    assert [one.status_code for one in answers] == [200, 200, 200, 507]
    assert "no room for uploads" in answers[-1].text
    assert gate._size(uploads) <= room
    monkeypatch.undo()
    upload(client, "a.png", picture())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:7860"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": "192.168.0.1:7860"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:1", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:1", "origin": "http://localhost:2"}, 403),
        ({"host": "localhost:1", "origin": "null"}, 403),
        ({"host": "localhost:1", "origin": "http://localhost:1"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "[::1]"}, 200),
    ],
)
def test_names_that_lead_here_from_elsewhere(
    client: TestClient, headers: dict[str, str], status: int
):
    """A page whose name was made to mean 127.0.0.1 sends its own name."""
    assert client.get("/config", headers=headers).status_code == status


def test_a_public_server_has_any_name(models: Models):
    public = TestClient(app.server(app.build(models), local=False), "http://demo.example")
    assert public.get("/").status_code == 200


def test_without_diffusers_the_rest_works(monkeypatch: Any):
    import vtc_zoo

    real = vtc_zoo.load

    def missing(name: str, **more: Any) -> Any:
        if "dit" in name:
            raise ImportError("pip install diffusers")
        return real(name, **more)

    monkeypatch.setattr(vtc_zoo, "load", missing)
    shown = str(app.build(Models()).get_config_file()["components"])
    assert "cannot load &#x27;tiny-dit-digits&#x27;: pip install diffusers" in shown
    assert "'elem_id': 'run'" in shown and "'elem_id': 'draw'" not in shown


def test_uploads_are_gone_when_the_server_ends(models: Models, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with TestClient(app.server(app.build(models)), "http://127.0.0.1") as client:
        path = Path(upload(client, "a.png", picture()))
        assert path.is_file() and path.is_relative_to(tmp_path)
    assert not path.exists()


# ---------------------------------------------------------------------- the command


def test_gradio_that_is_missing(monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else there(name)
    )
    assert cli.main(["demo", "--web"]) == 1
    assert "pip install 'vision-token-compression[gradio]'" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["demo", "--web", "--port", str(taken.getsockname()[1])]) == 1
    assert "Give another --port" in capsys.readouterr().err
    assert cli.main(["demo", "--web", "--port", "70000"]) == 2
    assert cli.main(["demo", "--web", "--host", "256.1.1.1"]) == 1


def test_who_may_type_names_of_models():
    hosts = {"127.0.0.1": True, "localhost": True, "::1": True, "0.0.0.0": False, "::": False}
    assert {host: serve.is_local(host) for host in hosts} == hosts


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--web", "--quick"], "--quick is not for the web page"),
        (["--web", "--out", "x", "--questions", "3"], "--out, --questions is not for the web"),
        (["--port", "0"], "--port needs --web"),
        (["--host", "localhost"], "--host needs --web"),
        (["--web", "--model", "tiny-dit-digits"], "answers no questions: it is in the page's tab"),
    ],
)
def test_options_that_would_do_nothing(typed: list[str], words: str, capsys: Any, monkeypatch: Any):
    monkeypatch.setattr(serve, "_listening", None)  # nothing may be served meanwhile
    assert cli.main(["demo", *typed]) == 2
    assert words in capsys.readouterr().err


def test_help_is_quick():
    code = """
import sys
from vtc.commands import cli
cli.main(["demo", "--help"])
assert not {"torch", "gradio", "fastapi"} & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0 and "--web" in done.stdout, done.stderr
