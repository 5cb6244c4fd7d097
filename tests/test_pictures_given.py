"""Pictures that users give: which formats are tried, how large they may be, what errors say."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image

from vtc.commands import cli, loading
from vtc.harness import chats

ROOT = Path(__file__).parents[1]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def png(width: int, height: int) -> bytes:
    """A PNG that says that it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def told(path: Path) -> str:
    with pytest.raises(loading.BadImage) as error:
        loading.open_image(path)
    return str(error.value)


def test_no_program_is_started_for_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def ghostscript(*_: object, **__: object) -> Any:
        started.append("gs")
        return Image.new("RGB", (9, 9)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    path = tmp_path / "pic.png"
    path.write_bytes(EPS)
    with Image.open(path) as image:  # what an open without formats does
        image.load()
    assert started.pop() == "gs"
    known = "PNG, JPEG, WEBP, BMP, GIF, TIFF"
    says = f"not an image that can be read: {path}. It is damaged, or none of {known}."
    assert told(path) == says
    with pytest.raises(loading.BadImage):
        chats._image(str(path))
    words = ("--model", cli.ZOO_MODEL, "--image", str(path), "--prompt", "x", "--method", "random")
    assert cli.main(["run", *words, "--keep", "4"]) == 2
    assert capsys.readouterr().err == f"vtc: {says}\n" and not started


def test_every_open_in_the_sources_names_its_formats() -> None:
    files = [*ROOT.glob("vtc/**/*.py"), *ROOT.glob("model_zoo/**/*.py")]
    opened = [line for path in files for line in re.findall(r"Image\.open\(.*", path.read_text())]
    assert len(opened) > 1 and all("formats=" in line for line in opened)


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (20_000, 20_000)])
def test_too_many_pixels_are_one_error_and_no_warning(
    width: int, height: int, tmp_path: Path
) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert told(path) == f"{path} has more than 89 million pixels: scale it down first."


def test_a_limit_and_formats_of_ones_own() -> None:
    with pytest.raises(loading.BadImage, match="^the upload has more than 1 million pixels"):
        loading.read_image(io.BytesIO(png(1001, 1000)), "the upload", most=1_000_000)
    data = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(data, "TIFF")
    assert loading.read_image(data, "the upload").size == (3, 2)
    with pytest.raises(loading.BadImage, match="It is damaged, or none of PNG, JPEG.$"):
        loading.read_image(data, "the upload", ("PNG", "JPEG"))


def test_a_folder_and_numbers_without_a_range_are_named(tmp_path: Path) -> None:
    assert told(tmp_path) == f"{tmp_path} is a folder: name the pictures in it."
    assert told(tmp_path / "a.png") == f"no such image: {tmp_path / 'a.png'}"
    path = tmp_path / "float.tif"
    Image.new("F", (2, 2), 0.5).save(path)
    numbers = "holds floating point numbers, whose range is not known: give 8 bits."
    assert told(path) == f"{path} {numbers}"
    with pytest.raises(loading.BadImage, match=f"^the image {numbers}"):
        loading.upright(Image.new("F", (2, 2)))
