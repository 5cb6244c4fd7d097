"""What happens at a click: plain functions from what the page holds to what it shows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from ..errors import InvalidInput, VtcError
from . import answers, diffusion, media, page
from .models import ANSWERERS, DRAWERS, Models, check_answers
from .offer import Choice, Offer

log = logging.getLogger(__name__)

UNTIL, NOISE = "dit.5", 0.5  # at first, where a method takes them


def _told(job: Callable[[], Any]) -> tuple[Any, str]:
    """The result and "", or None and what went wrong, in words."""
    try:
        return job(), ""
    except VtcError as error:
        return None, str(error)
    except Exception as error:  # of a model or a library: the page says so, the log says where
        log.exception("a request failed")
        first = (str(error).strip().splitlines() or ["no more is known"])[0]
        return None, f"{type(error).__name__}: {first}"


def _message(text: str) -> Any:
    """What went wrong, in its place; nothing hides it."""
    return gr.update(value=page.error(text) if text else "", visible=bool(text))


# ---------------------------------------------------------------------- what is offered


def _sites(choice: Choice) -> Any:
    """Of a method: where it goes by itself first."""
    own = [(f"{choice.usual} (default)", "")] if choice.usual else []
    listed = [*own, *((site, site) for site in choice.sites)]
    first = "dit.1" if "dit.1" in choice.sites else listed[0][1]
    return gr.update(choices=listed, value=first, interactive=len(listed) > 1)


def _budget(choice: Choice) -> tuple[Any, Any]:
    """Slider and check box: whether a share can be given, and whether it can be left out."""
    slider = gr.update(interactive=choice.share)
    return slider, gr.update(value=not choice.share, interactive=choice.share and choice.own)


def of_method(offer: Offer, method: str) -> tuple[Any, ...]:
    """Updates of site, share, check box."""
    choice = offer.choices[method]
    return (_sites(choice), *_budget(choice))


def shown_method(offer: Offer, method: str) -> tuple[str, Any]:
    """The method to show, that one if it fits, and the update of its list."""
    names = list(offer.choices)
    if not names:
        raise InvalidInput("no method fits this model.")
    shown = method if method in names else names[0]
    return shown, gr.update(choices=names, value=shown, info=offer.choices[shown].about)


def phases(choice: Choice, at: str) -> tuple[Any, Any]:
    """Of a method of the digits at a site: until which block, and from which noise on; without
    effect where the method takes neither."""
    spans = bool(choice.sites) and not at.endswith(".attn")  # there tokens are back at once
    until = gr.update(value=UNTIL if spans else "", interactive=spans)
    noisy = bool(choice.sites)
    return until, gr.update(value=NOISE if noisy else 0, interactive=noisy)


class Desk:
    """What happens at a click. Nothing is kept between two of them but the models.

    What only changes the page asks for `known` models, so that nobody's run keeps others waiting.
    """

    def __init__(self, models: Models) -> None:
        self.models = models

    def offer(self, name: Any) -> Offer:
        return self.models.known(name).offer

    def model(self, name: Any, method: Any) -> tuple[Any, ...]:
        """Another model that answers: method, site, share, check box, reasons, message."""

        def job() -> tuple[Any, ...]:
            check_answers(name)
            return self._model(name, method)[1]

        found, wrong = _told(job)
        return found or (*(gr.skip() for _ in range(5)), _message(wrong))

    def drawer(self, name: Any, method: Any) -> tuple[Any, ...]:
        """Another model that draws: as `model`, then until and noise."""

        def job() -> tuple[Any, ...]:
            choice, found = self._model(name, method)
            return (*found, *phases(choice, _sites(choice)["value"]))

        found, wrong = _told(job)
        return found or (*(gr.skip() for _ in range(5)), _message(wrong), gr.skip(), gr.skip())

    def _model(self, name: Any, method: Any) -> tuple[Choice, tuple[Any, ...]]:
        offer = self.offer(name)
        shown, update = shown_method(offer, str(method))
        found = (update, *of_method(offer, shown), page.reasons(offer), _message(""))
        return offer.choices[shown], found

    def method(self, name: Any, method: Any) -> tuple[Any, ...]:
        """Another method: its line, site, share, check box, message."""
        found, wrong = _told(lambda: self._method(name, method)[1])
        return found or (*(gr.skip() for _ in range(4)), _message(wrong))

    def drawing_method(self, name: Any, method: Any) -> tuple[Any, ...]:
        """Another method of the digits: as `method`, then until and noise."""

        def job() -> tuple[Any, ...]:
            choice, found = self._method(name, method)
            return (*found, *phases(choice, _sites(choice)["value"]))

        found, wrong = _told(job)
        return found or (*(gr.skip() for _ in range(4)), _message(wrong), gr.skip(), gr.skip())

    def _method(self, name: Any, method: Any) -> tuple[Choice, tuple[Any, ...]]:
        choice = answers.chosen(self.models.known(name), method)
        about = gr.update(info=choice.about)
        return choice, (about, _sites(choice), *_budget(choice), _message(""))

    def drawing_site(self, name: Any, method: Any, at: Any) -> tuple[Any, ...]:
        """Another site of a method of the digits: message, until."""

        def job() -> tuple[Any, ...]:
            choice = answers.chosen(self.models.known(name), method)
            return _message(""), phases(choice, str(at or ""))[0]

        found, wrong = _told(job)
        return found or (_message(wrong), gr.skip())

    def pick(self, model: Any, event: gr.EventData) -> tuple[Any, ...]:
        """An example: its name, the examples, preview, question, model, upload, message."""
        found, wrong = _told(lambda: _example(event._data.get("name")))
        if found is None:
            return (*(gr.skip() for _ in range(6)), _message(wrong))
        if model in ANSWERERS:  # one that knows this kind
            video = found.clip is not None
            model = ANSWERERS[1] if video and model == ANSWERERS[0] else model
            model = model if video else ANSWERERS[0]
        asked = [question for question, _ in found.answers]
        return (
            found.name,
            page.thumbs(media.examples(), found.name),
            page.preview(found),
            gr.update(choices=asked, value=asked[0]),
            model,
            None,
            _message(""),
        )

    def upload(self, data: bytes | None, frames: Any) -> tuple[Any, ...]:
        """A file: no example's name, the examples, preview, message."""
        if data is None:
            return (*(gr.skip() for _ in range(3)), _message(""))
        found, wrong = _told(lambda: media.read(data, frames=frames, wait=False))
        shown = page.error(wrong) if found is None else page.preview(found)
        return "", page.thumbs(media.examples(), ""), shown, _message("")

    def run(
        self,
        picked: str,
        data: bytes | None,
        question: Any,
        name: Any,
        method: Any,
        at: Any,
        share: Any,
        own: bool,
        merge: bool,
        mass: Any,
        frames: Any,
        words: Any,
    ) -> tuple[Any, ...]:
        """Both answers: cards, slider, pictures, stages."""

        def job() -> tuple[answers.Comparison, str | None]:
            check_answers(name)
            keep = None if own else share / 100
            ask = answers.Ask(question, method, at or "", keep, bool(merge), mass, words)
            about = _example(picked) if picked or data is None else media.read(data, frames=frames)
            with self.models.using(name) as loaded:
                found = answers.compare(loaded, about, ask)
            return found, dict(about.answers).get(question)

        done, wrong = _told(job)
        if done is None:
            return page.error(wrong), gr.update(visible=False), "", ""
        found, right = done
        last = len(found.pictures) - 1
        slider = gr.update(visible=last > 0, maximum=max(1, last), value=last)
        return page.cards(found, right), slider, page.pictures(found), page.stages(found)

    def sketch(
        self,
        name: Any,
        method: Any,
        at: Any,
        share: Any,
        own: bool,
        until: Any,
        noise: Any,
        steps: Any,
        seed: Any,
    ) -> str:
        """Digits of both."""

        def job() -> diffusion.Pair:
            keep = None if own else share / 100
            wish = diffusion.Sketch(method, at or "", until or "", keep, noise, steps, seed)
            if name not in DRAWERS:
                raise InvalidInput(f"{name!r} draws no digits. These do: {', '.join(DRAWERS)}.")
            with self.models.using(name) as loaded:
                return diffusion.sketch(loaded, wish)

        found, wrong = _told(job)
        return page.error(wrong) if found is None else page.pair(found)


def _example(name: object) -> media.Media:
    found = media.examples().get(str(name))
    if found is None:
        raise InvalidInput(f"there is no example {name!r}: {', '.join(media.examples())}.")
    return found
