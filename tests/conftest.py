"""One thread, no network, no chatter."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # kernels run in the interpreter; before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

#: a package of its own, which test_plugin.py installs and runs
collect_ignore = ["plugin"]


class NoNetwork(RuntimeError):
    """A test tried to open a connection."""


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Only sockets of the local file system may connect."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guard(original: Any) -> Any:
        def guarded(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX:
                raise NoNetwork(f"tests must not use the network: {address}")
            return original(self, address)

        return guarded

    socket.socket.connect = guard(connect)  # type: ignore[method-assign]
    socket.socket.connect_ex = guard(connect_ex)  # type: ignore[method-assign]
    yield
    socket.socket.connect, socket.socket.connect_ex = connect, connect_ex  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    """Warnings of transformers about tiny configurations say nothing here."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample",
        type=int,
        metavar="N",
        help="run N of the collected tests, drawn by their names, and all of the canary",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The same sample on every machine and in every version of a library that is tried."""
    wanted = config.getoption("sample")
    if wanted is None:
        return
    some = [item for item in items if item.path.name != "test_canary.py"]
    some.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
    left = {*some[wanted:]}
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]
