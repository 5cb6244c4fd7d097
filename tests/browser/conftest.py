"""The server as users start it, and a browser that looks at it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser.visitor import Visitor

if TYPE_CHECKING:  # plain `pytest` passes by here, perhaps without playwright
    from playwright.sync_api import Browser

REPO = Path(__file__).parents[2]
CHROMIUM = "chromium", "chromium-browser", "google-chrome"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 90.0  # seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshot", type=Path, help="also write the README's picture there")


@pytest.fixture(scope="session")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server puts what is temporary."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="session")
def address(temporary: Path) -> Iterator[str]:
    """Of a running `vtc demo --web`, which has to end in good order and leave nothing behind."""
    command = [sys.executable, "-m", "vtc", "demo", "--web", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    alarm = threading.Timer(PATIENCE, server.kill)
    alarm.start()
    assert server.stdout is not None
    try:
        line = server.stdout.readline().decode()
        found = re.search(r"http://\S+", line)
        assert found, f"the server says {line!r} and ends with {server.poll()}"
        alarm.cancel()
        yield found[0]
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    finally:
        alarm.cancel()
        server.kill()
        server.wait()
        server.stdout.close()
    left = [str(path) for path in temporary.rglob("*") if path.is_file() or "vtc" in path.name]
    assert not left


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert found, "no Chromium: .ci/browser installs Debian's"
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def visitor(chromium: Browser, address: str) -> Iterator[Visitor]:
    found = Visitor(chromium, address)
    yield found
    found.context.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in found.requests)
    assert not found.complaints
