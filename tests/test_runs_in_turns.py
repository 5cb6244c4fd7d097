"""Pictures that one diffusion model denoises in turns, by methods that keep something from step to
step: never mixed, with and without names."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import InvalidInput
from vtc.testing import dits

TIMES = (1.0, 0.75, 0.5, 0.25)
PLAIN: dict[str, Any] = {"steps": 0, "interval": 4, "share": 0.25}
METHODS: dict[str, dict[str, Any]] = {
    "toca": PLAIN,
    "duca": PLAIN,
    "scheduled_cache": {"table": [[1.0] * 4, *[[0.25] * 4] * 3]},
}
over_methods = pytest.mark.parametrize("method", METHODS)


class Picture:
    """One run of a plain sampler."""

    def __init__(self, model: Any, family: str, seed: int, prompt: int | None = None) -> None:
        self.model, self.given = model, dits.inputs(family, batch=1, seed=seed)
        if prompt is not None:
            self.given |= {
                k: v
                for k, v in dits.inputs(family, batch=1, seed=prompt).items()
                if k == "encoder_hidden_states"
            }
        self.out: list[Tensor] = []

    def step(self, time: float) -> None:
        given = self.given | {"timestep": torch.full((1,), 1000 * time)}
        with torch.no_grad():
            made = dits.call(self.model, given)
        self.out.append(made)
        x = self.given["hidden_states"]
        self.given["hidden_states"] = x - 0.15 * made[:, : x.shape[1]]

    def run(self, times: Iterable[float] = TIMES) -> list[Tensor]:
        for time in times:
            self.step(time)
        return self.out


def alone(model: Any, method: str, family: str, seed: int, prompt: int | None) -> list[Tensor]:
    with vtc.attach(model, method, **METHODS[method]):
        return Picture(model, family, seed, prompt).run()


@over_methods
@pytest.mark.parametrize("prompt", [None, 7])
def test_named_runs_in_turns_equal_runs_alone(method: str, prompt: int | None) -> None:
    """With prompts of their own, and with one for all."""
    model = dits.make("pixart")
    want = {seed: alone(model, method, "pixart", seed, prompt) for seed in (1, 2)}
    pictures = {seed: Picture(model, "pixart", seed, prompt) for seed in (1, 2)}
    with vtc.attach(model, method, **METHODS[method]) as session:
        for time in TIMES:
            for name, picture in pictures.items():
                with session.stream(name):
                    picture.step(time)
        used = session.stats()
    for seed, picture in pictures.items():
        assert all(map(torch.equal, picture.out, want[seed]))
    assert used["flops"] < 0.9 * used["flops_dense"]


def test_named_runs_follow_their_name_from_thread_to_thread() -> None:
    model = dits.make("pixart")
    want = alone(model, "toca", "pixart", 1, None)
    picture = Picture(model, "pixart", 1)
    with vtc.attach(model, "toca", **PLAIN) as session:

        def job(time: float) -> None:
            with session.stream("a"):
                picture.step(time)

        for time in TIMES:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(job, time).result()
    assert all(map(torch.equal, picture.out, want))


def test_runs_with_prompts_of_their_own_need_no_names() -> None:
    model = dits.make("pixart")
    want = {seed: alone(model, "toca", "pixart", seed, None) for seed in (1, 2)}
    pictures = {seed: Picture(model, "pixart", seed) for seed in (1, 2)}
    with vtc.attach(model, "toca", **PLAIN):
        for time in TIMES:
            for picture in pictures.values():
                picture.step(time)
    for seed, picture in pictures.items():
        assert all(map(torch.equal, picture.out, want[seed]))


def test_runs_with_one_prompt_are_refused() -> None:
    model = dits.make("pixart")
    first, second = (Picture(model, "pixart", seed, 7) for seed in (1, 2))
    with vtc.attach(model, "toca", **PLAIN) as session:
        first.step(1.0)
        second.step(1.0)
        with pytest.raises(InvalidInput, match=r"same prompt.*session\.stream\(name\)"):
            first.step(0.75)
        session.reset()
        third = Picture(model, "pixart", 3, 7).run()
    assert all(map(torch.equal, third, alone(model, "toca", "pixart", 3, 7)))


def test_a_run_that_was_left_does_not_stop_the_next() -> None:
    """The next one goes on with its own images, which are nearer."""
    model = dits.make("pixart")
    want = alone(model, "toca", "pixart", 2, 7)
    with vtc.attach(model, "toca", **PLAIN):
        Picture(model, "pixart", 1, 7).step(1.0)
        got = Picture(model, "pixart", 2, 7).run()
    assert all(map(torch.equal, got, want))


def test_a_run_that_began_later_never_takes_over_what_was_kept() -> None:
    """One prompt: the second begins while the first goes on, whose next call begins anew."""
    model = dits.make("pixart")
    first, second = (Picture(model, "pixart", seed, 7) for seed in (1, 2))
    with vtc.attach(model, "toca", **PLAIN):
        first.run(TIMES[:2])
        second.step(1.0)
        before = first.given | {"timestep": torch.full((1,), 500.0)}
        first.step(0.5)
    with torch.no_grad():
        assert torch.equal(first.out[2], dits.call(model, before))


def test_a_reset_is_about_one_run() -> None:
    model = dits.make("pixart")
    want = alone(model, "toca", "pixart", 1, None)
    first, second = Picture(model, "pixart", 1), Picture(model, "pixart", 2)
    with vtc.attach(model, "toca", **PLAIN) as session:
        for time in TIMES:
            with session.stream("a"):
                first.step(time)
            with session.stream("b"):
                second.step(time)
                session.reset()
    assert all(map(torch.equal, first.out, want))
    assert session.stream_name is None


def test_methods_that_keep_nothing_are_never_refused() -> None:
    model = dits.make("dit")
    pictures = [Picture(model, "dit", seed) for seed in (1, 2)]
    with vtc.attach(model, "tomesd", keep=0.5):
        for time in TIMES:
            for picture in pictures:
                picture.step(time)
    assert len(pictures[0].out) == 4
