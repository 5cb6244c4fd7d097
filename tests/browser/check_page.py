"""The page in a real browser, from the first click on. `make browser` runs it; its name keeps it
from those who run `pytest` without one."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from browser.visitor import Visitor
from PIL import Image
from playwright.sync_api import Browser, expect

from vtc import video


def picture(color: str = "gray") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (96, 96), color).save(stream, "PNG")
    return stream.getvalue()


def upload(visitor: Visitor, name: str, data: bytes) -> None:
    file = {"name": name, "mimeType": "application/octet-stream", "buffer": data}
    visitor.page.locator("input[type=file]").first.set_input_files(file)


def shown(visitor: Visitor) -> list[bool]:
    figures = visitor.page.locator("#pictures figure")
    return [figures.nth(number).is_visible() for number in range(figures.count())]


def test_one_click_gives_a_result(visitor: Visitor):
    said = visitor.run()
    assert "144 vision tokens" in said and "144 → 36 vision tokens" in said
    assert said.count("✓") == 2 and "right answer: 1" in said
    assert shown(visitor) == [False, True]
    widths = visitor.page.locator("#pictures img").evaluate_all(
        "all => all.map(i => i.naturalWidth)"
    )
    assert min(widths) > 300
    visitor.page.locator("#stage input[type=range]").fill("0")
    expect(visitor.page.locator("#pictures figure").first).to_be_visible()
    assert shown(visitor) == [True, False]


def test_a_method_of_several_stages(visitor: Visitor):
    visitor.choose("Method", "pdrop")
    expect(visitor.page.get_by_label("Site").first).to_have_value(
        re.compile("decoder.1, decoder.2")
    )
    assert "144 → 91 → 57 → 36" in visitor.run()
    for stage in range(4):
        visitor.page.locator("#stage input[type=range]").fill(str(stage))
        expect(visitor.page.locator("#pictures figure").nth(stage)).to_be_visible()
        assert shown(visitor) == [number == stage for number in range(4)]
    visitor.page.get_by_role("button", name="What does not fit this model").first.click()
    expect(visitor.page.get_by_text("works at dit only").first).to_be_visible()


def test_a_clip_takes_a_model_of_videos(visitor: Visitor):
    visitor.page.get_by_role("button", name="clip 1").click()
    expect(visitor.page.get_by_label("Model", exact=True).first).to_have_value("tiny-llava-video")
    expect(visitor.page.locator("#preview img")).to_have_count(8)
    expect(visitor.page.get_by_label("Question")).to_have_value(re.compile("which way"))
    said = visitor.run()
    assert "288 → 72 vision tokens" in said and "right answer: left" in said
    visitor.page.get_by_role("button", name="scene 2").click()
    expect(visitor.page.get_by_label("Model", exact=True).first).to_have_value("tiny-llava-shapes")
    assert "144 → 36" in visitor.run()


def test_uploads(visitor: Visitor, tmp_path: Path):
    upload(visitor, "mine.png", picture())
    expect(visitor.page.locator("#preview")).to_contain_text("your upload, 96 x 96 pixels")
    assert "144 → 36" in (said := visitor.run()) and "right answer" not in said
    visitor.page.get_by_role("button", name="scene 3").click()
    expect(visitor.page.locator("#preview")).to_contain_text("scene 3")
    assert "right answer: 6" in visitor.run()

    path = tmp_path / "clip.mp4"
    video.write(path, np.random.default_rng(0).integers(0, 255, (12, 96, 96, 3), np.uint8), 4)
    upload(visitor, "clip.mp4", path.read_bytes())
    expect(visitor.page.locator("#preview")).to_contain_text("8 frames of 3.0 s")
    assert "reads no videos" in visitor.run(result="#cards .vtc-error")
    visitor.choose("Model", "tiny-llava-video")
    expect(visitor.page.locator("#preview img")).to_have_count(8)
    assert "288 → 72" in visitor.run()


def test_files_that_are_refused(visitor: Visitor, tmp_path: Path):
    upload(visitor, "really.png", b"MZ a program")
    expect(visitor.page.locator("#preview [role=alert]")).to_contain_text("neither an image")
    assert "neither an image" in visitor.run(result="#cards .vtc-error")
    visitor.page.get_by_role("button", name="scene 1").click()
    expect(visitor.page.locator("#preview")).to_contain_text("scene 1")
    (tmp_path / "big.png").write_bytes(b"\0" * (26 * 2**20))
    visitor.page.locator("input[type=file]").first.set_input_files(tmp_path / "big.png")
    words = re.compile("maximum allowed size|size exceed", re.IGNORECASE)
    expect(visitor.page.get_by_text(words).first).to_be_visible()
    visitor.complaints.clear()  # the browser notes the answer 413


def test_errors_are_text(visitor: Visitor):
    visitor.type("Model", "<img src=x onerror=alert(1)>")
    expect(visitor.page.get_by_role("alert").first).to_contain_text("unknown model '<img src=x")
    said = visitor.run(result="#cards .vtc-error")
    assert "This does not work." in said and "Traceback" not in said
    visitor.choose("Model", "tiny-llava-shapes")
    visitor.type("Question", "what is <image> ?")
    assert "stands for the image itself" in visitor.run(result="#cards .vtc-error")


def test_digits(visitor: Visitor):
    visitor.page.get_by_role("tab", name="Diffusion").click()
    said = visitor.run("#draw", "#digits .vtc-card")
    assert said.count("GFLOPs") >= 2 and "100% recognised" in said
    assert visitor.page.locator("#digits svg rect").count() == 30
    tall = visitor.page.locator("#digits svg rect").evaluate_all(
        "all => all.map(one => Number(one.getAttribute('height')))"
    )
    assert tall == [142.0] * 15 + [71.0] * 8 + [142.0] * 7


def test_digits_by_a_method_that_takes_neither_until_nor_noise(visitor: Visitor):
    visitor.page.get_by_role("tab", name="Diffusion").click()
    panel = visitor.page.get_by_role("tabpanel").filter(has=visitor.page.locator("#draw"))
    panel.get_by_label("Method", exact=True).click()
    panel.get_by_role("option", name="toca", exact=True).click()
    expect(panel.get_by_label("Until", exact=True)).to_be_disabled()
    assert "GFLOPs" in visitor.run("#draw", "#digits .vtc-card")


def test_two_visitors_do_not_mix(chromium: Browser, address: str):
    visitors = [Visitor(chromium, address) for _ in range(2)]
    for visitor, method in zip(visitors, ("pdrop", "mustdrop"), strict=True):
        visitor.choose("Method", method)
        expect(visitor.page.get_by_label("Site").first).to_have_value(re.compile("decoder.1"))
    for visitor in visitors:
        visitor.page.locator("#run").click()
    for visitor, method in zip(visitors, ("pdrop", "mustdrop"), strict=True):
        expect(visitor.page.locator("#stages")).to_contain_text(method)
        assert ("144 → 91 → 57 → 36" in visitor.page.locator("#cards").inner_text()) == (
            method == "pdrop"
        )
        visitor.context.close()


def test_nothing_of_the_server_is_served(visitor: Visitor, address: str):
    for path in ("gradio_api/file=/etc/passwd", "gradio_api/file=README.md", "file=/etc/passwd"):
        answer = visitor.page.request.get(f"{address}/{path}")
        assert answer.status == 404 and "root:" not in answer.text()


def test_the_picture_of_the_readme(chromium: Browser, address: str, request: Any):
    path = request.config.getoption("--screenshot")
    visitor = Visitor(chromium, address)
    visitor.choose("Method", "mustdrop")
    expect(visitor.page.get_by_label("Site").first).to_have_value(re.compile("vision.1"))
    visitor.run()
    expect(visitor.page.locator("#pictures figure").last).to_be_visible()
    visitor.page.mouse.move(0, 0)
    visitor.page.wait_for_timeout(500)  # transitions
    with Image.open(io.BytesIO(visitor.page.screenshot(full_page=True))) as shot:
        small = shot.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    visitor.context.close()
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    assert small.width == 1200 and len(stream.getvalue()) < 300_000
    if path is not None:
        path.write_bytes(stream.getvalue())
