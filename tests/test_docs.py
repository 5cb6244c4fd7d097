"""The documentation: the code of its pages runs, cards are whole, drawings are current."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mkdocs.exceptions import PluginError
from support import pages

import vtc
from vtc.commands import tables
from vtc.registry import ADAPTERS

ROOT = pages.ROOT
sys.path.append(str(ROOT / "docs" / "make"))
import cards  # noqa: E402
import commands  # noqa: E402
import hooks  # noqa: E402
import pictures  # noqa: E402


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with what the examples read; what they register is forgotten afterwards."""
    for name in ("demos", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert len(vtc.REDUCERS) and len(ADAPTERS)  # loaded now, so that the snapshot is whole
    kept = [(r, dict(r._items)) for r in (vtc.REDUCERS, ADAPTERS)]
    yield
    for registry, items in kept:
        registry._items.clear()
        registry._items.update(items)


@pytest.mark.parametrize("name", pages.pages())
def test_the_code_of_a_page_runs(name: str, reader: None) -> None:
    pages.run(name)


def test_the_report_in_getting_started_is_a_real_one(reader: None):
    text = (ROOT / "docs" / "start.md").read_text("utf-8")
    until_shown = text.partition("```text\n")[0]
    seen: dict[str, Any] = {}
    for block in pages.blocks(until_shown):
        exec(block.code, seen)
    shown = text.partition("```text\n")[2].partition("```")[0]

    def timeless(report: str) -> str:  # the last number of the first site is milliseconds
        return re.sub(r"(%\s+)\d+\.\d+\n", r"\1-\n", re.sub(r" +", " ", report.strip() + "\n"))

    assert timeless(shown) == timeless(seen["session"].report())


def test_blocks_are_found_with_what_is_said_above_them():
    text = "a\n```python\nx = 1\n```\n<!-- alone -->\n```python\nf(x)\n```\n```bash\nls\n```\n"
    text += "<!-- not run: needs a GPU -->\n```python\ny = 2\n```\n"
    found = [(b.code, b.note, b.line) for b in pages.blocks(text)]
    assert found == [
        ("x = 1\n", "", 2),
        ("f(x)\n", "alone", 6),
        ("y = 2\n", "not run: needs a GPU", 13),
    ]


def test_few_blocks_are_not_run():
    notes = [b.note for n in pages.pages() for b in pages.blocks((ROOT / n).read_text("utf-8"))]
    skipped = [note for note in notes if note.startswith("not run")]
    assert len(skipped) <= len(notes) / 5, skipped


def test_every_fence_of_python_is_seen():
    for name in pages.pages():
        text = (ROOT / name).read_text("utf-8")
        assert text.count("```python") == len(list(pages.blocks(text))), name


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    links += re.findall(r'src="([^"]+)"', text)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", list(vtc.REDUCERS))
def test_a_method_says_when_to_use_it_and_what_it_costs(name: str) -> None:
    module = sys.modules[vtc.REDUCERS[name].__module__]
    if not module.__name__.startswith("vtc.methods."):
        pytest.skip("a method of another package")
    title, told = cards.fields(module.__doc__ or "")
    assert title.endswith(".") and "\n" not in title
    assert len(told["use"]) > 30 and told["cost"]


@pytest.mark.parametrize("name", list(vtc.REDUCERS))
def test_parameters_on_a_card_have_a_meaning(name: str) -> None:
    table = cards.parameters(vtc.REDUCERS[name]).splitlines()[2:]
    assert [row for row in table if row.rstrip(" |").endswith("`")] == []


def test_a_card_tells_what_the_docstring_says():
    said = {"a": {"fastv": "at decoder.1"}, "b": {"fastv": "no: x"}}
    page = cards.card("fastv", {"Models": said})
    for part in (
        "# fastv\n",
        "## How it decides\n\nChen et al.",
        "<https://arxiv.org/abs/2403.06764>. Score",
        "## When to use it\n\nWhen the question",
        "| `pool` | `Literal['mean', 'max']` | `'mean'` | how heads are combined",
        "- Default: decoder.2",
        "- Reads `attn_last`: \\[R, H, N\\] attention of the last prompt token",
        "- Models, 1 of 2: a.\n    - not b: x.",
        "## What differs from the paper\n\nDiffers from the released code: scores come",
        "| fastv (decoder.2) | 99.8 | 98.6 |",
        "| random (projector) | 85.4 |",
    ):
        assert part in page, part
    assert "divprune (projector)" not in page  # rows of other methods stay where they are
    assert "LangDC" not in cards.numbers("pooled")
    beside = cards.numbers("mustdrop")
    assert "| mustdrop_merge alone |" not in beside
    assert "| random at the same decoder layers |" in beside
    assert "| random at the same decoder layers |" not in cards.numbers("zoo_prune")


def test_plain_text_is_no_markup():
    said = cards.plain("a_j * b_k of `x[i]` <tail> (https://a.org/x_y). [R, N]")
    assert said == r"a\_j \* b\_k of `x[i]` &lt;tail&gt; (<https://a.org/x_y>). \[R, N\]"


def test_every_adapter_is_in_its_guide():
    guide = (ROOT / "docs" / "guides" / "adapters.md").read_text("utf-8")
    assert [name for name in ADAPTERS if f"| `{name}` |" not in guide] == []


def test_the_number_of_families_is_current():
    tested = [f for f in tables.FAMILIES if f.status != tables.REFUSED]
    page = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert f"{len(tested)} families tested" in page


def test_every_command_is_on_its_page():
    from vtc.commands import cli

    words = list(commands.commands(cli._parser()))
    assert {(), ("run",), ("zoo", "list"), *(("bench", b) for b in cli.BENCHES)} <= set(words)
    assert all(
        f"| {code} | {meaning} |\n" in commands.page() for code, meaning in cli.CODES.items()
    )
    said = commands.help_of(("bench", "quality"))
    assert said.startswith("usage: vtc bench quality") and "--json" in said


def test_what_a_browser_would_fetch_is_found():
    inside = '<a href="https://arxiv.org">x</a><script src="assets/a.js"></script>'
    assert hooks.FETCHED.search(inside) is None
    for outside in (
        '<script async src="https://cdn.org/a.js">',
        "<link rel=stylesheet href=//fonts.org/a.css>",
        "<img alt='a' src='http://a.org/b.png'>",
    ):
        assert hooks.FETCHED.search(outside)


def test_what_styles_would_fetch_is_found(tmp_path: Path):
    for name, text, said in (
        ("in.css", 'a { src: url("data:x;http://w3.org") } @import "b.css"', None),
        ("far.css", 'a { src: url( "https://fonts.org/a.woff2") }', "https://fonts.org/a.woff2"),
        ("bare.css", "a { src: URL(//fonts.org/a.woff2) }", "//fonts.org/a.woff2"),
        ("more.css", "@import 'http://fonts.org/b.css';", "http://fonts.org/b.css"),
        ("told.html", "<code>url(https://a.org/b)</code>", None),
        ("own.html", "<style>\n@import url(https://a.org/b);</style>", "https://a.org/b"),
        ("one.html", '<p style="background: url(//a.org/b.png)">', "//a.org/b.png"),
    ):
        (tmp_path / name).write_text(text, "utf-8")
        found = hooks.fetched(tmp_path / name)
        assert found is None if said is None else found and found.endswith(said), name
    with pytest.raises(PluginError, match=r"bare.css fetches something from elsewhere"):
        hooks.on_post_build({"site_dir": str(tmp_path)})


def test_guides_come_in_the_order_of_the_menu():
    there = {f"guides/{path.name}" for path in (ROOT / "docs" / "guides").glob("*.md")}
    assert set(hooks.guides()) == there
    known = [f"guides/{name}.md" for name in hooks.GUIDES]
    assert [page for page in hooks.guides() if page in known] == [p for p in known if p in there]
    assert "- [Writing a method](guides/new-method.md)" in hooks.links_to_guides()


@pytest.mark.parametrize("name", pictures.DRAWINGS)
def test_drawings_are_what_the_script_draws(name: str) -> None:
    assert (pictures.IMAGES / f"{name}.svg").read_text("utf-8") == pictures.DRAWINGS[name]()
