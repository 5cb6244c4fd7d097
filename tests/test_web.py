"""The web page: which methods it offers, what it answers, and that users do not mix."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vtc
from vtc.commands import loading
from vtc.errors import InvalidInput, VtcError
from vtc.web import answers, diffusion, media, page
from vtc.web.desk import Desk
from vtc.web.models import Loaded, Models, load
from vtc.web.offer import Offer

SHAPES, CLIPS = "tiny-llava-shapes", "tiny-llava-video"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


def scene(number: int) -> media.Media:
    return media.examples()[f"scene {number}"]


def asked(about: media.Media, method: str, **more: Any) -> answers.Ask:
    return answers.Ask(about.answers[0][0], method, **({"keep": 0.25} | more))


# ---------------------------------------------------------------------- what is offered


@pytest.mark.parametrize("name", [SHAPES, "tiny-flexdit-digits"])
def test_what_is_offered_attaches_and_what_is_not_does_not(models: Models, name: str):
    with models.using(name) as loaded:
        told = vtc.describe(loaded.model)
        assert {*loaded.offer.choices, *loaded.offer.reasons} >= set(told.methods)
        for choice in loaded.offer.choices.values():
            assert choice.share or choice.own
            places = [*choice.sites[:1], *choice.sites[-1:]]
            ways = [(at, 0.25) for at in places] if choice.share else []
            if choice.usual:
                ways += [("", keep) for keep in [0.25] * choice.share + [None] * choice.own]
            for at, keep in ways:
                given = answers.request(choice, answers.Ask("?", choice.name, at, keep))
                vtc.attach(loaded.model, **given).detach()
            others = sorted(set(told.sites) - set(choice.sites)) if choice.sites else []
            for at in (*others[:1], *others[-1:]):
                with pytest.raises(VtcError):
                    vtc.attach(loaded.model, choice.name, keep=0.25, at=at).detach()


def test_weights_of_the_zoo_are_used_where_there_are_any(models: Models):
    with models.using(CLIPS) as loaded:
        about = media.examples()["clip 1"]
        found = answers.compare(loaded, about, asked(about, "langdc", keep=None))
    assert "untrained" not in found.report
    with models.using(SHAPES) as loaded:
        assert "weights trained for this model" in loaded.offer.reasons["langdc"]
        with pytest.raises(VtcError, match="langdc"):
            answers.compare(loaded, scene(1), asked(scene(1), "langdc", keep=None))


def test_reasons_are_grouped_and_escaped():
    html = page.reasons(Offer({}, {"a": "<b>", "c": "<b>", "d": "other"}))
    assert "<td>a, c</td><td>&lt;b&gt;</td>" in html and html.count("<tr>") == 2


# ---------------------------------------------------------------------- answers


def test_answers_are_those_of_the_library(models: Models):
    """Against a session of our own, without the page."""
    about = scene(3)
    with models.using(SHAPES) as loaded:
        found = answers.compare(loaded, about, asked(about, "pdrop"))
        inputs = loading.encode(loaded.processor, about.answers[0][0], [about.image])
        said = []
        with vtc.attach(loaded.model, "pdrop", keep=0.25) as session:
            said.append(loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False))
        said.append(loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False))
        start = inputs["input_ids"].shape[1]
        text = [loaded.processor.decode(ids[0, start:], skip_special_tokens=True) for ids in said]
    assert [found.compressed, found.dense] == [one.strip() for one in text]
    stats = session.stats()
    assert found.flops == (stats["flops_dense"], stats["flops"])
    assert [(s.site, s.before, s.after) for s in found.stages] == [
        ("decoder.1", 144, 91),
        ("decoder.2", 91, 57),
        ("decoder.3", 57, 36),
    ]
    assert [picture.caption.partition(": ")[0] for picture in found.pictures] == [
        f"stage {number}" for number in range(4)
    ]


def test_a_stage_is_drawn_without_those_behind_it(models: Models):
    """Patches that stay are as bright as the picture, those that are gone are darker."""
    about = scene(1)
    with models.using(SHAPES) as loaded:
        found = answers.compare(loaded, about, asked(about, "pdrop"))
        first = answers.compare(loaded, about, asked(about, "pdrop"))
    whole, *later = (np.asarray(one.image.convert("L"), float) for one in found.pictures)
    cells = [
        one.reshape(12, 35, 12, 35)[:, 12:23, :, 12:23].mean((1, 3)) for one in (whole, *later)
    ]
    left = [int((one > 0.8 * cells[0]).sum()) for one in cells[1:]]
    assert left == [91, 57, 36]
    assert [np.asarray(a.image).tobytes() for a in first.pictures] == [
        np.asarray(b.image).tobytes() for b in found.pictures
    ]


def test_tiles_of_an_image_are_drawn_where_they_were_cut_out(models: Models):
    """The whole picture and one tile, side by side, at every stage."""
    about = scene(3)
    with models.using(CLIPS) as loaded:
        found = answers.compare(loaded, about, asked(about, "pdrop"))
    assert found.undrawn == "" and [one.image.width for one in found.pictures] == [844] * 4
    # a quarter of 288 tokens of the picture; places are counted with its 12 newlines
    assert found.pictures[-1].caption == "stage 3: decoder.3 pdrop: 72 of 300 tokens"


def test_the_cache_shows_means_of_its_layers(models: Models):
    with models.using(SHAPES) as loaded:
        found = answers.compare(loaded, scene(1), asked(scene(1), "mustdrop_cache", keep=None))
        assert found.stages[0].before == 144  # not four layers x 144
        assert "144" in page.stages(found) and "mean of its layers" in page.stages(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": " "}, "there is no question"),
        ({"question": "x" * 1001}, "1001 characters"),
        ({"question": "<image> what ?"}, "stands for the image itself"),
        ({"words": 0}, "give 1 to 256"),
        ({"method": "tomesd"}, "does not fit tiny-llava-shapes: works at dit only"),
        ({"method": "nothing"}, "there is no such method"),
        ({"at": "decoder.2", "method": "visionzip"}, "cannot be put at 'decoder.2'"),
        ({"at": "../../etc"}, "cannot be put at"),
        ({"keep": 0.0}, "a share must be above 0"),
        ({"keep": 4.0}, "a share must be above 0 and at most 1.0"),
        ({"mass": 7.0}, "mass=7.0"),
    ],
)
def test_requests_that_make_no_sense(models: Models, change: dict[str, Any], words: str):
    with models.using(SHAPES) as loaded, pytest.raises(VtcError, match=words):
        answers.compare(loaded, scene(1), replace(asked(scene(1), "divprune"), **change))


def test_a_video_for_a_model_of_images(models: Models):
    about = media.examples()["clip 1"]
    with models.using(SHAPES) as loaded, pytest.raises(VtcError, match="reads no videos. Pick"):
        answers.compare(loaded, about, asked(about, "divprune"))


# ---------------------------------------------------------------------- users side by side


def test_users_at_once_get_what_each_would_get_alone(models: Models):
    """Eight requests with different methods, budgets and pictures, on one model and on another."""
    work = [
        (SHAPES, f"scene {1 + i % 6}", method, keep)
        for i, (method, keep) in enumerate(
            [("divprune", 0.1), ("fastv", 0.5), ("pdrop", 0.25), ("mustdrop", 0.25), ("norm", 0.1)]
        )
    ] + [
        (CLIPS, f"clip {1 + i}", method, 0.1) for i, method in enumerate(["evs", "dycoke", "tome"])
    ]

    def job(one: tuple[str, str, str, float]) -> tuple[Any, ...]:
        name, example, method, keep = one
        about = media.examples()[example]
        with models.using(name) as loaded:
            found = answers.compare(loaded, about, asked(about, method, keep=keep))
        drawn = [np.asarray(picture.image).tobytes() for picture in found.pictures]
        tokens = [(stage.site, stage.before, stage.after) for stage in found.stages]
        return found.dense, found.compressed, found.flops, tokens, drawn

    serial = [job(one) for one in work]
    with ThreadPoolExecutor(len(work)) as pool:
        assert list(pool.map(job, [*work, *work])) == serial * 2


def slow(name: str) -> Loaded:
    return Loaded(name, object(), None, Offer({}, {}))


def test_one_model_serves_one_at_a_time_and_two_models_serve_two():
    models, inside, most = Models(load=slow), [0], [0]
    meet = threading.Barrier(2)

    def alone(_: int) -> None:
        with models.using("a"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.01)
            inside[0] -= 1

    def together(name: str) -> int:
        with models.using(name):
            return meet.wait(10)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(alone, range(6)))
        assert sorted(pool.map(together, "ab")) == [0, 1]  # else the barrier breaks
    assert most == [1]


def test_what_is_offered_is_known_while_the_model_runs_but_not_before_it_is_loaded():
    go = threading.Event()

    def loading(name: str) -> Loaded:
        assert go.wait(30)
        return slow(name)

    models = Models(load=loading)
    with ThreadPoolExecutor(9) as pool:
        waiting = [pool.submit(models.known, "a") for _ in range(9)]
        refused = next(job for job in as_completed(waiting, 30))  # one more than may wait
        with pytest.raises(VtcError, match="try again soon"):
            refused.result()
        go.set()
        assert len({id(job.result(30)) for job in waiting if job is not refused}) == 1
        with models.using("a"):
            assert pool.submit(models.known, "a").result(30).name == "a"


def test_models_are_loaded_once_and_bounded():
    asked_for: list[str] = []

    def loading(name: str) -> Loaded:
        asked_for.append(name)
        return slow(name)

    models = Models(2, load=loading)
    for name in "aab":
        with models.using(name):
            pass
    assert asked_for == ["a", "b"] and models.names() == ["a", "b"]
    with models.using("a"), models.using("c"):  # `a` is in use, so `b` goes
        assert models.names() == ["a", "c"]
    with models.using("a"), models.using("c"), models.using("d"):
        assert models.names() == ["a", "c", "d"]  # all are in use
    assert len(models.names()) == 2 and asked_for == ["a", "b", "c", "d"]


def test_a_model_that_fails_to_load_is_tried_again():
    calls: list[str] = []

    def failing(name: str) -> Loaded:
        calls.append(name)
        if len(calls) == 1:
            raise VtcError("no")
        return slow(name)

    models = Models(load=failing)
    with pytest.raises(VtcError), models.using("a"):
        pass
    assert models.names() == []
    with models.using("a") as loaded:
        assert loaded.name == "a" and len(calls) == 2


def test_a_public_server_loads_what_it_offers_only(tmp_path: Path):
    models = Models(allowed=(SHAPES,), load=slow)
    for name in ("org/model", str(tmp_path), "../" + SHAPES):
        with pytest.raises(InvalidInput, match="not offered by this server"), models.using(name):
            pass
    with models.using(SHAPES) as loaded:
        assert loaded.name == SHAPES
    for name in (None, "", "a" * 300, "a\0b"):
        with pytest.raises(InvalidInput), Models(load=slow).using(name):
            pass


@pytest.mark.parametrize("name", ["tiny-vit-fmnist", "nothing-like-it", "/etc", "a/b"])
def test_models_that_cannot_answer_are_refused_in_words(name: str):
    with pytest.raises(
        VtcError, match="(answers no prompts|unknown model|cannot load|no weights of)"
    ):
        load(name)


# ---------------------------------------------------------------------- digits


def test_tokens_per_step_of_the_digits(models: Models):
    """By hand: 2 of 6 blocks work on 64 tokens and 4 on 16 while the noise is at least a half."""
    with models.using("tiny-dit-digits") as loaded:
        wish = diffusion.Sketch("pooled", "dit.1", "dit.5", 0.25, 0.5, steps=4)
        found = diffusion.sketch(loaded, wish)
    assert found.times == (1.0, 0.75, 0.5, 0.25)
    assert found.dense.tokens == pytest.approx([64] * 4)
    assert found.compressed.tokens == pytest.approx([(2 * 64 + 4 * 16) / 6] * 3 + [64])
    assert found.compressed.gigaflops < found.dense.gigaflops
    heights = [float(part.split('"')[0]) for part in page.chart(found).split('height="')[1:]]
    assert heights == pytest.approx([142.0] * 4 + [71.0] * 3 + [142.0])
    assert page.pair(found).count("<img") == 2


def test_wishes_that_make_no_sense(models: Models):
    for change, words in (
        ({"steps": 51}, "from 1 to 50"),
        ({"seed": -1}, "seed -1"),
        ({"at": "decoder.1"}, "cannot be put at"),
        ({"until": "dit.1"}, "the second behind the first"),
        ({"method": "fastv"}, "does not fit"),
        ({"at": "dit.1.attn", "until": "dit.5"}, "leave until out"),
        ({"method": "toca", "keep": None}, "takes no site"),
        ({"method": "toca", "keep": None, "at": "", "until": "dit.5"}, "no `until`"),
        ({"method": "duca", "keep": None, "at": "", "noise": 0.5}, "no least noise"),
    ):
        wish = replace(diffusion.Sketch("pooled", "dit.1", keep=0.25, steps=2), **change)
        with models.using("tiny-dit-digits") as loaded, pytest.raises(VtcError, match=words):
            diffusion.sketch(loaded, wish)


def test_what_a_method_of_digits_does_not_take_cannot_be_set(models: Models):
    """Until and noise: both, noise alone inside an attention, neither for a cache."""
    desk, name = Desk(models), "tiny-dit-digits"
    wanted = {"pooled": (True, True), "tomesd": (True, True), "toca": (False, False)}
    for method, expected in wanted.items():
        *_, until, noise = desk.drawing_method(name, method)
        assert (until["interactive"], noise["interactive"]) == expected
        assert (bool(until["value"]), bool(noise["value"])) == expected  # what is sent by Run
        *_, until, noise = desk.drawer(name, method)
        assert (until["interactive"], noise["interactive"]) == expected
    _, until = desk.drawing_site(name, "tomesd", "dit.1.attn")
    assert until["interactive"] is False and until["value"] == ""
    assert "is in the tab Diffusion" in str(desk.model(name, "divprune")[-1])


def test_mustdrop_on_a_video_is_drawn_from_the_tower_on(models: Models):
    """A newline comes behind the tokens that the tower leaves."""
    about = media.examples()["clip 1"]
    with models.using(CLIPS) as loaded:
        found = answers.compare(loaded, about, asked(about, "mustdrop"))
    drawn = [one.caption.partition(": ")[2] for one in found.pictures[1:]]
    assert [text.split()[0] for text in drawn] == [
        one.site for one in found.stages if one.site != "cache"
    ]
    assert drawn[0] == "vision.1 mustdrop_merge: 128 of 288 tokens"
    assert drawn[-1].endswith(": 72 of 288 tokens")
