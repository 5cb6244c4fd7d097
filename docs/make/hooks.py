"""What mkdocs asks while it builds the site: pages made of code, tables, drawings, a last check.

Nothing here is a second catalogue: method cards come from the registry and the docstrings, the
command line from its parser, the other pages from files of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cards
import commands
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from vtc.commands import tables

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent

#: pages that are files of the repository, which live elsewhere
COPIES = {
    "changelog.md": "CHANGELOG.md",
    "kernels.md": "kernels/README.md",
    "zoo.md": "model_zoo/README.md",
}
#: guides in the order of the menu; others follow by name
GUIDES = (
    "web-demo",
    "plots",
    "loyalty-and-tune",
    "evaluation-harnesses",
    "new-method",
    "plugins",
    "adapters",
)
#: what a browser fetches by itself when it opens a page
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|link|video|audio)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*"
)
#: what a style sheet fetches, and where a page has styles of its own
STYLED = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^\s\"')]*", re.I)
STYLES = re.compile(r"<style\b[^>]*>.*?</style>|\bstyle=(?:\"[^\"]*\"|'[^']*')", re.I | re.S)


def on_config(config: Any) -> Any:
    """Fill the two parts of the menu that follow from what there is."""
    for entry in config["nav"]:
        if "Methods" in entry:
            entry["Methods"] = [{"All methods": "methods/index.md"}, *cards.menu()]
        elif "Guides" in entry:
            entry["Guides"] = guides()
    return config


def guides() -> list[str]:
    """Pages of docs/guides, in the order of the menu."""
    names = sorted(path.stem for path in (DOCS / "guides").glob("*.md"))
    names.sort(key=lambda name: GUIDES.index(name) if name in GUIDES else len(GUIDES))
    return [f"guides/{name}.md" for name in names]


def links_to_guides() -> str:
    """A list of all guides, by their titles."""
    return "\n".join(f"- [{title(DOCS / page)}]({page})" for page in guides())


def title(path: Path) -> str:
    """The first heading of a page."""
    return path.read_text("utf-8").partition("\n")[0].lstrip("# ")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file of docs/ holds."""
    pages = {**cards.pages(), "cli.md": commands.page()}
    pages |= {name: (ROOT / path).read_text("utf-8") for name, path in COPIES.items()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the tables of `vtc list`, and the guides, where a page asks for them."""
    for families in (False, True):
        mark = "<!-- vtc list --families -->" if families else "<!-- vtc list -->"
        if mark in markdown:
            markdown = markdown.replace(mark, tables.listing(families, markdown=True))
    return markdown.replace("<!-- guides -->", links_to_guides())


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Write drawings into the page itself, where they follow its colours."""

    def inline(match: re.Match[str]) -> str:
        return (DOCS / "images" / match["name"]).read_text("utf-8")

    return re.sub(r'<img [^>]*src="[^"]*images/(?P<name>[\w-]+\.svg)"[^>]*>', inline, html)


def on_post_build(config: Any) -> None:
    """The site has to work without a network."""
    files = Path(config["site_dir"]).rglob("*")
    for path in sorted(path for path in files if path.suffix in (".html", ".css")):
        found = fetched(path)
        if found:
            raise PluginError(f"{path.name} fetches something from elsewhere: {found}")


def fetched(path: Path) -> str | None:
    """The first thing that a browser would fetch from elsewhere for a page or a style sheet."""
    text = path.read_text("utf-8")
    if path.suffix == ".css":
        found = STYLED.search(text)
    else:
        found = FETCHED.search(text) or STYLED.search(" ".join(STYLES.findall(text)))
    return found[0] if found else None
