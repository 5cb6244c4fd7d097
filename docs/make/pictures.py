"""Draws the pictures of the page of concepts: `python docs/make/pictures.py` writes them again.

Text takes the colour of the page around it, so that the pictures are readable on light and dark
ground; all shares and means are computed here, not written down."""

from __future__ import annotations

from pathlib import Path

IMAGES = Path(__file__).parent.parent / "images"

TEAL, ORANGE, PURPLE, GREY = "#3aa89a", "#e39a57", "#8e6bbf", "#8b949e"
INK = "#0b1f24"  # on teal and orange, whatever the ground
KEPT = (1, 6, 8, 13)  # of sixteen tokens
ROOT = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="100%" role="img" '
    'aria-label="{title}" font-family="sans-serif" '
    'style="max-width:{w}px;color:var(--md-typeset-color,#6e7781)">'
)


class Drawing:
    """Shapes, in the order they are drawn; units are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [ROOT.format(w=width, h=height, title=title), f"<title>{title}</title>"]

    def box(self, x: float, y: float, w: float, h: float, fill: str = "none", faint: float = 1.0):
        edge = ' stroke="currentColor" stroke-opacity=".5"' if fill == "none" else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{fill}" '
            f'fill-opacity="{faint:g}"{edge}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 13,
        anchor: str = "middle",
        color: str = "currentColor",
    ):
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{color}">{words}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str = "currentColor"):
        self.parts.append(
            f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{color}" stroke-width="1.5" '
            f'stroke-opacity=".7" fill="none"/>'
        )

    def arrow(self, x: float, y: float, length: float = 22):
        """To the right, from (x, y)."""
        self.line(x, y, x + length, y)
        self.line(x + length - 5, y - 4, x + length, y)
        self.line(x + length - 5, y + 4, x + length, y)

    def done(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def sites() -> str:
    """From pixels to the answer, and where tokens can go."""
    d = Drawing(760, 204, "Where tokens can go: in the vision tower, before and in the model")
    for i in range(16):
        d.box(24 + i % 4 * 17, 60 + i // 4 * 17, 15, 15, TEAL, 0.35 + 0.4 * (i in KEPT))
    d.text(57, 50, "patches")
    stages = (
        (130, 150, "vision tower", 4),
        (322, 74, "projector", 1),
        (438, 190, "language model", 5),
        (672, 74, "answer", 1),
    )
    for x, w, name, blocks in stages:
        d.arrow(x - 29, 95)
        for i in range(blocks):
            d.box(x + i * w / blocks, 60, w / blocks - 4, 70)
        d.text(x + w / 2 - 2, 50, name)
    for x, name in ((166, "vision.1"), (408, "projector"), (512, "decoder.2"), (640, "cache")):
        d.line(x, 56, x, 145, ORANGE)
        d.text(x, 162, name)
    d.text(380, 20, "an orange line is a site: a place where a step may drop or merge tokens")
    d.text(380, 192, "in encoders alone: vision.i; in diffusion transformers: dit.i", 12)
    return d.done()


def plan() -> str:
    """A plan that drops, and one that merges."""
    d = Drawing(760, 250, "A plan: which tokens stay, and which go into which")
    taken = [min(range(4), key=lambda j: abs(KEPT[j] - i)) for i in range(16)]
    for x, title in ((10, "dropping"), (400, 'merge="nearest"')):
        merging = x > 10
        d.text(x, 22, title, 14, "start")
        for i in range(16):
            cx = x + i * 21.5
            d.box(cx, 40, 18, 18, TEAL, 0.95 if i in KEPT else 0.25)
            d.text(cx + 9, 53, str(i), 10, color=INK if i in KEPT else "currentColor")
        for j, i in enumerate(KEPT):
            cx = x + 40 + j * 70
            d.box(cx, 140, 30, 30, TEAL, 0.95)
            d.text(cx + 15, 160, str(i), color=INK)
            group = [n for n in range(16) if taken[n] == j] if merging else [i]
            for n in group:
                d.line(x + n * 21.5 + 9, 60, cx + 15, 138, TEAL if n == i else GREY)
            d.text(cx + 15, 190, f"size {len(group)}" if merging else "size 1", 12)
        told = "nothing is lost: size counts what each stands for" if merging else "index: 1 6 8 13"
        d.text(x, 225, told, 12, "start")
    return d.done()


def budgets() -> str:
    """Tokens per layer of a model of 16 layers."""
    d = Drawing(760, 200, "Tokens that each layer processes, for three budgets")
    layers = 16
    shown = (
        ('keep=0.25, at="projector"', [25] * layers),
        ('keep=0.25, at="decoder.2"', [100 if i < 2 else 25 for i in range(layers)]),
        (
            "schedule={2: 0.5, 8: 0.25}",
            [100 if i < 2 else 50 if i < 8 else 25 for i in range(layers)],
        ),
    )
    for n, (title, tokens) in enumerate(shown):
        x = 10 + n * 255
        d.text(x, 20, title, 13, "start")
        for i, share in enumerate(tokens):
            d.box(x + i * 14, 40, 11, 100, GREY, 0.2)
            d.box(x + i * 14, 140 - share, 11, share, TEAL, 0.9)
        d.text(x, 160, "layer 0", 11, "start")
        d.text(x + layers * 14 - 3, 160, f"{layers - 1}", 11, "end")
        mean = sum(tokens) / layers
        d.text(x, 184, f"mean over layers: {mean:.1f} %", 13, "start")
    return d.done()


def mass() -> str:
    """Share of attention that images receive, if all logits were equal."""
    d = Drawing(760, 176, "Attention on 12 image tokens and 4 text tokens, all logits equal")
    shown = (
        ("all 12 image tokens", 12.0),
        ("3 left, mass=0", 3.0),
        ("3 left, mass=1: each counts as 4", 3.0 * 4.0),
    )
    for n, (title, weight) in enumerate(shown):
        y, share = 14 + n * 42, weight / (weight + 4)
        d.text(250, y + 19, title, 13, "end")
        d.box(262, y, 480 * share - 2, 28, TEAL, 0.9)
        d.box(262 + 480 * share, y, 480 * (1 - share), 28, ORANGE, 0.9)
        d.text(262 + 240 * share, y + 19, f"image {share:.0%}", color=INK)
        d.text(502 + 240 * share, y + 19, f"text {1 - share:.0%}", color=INK)
    d.text(262, 160, "attention of one text token, if all logits were equal", 12, "start")
    return d.done()


def positions() -> str:
    """Positions of the tokens that stay."""
    d = Drawing(760, 190, "Kept tokens keep their positions")
    prompt = [*"tt", *"iiiiiiii", *"tt"]
    left = [i for i, kind in enumerate(prompt) if kind == "t" or i in (3, 6, 9)]
    rows = (
        ("dense", range(len(prompt)), None),
        ("kept, positions stay", left, left),
        ('positions="renumber"', left, range(len(left))),
    )
    for n, (title, tokens, numbers) in enumerate(rows):
        y = 16 + n * 52
        d.text(196, y + 20, title, 13, "end")
        for at, i in enumerate(tokens):
            x = 210 + (at if n == 2 else i) * 44
            d.box(x, y, 38, 30, ORANGE if prompt[i] == "t" else TEAL, 0.9)
            d.text(x + 19, y + 20, str(i if numbers is None else list(numbers)[at]), color=INK)
    d.text(210, 182, "teal: image tokens, orange: text; the number is the position", 12, "start")
    return d.done()


def span() -> str:
    """A diffusion transformer: tokens go before one block and come back before another."""
    d = Drawing(760, 220, "In a diffusion transformer all tokens come back")
    heights = [96 if i < 2 or i > 5 else 30 for i in range(8)]
    for i, h in enumerate(heights):
        x = 40 + i * 86
        d.box(x, 40, 66, 110)
        d.box(x + 8, 144 - h, 50, h, TEAL, 0.9)
        d.text(x + 33, 170, f"block {i}", 12)
    for x, words in ((205, 'at="dit.2": keep=0.3'), (549, 'until="dit.6": all are there again')):
        d.line(x, 28, x, 158, ORANGE)
        d.text(x, 20, words)
    d.line(205, 186, 549, 186, PURPLE)
    d.text(377, 206, "a token that was away takes the change of the one that stood for it", 12)
    return d.done()


DRAWINGS = {
    "sites": sites,
    "plan": plan,
    "budgets": budgets,
    "mass": mass,
    "positions": positions,
    "span": span,
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")
