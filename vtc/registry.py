"""Registries of methods and adapters. A method joins by being a file in vtc/methods, or by an
entry point of the group "vtc.reducers" in somebody else's package."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .context import PARTS, SIGNALS, Site
from .errors import PluginWarning, UnknownName, VtcError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> class. The first look-up imports the built-in package, then the entry points."""

    def __init__(
        self,
        kind: str,
        package: str,
        group: str | None = None,
        flaw: Callable[[str, Any], str | None] | None = None,
    ) -> None:
        self.kind, self._package, self._group, self._flaw = kind, package, group, flaw
        self._items: dict[str, T] = {}
        self._loaded = self._loading = False
        self._lock = threading.RLock()
        #: name -> the package that brought it, such as "their-package 1.2"
        self.packages: dict[str, str] = {}
        #: name of an entry point that was left out -> package and reason
        self.broken: dict[str, str] = {}

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
        """Once; other threads wait for it. What the imports themselves look up is there so far."""
        if self._loaded:
            return
        with self._lock:
            if self._loaded or self._loading:
                return
            self._loading = True
            try:
                self._import()
                self._loaded = True
            except BaseException:  # the next look-up tries again, modules that failed among them
                there = self._items.items()
                self._items = {n: item for n, item in there if item.__module__ in sys.modules}
                raise
            finally:
                self._loading = False
        for reason in self.broken.values():  # at the end: a filter may turn warnings into errors
            warnings.warn(f"{reason} It is left out.", PluginWarning, stacklevel=2)

    def _import(self) -> None:
        package = importlib.import_module(self._package)
        for info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{info.name}")
        for entry in entry_points(group=self._group) if self._group else ():
            self._plug_in(entry)

    def _plug_in(self, entry: EntryPoint) -> None:
        """Add what an entry point names, or note why it is left out."""
        dist, before = getattr(entry, "dist", None), dict(self._items)
        package = "a package" if dist is None else f"{dist.name} {dist.version}"
        try:
            item: Any = entry.load()
            flaw = self._flaw(entry.name, item) if self._flaw else None
            if flaw is not None:
                raise VtcError(f"{_module(item)} {flaw}")
            self.add(entry.name)(item)
        except Exception as error:  # whatever somebody else's import raises
            self._items = before
            why = str(error) if isinstance(error, VtcError) else f"{type(error).__name__}: {error}"
            named = f"{self.kind} {entry.name!r} of {package} ({entry.value})"
            self.broken[entry.name] = f"{named} cannot be used: {why.rstrip('.')}."
            return
        if not vars(item).get("name"):  # not decorated
            item.name = entry.name
        self.packages[entry.name] = package

    def unknown(self, name: str) -> UnknownName:
        """The error for a name that is not registered, or was left out."""
        if name in self.broken:
            return UnknownName(self.broken[name])
        return unknown(self.kind, name, self._items, " Run `vtc list` for a table.")

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._items:
            raise self.unknown(name)
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


def flaw(name: str, cls: Any) -> str | None:
    """What is wrong with a class as the method `name`, in words that follow its own name."""
    from .reducer import Method  # not before a plug-in is there

    if not isinstance(cls, type) or not issubclass(cls, Method):
        return "is no class that inherits from vtc.Method (vtc.Scorer is one)."
    if not dataclasses.is_dataclass(cls):
        return "is no dataclass: write @dataclass(frozen=True) above it."
    own = vars(cls).get("name") or name
    if own != name:
        return f"is registered as {own!r}, its entry point says {name!r}: use one name."
    missing = dataclasses.MISSING
    for f in dataclasses.fields(cls):
        if f.init and f.default is missing and f.default_factory is missing:
            return f"needs a default for its parameter {f.name!r}."
    for what, given, known in (
        ("sites", cls.sites, ("projector", "cache", *PARTS)),
        ("needs", cls.needs, tuple(SIGNALS)),
        ("budgets", cls.budgets, ("fixed", "auto")),
    ):
        if not isinstance(given, frozenset) or not given <= set(known):
            return f"has {what}={given!r}: give a frozenset of {', '.join(known)}."
    if not cls.sites or not cls.budgets:
        return "has no sites or no budgets: say where it works."
    if Site.parse(cls.default_at).kind not in cls.sites:
        return f"has default_at={cls.default_at!r}, which is none of its sites."
    return None


REDUCERS: Registry[Any] = Registry("method", "vtc.methods", "vtc.reducers", flaw)
ADAPTERS: Registry[Any] = Registry("adapter", "vtc.adapters")


def register(name: str) -> Callable[[type], type]:
    """Class decorator: register a method and set its `name`."""

    def decorator(cls: type) -> type:
        cls.name = name  # type: ignore[attr-defined]
        return REDUCERS.add(name)(cls)

    return decorator
