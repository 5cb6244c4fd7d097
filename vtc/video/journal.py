"""Answers on disk, so that every question is answered exactly once whatever is killed, and when.

Beside `answers.jsonl` stands the folder `answers.jsonl.parts`:

    run.json          what is being answered, with what; how often it was started, and the first
                      start that counts: parts of earlier ones were given up and may be removed
    lock              held by the first process of the run that is going on
    0003-0001.jsonl   records of the third start, second process; held by that process

A process writes only to a part of its own, opened anew at every start, one record a line:
`checksum length key {"id": ...}`. A line goes out in one system call, so that a killed process
loses at most the line it was writing; that line fails its checksum and its question is asked
again. Data is forced to the disk (fsync) when a batch ends and 5 s have passed, and at the end: a
machine that loses power loses no more than that, and those questions are asked again.

Locks are the kernel's (flock): they end with their process, however it ends.

Whatever the disk refuses is an `OutputRefused`, and leaves what was answered before."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputRefused
from .disk import disk, remove, replaced, sync_folder, write_whole

SYNC_SECONDS = 5.0
_PART = re.compile(r"(\d{4,})-(\d{4,})\.jsonl")
_RUN, _LOCK = "run.json", "lock"

Record = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Where a record stands."""

    part: Path
    offset: int
    length: int
    failed: bool


def parts_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


# ---------------------------------------------------------------------- lines


def encode(key: str, record: Mapping[str, Any]) -> bytes:
    """The line of a record; there are no blanks in a key."""
    body = b"%s %s" % (key.encode(), _json(record))
    return b"%08x %d %s\n" % (zlib.crc32(body), len(body), body)


def _json(record: Mapping[str, Any]) -> bytes:
    # half a surrogate pair, as a tokenizer can write, becomes an escape that JSON knows
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")


def decode(line: bytes) -> tuple[str, Record] | None:
    """Key and record; None for a line that is torn or damaged."""
    checksum, _, rest = line.partition(b" ")
    length, _, body = rest.partition(b" ")
    if not body.endswith(b"\n") or not length.isdigit() or len(body) - 1 != int(length):
        return None
    body = body[:-1]
    if checksum != b"%08x" % zlib.crc32(body):
        return None
    key, _, text = body.partition(b" ")
    return key.decode(), json.loads(text)


def lines(part: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of every line of a part."""
    offset = 0
    with disk("read", part), part.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


# ---------------------------------------------------------------------- one process writes


class Part:
    """The file that one process appends to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk("write", path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                sync_folder(path.parent)
            except BaseException:
                os.close(self._file)  # the lock with it
                raise
        self._synced = time.monotonic()

    def append(self, key: str, record: Mapping[str, Any]) -> None:
        """Write one record."""
        line = encode(key, record)
        with disk("write", self._path):
            if os.write(self._file, line) != len(line):
                raise OSError("a line went out in part only (is the disk full?)")

    def flush(self, force: bool = False) -> None:
        """Force what was written to the disk, if the last time is 5 s ago."""
        if force or time.monotonic() - self._synced > SYNC_SECONDS:
            with disk("write", self._path):
                os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        try:
            self.flush(force=True)
        finally:
            os.close(self._file)


# ---------------------------------------------------------------------- the folder


class Journal:
    """All parts of one output file.

    One process of a run (its first) calls `open`, the others `join` with what that returned.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, parts_folder(out)
        self.start = 0
        self._lock: int | None = None

    def open(self, settings: Mapping[str, Any], overwrite: bool = False) -> int:
        """Lock, check that `settings` are those of earlier starts, count this start."""
        with disk("make", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with disk("write", self.folder / _LOCK):
                self._take_lock()
            # as JSON gives it back: tuples and lists are one
            self.start = self._begin(json.loads(json.dumps(settings)), overwrite)
        except BaseException:
            self.close()
            raise
        return self.start

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not those of earlier starts, where these answered anything;
        nothing is written."""
        run = self._run()
        if not run and (self.parts() or self.out.exists()):
            raise OutputRefused(
                f"{self.out} is there already, and how it was made is not known. Give another "
                f"--out, or --overwrite to begin anew."
            )
        before = run.get("settings", settings)
        changed = [
            f"{name}: was {before.get(name)!r}, now {settings.get(name)!r}"
            for name in {**before, **settings}
            if before.get(name) != settings.get(name)
        ]
        if changed and self.answered():
            raise OutputRefused(
                f"{self.out} holds answers of another run ({'; '.join(changed)}). Give another "
                f"--out, or --overwrite to begin anew."
            )

    def answered(self) -> list[str]:
        """Keys that have an answer."""
        return [key for key, entry in self.found().items() if not entry.failed]

    def join(self, start: int) -> None:
        """Take part in a start that another process has opened."""
        if self._run().get("starts") != start:
            raise OutputRefused(
                f"{self.folder} is not (or no longer) the folder of this run: --out must be on a "
                f"file system that all machines share, and a process must not outlive its run."
            )
        self.start = start

    def part(self, process: int) -> Part:
        """A new part for this process."""
        self.join(self.start)  # a process that is late for its own run must not write into the next
        return Part(self.folder / f"{self.start:04}-{process:04}.jsonl")

    def found(self, starts: int | None = None) -> dict[str, Found]:
        """The record of every key that has one: an answer rather than an error, else the latest.
        `starts`: those of earlier starts only."""
        best: dict[str, Found] = {}
        for part in self.parts():
            if starts is not None and _start(part) >= starts:
                continue
            for offset, line in lines(part):
                entry = decode(line)
                if entry is None:
                    continue
                key, record = entry
                earlier = best.get(key)
                if earlier is None or earlier.failed:
                    failed = record.get("error") is not None
                    best[key] = Found(part, offset, len(line), failed)
        return best

    def parts(self) -> list[Path]:
        """Those that count, in the order in which they were begun."""
        if not self.folder.is_dir():
            return []
        first = self._run().get("first", 0)
        return [path for path in self._all_parts() if _start(path) >= first]

    def _all_parts(self) -> list[Path]:
        """Those too that were given up."""
        with disk("read", self.folder):
            there = [path for path in self.folder.iterdir() if _PART.fullmatch(path.name)]
            for path in there:
                if not path.is_file():
                    raise OutputRefused(
                        f"{path} is not a file, but a folder, a link to nothing or the like. Put "
                        f"back the file that was there, or remove it: what it held is asked again."
                    )
        return sorted(there, key=lambda path: (_start(path), path.name))

    def merge(self, order: list[str], read: Callable[[str, Record], None]) -> None:
        """Write the records of these keys to the output file, in this order, all or none.

        `read` sees every key and record on its way.
        """
        found = self.found()
        with ExitStack() as stack:
            files = {}
            for part in {entry.part for entry in found.values()}:
                with disk("read", part):
                    files[part] = stack.enter_context(part.open("rb"))
            file = stack.enter_context(replaced(self.out))
            for key in order:
                entry = found[key]
                with disk("read", entry.part):
                    files[entry.part].seek(entry.offset)
                    line = decode(files[entry.part].read(entry.length))
                if line is None:
                    raise OutputRefused(f"{entry.part} was changed while it was read.")
                read(*line)
                file.write(_json(line[1]) + b"\n")

    def close(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -------------------------------------------------------------- at the start

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(self._lock):
            holder = os.read(self._lock, 200).decode("utf-8", "replace").strip()
            raise OutputRefused(
                f"another run is writing to {self.out} ({holder or 'it has just begun'}). Wait for "
                f"it, stop it, or give another --out."
            )
        os.ftruncate(self._lock, 0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}, {now}".encode(), 0)

    def _begin(self, settings: dict[str, Any], overwrite: bool) -> int:
        for part in self._all_parts():
            _refuse_writer(part)
        run: dict[str, Any] = {}
        if overwrite:
            with suppress(OutputRefused):  # it may be damaged
                run = self._run()
        else:
            self.check(settings)
            run = self._run()
        anew = overwrite or run.get("settings") != settings  # others have answered nothing
        # a number that no process of an earlier start has
        starts = max([run.get("starts", 0), *map(_start, self._all_parts())]) + 1
        first = starts if anew else run.get("first", 0)
        # until this is written, what was there counts; from then on it does not
        self._write_run({"settings": settings, "starts": starts, "first": first})
        for path in self._all_parts():
            if _start(path) < first:
                remove(path)
        if overwrite:
            remove(self.out)
        return starts

    def _run(self) -> dict[str, Any]:
        file = self.folder / _RUN
        with disk("read", file):
            try:
                text = file.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return {}
        try:
            run = json.loads(text)
            if set(run) >= {"settings", "starts"} and type(run["starts"]) is int:
                return run
            why = "settings or starts are missing"
        except (ValueError, TypeError) as error:
            why = str(error)
        raise OutputRefused(
            f"{file} is damaged ({why}), so it is not known how the answers beside it were made. "
            f"Put a good copy there, give another --out, or --overwrite to begin anew."
        )

    def _write_run(self, run: Mapping[str, Any]) -> None:
        write_whole(self.folder / _RUN, json.dumps(run, indent=1).encode())


def _start(part: Path) -> int:
    match = _PART.fullmatch(part.name)
    return int(match[1]) if match else 0


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refuse_writer(part: Path) -> None:
    """A process of an earlier start may have outlived its first process."""
    with disk("read", part):
        file = os.open(part, os.O_RDWR)  # NFS locks for writing only what is open for writing
    try:
        if not _locked(file):
            raise OutputRefused(
                f"a process of an earlier run is still writing {part}. Stop it first."
            )
    finally:
        os.close(file)
