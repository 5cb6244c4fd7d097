"""The web page where strangers reach it: slow and broken-off requests, runs that nobody waits for,
many visitors, pages of others. A real server, at a socket of the file system, as tests open no
other connections."""

from __future__ import annotations

import json
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient

from vtc.web import app, body, gate, line, media
from vtc.web.models import Models

SHAPES, NAME = "tiny-llava-shapes", "demo.example"
HEAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
TAIL = b"\r\n--x--\r\n"
FORM = "multipart/form-data; boundary=x"
PATIENCE = 20.0  # seconds after which a test has failed


@dataclass(frozen=True)
class Server:
    """A page that runs, its folder of uploads, and its models."""

    page: app.Page
    at: str
    folder: Path
    models: Models
    web: httpx.Client
    config: dict[str, Any]

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        client.connect(self.at)
        return client

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def begin(self, path: str, length: int, sent: bytes, kind: str = FORM) -> socket.socket:
        """A request whose body is not sent to its end."""
        client = self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: {kind}\r\n"
        client.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + sent)
        return client

    def post(self, path: str, data: Any) -> httpx.Response:
        return self.web.post(path, json=data)

    def join(self, session: str) -> httpx.Response:
        about = {"session_hash": session, "fn_index": self.function(12), "data": wish()}
        return self.post("/gradio_api/queue/join", about)

    def function(self, inputs: int, place: int = 0) -> int:
        """The number of what has that many inputs."""
        return [one["id"] for one in self.config["dependencies"] if len(one["inputs"]) == inputs][
            place
        ]


def wish() -> list[Any]:
    """What the page sends at Run."""
    question = media.examples()["scene 1"].answers[0][0]
    return ["scene 1", None, question, SHAPES, "divprune", "", 25, False, False, 0, 8, 16]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, models = tmp_path_factory.mktemp("uploads"), Models()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setattr(app, "SESSIONS", 5)
        patch.setattr(body, "GRACE", 1.5)
        patch.setattr(line, "LISTEN", 3.0)
        page = app.build(models)
        config = uvicorn.Config(app.server(page, local=False), log_config=None)
        served = uvicorn.Server(config)
        with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{short}/page")
            thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]})
            thread.start()
            until(lambda: served.started)
            way = httpx.HTTPTransport(uds=f"{short}/page")
            with httpx.Client(transport=way, base_url=f"http://{NAME}", timeout=PATIENCE) as web:
                about = web.get("/config").json()
                yield Server(page, f"{short}/page", folder, models, web, about)
            served.should_exit = served.force_exit = True
            thread.join(PATIENCE)


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def answer(client: socket.socket) -> bytes:
    with client:
        data = b""
        while part := client.recv(2**16):
            data += part
            if data.endswith(b"\r\n0\r\n\r\n"):  # the last chunk
                break
        return data


def upload(server: Server, size: int, seed: int = 0) -> httpx.Response:
    files = {"files": ("a.png", bytes([seed]) * size)}
    return server.web.post("/gradio_api/upload", files=files)


# ---------------------------------------------------------------------- bodies that take their time


def test_slow_uploads_reserve_nothing_and_end(server: Server) -> None:
    """More than would fill the folder, each announcing the most that is taken."""
    before = server.files()
    slow = [
        server.begin("/gradio_api/upload", media.MOST_BYTES, HEAD + bytes(100)) for _ in range(45)
    ]
    until(lambda: len(server.files()) >= len(before) + 45)  # all of them are being read
    assert upload(server, 1000).status_code == 200
    for client in slow:
        told = answer(client)
        assert told.startswith(b"HTTP/1.1 408 ") and b"This came too slowly." in told
    until(lambda: len(server.files()) == len(before) + 1)  # that of the quick one


def test_a_slow_but_steady_upload_arrives(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(body, "PACE", 1000.0)
    whole = HEAD + bytes(2800) + TAIL
    client = server.begin("/gradio_api/upload", len(whole), whole[:1000])
    for start in range(1000, len(whole), 200):  # two seconds, longer than the grace
        time.sleep(0.2)
        client.sendall(whole[start : start + 200])
    assert client.recv(2**16).startswith(b"HTTP/1.1 200 ")
    client.close()


@pytest.mark.parametrize("path", ["queue/join", "run/predict", "cancel"])
def test_other_bodies_end_too(server: Server, path: str) -> None:
    client = server.begin(f"/gradio_api/{path}", 900, b"{", "application/json")
    assert answer(client).startswith(b"HTTP/1.1 408 ")


def test_room_is_taken_by_what_arrives(server: Server, monkeypatch: Any) -> None:
    """Two uploads that fit alone: the one that comes to the limit is cut off and leaves nothing."""
    size = 10 * gate.LEAST
    monkeypatch.setattr(gate, "MOST_STORED", gate._size(server.folder) + 17 * gate.LEAST)
    before = server.files()
    parts = HEAD + bytes(size)
    first = server.begin("/gradio_api/upload", len(parts) + len(TAIL), parts[: size // 2])
    until(lambda: len(server.files()) == len(before) + 1)
    time.sleep(0.2)
    assert upload(server, size, seed=1).status_code == 200  # the first has not taken that much yet
    first.sendall(parts[size // 2 :] + TAIL)
    told = answer(first)
    assert told.startswith(b"HTTP/1.1 507 ") and b"There is no room for uploads now" in told
    until(lambda: len(server.files()) == len(before) + 1)
    assert gate._size(server.folder) <= gate.MOST_STORED
    assert upload(server, size, seed=2).status_code == 507  # and that before it is read


# ---------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize(
    ("path", "kind", "sent"),
    [
        ("upload", FORM, HEAD + b"abc"),
        ("queue/join", "application/json", b"{"),
        ("run/predict", "application/json", b"{"),
    ],
)
def test_a_client_that_leaves_is_no_error(
    server: Server, path: str, kind: str, sent: bytes, caplog: Any
) -> None:
    before = server.files()
    client = server.begin(f"/gradio_api/{path}", 1000, sent, kind)
    if path == "upload":
        until(lambda: len(server.files()) > len(before))
    time.sleep(0.2)
    client.close()
    until(lambda: server.files() == before)
    time.sleep(0.3)
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_a_listener_that_leaves_is_no_error(server: Server, caplog: Any) -> None:
    with server.models.using(SHAPES):
        assert server.join("leaver").status_code == 200
        client = server.connect()
        request = f"GET /gradio_api/queue/data?session_hash=leaver HTTP/1.1\r\nHost: {NAME}\r\n\r\n"
        client.sendall(request.encode())
        told = client.recv(2**16)
        assert told.startswith(b"HTTP/1.1 200 "), told
        client.close()
        jobs = [job for jobs in server.page._queue.active_jobs for job in jobs or ()]
        until(lambda: not any(job.alive for job in jobs if job.session_hash == "leaver"))
    gone = server.web.get("/gradio_api/queue/data?session_hash=nobody")
    assert gone.status_code == 404 and "Nothing was asked for" in gone.text
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


# ---------------------------------------------------------------------- the queue


def result(server: Server, session: str, ready: threading.Event) -> dict[str, Any]:
    """The last message about a run, once it is done."""
    address = f"/gradio_api/queue/data?session_hash={session}"
    with server.web.stream("GET", address) as stream:
        ready.set()
        for text in stream.iter_lines():
            message = json.loads(text.removeprefix("data: ")) if text else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("the stream ended without an answer")


def test_runs_without_a_listener_leave_the_queue(server: Server) -> None:
    found: list[dict[str, Any]] = []
    ready = threading.Event()
    listener = threading.Thread(target=lambda: found.append(result(server, "heard", ready)))
    queue = server.page._queue
    with server.models.using(SHAPES):  # nothing is done meanwhile
        assert server.join("heard").status_code == 200
        listener.start()
        assert ready.wait(PATIENCE)
        codes = [server.join(f"deaf{i}").status_code for i in range(40)]
        assert set(codes) == {200, 503} and codes.count(200) <= app.WAITING + app.AT_ONCE
        until(lambda: len(queue) == 0)
        waiting = queue.pending_messages_per_session
        until(lambda: not [name for name in waiting if name.startswith("deaf")])
        assert server.join("late").status_code == 200  # there is room again
    listener.join(PATIENCE)  # waited for longer than others may be silent
    assert found and found[0]["success"] and "144 → 36" in found[0]["output"]["data"][0]


def test_sessions_are_bounded(server: Server) -> None:
    held = server.page.state_holder.session_data
    number = server.function(2, 1)
    for i in range(12):
        about = {"session_hash": f"s{i}", "fn_index": number, "data": [SHAPES, "pdrop"]}
        server.post("/gradio_api/run/predict", about)
        server.post("/gradio_api/run/predict", about | {"session_hash": "faithful"})
    assert len(held) <= 5 and {"faithful", "s11"} <= set(held)


# ---------------------------------------------------------------------- pages of others


@pytest.mark.parametrize(
    ("origin", "more", "status"),
    [
        ("", {}, 200),
        (f"https://{NAME}", {}, 200),
        (f"HTTP://{NAME.upper()}", {}, 200),
        ("https://evil.example", {}, 403),
        (f"https://{NAME}.evil.example", {}, 403),
        (f"https://{NAME}:8443", {}, 403),
        ("null", {}, 403),
        (f"https://{NAME}", {"host": "inside:7860", "x-forwarded-host": NAME}, 200),
        (f"https://{NAME}", {"host": "inside:7860", "x-forwarded-host": f"{NAME}, proxy"}, 200),
        (f"https://{NAME}", {"host": "inside:7860"}, 403),
        ("https://evil.example", {"host": "inside:7860", "x-forwarded-host": NAME}, 403),
    ],
)
def test_where_requests_come_from(
    server: Server, origin: str, more: dict[str, str], status: int
) -> None:
    headers = {"host": NAME, **({"origin": origin} if origin else {}), **more}
    about = {"session_hash": "o1", "fn_index": server.function(2, 1), "data": [SHAPES, "pdrop"]}
    told = server.web.post("/gradio_api/run/predict", json=about, headers=headers)
    assert told.status_code == status
    assert status == 200 or told.text == "Only the page of this server itself may ask it."


def test_a_forwarded_name_is_none_of_this_machine(server: Server) -> None:
    local = TestClient(app.server(server.page), "http://127.0.0.1")
    headers = {"origin": "http://evil.example", "x-forwarded-host": "evil.example"}
    assert local.get("/config", headers=headers).status_code == 403
