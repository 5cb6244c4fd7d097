"""What loyalty is measured on: the user's own pictures or videos, and prompts about them."""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..bench.options import at_least
from ..commands.leftout import LeftOut
from ..errors import InvalidInput, InvalidQuestions, VtcError
from ..video.cli import frames

if TYPE_CHECKING:
    from ..video.questions import Question

Kind = Literal["image", "video"]
ENDINGS: dict[str, frozenset[str]] = {
    "image": frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}),
    "video": frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}),
}
PROMPT = "Describe the {kind} in detail."
#: bytes at either end of a file that tell it from others
ENDS = 1 << 20


@dataclass(frozen=True)
class Item:
    """A picture or a video and a prompt about it; `question`: the line it came from, if any."""

    media: Path
    kind: Kind
    prompt: str
    question: Question | None = None

    def right(self, said: str) -> bool | None:
        """Whether an answer is the one the file gives; None where it gives none."""
        return None if self.question is None else self.question.right(said)


# ---------------------------------------------------------------------- options


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that measure loyalty: the model and what it is asked."""
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="zoo name, folder or hub id")
    add("--images", type=Path, nargs="+", default=[], metavar="PATH", help="files or folders")
    add("--videos", type=Path, nargs="+", default=[], metavar="PATH", help="files or folders")
    add("--prompt", action="append", default=[], metavar="TEXT", help="asked about every image and "
        f"video; more than once if need be (default: {PROMPT.format(kind='image')!r})")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="more of them, one a line")
    add("--questions", type=Path, metavar="JSONL", help="instead: lines such as "
        '{"image": "a.png", "question": "..."}, paths from the one folder of --images or --videos, '
        "or from the file's own")  # fmt: skip
    add("--limit", type=at_least(1), metavar="N", help="the first N items only")
    add(
        "--frames",
        type=frames,
        default="8",
        metavar="F",
        help="of videos, as for `vtc videoqa` (%(default)s)",
    )
    add("--max-new-tokens", type=at_least(1), default=32, metavar="N", help="of the dense answers, "
        "which are compared up to there (%(default)s)")  # fmt: skip
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="items at once "
        "(%(default)s)")  # fmt: skip
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the model")
    add("--device", help="default: cuda when there is one, else cpu")
    add("--trust-remote-code", action="store_true", help="run code of the model repo")


def given(args: argparse.Namespace, left_out: LeftOut | None = None) -> list[Item]:
    """The items that the options name; lines that cannot be used are left out."""
    prompts = list(args.prompt)
    if not all(map(str.strip, prompts)):
        raise InvalidQuestions("--prompt is blank: give a text, or leave it out.")
    if args.prompts is not None:
        lines = list(filter(None, map(str.strip, _text(args.prompts).splitlines())))
        if not lines:
            raise InvalidQuestions(f"{str(args.prompts)!r} holds no prompt: write one a line.")
        prompts += lines
    if args.questions is None:
        found = asked(args.images, "image", prompts) + asked(args.videos, "video", prompts)
    elif prompts:
        raise InvalidQuestions("--questions says what is asked: leave out --prompt and --prompts.")
    else:
        found = read_questions(args.questions, [*args.images, *args.videos], left_out)
    if not found:
        raise InvalidQuestions("nothing to ask about: give --images, --videos or --questions.")
    return found[: args.limit]


def asked(paths: Iterable[Path], kind: Kind, prompts: Sequence[str] = ()) -> list[Item]:
    """Every prompt about every file of these files and folders."""
    texts = list(prompts) or [PROMPT.format(kind=kind)]
    return [Item(path, kind, text) for path in _files(paths, kind) for text in texts]


def _files(paths: Iterable[Path], kind: Kind) -> list[Path]:
    out: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS[kind])
            if not inside:
                endings = ", ".join(sorted(ENDINGS[kind]))
                raise InvalidQuestions(f"no {kind} in {path}: looked for files with {endings}.")
            out += inside
        elif path.is_file():
            out.append(path)
        else:
            raise InvalidQuestions(f"no such {kind}: {path}")
    first: dict[Path, Path] = {}
    for path in out:
        first.setdefault(path.resolve(), path)
    return list(first.values())


def read_questions(
    path: Path, folders: Sequence[Path] = (), left_out: LeftOut | None = None
) -> list[Item]:
    """Items of a JSONL file, as `vtc videoqa` reads them, with `image` or `video` in a line. Lines
    that cannot be used are left out."""
    from ..video import questions

    if len(folders) > 1 or not all(folder.is_dir() for folder in folders):
        raise InvalidQuestions("--questions takes one folder, of --images or of --videos.")
    base = folders[0] if folders else path.parent
    out, bad = [], []
    for number, row in questions.rows(path):
        line = _line(row, base)
        if isinstance(line, Item):
            out.append(line)
        else:
            bad.append((f"{path}, line {number}", line))
    if bad and not out:
        raise InvalidQuestions(
            f"no question that can be asked: {': '.join(bad[0])}. Write one JSON object a line, "
            f'such as {{"image": "a.png", "question": "what is this ?"}}, with "image" or "video".'
        )
    for name, why in bad:
        (LeftOut() if left_out is None else left_out).add(name, why)
    return out


def _line(row: Any, base: Path) -> Item | str:
    """The item of a line, or what is wrong with it."""
    from ..video import questions

    if isinstance(row, questions.Fault):
        return str(row)
    if not isinstance(row, dict):
        return f"a JSON object was expected, not {questions.shown(row)}"
    kind: Kind = "image" if "image" in row else "video"
    if not {"image", *questions.FIELDS["video"]} & set(row):
        return "'image' or 'video' is missing: name a file"
    row = {**row, "video": row["image"]} if kind == "image" else row
    other = {"video": "v", "question": "q"}  # a file without any good line would be refused
    [line, _] = questions.read_questions([row, other]).lines
    if isinstance(line, questions.BadLine):
        why = line.error.partition("line 1: ")[2]
        if kind == "image":  # it was read as one about a video
            why = why.replace("'video' or 'video_path' is", "'image' is").replace(
                "leaves the folder of videos", "leaves the folder of images"
            )
            why = f"image {why.removeprefix('video ')}" if why.startswith("video ") else why
        return why
    file = base / line.video
    return Item(file, kind, line.prompt, line) if file.is_file() else f"no such {kind}: {file}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidQuestions(f"cannot read {str(path)!r}: {error}") from error


# ---------------------------------------------------------------------- batches


def batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Runs of at most `size` items in their order, pictures and videos apart."""
    out: list[list[Item]] = []
    for item in items:
        if not out or len(out[-1]) == size or out[-1][0].kind != item.kind:
            out.append([])
        out[-1].append(item)
    return out


def split(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Items to choose on, in random order, and items held out; no picture is in both, under
    whatever names its copies are given. The first ones are about as many pictures as there are.

    share: least share of the items that is held out.
    """
    groups: dict[bytes, list[Item]] = {}
    for item, content in zip(items, contents(items), strict=True):
        groups.setdefault(content, []).append(item)
    if share and len(groups) < 2:
        raise InvalidInput(
            "there is only one picture or video, so none can be held out. Give more, or "
            "--holdout 0 to choose and report on the same ones."
        )
    files = list(groups)
    random.Random(seed).shuffle(files)
    held: list[list[Item]] = []
    while sum(map(len, held)) < share * len(items) and len(files) > 1:
        held.append(groups[files.pop()])
    return _dealt([groups[file] for file in files]), _dealt(held)


def _dealt(groups: Sequence[Sequence[Item]]) -> list[Item]:
    """One item of every group, then a second one of those that have it, and so on."""
    rounds = zip_longest(*groups)
    return [item for some in rounds for item in some if item is not None]


def contents(items: Sequence[Item]) -> list[bytes]:
    """The same bytes for items about the same picture or video. Of long files the ends are read."""
    known: dict[Path, bytes] = {}
    for item in items:
        if item.media not in known:
            known[item.media] = _ends(item.media)
    return [known[item.media] for item in items]


def fingerprint(items: Sequence[Item]) -> str:
    """Changes when a file, a prompt or the order changes. Of long files the ends are read."""
    whole = hashlib.sha256()
    for item, content in zip(items, contents(items), strict=True):
        for part in (str(item.media).encode(), content, item.prompt.encode()):
            whole.update(b"%d %s" % (len(part), part))
    return whole.hexdigest()[:16]


def readable(items: Sequence[Item], left_out: LeftOut) -> list[Item]:
    """Those whose files can be read; known before any work. The others are left out."""
    from .. import video
    from ..commands.loading import BadInput, open_image

    bad: dict[Path, str] = {}
    for path, kind in dict.fromkeys((item.media, item.kind) for item in items):
        try:
            if kind == "image":
                open_image(path)
            else:
                video.probe(path)
        except VtcError as error:
            bad[path] = str(error)
    out = [item for item in items if item.media not in bad]
    if not out:
        raise BadInput(f"none of the {len(bad)} files can be read. The first: {[*bad.values()][0]}")
    for item in items:
        if item.media in bad:
            left_out.add(item.media, bad[item.media])
    return out


def _ends(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(ENDS)
            file.seek(max(len(head), size - ENDS))
            return hashlib.sha256(b"%d " % size + head + file.read()).digest()
    except OSError as error:
        raise InvalidInput(f"cannot read {str(path)!r}: {error}") from error


# ---------------------------------------------------------------------- inputs of the model


def encode(
    model: Any, processor: Any, items: Sequence[Item], sampling: Any = "8"
) -> dict[str, Any]:
    """Arguments of `generate` for items of one kind, padded on the left."""
    from ..commands.loading import open_image, prompted

    texts = [prompted(processor, item.prompt, item.kind) for item in items]
    try:
        if items[0].kind == "image":
            alone = {} if len(items) == 1 else {"padding": True, "padding_side": "left"}
            pictures = [[open_image(item.media)] for item in items]
            made = processor(images=pictures, text=texts, return_tensors="pt", **alone)
        else:
            made = _videos(model, processor, items, texts, sampling)
    except VtcError:
        raise  # it says what is wrong, with one item as with many
    except (ValueError, RuntimeError) as error:
        if len(items) == 1:
            raise InvalidInput(
                f"{type(processor).__name__} cannot read this {items[0].kind}: {error}"
            ) from error
        raise InvalidInput(
            f"{type(processor).__name__} cannot put {len(items)} of these {items[0].kind}s into "
            f"one batch: {error}. Use --batch-size 1."
        ) from error
    return dict(made.to(model.device, model.dtype))


def _videos(
    model: Any, processor: Any, items: Sequence[Item], texts: Sequence[str], sampling: Any
) -> Any:
    """Videos are processed one by one, with the times of their frames, and put together."""
    from transformers import BatchFeature

    from .. import video
    from ..video.answer import joined, pad_token
    from ..video.prompts import SEQUENCES, padded, processed

    made = [
        processed(processor, text, video.read(item.media, sampling))
        for text, item in zip(texts, items, strict=True)
    ]
    words = [{key: one[key] for key in SEQUENCES if key in one} for one in made]
    rest = [{key: value for key, value in one.items() if key not in SEQUENCES} for one in made]
    return BatchFeature({**padded(words, pad_token(model, processor)), **joined(rest)})
