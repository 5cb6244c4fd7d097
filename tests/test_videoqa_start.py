"""Processes whose partners never come: they say so and end in time, or at once when told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.videoqa import command, write_lines

from vtc.commands import cli
from vtc.errors import VtcError
from vtc.video import processes

#: seconds for imports on a machine that has other things to do
PATIENT = 240


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def heard() -> None:
    """Ctrl-C, also where this test runs in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def partner(rank: int, words: list[str], **more: str) -> Iterator[tuple[Any, int]]:
    """One process of two, started as a launcher does, and the port at which they meet."""
    port = free_port()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    path = {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    process = subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, **path, **who, **where, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
    )
    try:
        yield process, port
    finally:
        process.kill()
        process.communicate()


def test_a_partner_that_never_comes() -> None:
    """Dead before it could connect, as after a kill of the launcher while it imports."""
    alone = "from vtc.video.processes import Launched; Launched(1)"
    first, second = (partner(rank, ["-c", alone]) for rank in (0, 1))  # at ports of their own
    with first as (one, _), second as (other, _):
        for process in (one, other):
            said = process.communicate(timeout=PATIENT)[1]
            assert process.returncode == 1, said
            assert "VtcError: the processes of this run did not find each other within 1 s" in said
            assert "unset WORLD_SIZE to answer with this process alone" in said


def test_the_command_says_it_in_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(connect: float) -> Any:
        raise VtcError(f"did not find each other within {connect:g} s")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "Launched", nobody)
    (tmp_path / "a.mp4").touch()
    questions = write_lines(tmp_path / "q.jsonl", [{"video": "a.mp4", "question": "what ?"}])
    call = command("tiny-llava-video", tmp_path, questions, tmp_path / "out.jsonl")
    assert cli.main([*call, "--connect", "7"]) == 1
    assert capsys.readouterr().err == "vtc: did not find each other within 7 s\n"
    assert cli.main(call) == 1
    assert "within 300 s" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


MEET = "from vtc.video.processes import Launched; Launched(600)"


def listens(port: int) -> bool:
    tables = (Path("/proc/net") / name for name in ("tcp", "tcp6"))
    lines = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return any(line[1].endswith(f":{port:04X}") and line[3] == "0A" for line in lines)


def test_a_signal_ends_the_wait_for_partners() -> None:
    with partner(0, ["-c", MEET]) as (process, port):
        until = time.monotonic() + PATIENT
        while not listens(port) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.3)  # it opened its door; now it waits
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT, process.stderr.read()


MET = """
import sys, torch
from datetime import timedelta
from vtc.video import processes
here = processes.Launched(240)
timeout = lambda: torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout
assert timeout() == timedelta(seconds=240), timeout()
assert here.share({0: "first", 1: "second"}[here.rank]) == "first"
if here.rank:
    sys.exit()
try:
    here.wait()
finally:
    assert timeout() == processes.PATIENCE, timeout()
"""


def test_who_has_met_waits_for_days_but_not_for_the_dead() -> None:
    with partner(0, ["-c", MET]) as (first, port):
        meet = partner(1, ["-c", MET], MASTER_PORT=str(port))
        with meet as (second, _):
            said = first.communicate(timeout=PATIENT)[1]
            assert second.wait(PATIENT) == 0
    assert "another process of this run ended early. Run the same command again" in said
    assert first.returncode == 1 and "AssertionError" not in said


def test_a_number_of_processes_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(VtcError, match="WORLD_SIZE='two': give a number of processes, or unset it"):
        processes.started()
