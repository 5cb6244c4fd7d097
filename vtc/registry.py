"""Registries of methods and adapters. A method joins by being a file in vtc/methods, or by an
entry point of the group "vtc.reducers" in somebody else's package."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import VtcError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> class. The first look-up imports the built-in package, then the entry points."""

    def __init__(self, kind: str, package: str, group: str | None = None) -> None:
        self.kind, self._package, self._group = kind, package, group
        self._items: dict[str, T] = {}
        self._loaded = False

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator: register under `name` (lower case, digits, underscores)."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise VtcError(f"{self.kind} name {name!r}: use lower-case letters, digits and '_'.")

        def decorator(item: T) -> T:
            old = self._items.get(name)
            if old is not None and old is not item:
                raise VtcError(
                    f"{self.kind} {name!r} is registered twice: by {_module(old)} and by "
                    f"{_module(item)}. Rename one of them."
                )
            self._items[name] = item
            return item

        return decorator

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{info.name}")
        for entry in entry_points(group=self._group) if self._group else ():
            self.add(entry.name)(entry.load())

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._items:
            raise unknown(self.kind, name, self._items, " Run `vtc list` for a table.")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._items))

    def __len__(self) -> int:
        self._load()
        return len(self._items)


def _module(item: Any) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', item)}"


REDUCERS: Registry[Any] = Registry("method", "vtc.methods", "vtc.reducers")
ADAPTERS: Registry[Any] = Registry("adapter", "vtc.adapters")


def register(name: str) -> Callable[[type], type]:
    """Class decorator: register a method and set its `name`."""

    def decorator(cls: type) -> type:
        cls.name = name  # type: ignore[attr-defined]
        return REDUCERS.add(name)(cls)

    return decorator
