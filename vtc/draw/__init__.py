"""Pictures of plans: kept patches stay bright, merged ones take the colour of the token they went
into, dropped ones go dark. The grid comes from the recorded layout, whatever it is.

    with vtc.attach(model, "divprune", keep=0.25, merge="nearest") as session:
        model.generate(**inputs)
    overlay(image, session.trace).save("kept.png")
"""

from .fate import Fate, fates, stage_labels
from .panels import BOX, DARK, DUSK, TINT, UNDER, overlay, token_color
from .prompts import as_seen, prompt_picture, save
from .sheet import Cell, Group, page, sheet
from .text import BACKGROUND, GAP, join

__all__ = [
    "BACKGROUND",
    "BOX",
    "DARK",
    "DUSK",
    "GAP",
    "TINT",
    "UNDER",
    "Cell",
    "Fate",
    "Group",
    "as_seen",
    "fates",
    "join",
    "overlay",
    "page",
    "prompt_picture",
    "save",
    "sheet",
    "stage_labels",
    "token_color",
]
