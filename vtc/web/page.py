"""What the page shows, as HTML. Pictures are part of it (data: addresses), so that nothing is
written to disk, and every text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from ..video.questions import Question
from .answers import Comparison
from .diffusion import Pair
from .media import Media, thumbnails
from .offer import Offer

THUMB, PREVIEW = 72, 120  # pixels

#: event of the slider: shows one of the pictures that are already there
SHOW_STAGE = """(stage) => {
  const all = document.querySelectorAll('.vtc-stages figure');
  all.forEach((one, number) => { one.hidden = number !== stage; });
}"""

#: of the examples: a click says which
PICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-name]');
  if (button) trigger('click', {name: button.dataset.name});
});"""

HEAD = """<h1>The same model, with fewer vision tokens</h1>
<p>Most of what a model computes for a picture can be left out. Pick a picture, a question and a
method, and press Run: the model answers twice, with all its tokens and with those that are
left.</p>"""

EMPTY = '<div class="vtc"><div class="vtc-empty">Press <b>Run</b>: results appear here.</div></div>'

LEGEND = (
    ("background:#a8b0be", "kept"),
    ("background:#8bc0e2;border-color:#468cbe", "merged: has the outline of where it went"),
    ("background:#1a1b1e;border-color:#1a1b1e", "dropped"),
)

NOTE = """times are of one run each, on this machine; with models as small as those that ship with
the package, choosing tokens can take longer than it saves"""


def box(inner: str) -> str:
    return f'<div class="vtc">{inner}</div>'


def error(text: str) -> str:
    return box(
        f'<div class="vtc-error" role="alert"><b>This does not work.</b> {escape(text)}</div>'
    )


def thumbs(found: Mapping[str, Media], picked: str) -> str:
    """A button for every example."""
    out = []
    for name, media in found.items():
        pressed = "true" if name == picked else "false"
        shown = _image(thumbnails(media.pictures[-1:], THUMB)[0], name)
        out.append(
            f'<button type="button" data-name="{escape(name)}" aria-pressed="{pressed}">{shown}'
            f"{escape(name)}</button>"
        )
    return box(f'<div class="vtc-thumbs">{"".join(out)}</div>')


def preview(media: Media) -> str:
    """What was picked or uploaded."""
    pictures = media.pictures
    shown = thumbnails(pictures[:8], PREVIEW if len(pictures) == 1 else PREVIEW // 3)
    images = "".join(_image(picture, media.name) for picture in shown)
    about = f'<span class="faint">{_e(media.about)}</span>'
    return box(f'<div class="vtc-seen">{images}{about}</div>')


def reasons(offer: Offer) -> str:
    """Methods and sites that this model does not have; equal reasons share a row."""
    same: dict[str, list[str]] = {}
    for what, why in offer.reasons.items():
        same.setdefault(why, []).append(what)
    rows = [
        f"<tr><td>{_e(', '.join(names))}</td><td>{_e(why)}</td></tr>" for why, names in same.items()
    ]
    return box(f"<table>{''.join(rows)}</table>")


def cards(found: Comparison, right: str | None) -> str:
    """Both answers, side by side, with what they took."""
    tokens = f"{found.stages[0].before:.0f}"
    told = [one for one in found.stages if one.site != "cache"] or found.stages
    behind = " → ".join([tokens, *(f"{stage.after:.0f}" for stage in told)])
    dense, used = found.flops
    facts = (
        (
            f"{tokens} vision tokens",
            f"{dense / 1e9:.3g} GFLOPs",
            f"{1e3 * found.seconds[0]:.0f} ms",
        ),
        (
            f"{behind} vision tokens",
            f"{used / 1e9:.3g} GFLOPs ({used / dense - 1:+.0%})" if dense else "FLOPs not counted",
            f"{1e3 * found.seconds[1]:.0f} ms, of which choosing tokens took "
            f"{1e3 * sum(stage.seconds for stage in found.stages):.0f} ms",
        ),
    )
    titles = ("All tokens", "Compressed")
    shown = [
        _card(title, said, right, each)
        for title, said, each in zip(titles, (found.dense, found.compressed), facts, strict=True)
    ]
    known = f"right answer: {_e(right)}; " if right else ""
    return box(
        f'<div class="vtc-cards">{"".join(shown)}</div>'
        f'<p class="faint">{known}FLOPs are those of the prefill; {NOTE}.</p>'
    )


def pictures(found: Comparison) -> str:
    """One figure per stage, of which the slider shows one; at first the last."""
    last = len(found.pictures) - 1
    figures = [
        f"<figure{'' if number == last else ' hidden'}><figcaption>{_e(one.caption)}</figcaption>"
        f"{_image(one.image, one.caption)}</figure>"
        for number, one in enumerate(found.pictures)
    ]
    marks = "".join(f'<span><i style="{how}"></i>{_e(what)}</span>' for how, what in LEGEND)
    told = f'<p class="faint">Not drawn: {_e(found.undrawn)}</p>' if found.undrawn else ""
    legend = f'<div class="vtc-legend">{marks}</div>'
    return box(f'<div class="vtc-stages">{"".join(figures)}</div>{legend}{told}')


def stages(found: Comparison) -> str:
    """Tokens before and after each stage."""
    head = ("stage", "method", "tokens before", "after", "kept", "ms")
    rows = [
        (
            one.site + (" (mean of its layers)" if one.site == "cache" else ""),
            one.method,
            f"{one.before:.0f}",
            f"{one.after:.0f}",
            f"{one.after / one.before:.0%}" if one.before else "-",
            f"{1e3 * one.seconds:.2f}",
        )
        for one in found.stages
    ]
    return box(f"{_table(head, rows, 2)}{_report(found.report)}")


def pair(found: Pair) -> str:
    """Digits of both, and tokens per step."""
    from vtc_zoo import digits

    shown = []
    for number, (title, one) in enumerate(
        (("All tokens", found.dense), ("Compressed", found.compressed))
    ):
        sheet = digits.sheet(one.images, digits.CLASSES, 4)
        cost = f"{one.gigaflops:.3g} GFLOPs"
        if number:
            cost += f" ({one.gigaflops / found.dense.gigaflops - 1:+.0%})"
        judged = f", {found.recognised[number]:.0%} recognised" if found.recognised else ""
        shown.append(
            f'<div class="vtc-card"><h3>{title}</h3>{_image(sheet, title, "", "vtc-digits")}'
            f"<ul><li>{cost}, {one.seconds:.2f} s{judged}</li></ul></div>"
        )
    return box(
        f"{''.join(shown)}<h3>Tokens per block and picture at every step</h3>{chart(found)}"
        f'<p class="faint">{NOTE}.</p>{_report(found.compressed.report)}'
    )


def chart(found: Pair) -> str:
    """Bars: tokens that a block works on at every step, of both models."""
    wide, high, left, foot = 760, 150, 40, 34
    most = max(*found.dense.tokens, *found.compressed.tokens)
    step = (wide - left) / len(found.times)
    out = [f'<svg viewBox="0 0 {wide} {high + foot}" width="100%" role="img" '
           f'aria-label="tokens per step" fill="currentColor" font-size="12">']  # fmt: skip
    for share in (0.0, 0.5, 1.0):
        y = 8 + (high - 8) * (1 - share)
        out.append(f'<line x1="{left}" x2="{wide}" y1="{y}" y2="{y}" stroke="currentColor" '
                   f'opacity=".2"/><text x="{left - 6}" y="{y + 4}" text-anchor="end">'
                   f"{most * share:.0f}</text>")  # fmt: skip
    for tokens, color in ((found.dense.tokens, "#c3cad6"), (found.compressed.tokens, "#3b7dd8")):
        for number, count in enumerate(tokens):
            tall = (high - 8) * max(0.0, count) / most
            inset = 0.12 if color == "#c3cad6" else 0.26
            out.append(
                f'<rect x="{left + step * (number + inset):.1f}" y="{high - tall:.1f}" '
                f'width="{step * (1 - 2 * inset):.1f}" height="{tall:.1f}" fill="{color}">'
                f"<title>step {number + 1}, noise {found.times[number]:.2f}: {max(0.0, count):.0f} "
                f"tokens</title></rect>"
            )
    middle = (left + wide) / 2
    out.append(f'<text x="{left}" y="{high + 16}">noise</text><text x="{wide}" y="{high + 16}" '
               f'text-anchor="end">picture</text><text x="{middle}" y="{high + 16}" '
               f'text-anchor="middle">steps of the sampler; grey: all tokens, blue: compressed'
               f"</text></svg>")  # fmt: skip
    return "".join(out)


def _card(title: str, said: str, right: str | None, facts: Sequence[str]) -> str:
    mark, kind = "", ""
    if right is not None:
        good = Question(1, title, "", "", right).right(said)
        mark, kind = (" ✓", "right") if good else (" ✗", "wrong")
    listed = "".join(f"<li>{_e(fact)}</li>" for fact in facts)
    answer = _e(said) or "(nothing)"
    return (
        f'<div class="vtc-card"><h3>{title}</h3><div class="said {kind}">{answer}{mark}</div>'
        f"<ul>{listed}</ul></div>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """The first `words` columns are text, the others numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ("" if i < words else ' class="number"' for i in range(len(cells)))
        return "".join(
            f"<{tag}{kind}>{_e(c)}</{tag}>" for kind, c in zip(kinds, cells, strict=True)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><tr>{line('th', head)}</tr>{body}</table>"


def _image(picture: Image.Image, about: str, style: str = "", kind: str = "") -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<img class="{kind}" style="{style}" alt="{_e(about)}" src="data:image/png;base64,{data}">'
    )


def _report(text: str) -> str:
    return f"<details><summary>Report of the session</summary><pre>{_e(text)}</pre></details>"


def _e(text: Any) -> str:
    return escape(str(text))
