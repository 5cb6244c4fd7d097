"""Whether outputs can be written is asked before the work; what the disk refuses is one line."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputRefused, storage
from .loading import UsageError


def output(text: str) -> Path:
    """The value of an option: a file to write, in a folder that exists."""
    return _option(text, check_file)


def picture(endings: Sequence[str], parents: bool = False) -> Callable[[str], Path]:
    """The value of an option: a picture to write, whose format its name tells.

    parents: missing folders will be made.
    """

    def path(text: str) -> Path:
        if Path(text).suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{text!r}: end it in {', '.join(endings)}")
        return _option(text, lambda path: check_file(path, parents))

    return path


def folder(text: str) -> Path:
    """The value of an option: a folder to write to, which is made where it is missing."""
    return _option(text, check_folder)


def _option(text: str, check: Callable[[Path], None]) -> Path:
    path = Path(text)
    try:
        check(path)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def check_file(path: Path, parents: bool = False) -> None:
    """Refuse a file that cannot be written. Nothing is left, and what is there stays as it is.

    parents: missing folders will be made.
    """
    with _refused(path):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # a name that is too long shows here
        if path.is_dir():
            raise UsageError(f"{path} is a folder: name a file in it.")
        target = Path(os.path.realpath(path))  # a link may lead to what is not there yet
        if target.is_file():
            with target.open("ab"):
                return
        if not target.exists():
            _check_inside(target.parent, parents)
        elif not os.access(target, os.W_OK):  # a device or a pipe, which waits when it is opened
            raise UsageError(f"cannot write {str(path)!r}: it is not for this user to write.")


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made, or in which nothing can be written."""
    with _refused(path):
        _check_inside(path, make=True)


def _check_inside(place: Path, make: bool) -> None:
    """Write a file without a name. make: missing folders will be made."""
    while make and not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = "not a folder" if place.exists() else "no such folder"
        raise UsageError(f"{what}: {place}")
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"\0")  # a full disk has names left


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(storage(error, "write", path)) from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, what the disk refuses is an `OutputRefused` that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputRefused(storage(error, "write", path)) from error
