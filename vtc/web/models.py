"""The models that requests share: loaded once, bounded in number, never used by two at a time."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..commands import loading
from ..errors import InvalidInput, VtcError
from .offer import Offer, offer_of

#: models of the zoo that answer, and those that draw; the first of each is shown at first
ANSWERERS = ("tiny-llava-shapes", "tiny-llava-video", "tiny-stts-video")
DRAWERS = loading.DRAWERS
LONGEST_NAME = 200
WAITERS = 8  # requests that load a model, or wait until it is loaded


@dataclass(frozen=True)
class Loaded:
    """A model with what turns its input into tensors, and what can be attached to it."""

    name: str
    model: Any
    processor: Any
    offer: Offer

    @property
    def reads_videos(self) -> bool:
        return hasattr(self.processor, "video_token")


def load(name: str) -> Loaded:
    """From the zoo, a folder or the hub. Code of a model's repository is never run."""
    import vtc_zoo

    if name in DRAWERS:
        try:
            model, processor = vtc_zoo.load(name)
        except (ImportError, OSError) as error:
            raise VtcError(f"cannot load {name!r}: {error}") from error
    else:
        model, processor = loading.load_model(
            Namespace(model=name, trust_remote_code=False, device=None)
        )
    return Loaded(name, model, processor, offer_of(model, trained(name)))


def check_answers(name: object) -> None:
    """Refuse models that draw."""
    if isinstance(name, str) and name.strip() in DRAWERS:
        raise InvalidInput(
            f"{name.strip()!r} draws digits and answers no questions: it is in the tab Diffusion. "
            f"These answer: {', '.join(ANSWERERS)}."
        )


def trained(name: str) -> dict[str, dict[str, Any]]:
    """Method -> arguments with the weights that the zoo has for it on this model."""
    import vtc_zoo

    if name == "tiny-flexdit-digits":
        from vtc_zoo import digits

        flexdit = digits.flexdit()
        return {flexdit.pop("method"): flexdit}
    if name == "tiny-llava-video":
        return {"langdc": {"weights": str(vtc_zoo.path("tiny-langdc-video"))}}
    if name == "tiny-stts-video":
        return {"stts": {"weights": str(vtc_zoo.path(name) / "stts.safetensors")}}
    return {}


@dataclass
class _Place:
    """One model, the lock of who runs it and that of who loads it. `users` counts the requests that
    use it or wait for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    loading: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    loaded: Loaded | None = None


class Models:
    """At most `most` models stay loaded; beyond that the one unused longest goes, but none that a
    request uses.

    A session patches its model, so a model serves one request at a time: others wait for its lock.
    Different models run side by side.

    allowed: names that may be loaded; None: any.
    """

    def __init__(
        self,
        most: int = 3,
        allowed: Sequence[str] | None = None,
        load: Callable[[str], Loaded] = load,
    ) -> None:
        self._most, self._allowed, self._load = most, allowed, load
        self._lock, self._waiters = threading.Lock(), threading.Semaphore(WAITERS)
        self._places: OrderedDict[str, _Place] = OrderedDict()

    @contextmanager
    def using(self, name: object) -> Iterator[Loaded]:
        """The model, for this request alone."""
        place = self._enter(self._checked(name))
        try:
            with place.lock:
                yield self._ready(place, str(name).strip())
        finally:
            self._leave(place)

    def known(self, name: object) -> Loaded:
        """The model, to be read and not to be run: whoever runs it is not waited for."""
        place = self._enter(self._checked(name))
        try:
            if place.loaded is not None:
                return place.loaded
            if not self._waiters.acquire(blocking=False):
                raise VtcError(
                    f"{name} is not loaded yet and many wait for models: try again soon."
                )
            try:
                return self._ready(place, str(name).strip())
            finally:
                self._waiters.release()
        finally:
            self._leave(place)

    def _ready(self, place: _Place, name: str) -> Loaded:
        with place.loading:
            if place.loaded is None:
                place.loaded = self._load(name)
            return place.loaded

    def names(self) -> list[str]:
        """What is loaded, the one unused longest first."""
        with self._lock:
            return [name for name, place in self._places.items() if place.loaded is not None]

    def _checked(self, name: object) -> str:
        if not isinstance(name, str) or not name.strip():
            raise InvalidInput("no model is chosen: pick one from the list.")
        name = name.strip()
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise InvalidInput(f"that is no name of a model: at most {LONGEST_NAME} characters.")
        if self._allowed is not None and name not in self._allowed:
            raise InvalidInput(
                f"{name!r} is not offered by this server. It has {', '.join(self._allowed)}; "
                f"whoever runs it can add another with --model."
            )
        return name

    def _enter(self, name: str) -> _Place:
        with self._lock:
            place = self._places.setdefault(name, _Place())
            self._places.move_to_end(name)
            place.users += 1
            self._trim()
            return place

    def _leave(self, place: _Place) -> None:
        with self._lock:
            place.users -= 1
            self._trim()

    def _trim(self) -> None:
        """Forget what failed to load, then what is too much, the one unused longest first."""
        idle = [name for name, place in self._places.items() if not place.users]
        failed = [name for name in idle if self._places[name].loaded is None]
        old = [name for name in idle if name not in failed]
        surplus = max(0, len(self._places) - len(failed) - self._most)
        for name in (*failed, *old[:surplus]):
            del self._places[name]
