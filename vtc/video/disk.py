"""Files on a disk that may be full, read-only or gone: whole ones, and one error that says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputRefused


@contextmanager
def disk(do: str, path: Path) -> Iterator[None]:
    """What the operating system refuses in here, as one error that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputRefused(
            f"cannot {do} {path}: {error.strerror or error}. What is recorded stays: run the "
            f"same command again when this is mended."
        ) from error


def remove(path: Path) -> None:
    """What was given up."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputRefused(
            f"cannot remove {path}: {error.strerror or error}. It is of an earlier run, whose "
            f"answers were given up: remove it, and run the same command again."
        ) from error


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` at the end; whatever fails when, there is
    what was there before, or all that was written."""
    new = path.with_name(f"{path.name}.new")
    with disk("write", path):
        try:
            with new.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except BaseException:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """A file with this inside, or what was there before, whatever fails when."""
    with replaced(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make new names of a folder last."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
