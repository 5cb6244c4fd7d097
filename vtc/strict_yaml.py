"""YAML of recipes, tables and values on a command line: plain data, bounded, no key twice."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import InvalidRecipe

#: bounds of everything that is read: characters, levels, values, digits of a number, of one text
MOST_TEXT = 2**18
MOST_LEVELS = 16
MOST_VALUES = 10_000
MOST_DIGITS = 18
MOST_WORD = 4096
TOO_DEEP = f"more than {MOST_LEVELS} levels of lists and mappings"


class _Loader(yaml.SafeLoader):
    """Bounded, without aliases, tags and keys that are there twice; dates are texts."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._levels = self._values = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Brackets are read far ahead of what is composed."""
        if self.flow_level >= MOST_LEVELS:
            raise _refused(self.get_mark(), TOO_DEEP)
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None):  # that of an alias too
            raise _refused(
                event.start_mark, "anchors and aliases (&, *) are not read: write the value again"
            )
        if getattr(event, "tag", None):
            raise _refused(event.start_mark, "tags (!) are not read: leave them out")
        self._values += 1
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise _refused(event.start_mark, TOO_DEEP)
        if self._values > MOST_VALUES:
            raise _refused(event.start_mark, f"more than {MOST_VALUES:,} values")
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        """Runs before a mapping is built. It would merge keys `<<`."""
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                raise _refused(key.start_mark, "a key is a word, and not <<")
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in lines:
                raise _refused(
                    key.start_mark,
                    f"{shown(name)} is there twice (first in line {lines[name]}): keep one",
                )
            lines[name] = line

    def number(self, node: Any) -> int | float:
        """A number, or an error that says where it is."""
        whole = node.tag.endswith(":int")
        if len(node.value) <= MOST_DIGITS or not whole:
            try:
                return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
            except (ValueError, OverflowError):
                pass
        raise _refused(
            node.start_mark,
            f"{shown(node.value)} is no number that can be read (whole numbers have at most "
            f"{MOST_DIGITS} digits)",
        )


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)


class _Refused(yaml.MarkedYAMLError):
    """What is YAML, but not read here."""


def _refused(mark: Any, why: str) -> _Refused:
    return _Refused(problem=why, problem_mark=mark)


def read(source: str | Path, name: str) -> Any:
    """What YAML text, or a file, stands for: mappings, lists, texts, numbers, booleans and None.

    name: what errors call it.

    Raises:
        InvalidRecipe: in one line, with the line of the text: it cannot be read, is no YAML, has
            more than 256 KB, 16 levels or 10,000 values, anchors, tags, or a key twice.
    """
    text = source if isinstance(source, str) else _text(source, name)
    if len(text) > MOST_TEXT:
        raise InvalidRecipe(f"{name} has more than {MOST_TEXT:,} characters, which is the most.")
    loader = None
    try:
        loader = _Loader(text)
        data = loader.get_single_data()
    except _Refused as error:
        mark: Any = error.problem_mark
        raise InvalidRecipe(f"{name}, line {mark.line + 1}: {error.problem}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        why = ", ".join(filter(None, (error.context, error.problem)))
        raise InvalidRecipe(f"{name} is not YAML: {line}{_short(why)}.") from error
    except yaml.YAMLError as error:  # a character that YAML does not have
        raise InvalidRecipe(f"{name} is not YAML: {_short(error)}.") from error
    finally:
        if loader is not None:
            loader.dispose()
    check(data, name)
    return data


def check(data: Any, name: str) -> None:
    """Refuse plain data beyond the bounds of what is read, such as a list that holds itself."""
    left, values = [(data, 1)], 0
    while left:
        value, level = left.pop()
        values += 1
        if level > MOST_LEVELS:
            raise InvalidRecipe(f"{name}: {TOO_DEEP}.")
        if values > MOST_VALUES:
            raise InvalidRecipe(f"{name}: more than {MOST_VALUES:,} values.")
        if isinstance(value, str) and len(value) > MOST_WORD:
            raise InvalidRecipe(
                f"{name}: {shown(value)} is a text of {len(value):,} characters: "
                f"{MOST_WORD:,} are the most."
            )
        if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
            raise InvalidRecipe(f"{name}: a number of more than {MOST_DIGITS} digits.")
        if isinstance(value, Mapping):
            left += [(part, level + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple):
            left += [(part, level + 1) for part in value]


def shown(value: Any) -> str:
    """A value as an error shows it: its beginning and end where it is long."""
    return _SHOWN.repr(value)


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


def _text(path: Path, name: str) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MOST_TEXT + 1)
    except (OSError, ValueError) as error:  # a name with a zero byte, bytes that are no UTF-8
        raise InvalidRecipe(f"cannot read {name}: {_short(error)}") from error


def _short(text: object) -> str:
    """In one line."""
    line = " ".join(str(text).split())
    return line if len(line) < 200 else f"{line[:200]}..."
