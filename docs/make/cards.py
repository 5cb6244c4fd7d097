"""Method cards: one page per registered method, from its docstrings, its fields and what
`vtc.describe` says of small random models; measured numbers from the tables of numbers.md."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import models

from vtc import REDUCERS
from vtc.commands import tables
from vtc.context import SIGNALS
from vtc.reducer import Composite, Denoiser, Host, Selector, summary

DOCS = Path(__file__).parent.parent
#: pages that hold measured tables, and where their text is
MEASURED = {"numbers.md": DOCS / "numbers.md", "zoo.md": DOCS.parent / "model_zoo" / "README.md"}
#: rows that stand beside every method
BARS = re.compile(r"^(dense|random|grid)\b")

#: title of a group -> the page that shows how to use it
GROUPS = {
    "Images in language models": "vlm",
    "Videos": "video",
    "Image encoders": "encoders",
    "Diffusion transformers": "diffusion",
    "Baselines": "vlm",
}
#: paragraphs of a docstring by how they begin
FIELDS = {"When to use:": "use", "Cost:": "cost", "Differs": "differs"}


def group(cls: Any) -> str:
    """Where a method stands in the menu."""
    if "baseline" in cls.paper:
        return "Baselines"
    if cls.sites == {"dit"}:
        return "Diffusion transformers"
    if cls.frames or issubclass(cls, Selector):
        return "Videos"
    return "Image encoders" if cls.sites == {"vision"} else "Images in language models"


def menu() -> list[dict[str, list[str]]]:
    """The methods of every group."""
    found: dict[str, list[str]] = {title: [] for title in GROUPS}
    for name in REDUCERS:
        found[group(REDUCERS[name])].append(f"methods/{name}.md")
    return [{title: names} for title, names in found.items()]


def pages() -> dict[str, str]:
    """File name -> text of every card, and of the page that lists them."""
    support = models.support()
    cards = {f"methods/{name}.md": card(name, support) for name in REDUCERS}
    return {"methods/index.md": overview(), **cards}


def overview() -> str:
    """The page in front of the cards."""
    parts = [
        "# Methods\n",
        "A method decides which tokens stay; everything else (positions, masks, caches, budgets, "
        "`merge`, `mass`) is the same for all. Each has a card: what it does, when to use it, what "
        "it costs, what differs from its paper, and what we measured beside `random` and `grid`.\n",
        "A step of a larger method has a card of its own. `vtc show NAME` prints most of it in "
        "a terminal. No method wins everywhere: measure on your own data.\n",
    ]
    for entry in menu():
        for title, names in entry.items():
            parts.append(f"## {title}\n\n| method | keeps | default site | signals it needs |")
            parts.append("|---|---|---|---|")
            parts += [_row(REDUCERS[Path(name).stem]) for name in names]
            parts.append("")
    return "\n".join(parts)


def _row(cls: Any) -> str:
    keeps = re.sub(r"^Keeps\b,? ", "", summary(cls)).rstrip(".")
    needs = ", ".join(f"`{n}`" for n in sorted(cls.needs)) or "none"
    cells = (f"[`{cls.name}`]({cls.name}.md)", plain(keeps), plain(tables.places(cls)), needs)
    return f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------------- one card


def card(name: str, support: dict[str, dict[str, str]]) -> str:
    """All about one method. `support`: kind of models -> model -> what `describe` says of it."""
    cls = REDUCERS[name]
    title, told = fields(inspect.getdoc(sys.modules[cls.__module__]) or "")
    parts = [f"# {name}", f"**{plain(title)}**", plain(summary(cls))]
    parts += [f"## How it decides\n\n{markdown(told['rule'])}"] if told["rule"] else []
    for key, heading in (("use", "When to use it"), ("cost", "Cost")):
        parts += [f"## {heading}\n\n{markdown(told[key])}"] if told[key] else []
    page = "diffusion" if cls.sites == {"dit"} else GROUPS[group(cls)]
    parts.append(f"How to attach it: [{title_of(page)}](../use/{page}.md). {_more(cls)}")
    shared = plain(tables._shared(cls))
    parts.append(f"## Parameters\n\n{parameters(cls)}\n\n{shared[:1].upper()}{shared[1:]}.")
    parts.append(f"## Where it works\n\n{places(cls)}\n\n{families(name, support)}")
    if told["differs"]:
        parts.append(f"## What differs from the paper\n\n{markdown(told['differs'])}")
    parts.append(f"## Our numbers\n\n{numbers(name)}")
    return "\n\n".join(parts) + "\n"


def title_of(page: str) -> str:
    """The heading of a page of docs/use."""
    return (DOCS / "use" / f"{page}.md").read_text("utf-8").partition("\n")[0].lstrip("# ").lower()


def fields(doc: str) -> tuple[str, dict[str, str]]:
    """First sentence of a module's docstring, and its paragraphs by kind."""
    title, _, rest = doc.partition("\n\n")
    told = {"rule": [], "use": [], "cost": [], "differs": []}
    for paragraph in rest.split("\n\n"):
        start = next((s for s in FIELDS if paragraph.startswith(s)), None)
        text = paragraph
        if start in ("When to use:", "Cost:"):
            text = paragraph[len(start) :].strip()
            text = text[:1].upper() + text[1:]
        told[FIELDS[start] if start else "rule"].append(text)
    return " ".join(title.split()), {key: "\n\n".join(parts) for key, parts in told.items()}


def _more(cls: Any) -> str:
    """Its steps, or the methods that it is a step of."""
    links = ", ".join(f"[`{name}`]({name}.md)" for name in _relatives(cls))
    if not links:
        return ""
    if issubclass(cls, Composite):
        return f"Made of {links}; their cards say what they read and what is different."
    return f"A step of {links}."


def _relatives(cls: Any) -> list[str]:
    return _steps(cls) or [name for name in REDUCERS if cls.name in _steps(REDUCERS[name])]


def _steps(cls: Any) -> list[str]:
    if not issubclass(cls, Composite):
        return []
    return list(dict.fromkeys(part.method for part in cls().parts(Host(32), None)))


def parameters(cls: Any) -> str:
    """A table of the method's own parameters."""
    said = arguments(cls)
    rows = [
        (
            f"`{f.name}`",
            f"`{f.type}`".replace(" | ", " or "),
            f"`{f.default!r}`",
            plain(said.get(f.name, "")),
        )
        for f in dataclasses.fields(cls)
        if f.init
    ]
    if not rows:
        return "None of its own."
    return tables.markdown_table(("parameter", "type", "default", "meaning"), rows)


def arguments(cls: Any) -> dict[str, str]:
    """Parameter -> what the `Args:` of the class, or of those it comes from, say."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, block = (inspect.cleandoc(base.__doc__ or "")).partition("Args:\n")
        block = block.partition("\n\n")[0]
        for names, text in re.findall(r"^    (\w[^:\n]*): ((?:.|\n(?!    \w))*)", block, re.M):
            for part in f"{names}: {text}".split("; `"):  # "a: ...; `b`: ..." in one entry
                name, _, meaning = part.replace("`", "").partition(": ")
                out |= dict.fromkeys(re.split(r", ", name), " ".join(meaning.split()))
    return out


def places(cls: Any) -> str:
    """Sites, default, signals, budgets."""
    sites = ", ".join(f"`{site}`" for site in sorted(cls.sites))
    lines = [f"- Sites: {sites}", f"- Default: {plain(tables.places(cls))}"]
    if not issubclass(cls, Composite | Denoiser):
        budgets = {"auto": '`keep="auto"`', "fixed": "`keep=0.25`, `keep=64`"}
        lines.append(f"- Budgets: {', '.join(budgets[b] for b in sorted(cls.budgets))}")
    lines += [f"- Reads `{signal}`: {plain(SIGNALS[signal])}" for signal in sorted(cls.needs)]
    if cls.trained:
        lines.append("- Brings weights that have to be trained; without them it is a stand-in.")
    return "\n".join(lines)


def families(name: str, support: dict[str, dict[str, str]]) -> str:
    """On which of our small random models `vtc.describe` offers the method, and why not."""
    lines = ["`vtc.describe` of small random instances says, kind by kind:", ""]
    for kind, found in support.items():
        answers = {model: said[name] for model, said in found.items()}
        runs = [m for m, said in answers.items() if not said.startswith("no:")]
        if not runs:
            lines.append(f"- {kind}: no.")
            continue
        which = "all" if len(runs) == len(answers) else f"{len(runs)} of {len(answers)}"
        line = f"- {kind}, {which}: {', '.join(runs)}."
        lines.append(line)
        left: dict[str, list[str]] = {}
        for model, said in answers.items():
            if model not in runs:
                left.setdefault(said.removeprefix("no: ").rstrip("."), []).append(model)
        lines += [f"    - not {', '.join(names)}: {plain(why)}." for why, names in left.items()]
    return "\n".join(lines)


# ---------------------------------------------------------------------- measured rows


def numbers(name: str) -> str:
    """Rows of the measured tables about this method, beside `random` and `grid`."""
    found = []
    for page, path in MEASURED.items():
        for title, table in measured(path.read_text("utf-8")):
            rows = _beside(table[2:], name)
            if any(_about(row, name) for row in rows):
                body = "\n".join([*table[:2], *rows])
                found.append(f"From [{title}](../{page}#{slug(title)}):\n\n{body}")
    if not found:
        beside = "".join(f", [{n}]({n}.md#our-numbers)" for n in _relatives(REDUCERS[name]))
        return f"None of this method alone; see [all numbers](../numbers.md){beside}."
    warn = "Sanity benchmarks on small models: ranks may differ at scale, "
    warn += "and rows of a table are not always equal in cost. Read the notes beside the tables."
    return "\n\n".join([warn, *found])


def _beside(rows: list[str], name: str) -> list[str]:
    """The rows of a method and its bars, in their order. "random at the same layers" belongs to
    the method above it."""
    out, last = [], ""
    for row in rows:
        bar = BARS.match(_first(row)) is not None
        last = last if bar else row
        if _about(row, name) or (bar and ("same" not in _first(row) or _about(last, name))):
            out.append(row)
    return out


def measured(text: str) -> list[tuple[str, list[str]]]:
    """(heading above, lines) of every table of a page."""
    out, title, table = [], "", list[str]()
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            title = line.lstrip("# ").strip()
        if line.startswith("|"):
            table.append(line)
        elif table:
            out.append((title, table))
            table = []
    return out


def _first(row: str) -> str:
    return row.split("|")[1].strip().lower().replace("-", "_")


def _about(row: str, name: str) -> bool:
    return bool(row) and re.match(rf"{name}\b", _first(row)) is not None


# ---------------------------------------------------------------------- text


def slug(title: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    from markdown.extensions.toc import slugify

    return slugify(title.replace("`", ""), "-")


def markdown(text: str) -> str:
    """Paragraphs of a docstring; lines that begin with a dash are a list."""
    out = []
    for paragraph in text.split("\n\n"):
        lead, *items = re.split(r"\n- ", paragraph)
        bullets = "\n".join(f"- {plain(item)}" for item in items)
        out.append(plain(lead) + (f"\n\n{bullets}" if items else ""))
    return "\n\n".join(out)


def plain(text: str) -> str:
    """Plain text as Markdown: what would be markup is escaped, code in backquotes stays, addresses
    become links."""
    parts = re.split(r"(`[^`]+`|https?://[^\s;,)]+[^\s;,.)])", " ".join(text.split()))
    for i, part in enumerate(parts):
        if part.startswith("http"):
            parts[i] = f"<{part}>"
        elif not part.startswith("`"):
            part = part.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            parts[i] = re.sub(r"([\\*_\[\]#])", r"\\\1", part.replace("|", "&#124;"))
    return "".join(parts)
