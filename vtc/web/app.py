"""The page: its two tabs, and the server around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder

from ..errors import VtcError
from . import answers, diffusion, media, page
from .desk import Desk, of_method, phases, shown_method
from .gate import Gate
from .line import Line
from .models import ANSWERERS, DRAWERS, Models

METHOD, SKETCH = "divprune", "pooled"  # at first
AT_ONCE, WAITING = 2, 32  # requests
SESSIONS = 200  # visitors whose lists are remembered, half a megabyte each
SWEEP, KEEP = 120, 1800  # seconds between looks at old uploads, and how old they get

#: Runs wait in the queue. What only changes the page does not: the stream of results ends when the
#: last of a visitor's requests is done, and one made at that moment would never be heard of.
QUEUED: Any = {
    "api_visibility": "private",
    "concurrency_id": "runs",
    "concurrency_limit": AT_ONCE,
}
ASIDE: Any = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


class Page(gr.Blocks):
    """Takes no files but those that were uploaded to this server."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any):
        for path in _paths(inputs):
            _check_uploaded(path)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _paths(data: Any) -> list[object]:
    """Everything in a request that gradio would take for the path of a file."""
    if isinstance(data, dict):
        own = [data["path"]] if "path" in data else []
        return own + [path for value in data.values() for path in _paths(value)]
    return [path for value in data for path in _paths(value)] if isinstance(data, list) else []


def _check_uploaded(path: object) -> None:
    folder = Path(get_upload_folder()).resolve()
    try:
        there = isinstance(path, str) and "\0" not in path
        there = there and Path(str(path)).resolve().is_relative_to(folder)
        left = there and Path(str(path)).is_file()
    except OSError:  # longer than any path may be
        there = left = False
    if not there:
        raise gr.Error("Only files that were uploaded here can be used.", print_exception=False)
    if not left:
        minutes = KEEP // 60
        raise gr.Error(
            f"The upload is gone: they are deleted after {minutes} minutes. Upload it again.",
            print_exception=False,
        )


def build(models: Models, first: str = ANSWERERS[0]) -> Page:
    """The page; `first` is the model that is shown at first, which is loaded now."""
    desk = Desk(models)
    with Page(
        title="vtc", analytics_enabled=False, delete_cache=(SWEEP, KEEP), fill_width=True
    ) as blocks:
        gr.HTML(page.box(page.HEAD))
        with gr.Tab("Image / video"):
            _answering(desk, first)
        with gr.Tab("Diffusion"):
            try:
                desk.offer(DRAWERS[0])
            except VtcError as error:  # diffusers is not installed
                gr.HTML(page.error(str(error)))
            else:
                _drawing(desk)
    blocks.state_session_capacity = SESSIONS
    return blocks.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE, api_open=False)


def _answering(desk: Desk, first: str) -> None:
    """The tab of questions."""
    start = next(iter(media.examples().values()))
    asked = [question for question, _ in start.answers]
    with gr.Row():
        with gr.Column(scale=5, min_width=340):
            examples = gr.HTML(page.thumbs(media.examples(), start.name), js_on_load=page.PICK)
            preview = gr.HTML(page.preview(start), elem_id="preview")
            picked = gr.Textbox(start.name, visible="hidden", label="picked")
            upload = gr.File(
                label=f"or your own image or video (up to {media.MOST_BYTES >> 20} MB)",
                type="binary",
                height=150,
            )
            question = gr.Dropdown(asked, value=asked[0], label="Question", allow_custom_value=True)
            names = list(dict.fromkeys((first, *ANSWERERS)))
            model = gr.Dropdown(
                names,
                value=first,
                label="Model",
                info="from the list, or a Hugging Face id or a folder, typed in",
                allow_custom_value=True,
            )
            knobs = _knobs(desk, first, METHOD)
            method, site, share, own, why, message = knobs
            with gr.Row():
                merge = gr.Checkbox(False, label="Merge", info="average dropped tokens into others")
                mass = gr.Slider(0, 1, 0, step=0.1, label="Mass", info="attention for merged ones")
            with gr.Accordion("More", open=False):
                frames = gr.Slider(
                    1, media.MOST_FRAMES, 8, step=1, label="Frames of an uploaded video"
                )
                words = gr.Slider(
                    1, answers.MOST_WORDS, 16, step=1, label="Longest answer, in tokens"
                )
            with gr.Accordion("What does not fit this model, and why", open=False):
                why.render()
        with gr.Column(scale=8, min_width=420):
            go = gr.Button("Run", variant="primary", size="lg", elem_id="run")
            cards = gr.HTML(page.EMPTY, elem_id="cards")
            slider = gr.Slider(
                0, 1, 1, step=1, label="Stage (0: all tokens)", visible=False, elem_id="stage"
            )
            pictures = gr.HTML(elem_id="pictures")
            stages = gr.HTML(elem_id="stages")
    examples.click(
        desk.pick, [model], [picked, examples, preview, question, model, upload, message], **ASIDE
    )
    upload.change(desk.upload, [upload, frames], [picked, examples, preview, message], **ASIDE)
    model.change(desk.model, [model, method], list(knobs), **ASIDE)
    method.input(desk.method, [model, method], [method, site, share, own, message], **ASIDE)
    given = [picked, upload, question, model, method, site, share, own, merge, mass, frames, words]
    go.click(
        desk.run,
        given,
        [cards, slider, pictures, stages],
        show_progress_on=[cards],
        **QUEUED,
    )
    slider.change(None, [slider], None, js=page.SHOW_STAGE, **ASIDE)


def _knobs(desk: Desk, name: str, first: str) -> tuple[Any, ...]:
    """Method, site, share, check box, reasons (not placed yet), message."""
    offer = desk.offer(name)
    shown, _ = shown_method(offer, first)
    choice = offer.choices[shown]
    sites, share_now, own_now = of_method(offer, shown)
    message = gr.HTML(visible=False)
    with gr.Row():
        method = gr.Dropdown(
            list(offer.choices), value=shown, label="Method", info=choice.about, min_width=160
        )
        site = gr.Dropdown(
            sites["choices"],
            value=sites["value"],
            interactive=sites["interactive"],
            label="Site",
            info="where in the model",
            min_width=160,
        )
    with gr.Row():
        share = gr.Slider(
            5,
            100,
            25,
            step=5,
            label="Tokens that stay, %",
            interactive=share_now["interactive"],
            scale=2,
        )
        own = gr.Checkbox(
            own_now["value"],
            label="its own number",
            info="as published",
            interactive=own_now["interactive"],
            min_width=110,
        )
    why = gr.HTML(page.reasons(offer), render=False)
    return method, site, share, own, why, message


def _drawing(desk: Desk) -> None:
    """The tab of digits."""
    with gr.Row():
        with gr.Column(scale=5, min_width=340):
            model = gr.Dropdown(list(DRAWERS), value=DRAWERS[0], label="Model")
            knobs = _knobs(desk, DRAWERS[0], SKETCH)
            method, site, share, own, why, message = knobs
            until, noise = _phases(desk, DRAWERS[0], method.value, site.value)
            with gr.Row():
                steps = gr.Slider(1, diffusion.MOST_STEPS, 15, step=1, label="Steps")
                seed = gr.Number(0, label="Seed", precision=0)
            with gr.Accordion("What does not fit this model, and why", open=False):
                why.render()
        with gr.Column(scale=8, min_width=420):
            go = gr.Button("Run", variant="primary", size="lg", elem_id="draw")
            out = gr.HTML(page.EMPTY, elem_id="digits")
    model.change(desk.drawer, [model, method], [*knobs, until, noise], **ASIDE)
    shown = [method, site, share, own, message, until, noise]
    method.input(desk.drawing_method, [model, method], shown, **ASIDE)
    site.input(desk.drawing_site, [model, method, site], [message, until], **ASIDE)
    given = [model, method, site, share, own, until, noise, steps, seed]
    go.click(desk.sketch, given, [out], **QUEUED)


def _phases(desk: Desk, name: str, method: str, at: str) -> tuple[Any, Any]:
    """Until and noise."""
    until_now, noise_now = phases(desk.offer(name).choices[method], at)
    with gr.Row():
        until = gr.Dropdown(
            [("the last block", ""), *(f"dit.{i}" for i in range(1, 6))],
            value=until_now["value"],
            interactive=until_now["interactive"],
            label="Until",
            info="where all tokens come back",
        )
        noise = gr.Slider(
            0,
            0.9,
            noise_now["value"],
            step=0.1,
            interactive=noise_now["interactive"],
            label="Least noise",
            info="act only while noisier",
        )
    return until, noise


# ---------------------------------------------------------------------- the server


def server(blocks: Page, local: bool = True) -> FastAPI:
    """Serves the page and nothing else of this machine. Fonts are those of the browser's system.

    local: only this machine can connect.
    """
    fonts: Any = ("ui-sans-serif", "system-ui", "sans-serif")
    mono: Any = ("ui-monospace", "monospace")
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        outer,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=["/"],
        show_error=True,
        max_file_size=media.MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(primary_hue="indigo", font=fonts, font_mono=mono),
        css_paths=Path(__file__).with_name("style.css"),
    )
    line = Line(lambda: blocks._queue)
    outer.add_middleware(Gate, folder=get_upload_folder, local=local, line=line)
    return outer
