"""The tables of methods and of model families, for the terminal and for the README."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..context import SIGNALS
from ..errors import VtcError
from ..reducer import Composite, Denoiser, Host, Rewriter, Selector, summary
from ..registry import REDUCERS
from .outputs import writing

Rows = list[tuple[str, ...]]

METHOD_HEADER = ("method", "keeps", "sites", "default site", "signals needed", "paper")
FAMILY_HEADER = ("family", "classes of transformers", "status", "note")

HOW_TESTED = "Tested: small random instances of these classes, against an independent reference."
TESTED, SHARED, REFUSED = "tested", "tested, nothing written for it", "refused"


@dataclass(frozen=True)
class Family:
    """A family of models: `model_types` of transformers, and what to expect."""

    name: str
    classes: tuple[str, ...]
    status: str
    note: str = ""


FAMILIES = (
    Family("llava", ("LlavaForConditionalGeneration",), TESTED),
    Family(
        "llava_next",
        ("LlavaNextForConditionalGeneration",),
        TESTED,
        "tiles share the budget of their image; grid known inside the tower only",
    ),
    Family(
        "llava_onevision",
        ("LlavaOnevisionForConditionalGeneration",),
        TESTED,
        "images and video; of videos, no method that reads what the projector is given",
    ),
    Family("qwen2_vl", ("Qwen2VLForConditionalGeneration",), TESTED, "images and video"),
    Family("qwen2_5_vl", ("Qwen2_5_VLForConditionalGeneration",), TESTED, "images and video"),
    Family("qwen3_vl", ("Qwen3VLForConditionalGeneration",), TESTED, "images and video, deepstack"),
    Family("internvl", ("InternVLForConditionalGeneration",), TESTED, "the -hf checkpoints"),
    Family("smolvlm", ("SmolVLMForConditionalGeneration",), TESTED),
    Family("idefics3", ("Idefics3ForConditionalGeneration",), TESTED),
    Family("gemma3", ("Gemma3ForConditionalGeneration",), TESTED, "not with StaticCache"),
    Family("paligemma", ("PaliGemmaForConditionalGeneration",), TESTED),
    Family("vipllava", ("VipLlavaForConditionalGeneration",), SHARED),
    Family("glm4v", ("Glm4vForConditionalGeneration",), SHARED),
    Family(
        "mistral3",
        ("Mistral3ForConditionalGeneration",),
        SHARED,
        "no vision sites; tower signals for one image per batch",
    ),
    Family("qwen3_vl_moe", ("Qwen3VLMoeForConditionalGeneration",), SHARED),
    Family(
        "molmo2",
        ("Molmo2ForConditionalGeneration",),
        SHARED,
        "inside the tower videos only; crops of images overlap there",
    ),
    Family(
        "llava_siglip_qwen3",
        ("LlavaForConditionalGeneration",),
        SHARED,
        "LLaVA with a SigLIP tower and a Qwen3 language model",
    ),
    Family(
        "mllama, idefics",
        ("MllamaForConditionalGeneration", "IdeficsForVisionText2Text"),
        REFUSED,
        "images are read by cross-attention: there are no image tokens in the sequence",
    ),
    Family(
        "florence2",
        ("Florence2ForConditionalGeneration",),
        REFUSED,
        "its language model is an encoder-decoder; all such models are refused",
    ),
    Family(
        "gemma3n, gemma4",
        ("Gemma3nForConditionalGeneration", "Gemma4ForConditionalGeneration"),
        REFUSED,
        "every layer has inputs per token of its own",
    ),
    Family(
        "blip-2, instructblip",
        ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"),
        REFUSED,
        "a Q-Former already compresses the image to 32 tokens",
    ),
)


def method_rows(plugged: bool = False) -> Rows:
    """One row per method of vtc; with `plugged` those of other packages too, and of which."""
    rows = []
    for name in REDUCERS:
        package = REDUCERS.packages.get(name, "")
        if package and not plugged:
            continue
        cls = REDUCERS[name]
        keeps = re.sub(r"^Keeps\b,? ", "", summary(cls)).rstrip(".")
        needs = ", ".join(sorted(cls.needs)) or "none"
        row = (name, keeps, ", ".join(sorted(cls.sites)), places(cls), needs, cls.paper)
        rows.append((*row, package) if plugged else row)
    return rows


def family_rows() -> Rows:
    """One row per family."""
    return [(f.name, ", ".join(f.classes), f.status, f.note) for f in FAMILIES]


def places(cls: Any, depth: int = 32) -> str:
    """Where a method acts when the user does not say: one site, or its stages for that depth."""
    if issubclass(cls, Composite):
        return ", ".join(dict.fromkeys(f"{p.method}" for p in cls().parts(Host(depth), None)))
    stages = list(cls().places(depth, 0.25))
    if len(stages) < 2:
        return stages[0] if stages else cls.default_at
    if stages[0].startswith("dit."):
        return "dit.<i>.attn of every block"
    layers = ", ".join(stage.partition(".")[2] for stage in stages)
    return f"decoder layers {layers} of {depth}"


def text_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    widest: int = 34,
    room: int | None = None,
) -> str:
    """Aligned columns, two spaces apart; long cells are wrapped. Numbers go to the right.

    room: characters of a line, by default any number. Where columns of whole words do not fit, each
        row is a paragraph with a line for each cell.
    """
    cells = [list(row) for row in rows]
    width = _widths(header, cells, [widest] * len(header))
    able = set(range(len(header)))
    while room is not None and sum(width) + 2 * len(width) - 2 > room:
        if not able:
            return _paragraphs(header, cells, room)
        column = max(able, key=width.__getitem__)
        narrower = [w - (c == column) for c, w in enumerate(width)]
        narrower = _widths(header, cells, narrower)
        if narrower[column] < width[column]:
            width = narrower
        else:
            able.remove(column)
    head, *body = _wrapped([header, *cells], width)
    right = [all(_number(row[c]) for row in body) and bool(body) for c in range(len(header))]
    rule = [["-" * w] for w in width]
    return "\n".join(
        _line([cell[i] if i < len(cell) else "" for cell in row], width, right)
        for row in [head, rule, *body]
        for i in range(max(len(cell) for cell in row))
    )


def _wrapped(rows: Iterable[Sequence[str]], most: Sequence[int]) -> list[list[list[str]]]:
    """The lines of every cell; words stay whole."""
    return [[_lines(c, w) for c, w in zip(row, most, strict=True)] for row in rows]


def _lines(text: str, most: int) -> list[str]:
    found = textwrap.wrap(text, max(1, most), break_long_words=False, break_on_hyphens=False)
    return found or [""]


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]], most: Sequence[int]) -> list[int]:
    """Of columns whose cells are wrapped at these widths."""
    body = _wrapped([header, *rows], most)
    return [max(len(line) for row in body for line in row[c]) for c in range(len(header))]


def _paragraphs(header: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> str:
    """For narrow terminals: a row is named by its first cell, the others follow line by line."""
    label = max(map(len, header[1:]), default=0) + 4
    out = []
    for name, *rest in rows:
        lines = [name or "-"]
        for title, cell in zip(header[1:], rest, strict=True):
            text = _lines(cell, max(20, room - label))
            lines += [
                f"  {'' if i else title:<{label - 2}}{t}".rstrip() for i, t in enumerate(text)
            ]
        out.append("\n".join(lines))
    return "\n\n".join(out)


def terminal() -> int | None:
    """Characters of a line where standard output is a terminal, else None."""
    seen = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if seen else None


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join(lines)


def listing(families: bool = False, markdown: bool = False) -> str:
    """The table of methods or of families. As markdown, for READMEs, without other packages."""
    header, rows = (FAMILY_HEADER, family_rows()) if families else (METHOD_HEADER, method_rows())
    if not families and not markdown and REDUCERS.packages:
        header, rows = (*METHOD_HEADER, "package"), method_rows(plugged=True)
    if markdown and families:
        rows = [(_code(names), _code(classes), *rest) for names, classes, *rest in rows]
    elif markdown:
        rows = [(_code(r[0]), *r[1:4], _code(r[4]), _link(r[5])) for r in rows]
    room = None if markdown else terminal()
    table = markdown_table(header, rows) if markdown else text_table(header, rows, room=room)
    told = HOW_TESTED if room is None else textwrap.fill(HOW_TESTED, room)
    return f"{table}\n\n{told}" if families else table


def refreshed(readme: str, name: str = "README.md") -> str:
    """`readme` with the tables between its markers brought up to date; the one of the families may
    be missing."""
    for families in (False, True):
        tag = "vtc list --families" if families else "vtc list"
        start, end = f"<!-- {tag} -->", f"<!-- /{tag} -->"
        if families and start not in readme and end not in readme:
            continue
        once = readme.count(start) == readme.count(end) == 1
        if not once or readme.find(start) > readme.find(end):
            raise VtcError(
                f"{name} needs the markers {start} and {end} once each, in this order and on "
                f"lines of their own: the table goes between them."
            )
        before, _, rest = readme.partition(start)
        table = f"{start}\n\n{listing(families, markdown=True)}\n\n{end}"
        readme = before + table + rest.partition(end)[2]
    return readme


def method_page(name: str) -> str:
    """All about one method: what its file says, parameters, sites, signals."""
    cls = REDUCERS[name]
    package = REDUCERS.packages.get(name)
    parts = [f"{cls.name}: {cls.paper}" + (f" (package {package})" if package else "")]
    parts += [
        text for text in (inspect.getdoc(sys.modules[cls.__module__]), inspect.getdoc(cls)) if text
    ]
    own = [(f.name, str(f.type), repr(f.default)) for f in dataclasses.fields(cls) if f.init]
    room = terminal()
    told = text_table(("parameter", "type", "default"), own, room=room)
    parts.append(told if own else "no parameters")
    parts.append(_shared(cls))
    where = "made of" if issubclass(cls, Composite) else "default site"
    parts.append(f"sites         {', '.join(sorted(cls.sites))}\n{where:<14}{places(cls)}")
    if issubclass(cls, Composite):
        parts.append("see `vtc show` of each step for what it reads and what is different")
        return "\n\n".join(parts)
    needs = [(signal, SIGNALS.get(signal, "")) for signal in sorted(cls.needs)]
    parts.append(
        text_table(("signal needed", "what it is"), needs, 76, room)
        if needs
        else "no signals needed"
    )
    return "\n\n".join(parts)


def _shared(cls: Any) -> str:
    """What all methods of this kind take."""
    if issubclass(cls, Rewriter):
        return "it writes its own tokens, as many as its parameters say: no keep, merge or mass"
    if issubclass(cls, Denoiser):
        return "it acts in all blocks of a diffusion transformer: no at, keep, merge or mass"
    if issubclass(cls, Selector):
        return "it also takes keep and at; it chooses inside a vision tower, without merge or mass"
    return (
        "every method also takes keep, at or schedule, merge, merge_threshold, mass,\n"
        "positions, scope, seed (methods of several steps know their own sites):\n"
        "see help(vtc.attach) and help(vtc.Step)"
    )


def check(path: Path) -> None:
    """Raise when the tables of this README are not current."""
    text = path.read_text(encoding="utf-8")
    if refreshed(text, str(path)) != text:
        raise VtcError(f"the tables in {path} are not current: run `vtc list --write {path}`.")


def write(path: Path) -> bool:
    """Refresh the tables of this README; True when something changed."""
    old = path.read_text(encoding="utf-8")
    new = refreshed(old, str(path))
    if new != old:
        with writing(path):
            path.write_text(new, encoding="utf-8")
    return new != old


def _line(cells: Sequence[str], width: Sequence[int], right: Sequence[bool]) -> str:
    parts = zip(cells, width, right, strict=True)
    return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in parts).rstrip()


def _number(lines: Sequence[str]) -> bool:
    return len(lines) == 1 and re.fullmatch(r"[-\d][\d.,/%]*|-", lines[0]) is not None


def _code(names: str) -> str:
    return names if names == "none" else ", ".join(f"`{n}`" for n in names.split(", "))


def _link(paper: str) -> str:
    """'Name, venue, https://...' -> a link."""
    text, found, url = paper.partition("https://")
    return f"[{text.rstrip(', ')}](https://{url})" if found and text else paper
