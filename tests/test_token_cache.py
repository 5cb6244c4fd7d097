"""Token-wise feature caching: steps in between against a model whose attention and MLP outputs are
replaced by plain hooks, schedules computed by hand."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc.adapters.dit.costs import Work
from vtc.adapters.dit.running import RunningBlock
from vtc.algorithms.token_cache import PRESETS, Choice, Kept, raised
from vtc.context import Layout
from vtc.errors import (
    InvalidBudget,
    InvalidInput,
    InvalidRecipe,
    UnsupportedModel,
    UnsupportedSite,
    VtcError,
)
from vtc.reducer import Moment
from vtc.testing import ditref, dits
from vtc.testing.threads import in_threads

TOLERANCE = 1e-4
FAMILIES = list(dits.FAMILIES)
#: families whose attention can be asked what it gives to each token
TELLING = ("dit", "pixart", "latte", "original")
TIMES = (0.9, 0.85, 0.8, 0.75, 0.7)
GRID = (12, 8)  # of latents: 6 x 4 tokens
TEXT = ditref.TEXT
over_families = pytest.mark.parametrize("family", FAMILIES)

#: a quarter of the tokens at every step that is not whole; by the noise, 4 steps make a cycle
PLAIN: dict[str, Any] = {
    "steps": 0,
    "share": 0.25,
    "step_weight": 0.0,
    "layer_weight": 0.0,
    "mlp_weight": 1.0,
    "single_weight": 1.0,
}


def run(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return dits.call(model, given)


def step_of(family: str, i: int, time: float, **options: Any) -> dict[str, Any]:
    """Step i of a run: its prompt, and images that are not far from those of the steps around."""
    given, other = (dits.inputs(family, time=time, seed=s, **options) for s in (0, i))
    name = "x" if family == "original" else "hidden_states"
    return given | {name: given[name] + (0.3 * other[name] if i else 0.0)}


def steps(model: Any, family: str, times: Any = TIMES, **options: Any) -> list[Tensor]:
    """One run of a sampler; the images of each step are other ones."""
    return [run(model, step_of(family, i, t, **options)) for i, t in enumerate(times)]


def score(family: str) -> dict[str, Any]:
    return {"score": "attention" if family in TELLING else "value"}


def mlp(block: Any) -> Any:
    names = [n for n in ("ff", "ffn", "mlp", "proj_mlp") if hasattr(block, n)]
    return getattr(block, names[0])


def linears(block: Any) -> list[nn.Module]:
    return [m for m in block.modules() if isinstance(m, nn.Linear)]


# ---------------------------------------------------------------------- the reference


@dataclass
class Reference:
    """Hooks on a model that no session touches, call by call."""

    model: Any
    family: str
    share: float = 0.25
    bonus: float = 0.5
    attention: dict[int, Any] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    base: dict[int, Tensor] = field(default_factory=dict)
    last: dict[int, Tensor] = field(default_factory=dict)
    call: int = -1

    def step(self, given: dict[str, Any], whole: bool) -> Tensor:
        self.call += 1
        handles = []
        for i, block in enumerate(ditref.blocks(self.model)):
            front = TEXT if hasattr(block, "proj_mlp") else 0
            for module, hook in ((ditref.attention(block), self._attend), (mlp(block), self._feed)):
                handles.append(
                    module.register_forward_hook(
                        self._bound(hook, i, front, whole), with_kwargs=True
                    )
                )
        try:
            return run(self.model, given)
        finally:
            for handle in handles:
                handle.remove()

    def _bound(self, hook: Any, i: int, front: int, whole: bool) -> Any:
        return lambda module, args, kwargs, out: hook(
            i, front, whole, module, args[0] if args else kwargs["hidden_states"], out
        )

    def _attend(self, i: int, front: int, whole: bool, module: Any, x: Tensor, out: Any) -> Any:
        if not whole:
            return self.attention[i]
        self.attention[i] = out
        x = x[:, front:]
        if self.family in TELLING:
            told = self._weights(module, x).mean(1).sum(1)  # columns of the mean over heads
        elif hasattr(module, "to_v"):
            told = module.to_v(x).unflatten(-1, (2, 16)).norm(dim=-1).sum(-1)
        self.base[i] = told / told.square().sum(1, keepdim=True).sqrt()
        return out

    @staticmethod
    def _weights(module: Any, x: Tensor) -> Tensor:
        if hasattr(module, "qkv"):
            q, k, _ = module.qkv(x).chunk(3, -1)
        else:
            q, k = module.to_q(x), module.to_k(x)
        q, k = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k))
        return (q @ k.transpose(2, 3) / 4).softmax(-1)

    def _feed(self, i: int, front: int, whole: bool, module: Any, x: Tensor, out: Tensor) -> Any:
        own = out[:, front:]
        if whole:
            self.last[i] = torch.full(own.shape[:2], self.call)
        else:
            total = self.base[i] + 0.25 * (self.call - self.last[i]) / 3
            keep = torch.zeros(own.shape[:2], dtype=torch.bool)
            for row, each in enumerate(total):
                best = self._raise(each).topk(int(self.share * own.shape[1])).indices
                keep[row, best] = True
            own = torch.where(keep[..., None], own, self.mlp[i])
            self.last[i] = torch.where(keep, self.call, self.last[i])
        self.mlp[i] = own
        return torch.cat([out[:, :front], own], 1)

    def _raise(self, score: Tensor) -> Tensor:
        """Cells of 4 x 4 on frames of 6 x 4 tokens: the lower ones are cut."""
        grid = score.unflatten(0, (-1, 6, 4)).clone()
        for frame, top in itertools.product(grid, (0, 4)):
            cell = frame[top : top + 4]
            place = divmod(int(cell.argmax()), 4)
            cell[place] = cell[place] * (1 + self.bonus)
        return grid.flatten()


@over_families
def test_steps_equal_a_model_with_replaced_outputs(family: str) -> None:
    """Whole, three in between, whole again, as four steps make a cycle at this noise."""
    model, options = dits.make(family), {**PLAIN, **score(family), "bonus": 0.5, "cell": 4}
    dense = steps(model, family, shape=GRID)
    reference = Reference(model, family)
    want = [
        reference.step(step_of(family, i, t, shape=GRID), i in (0, 4)) for i, t in enumerate(TIMES)
    ]
    with vtc.attach(model, "toca", **options) as session:
        got = steps(model, family, shape=GRID)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
    assert torch.equal(got[0], dense[0]) and torch.equal(got[4], dense[4])
    assert (got[2] - dense[2]).abs().max() > 10 * TOLERANCE
    assert session.stats()["sites"][0]["runs"] == 5


@over_families
@pytest.mark.parametrize("method", ["toca", "duca", "scheduled_cache"])
def test_an_interval_of_one_changes_nothing(family: str, method: str) -> None:
    model = dits.make(family)
    dense = steps(model, family, TIMES[:3])
    options: dict[str, Any] = {"interval": 1, "steps": 0}
    if method == "scheduled_cache":
        options = {"table": [[1.0] * 4] * 3}
    with vtc.attach(model, method, **score(family), **options):
        got = steps(model, family, TIMES[:3])
    assert all(map(torch.equal, got, dense))


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_runs_begin_anew(family: str) -> None:
    """Twice the same run, once after a batch of another size came into the first."""
    model, options = dits.make(family), {**PLAIN, **score(family)}
    with vtc.attach(model, "toca", **options):
        first = steps(model, family)
        assert all(map(torch.equal, steps(model, family), first))
        steps(model, family, TIMES[:2])
        other = step_of(family, 2, TIMES[2], batch=3)
        middle = run(model, other)
        assert all(map(torch.equal, steps(model, family), first))
    assert torch.equal(middle, run(model, other))


@pytest.mark.parametrize("method", ["toca", "duca"])
def test_prompts_called_one_by_one_do_not_mix(method: str) -> None:
    """Guidance that calls the model twice per step equals two runs."""
    model = dits.make("pixart")

    def given(time: float, seed: int) -> dict[str, Any]:
        made = dits.inputs("pixart", time=time, seed=seed)
        return made | {
            "hidden_states": dits.inputs("pixart", seed=round(100 * time))["hidden_states"]
        }

    with vtc.attach(model, method, **PLAIN) as session:
        alone = [[run(model, given(t, seed)) for t in TIMES] for seed in (1, 2)]
        both = [[run(model, given(t, seed)) for seed in (1, 2)] for t in TIMES]
    for step, (one, other) in enumerate(both):
        assert torch.equal(one, alone[0][step]) and torch.equal(other, alone[1][step])
    assert session.stats()["sites"][0]["runs"] == 20


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_runs_that_were_left(family: str) -> None:
    """Behind their first step or inside it: a run from the same noise is another one."""
    model, options = dits.make(family), {**PLAIN, **score(family)}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with vtc.attach(model, "duca", **options):
        want = steps(model, family)
        given = dits.inputs(family, time=TIMES[0], seed=9)
        run(model, step_of(family, 0, TIMES[0]) | {"hidden_states": given["hidden_states"]})
        assert all(map(torch.equal, steps(model, family), want))
        handle = ditref.blocks(model)[2].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            steps(model, family)
        handle.remove()
        assert all(map(torch.equal, steps(model, family), want))


def test_samplers_of_second_order_take_two_steps_at_a_noise() -> None:
    """Heun: once at the first noise, twice at the others, which is no new run."""
    model, times = dits.make("dit"), (0.9, 0.85, 0.85, 0.8, 0.8)
    with vtc.attach(model, "scheduled_cache", table=[[1.0] * 4, *[[0.25] * 4] * 4]) as session:
        first = steps(model, "dit", times)
        assert session.stats()["flops"] < 0.7 * session.stats()["flops_dense"]
        assert all(map(torch.equal, steps(model, "dit", times), first))


def test_a_sampler_that_shifts_its_steps_to_the_noise_is_counted_right() -> None:
    model, n = dits.make("sd3"), 8
    shifted = [5 * u / (1 + 4 * u) for u in (1 - i / n for i in range(n))]
    with vtc.attach(model, "toca", **PLAIN | {"steps": n}, score="value") as session:
        steps(model, "sd3", shifted)
    assert session.stats()["sites"][0]["runs"] == n


def test_skipped_layers_are_refused() -> None:
    model, given = dits.make("sd3"), dits.inputs("sd3") | {"skip_layers": [1]}
    session = vtc.attach(model, "toca", score="value", strict=False)
    with session, pytest.raises(UnsupportedModel, match="skip_guidance_layers"):
        run(model, given)


def test_threads_do_not_mix() -> None:
    model = dits.make("dit")

    def job(batch: int) -> Callable[[], list[Tensor]]:
        return lambda: steps(model, "dit", batch=batch)

    with vtc.attach(model, "duca", **PLAIN):
        alone = [job(batch)() for batch in (1, 2)]
        together = in_threads([job(1), job(2)])
    for got, want in zip(together, alone, strict=True):
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("family", ["original", "flux"])
def test_nothing_is_left_behind(family: str) -> None:
    model = dits.make(family)
    dense, before = steps(model, family), [set(vars(m)) for m in model.modules()]
    session = vtc.attach(model, "duca", **PLAIN)
    steps(model, family)
    assert sum(type(thing) is Kept for thing in gc.get_objects()) == 4
    session.detach()
    gc.collect()
    assert not any(type(thing) is Kept for thing in gc.get_objects())
    assert [set(vars(m)) for m in model.modules()] == before
    assert all(map(torch.equal, steps(model, family), dense))


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_bfloat16(family: str) -> None:
    model = dits.make(family).to(torch.bfloat16)

    def given(i: int) -> dict[str, Any]:
        made = step_of(family, i, TIMES[i])
        return {k: v.bfloat16() if v.is_floating_point() else v for k, v in made.items()}

    with vtc.attach(model, "toca", **PLAIN, **score(family)):
        got = [run(model, given(i)) for i in range(3)]
    assert all(x.dtype == torch.bfloat16 and bool(x.isfinite().all()) for x in got)


@pytest.mark.parametrize("family", ["original", "flux"])
def test_gradients_follow_what_is_kept(family: str) -> None:
    """Of a step in between, into the images of the whole step before: as far as a small change of
    them changes it. What no block of that step computed has none."""
    model = dits.make(family).double().requires_grad_(False)
    first, second = (step_of(family, i, t) for i, t in enumerate(TIMES[:2]))
    name = "x" if family == "original" else "hidden_states"

    def double(given: dict[str, Any]) -> dict[str, Any]:
        return {k: v.double() if v.is_floating_point() else v for k, v in given.items()}

    def last(images: Tensor) -> Tensor:
        with vtc.attach(model, "toca", **PLAIN, **score(family)):
            dits.call(model, double(first) | {name: images})
            return dits.call(model, double(second)).square().mean()

    images = double(first)[name].requires_grad_()
    (gradient,) = torch.autograd.grad(last(images), images)
    step = 1e-3 * gradient / gradient.norm()  # Flux's norms are float32: less is rounding
    with torch.no_grad():
        slope = (last(images + step) - last(images - step)) / 2e-3
    assert float(gradient.norm()) > 1e-6
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_draws_are_their_own() -> None:
    model, table = dits.make("dit"), [[1.0] * 4, [0.5] * 4, [0.5] * 4]
    torch.manual_seed(5)
    state, out = torch.get_rng_state(), {}
    for seed in (0, 0, 1):
        with vtc.attach(model, "scheduled_cache", table=table, score="random", seed=seed):
            got = steps(model, "dit", TIMES[:3])
        if seed in out:
            assert all(map(torch.equal, got, out[seed]))
        out[seed] = got
    assert not torch.equal(out[0][1], out[1][1])
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- schedules


def moment(call: int, steps: int, state: dict[Any, Any], noise: float | None = None) -> Moment:
    noise = (steps - 1 - call) / steps if noise is None else noise
    return Moment(noise, noise, call, Layout(1, 4, 4), 28, 0, state)


def whole_steps(method: Any, steps: int) -> list[int]:
    """Of steps counted down, those where all blocks run."""
    kinds = enumerate(kinds_of_steps(method, steps))
    return [steps - 1 - call for call, kind in kinds if kind == "WW"]


def kinds_of_steps(method: Any, steps: int) -> list[str]:
    """What the first block and the others do at each call: W whole, p some tokens, s nothing."""
    state: dict[Any, Any] = {}
    found = []
    for call in range(steps):
        passage = method.start(None, moment(call, steps, state))
        found.append(
            "".join(
                "s" if passage.skips(i) else "W" if passage.share(Place(i)) is None else "p"
                for i in (0, 1)
            )
        )
    return found


def test_whole_steps_of_the_papers_presets() -> None:
    """By hand. A whole step s sets the interval. 50 steps: 3 / (1.4 - 0.8 s / 50) rounds
    to 5 for s >= 46, to 4 down to 34, to 3 down to 20; 2 for 10 <= s < 20, and 2 is what it rounds
    to below. At 45 the interval of 49 ends, but the new one, 4, does not divide 45: the first block
    alone is whole. The same at 32 (4, then 3). 250 steps, interval 4: 7 down to 246, 6 down to 211,
    5 down to 160, 4 down to 100, 2 down to 50, then 3; 245 and 155 are the first block's."""
    toca = vtc.REDUCERS["toca"]
    early = [49, 44, 40, 36, 30, 27, 24, 21]
    assert whole_steps(toca(preset="dit_ddim50"), 50) == early + [*range(18, -1, -2)]
    kinds = kinds_of_steps(toca(preset="dit_ddim50"), 50)
    assert [49 - call for call, kind in enumerate(kinds) if kind == "Wp"] == [45, 32]
    long = [249, *range(240, 211, -6), *range(210, 159, -5), *range(152, 95, -4)]
    long += [*range(94, 47, -2), *range(45, -1, -3)]
    assert whole_steps(toca(preset="dit_ddpm250"), 250) == long
    kinds = kinds_of_steps(toca(preset="dit_ddpm250"), 250)
    assert [249 - call for call, kind in enumerate(kinds) if kind == "Wp"] == [245, 155]


def test_whole_steps_of_models_that_count_up() -> None:
    """PixArt, 20 steps, interval 3: 3 / (0.8 + 0.4 s / 20) rounds to 4 at 0 and to 3 from 4 on,
    which 4 is no multiple of. Flux: the first three, then every fourth."""
    toca = vtc.REDUCERS["toca"]
    kinds = kinds_of_steps(toca(preset="pixart"), 20)
    assert [call for call, kind in enumerate(kinds) if kind == "WW"] == [0, *range(6, 20, 3)]
    assert [call for call, kind in enumerate(kinds) if kind == "Wp"] == [4]
    calls = [49 - s for s in whole_steps(toca(preset="flux"), 50)]
    assert calls == [0, 1, 2, *range(6, 50, 4)]


def test_whole_steps_without_a_count() -> None:
    """20 steps by their noise, .95 at the first: the interval is 3 / (1.4 - 0.8 * noise) at the
    last whole step: 5, 4 at .7, 3 at .5, 2 at .35 and below."""
    assert whole_steps(vtc.REDUCERS["toca"](), 20) == [19, 14, 10, 7, 5, 3, 1]


def test_the_order_of_duca_between_two_whole_steps() -> None:
    """Released code. DiT counts down: of s = 40 to 37 with interval 4, and 30 to 28 with interval
    3, those run tokens where s is odd within the interval. PixArt counts up, every third is whole;
    without a count it is the same from one whole step to the next."""
    duca = vtc.REDUCERS["duca"]
    dit = kinds_of_steps(duca(preset="dit_ddim50"), 50)
    assert "".join(kind[1] for kind in dit[:29]) == "WpsppWpspWpspWpspspWspWspWspW"
    assert dit[49 - 32] == "Ws"  # the first block alone
    assert "".join(k[0] for k in kinds_of_steps(duca(preset="pixart"), 20)) == "Wps" * 6 + "Wp"
    assert "".join(kind[0] for kind in kinds_of_steps(duca(), 9)) == "WpspWspWp"
    by_noise = kinds_of_steps(duca(preset="pixart", steps=0), 9)
    assert "".join(kind[0] for kind in by_noise) == "WpsWpsWps"


def test_a_long_value_in_one_head_is_less_than_two_in_both() -> None:
    """Values (3, 0 | 0, 0) and (2, 0 | 2, 0) of two heads: the sums of lengths are 3 and 4."""
    attention = SimpleNamespace(heads=2, to_v=nn.Identity())
    part: Any = SimpleNamespace(attention=attention)
    block = RunningBlock(0, part, {}, Work())
    x = torch.tensor([[[3.0, 0, 0, 0], [2.0, 0, 2.0, 0]]])
    assert block.value_norm(x).tolist() == [[3.0, 4.0]]


@dataclass
class Place:
    index: int
    kind: str = "self"


def test_shares_of_the_papers_presets() -> None:
    """DDIM-50: none early, 17.5 % in the middle, 52.5 % at the last step, in the middle block."""
    ddim = PRESETS["dit_ddim50"]
    middle: Any = Place(14)
    assert [ddim.part(p, middle, 29) for p in (0.98, 0.5, 0.0)] == pytest.approx([0, 0.175, 0.525])
    first, last = (ddim.part(0.5, Place(i), 28) for i in (0, 27))  # type: ignore[arg-type]
    assert (first, last) == pytest.approx((0.175 * 0.8, 0.175 * 1.2))
    pixart, flux = PRESETS["pixart"], PRESETS["flux"]
    assert pixart.part(0.0, middle, 29) == pytest.approx(0.3 * 1.6 * 0.1)
    assert pixart.part(1.0, middle, 29) == pytest.approx(0.3 * 1.6 * 1.9)
    ends = [flux.part(p, Place(i, k), 57) for p, i, k in ((0.9, 0, "joint"), (0, 56, "single"))]  # type: ignore[arg-type]
    assert ends == pytest.approx([0.1 * 1.5 * 0.4, 0.1 * 0.5 * 1.6])


def test_duca_takes_turns() -> None:
    """Interval 4 with Flux's preset: whole, some tokens, none, some tokens; none has no blocks."""
    model, block_calls = dits.make("flux"), []
    inner = [m for block in ditref.blocks(model) for m in linears(block)]
    handles = [m.register_forward_hook(lambda *_: block_calls.append(1)) for m in inner]
    spent, ran, out = [0.0], [0], []
    with vtc.attach(model, "duca", preset="flux") as session:
        for i in range(8):
            out.append(run(model, step_of("flux", i, 0.9 - 0.1 * i)))
            spent.append(session.stats()["flops"])
            ran.append(len(block_calls))
    for handle in handles:
        handle.remove()
    used = [spent[i + 1] - spent[i] for i in range(8)]
    calls = [ran[i + 1] - ran[i] for i in range(8)]
    for i, kind in enumerate("wwwprpwp"):
        assert (used[i] == 0 and calls[i] == 0) == (kind == "r")
        assert (used[i] == used[0]) == (kind == "w")
    assert used[3] < used[0] / 2
    assert not torch.equal(out[4], out[3])  # the last layer still knows the timestep


@over_families
def test_a_reused_step_gives_what_left_the_last_block(family: str) -> None:
    """With the timestep and the images as before, so are the outputs, Latte's last block too."""
    model = dits.make(family)
    given = dits.inputs(family)
    name = {"original": "t"}.get(family, "timestep")
    with vtc.attach(model, "duca", **PLAIN):
        out = []
        for i in range(3):
            given[name] = given[name] * (1 - 2e-7 * i)  # lower, or it were another branch
            out.append(run(model, given))
    torch.testing.assert_close(out[2], out[1], rtol=0, atol=TOLERANCE)
    assert not torch.equal(out[1], out[0])


# ---------------------------------------------------------------------- choices


def test_budgets_are_exact() -> None:
    """Rows that the first linear of every MLP sees, of 24 tokens."""
    model = dits.make("original")
    shares = [[1.0] * 4, [0.25, 0.5, 0.0, 1.0], [0.3, 0.04, 0.99, 0.0]]
    seen: list[list[int]] = [[] for _ in range(4)]
    handles = [
        block.mlp.fc1.register_forward_pre_hook(lambda m, a, i=i: seen[i].append(a[0].shape[1]))
        for i, block in enumerate(model.blocks)  # type: ignore[arg-type]
    ]
    with vtc.attach(model, "scheduled_cache", table=shares):
        steps(model, "original", TIMES[:3], shape=GRID)
    for handle in handles:
        handle.remove()
    assert seen == [[24, 6, 7], [24, 12], [24, 23], [24, 24]]  # rounded down, none at 0


def test_staleness_goes_round() -> None:
    """Four of 16 tokens at a time, those that wait longest, the first ones first."""
    age = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    choice = Choice("staleness", interval=2, bonus=0.0)
    assert choice.rank(None, age, Layout(1, 2, 2), 0).tolist() == [[1.5, 0.5, 1.0, 1.0]]
    model = dits.make("original")
    table = [[1.0] * 4] + [[0.25] * 4] * 4
    options = {"score": "staleness", "bonus": 0.0, "table": table}
    session = vtc.attach(model, "scheduled_cache", **options)
    steps(model, "original", shape=(8, 8))
    kept = [thing for thing in gc.get_objects() if type(thing) is Kept]
    want = torch.arange(1, 5).repeat_interleave(4).expand(2, -1)
    assert len(kept) == 4 and all(torch.equal(one.call, want) for one in kept)
    session.detach()


def test_the_best_of_every_cell_is_raised() -> None:
    score = torch.tensor([[1.0, 2, 9, 4, 5, 8, 7, 6, 3, 10, 11, 12]])  # 3 x 4: cells 2 x 2, cut
    want = torch.tensor([[1.0, 2, 13.5, 4, 5, 12, 7, 6, 3, 15, 11, 18]])
    assert torch.equal(raised(score, Layout(1, 3, 4), 0.5, 2), want)
    two = torch.cat([score, score], 1)
    assert torch.equal(raised(two, Layout(2, 3, 4), 0.5, 2), torch.cat([want, want], 1))


def test_pairs_choose_together() -> None:
    base, age = torch.tensor([[0.1, 0.9], [0.2, 0.4], [0.5, 0.1], [0.2, 0.0]]), torch.zeros(4, 2)
    together = Choice(pairs=True).rank(base, age, Layout(1, 1, 2), 0)
    torch.testing.assert_close(together[:2], torch.tensor([[0.3, 0.5], [0.2, 0.2]]))
    assert torch.equal(together[2:], together[:2])
    with pytest.raises(InvalidInput, match="3 rows.*even batch"):
        Choice(pairs=True).rank(base[:3], age[:3], Layout(1, 1, 2), 0)


# ---------------------------------------------------------------------- FLOPs


@over_families
def test_counted_flops_are_those_that_torch_counts(family: str) -> None:
    """Of a whole step with scores, and of one in between; what is around the blocks is the same
    in all, and is what a dense forward has more than its blocks."""
    model, given = dits.make(family), [dits.inputs(family, time=t) for t in TIMES[:2]]

    def counted(i: int) -> int:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused attention of CPUs
            run(model, given[i])
        return counter.get_total_flops()

    dense = counted(0)
    with vtc.attach(model, "toca", **PLAIN, **score(family)) as session:
        whole = counted(0)
        first = session.stats()
        between = counted(1)
        second = session.stats()
    around = dense - first["flops_dense"]
    assert around >= 0
    assert first["flops"] == pytest.approx(whole - around, rel=1e-3)
    assert second["flops"] - first["flops"] == pytest.approx(between - around, rel=1e-3)
    assert between < dense <= whole  # values are there; attention has to be read once more
    assert (dense == whole) == (score(family).get("score") == "value")


# ---------------------------------------------------------------------- recipes and refusals


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("toca", {"preset": "pixart", "share": 0.2, "pairs": True}),
        ("duca", {"preset": "flux", "interval": 5}),
        ("scheduled_cache", {"table": [[1.0, 1.0], [0.5, 0.0]], "score": "value"}),
    ],
)
def test_recipes_survive_yaml(method: str, params: dict[str, Any]) -> None:
    recipe = vtc.Recipe.build(method, 2, **params)
    assert vtc.Recipe.load(recipe.dump()) == recipe
    assert recipe.steps[0].build() == vtc.Recipe.load(recipe.dump()).steps[0].build()


@pytest.mark.parametrize("name", ["toca_dit", "duca_flux"])
def test_configurations_run(name: str) -> None:
    family = name.split("_")[1]
    recipe = vtc.Recipe.load(Path(__file__).parents[1] / "configs" / f"{name}.yaml")
    model, n = dits.make(family), 50
    with vtc.attach(model, recipe) as session:
        steps(model, family, [(n - 1 - i) / n for i in range(n)], batch=2, shape=(4, 4))
    stats = session.stats()
    assert 0.2 < stats["flops"] / stats["flops_dense"] < 0.8


def test_tables_come_from_files(tmp_path: Path) -> None:
    table = [[1.0, 1.0], [0.5, 0.25]]
    yaml, tensors = tmp_path / "table.yaml", tmp_path / "table.safetensors"
    yaml.write_text(f"table: {table}", encoding="utf-8")
    safetensors.torch.save_file({"table": torch.tensor(table)}, tensors)
    for path in (yaml, tensors):
        method = vtc.Recipe.build("scheduled_cache", 2, table=path).steps[0].build()
        assert method.shares == ((1.0, 1.0), (0.5, 0.25))
    yaml.write_text("rows: 3", encoding="utf-8")
    for bad in (yaml, tmp_path / "none.yaml"):
        with pytest.raises(InvalidRecipe, match="cannot read a table from.*Give a safetensors"):
            vtc.Recipe.build("scheduled_cache", 2, table=str(bad)).steps[0].build()


ONES = [1.0] * 4


@pytest.mark.parametrize(
    ("method", "family", "options", "error", "words"),
    [
        ("toca", "sd3", {}, UnsupportedModel, "this is sd3, .*score='value'"),
        ("scheduled_cache", "wan", {"table": [ONES]}, UnsupportedModel, "this is wan"),
        ("scheduled_cache", "dit", {}, InvalidRecipe, "needs table=.*with 4 shares"),
        ("scheduled_cache", "dit", {"table": [[1.0]]}, InvalidRecipe, "1 shares.*has 4 blocks"),
        ("scheduled_cache", "dit", {"table": [ONES, [1.0]]}, InvalidRecipe, r"have \[1, 4\]"),
        ("scheduled_cache", "dit", {"table": [ONES, [1.5] * 4]}, InvalidRecipe, "has 1.5: shares"),
        ("scheduled_cache", "dit", {"table": [[0.5] * 4]}, InvalidRecipe, "has to be 1"),
        ("toca", "dit", {"interval": 0}, InvalidRecipe, "interval is 0: it is at least 1"),
        ("duca", "dit", {"share": -0.1}, InvalidRecipe, "share is -0.1: it is at least 0"),
        ("duca", "dit", {"preset": "sdxl"}, InvalidRecipe, "'sdxl' is not 'dit' |"),
        ("toca", "dit", {"noise": (0.0, 0.5)}, InvalidRecipe, "leave until, noise and merge out"),
        ("toca", "dit", {"until": "dit.2"}, InvalidRecipe, "leave until, noise and merge out"),
        ("toca", "dit", {"keep": 0.5}, InvalidBudget, "it takes keep='auto'"),
        ("toca", "dit", {"at": "dit.1"}, InvalidRecipe, "stands alone"),
        ("toca", "dit", {"at": "dit.0.attn"}, UnsupportedSite, "acts before a block"),
    ],
)
def test_what_cannot_be_attached(
    method: str, family: str, options: dict[str, Any], error: type[VtcError], words: str
) -> None:
    with pytest.raises(error, match=words):
        vtc.attach(dits.make(family), method, **options)


@contextmanager
def attached(**options: Any) -> Iterator[nn.Module]:
    model = dits.make("dit")
    with vtc.attach(model, options.pop("method", "toca"), **options):
        yield model


def norms(block: Any) -> tuple[Any, Any]:
    """Those of the attention and of the MLP."""
    first = getattr(block.norm1, "norm", block.norm1)
    last = "norm2" if hasattr(block, "mlp") or block.norm3 is None else "norm3"
    return first, getattr(block, last)


@pytest.mark.parametrize("family", ["dit", "wan", "original"])
def test_norms_run_for_the_tokens_that_are_computed(family: str) -> None:
    model, seen = dits.make(family), list[int]()

    def see(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output.shape[1])

    with vtc.attach(model, "toca", interval=4, **PLAIN, **score(family)):
        handles = [norm.register_forward_hook(see) for norm in norms(ditref.blocks(model)[1])]
        steps(model, family, TIMES[:2], shape=GRID)
        for handle in handles:
            handle.remove()
    n = seen[0]
    assert n in (24, 72)
    assert seen == [n, n, 0, n // 4]


def test_calls_that_parts_of_blocks_cannot_take() -> None:
    pixart = dits.make("pixart")
    for block in ditref.blocks(pixart):
        block.set_chunk_feed_forward(12, 1)
    with (
        vtc.attach(pixart, "toca", **PLAIN),
        pytest.raises(UnsupportedModel, match="come to the mlp .*set_chunk_feed"),
    ):
        steps(pixart, "pixart", shape=GRID)
    wan = dits.make("wan")
    given = dits.inputs("wan", shape=GRID)
    given["timestep"] = given["timestep"][:, None].expand(-1, 72).clone()
    run(wan, given)
    with (
        vtc.attach(wan, "toca", **PLAIN, **score("wan")),
        pytest.raises(UnsupportedModel, match="every token has a timestep of its own"),
    ):
        run(wan, given)


def test_what_cannot_be_run() -> None:
    given = [dits.inputs("dit", time=t) for t in (0.9, 0.3, 0.2)]
    with attached() as model, pytest.raises(UnsupportedModel, match="training mode.*model.eval"):
        run(model.train(), given[0])
    with attached() as model:
        mixed = given[0] | {"timestep": torch.tensor([900.0, 300.0])}
        with pytest.raises(InvalidInput, match="0.300 to 0.900 noisy.*samples of one timestep"):
            run(model, mixed)
    with attached(preset="dit_ddim50") as model:
        run(model, given[0])
        with pytest.raises(InvalidInput, match="call 1 of steps=50 leaves 0.96.*steps=0"):
            run(model, given[1])
    with attached(steps=2) as model, pytest.raises(InvalidInput, match="steps=2, but this run"):
        [run(model, one) for one in given]
    table = [ONES, ONES]
    words = "table has 2 steps, but this run takes more"
    with (
        attached(method="scheduled_cache", table=table) as model,
        pytest.raises(InvalidInput, match=words),
    ):
        [run(model, one) for one in given]


# ---------------------------------------------------------------------- the knapsack


def test_knapsack_equals_brute_force() -> None:
    dice = torch.Generator().manual_seed(0)
    for levels in ((0, 0.25, 0.5, 0.75, 1), (1, 3, 4), (0.1, 0.2, 0.7), (2,)):
        cost = torch.randn(5, len(levels), generator=dice)
        every = list(itertools.product(range(len(levels)), repeat=5))
        sums = {round(sum(levels[i] for i in choice), 6) for choice in every}
        for budget in sums:
            got = vtc.knapsack_allocate(cost, levels, budget)
            assert sum(levels[i] for i in got) == pytest.approx(budget)
            fitting = [c for c in every if abs(sum(levels[i] for i in c) - budget) < 1e-6]
            best = min(float(sum(cost[i, j] for i, j in enumerate(c))) for c in fitting)
            assert float(cost.gather(1, got[:, None]).sum()) == pytest.approx(best, abs=1e-5)


def test_knapsack_is_quick_and_pins_levels() -> None:
    """28 blocks and 20 steps; the first step is whole, as the table of a cache asks."""
    levels = (0, 0.25, 0.5, 0.75, 1)
    cost = torch.rand(560, 5, generator=torch.Generator().manual_seed(1))
    cost[:28, :4] = torch.inf
    started = time.perf_counter()
    got = vtc.knapsack_allocate(cost, levels, 560 * 0.45)
    assert time.perf_counter() - started < 2
    table = torch.tensor(levels)[got].view(20, 28)
    assert bool((table[0] == 1).all()) and float(table.sum()) == 252


def test_what_the_knapsack_refuses() -> None:
    cost = torch.zeros(3, 2)
    for budget in (2, 11):
        with pytest.raises(InvalidBudget, match=f"budget {budget}: 3 items.*take 3 to 9 together"):
            vtc.knapsack_allocate(cost, (1, 3), budget)
    for levels, budget, near in (((1, 3), 4, "3"), ((1, 3), 8.5, "7"), ((0.25, 1), 1.3, "0.75")):
        with pytest.raises(InvalidBudget, match=f"budget {budget}: no choice.* met: {near}."):
            vtc.knapsack_allocate(cost, levels, budget)
    with pytest.raises(InvalidBudget, match="finite cost.*met: none"):
        vtc.knapsack_allocate(cost.fill_(torch.inf), (1, 3), 5)
    with pytest.raises(InvalidInput, match=r"shape \(3, 2\) and there are 3 levels"):
        vtc.knapsack_allocate(cost, (1, 2, 3), 5)
    with pytest.raises(InvalidInput, match="NaN"):
        vtc.knapsack_allocate(cost * torch.nan, (1, 3), 5)
    with pytest.raises(InvalidBudget, match="nan is no level"):
        vtc.knapsack_allocate(torch.zeros(3, 2), (1, float("nan")), 5)
    with pytest.raises(InvalidBudget, match="larger unit"):
        vtc.knapsack_allocate(torch.zeros(10_000, 2), (0.0001, 1.0), 5000)
