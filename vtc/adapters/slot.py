"""Values that belong to the running forward."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Slot(Generic[T]):
    """A ContextVar: threads and tasks do not mix. torch.compile cannot trace setting one, so while
    it traces the value is a plain attribute, which it resolves inside the graph."""

    def __init__(self, name: str, default: T) -> None:
        self._var: ContextVar[T] = ContextVar(name, default=default)
        self._default = default
        self._traced: T = default

    def get(self) -> T:
        return self._var.get() if self._traced is self._default else self._traced

    def set(self, value: T) -> None:
        if torch.compiler.is_compiling():
            self._traced = value
            return
        self._traced = self._default
        self._var.set(value)


class Memo:
    """Results that many layers of one forward share."""

    def __init__(self) -> None:
        self._memo: dict[Any, tuple[Any, Any]] = {}

    def once(self, key: Any, holds: Any, make: Callable[[], Any]) -> Any:
        """Compute once; `holds` stays referenced, so that its id stays unique."""
        if key not in self._memo:
            self._memo[key] = (holds, make())
        return self._memo[key][1]

    def clear(self) -> None:
        self._memo = {}
