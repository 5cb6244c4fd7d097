"""The search finds what an exhaustive one does, says what it cannot find, survives being killed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import vtc_zoo
from vtc_zoo import shapes

import vtc
from vtc.bench import records
from vtc.bench.records import Record
from vtc.commands import cli
from vtc.errors import InvalidInput
from vtc.tune import candidates, loyalty, search, work
from vtc.tune.search import Goal
from vtc.video import journal
from vtc.video.journal import Journal, parts_folder

# ---------------------------------------------------------------------- the search alone


class Table:
    """Candidates with a price and answers that are the same (1) or not (0), one per batch."""

    def __init__(self, rows: Mapping[str, tuple[float, Sequence[int]]]) -> None:
        self.rows, self.seen = rows, dict.fromkeys(rows, 0)

    def __call__(self, names: Sequence[str], count: int) -> dict[str, Record]:
        out = {}
        for name in names:
            flops, answers = self.rows[name]
            self.seen[name] = max(self.seen[name], count)
            share = sum(answers[:count]) / count
            out[name] = {
                "items": count,
                "media": count,
                "flops": flops,
                "time": 1.0,
                "exact": share,
            }
            out[name] |= {"kl": 1 - share, "kl_se": 0.0}
        return out

    def best(self, steps: Sequence[int], goal: Goal) -> str | None:
        return search.search(list(self.rows), steps, self, goal).best


def answers(*wrong: int, n: int = 64) -> list[int]:
    """n answers of which these are different."""
    return [int(i not in wrong) for i in range(n)]


def spread(share: float) -> list[int]:
    """64 answers of which a share is the same, evenly."""
    return [int((i + 1) * share) - int(i * share) for i in range(64)]


def test_rungs_double() -> None:
    assert search.rungs(4, 64) == [4, 8, 16, 32, 64]
    assert search.rungs(3, 10) == [3, 6, 10] and search.rungs(5, 3) == [3]


def test_halving_finds_what_the_grid_finds_for_less() -> None:
    shares = [i / 15 for i in range(16)]
    rows = {f"c{i}": (0.1 + 0.05 * i, spread(share)) for i, share in enumerate(shares)}
    goal = Goal(0.8)
    grid, halving = Table(rows), Table(rows)
    wanted = next(name for name, (_, own) in rows.items() if sum(own) / 64 >= 0.8)
    assert grid.best([64], goal) == halving.best(search.rungs(8, 64), goal) == wanted
    assert sum(grid.seen.values()) == 16 * 64 and sum(halving.seen.values()) < 8 * 64
    assert halving.seen["c0"] == 8  # far below the goal


def test_what_is_surely_good_ends_what_is_dearer() -> None:
    rows = {"cheap": (0.2, answers()), "dear": (0.9, answers()), "far": (0.1, [0] * 64)}
    table = Table(rows)
    assert table.best([32, 64], Goal(0.9)) == "cheap"
    assert table.seen == {"cheap": 64, "dear": 32, "far": 32}


def test_what_was_cut_is_taken_back_when_nothing_else_reaches_the_goal() -> None:
    late = answers(*range(8, 64, 4))  # right on the first rung, wrong later
    rows = {"a": (0.1, late), "b": (0.2, late), "good": (0.3, answers()), "c": (0.4, answers(0, 9))}
    table = Table(rows)
    assert table.best(search.rungs(8, 64), Goal(0.95)) == "good"
    assert table.seen["good"] == 64
    assert Table(rows).best(search.rungs(8, 64), Goal(1.0)) == "good"
    del rows["good"]
    assert Table(rows).best(search.rungs(8, 64), Goal(0.99)) is None


def test_what_was_undercut_is_taken_back_when_the_cheap_one_fails_later() -> None:
    late = answers(*range(32, 64))  # surely good on the first rung, wrong later
    table = Table({"cheap": (0.2, late), "dear": (0.9, answers())})
    assert table.best([32, 64], Goal(0.9)) == "dear"
    assert table.seen == {"cheap": 64, "dear": 64}


def test_flops_that_count_as_equal_do_not_undercut() -> None:
    """The grid takes the quicker one of them, and so does halving."""

    def measured(names: Sequence[str], _: int) -> dict[str, Record]:
        same = {"items": 60, "media": 60, "exact": 1.0, "kl": 0.0, "kl_se": 0.0}
        rows = {"slow": (0.50001, 1.0), "quick": (0.50002, 0.5), "c": (0.9, 1.0), "d": (0.9, 1.0)}
        return {n: same | dict(zip(("flops", "time"), rows[n], strict=True)) for n in names}

    for steps in ([1], [1, 2]):
        names = ["slow", "quick", "c", "d"]
        assert search.search(names, steps, measured, Goal(0.9)).best == "quick"


def test_questions_about_one_picture_are_not_many_pictures() -> None:
    row = {"exact": 1.0, "items": 60, "kl": 0.0, "kl_se": 0.0}
    assert Goal(0.95).surely(row | {"media": 60}) and not Goal(0.95).surely(row | {"media": 6})
    row["exact"] = 0.9
    assert Goal(0.95).fails(row | {"media": 60}) and not Goal(0.95).fails(row | {"media": 6})


def test_equal_flops_are_told_apart_by_time_then_loyalty() -> None:
    def measured(names: Sequence[str], _: int) -> dict[str, Record]:
        same = {"items": 50, "media": 50, "flops": 0.5, "kl": 0.0, "kl_se": 0.0}
        rows = {"slow": (1.0, 0.98), "quick": (0.5, 0.95), "loyal": (0.5, 0.97)}
        return {
            name: same | dict(zip(("time", "exact"), rows[name], strict=True)) for name in names
        }

    for steps in ([1], [1, 2, 3]):
        assert search.search(["slow", "quick", "loyal"], steps, measured, Goal(0.9)).best == "loyal"


def test_kl_is_a_second_goal_and_what_cannot_run_is_told() -> None:
    def measured(names: Sequence[str], _: int) -> dict[str, Record]:
        row = {"items": 40, "media": 40, "time": 1.0, "exact": 1.0, "kl_se": 0.01}
        rows = {"far": row | {"flops": 0.1, "kl": 0.2}, "near": row | {"flops": 0.9, "kl": 0.04}}
        return {name: rows.get(name, {"error": "it broke"}) for name in names}

    result = search.search(["broken", "far", "near"], [1, 2], measured, Goal(0.9, kl=0.05))
    assert result.best == "near" and result.broken == {"broken": "it broke"}
    assert search.search(["far", "near"], [1], measured, Goal(0.9)).best == "far"
    assert result.records.keys() == {"far", "near"}


def test_goal_by_hand() -> None:
    def seen(share: float, items: int, kl: float = 0.0, error: float | None = 0.0) -> Record:
        return {"exact": share, "media": items, "kl": kl, "kl_se": error}

    goal = Goal(0.95, kl=0.1)
    assert goal.meets(seen(0.95, 20)) and not goal.meets(seen(0.94, 20))
    assert goal.fails(seen(0.75, 16)) and not goal.fails(seen(0.9375, 16))  # up to .894, .986
    assert goal.surely(seen(1.0, 52)) and not goal.surely(seen(1.0, 51))  # from .95054, .94963
    assert goal.fails(seen(1.0, 90, 0.2, 0.05)) and not goal.fails(seen(1.0, 90, 0.2, 0.07))
    assert not goal.fails(seen(1.0, 1, 0.2, None)) and not goal.surely(seen(1.0, 90, 0.0, None))
    assert not Goal(1.0).fails(seen(1.0, 7))
    for wrong in ({"loyalty": 0.0}, {"loyalty": 1.2}, {"loyalty": 0.9, "kl": 0.0}):
        with pytest.raises(InvalidInput, match="give"):
            Goal(**wrong)


def test_front_by_hand() -> None:
    rows = {"a": (0.2, 0.5, 9), "b": (0.3, 0.4, 9), "c": (0.4, 0.9, 9), "early": (0.1, 1.0, 4)}
    keys = ("flops", "exact", "items")
    found = {name: dict(zip(keys, row, strict=True)) for name, row in rows.items()}
    assert search.Result(records=found).front("exact") == ["a", "c"]
    assert search.Result("b", records=found).front("exact") == ["a", "b", "c"]


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_scenes(tmp_path_factory.mktemp("scenes"), 12)


def tune(scenes: Path, out: Path, *more: str | float) -> int:
    """divprune at three budgets and grid at one: no two cost the same."""
    words = ("--model", "tiny-llava-shapes", "--questions", scenes, "--max-new-tokens", 4)
    what = ("--methods", "divprune", "--budgets", "0.6,0.3,0.06", "--merge-mass", "off")
    options = ("--batch-size", 4, "--start", 4, "--out", out)
    return cli.main(["tune", *map(str, (*words, *what, *options, *more))])


def outcomes(out: Path) -> dict[str, list[Record]]:
    """Name of a candidate -> what was measured on its batches, in their order."""
    found: dict[str, list[Record]] = {}
    for key, record in sorted(work.recorded(Journal(out)).items()):
        found.setdefault(key.partition(".")[0], []).append(record)
    return found


def test_a_grid_chooses_the_cheapest_that_is_loyal(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.yaml"
    assert tune(scenes, out, "--loyalty", 0.7, "--search", "grid") == 0
    recipe = vtc.Recipe.load(out)
    assert recipe.steps[0].method == "divprune"

    def told(name: str) -> tuple[float, float]:
        rows = [row for one in outcomes(out)[name][:4] for row in one["items"]]  # 16 of 24 items
        dense = sum(one["flops_dense"] for one in outcomes(out)[name][:4])
        flops = sum(one["flops"] for one in outcomes(out)[name][:4]) / dense
        return flops, sum(row["exact"] for row in rows) / len(rows)

    wanted = min(pair for name in outcomes(out) if (pair := told(name))[1] >= 0.7)
    assert told(candidates.Candidate(recipe, {}).name) == wanted
    assert f"FLOPs {wanted[0]:.1%}" in out.read_text()
    assert "held out:    exact" in out.read_text()
    assert ", 8 items about 4 pictures" in out.read_text()
    assert "4 held-out pictures or videos are few" in out.read_text()
    assert "| chosen | divprune | projector |" in capsys.readouterr().out
    model, _ = vtc_zoo.load("tiny-llava-shapes")
    vtc.attach(model, out).detach()

    other = tmp_path / "halving.yaml"
    file = tmp_path / "all.json"
    assert tune(scenes, other, "--loyalty", 0.7, "--json", file) == 0
    assert vtc.Recipe.load(other) == recipe
    *rows, held = records.read(file)
    assert {row["part"] for row in rows} == {"chosen on"} and held["part"] == "held out"
    assert held["keep"] == recipe.steps[0].keep and held["items"] == 8


def test_killed_at_any_moment_it_goes_on(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.yaml", tmp_path / "cut.yaml"
    calls: list[int] = []
    measure = loyalty.outcome

    def counted(*args: Any) -> Record:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(*args)

    monkeypatch.setattr(loyalty, "outcome", counted)
    stop = math.inf
    assert tune(scenes, whole, "--loyalty", 0.7) == 0
    total = len(calls)
    calls.clear()
    stop = 5
    assert tune(scenes, cut, "--loyalty", 0.7) == 130 and not cut.exists()
    [part] = [path for path in parts_folder(cut).iterdir() if path.suffix == ".jsonl"]
    part.write_bytes(part.read_bytes()[:-7])  # the last of five records was being written
    calls.clear()
    stop = math.inf
    assert tune(scenes, cut, "--loyalty", 0.7) == 0
    assert len(calls) == total - 4
    assert vtc.Recipe.load(cut) == vtc.Recipe.load(whole)
    calls.clear()
    text = cut.read_text()
    assert tune(scenes, cut, "--loyalty", 0.7) == 0  # once more: all is known
    assert not calls and cut.read_text() == text


def test_other_data_are_refused_and_other_goals_are_not(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "recipe.yaml"
    words = ("--loyalty", 1.0, "--budgets", "0.06", "--limit", 8)
    assert tune(scenes, out, *words) == 1 and not out.exists()
    said = capsys.readouterr().out
    assert "nothing reaches exact >= 1, and no recipe was written" in said
    assert "divprune at projector keep=0.06: exact 0." in said
    assert tune(scenes, out, "--loyalty", 0.5, "--limit", 6) == 1
    assert "answers of another run (data: was '8 items, " in capsys.readouterr().err
    assert tune(scenes, out, *words, "--seed", 3) == 1
    assert "(seed: was 0, now 3)" in capsys.readouterr().err
    assert tune(scenes, out, "--loyalty", 0.01, "--budgets", "0.06", "--limit", 8) == 0
    assert vtc.Recipe.load(out).steps[0].keep == 0.06
    mine = tmp_path / "mine.yaml"
    mine.write_text("# mine\n", encoding="utf-8")
    assert tune(scenes, mine, *words) == 1 and mine.read_text() == "# mine\n"
    assert "how it was made is not known" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "recipe.yaml"
    assert tune(scenes, out, "--loyalty", 0.9, "--methods", "grid,fastv", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "9 candidates; 16 items to choose on, 8 held out" in said
    assert "| fastv | decoder.2 | 0.3 |" in said and "| grid | decoder.2 | 0.3 |" in said
    runs = "9 candidates on 4 items, 5 candidates on 8 items, 3 candidates on 16 items"
    compressed = 9 * 4 + 5 * 4 + 3 * 8 + 8
    assert f"halving: {runs}; at most {compressed} compressed answers, and 24 dense ones" in said
    assert not list(tmp_path.iterdir())


def test_every_item_is_answered_once_by_the_dense_model(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--dry-run` says."""
    reference, dense = loyalty.reference, []

    def counted(model: Any, inputs: Any, most: int) -> Any:
        dense.append(len(inputs["input_ids"]))
        return reference(model, inputs, most)

    monkeypatch.setattr(loyalty, "reference", counted)
    assert tune(scenes, tmp_path / "r.yaml", "--loyalty", 0.01) == 0
    assert sum(dense) == 24


def test_files_that_a_recipe_names_belong_to_its_name(tmp_path: Path) -> None:
    def name() -> str:
        step = vtc.Step("stts", "vision.2", 0.5, params={"weights": str(weights)})
        return candidates.Candidate(vtc.Recipe((step,)), {}).name

    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"one")
    first = name()
    assert name() == first
    weights.write_bytes(b"two")
    assert name() != first
    weights.unlink()
    weights.mkdir()  # methods of several files name a folder
    (weights / "a").write_bytes(b"one")
    folder = name()
    (weights / "a").write_bytes(b"two")
    assert len({first, folder, name()}) == 3


def test_what_a_run_is_about(scenes: Path, zoo_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = vtc_zoo.load("tiny-llava-shapes")

    def told() -> Record:
        return work.identity(model, processor, zoo_args(), [])

    def changed() -> set[str]:
        now = told()
        return {key for key in now if now[key] != before[key]}

    before = told()
    assert not changed() and json.dumps(before)
    with monkeypatch.context() as patch:
        patch.setattr(processor.image_processor, "image_mean", [0.5, 0.5, 0.5])
        assert changed() == {"processor"}
    with monkeypatch.context() as patch:
        patch.setattr(processor, "chat_template", "other")
        assert changed() == {"processor"}
    with monkeypatch.context() as patch:
        patch.setattr(model.config.vision_config, "_attn_implementation_internal", "eager")
        assert changed() == {"attention"}
    assert before["device"] == "cpu" and before["dtype"] == "torch.float32"
    assert not changed()


def test_a_recipe_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (done.append(n), f(*a)))
    journal.write_whole(tmp_path / "r.yaml", b"new")
    assert (tmp_path / "r.yaml").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
    assert done == ["fsync", "replace", "fsync"]  # the file, and its name in the folder


def test_a_job_lets_go_of_its_folder_whatever_fails(tmp_path: Path, zoo_args: Any) -> None:
    class Full:
        def close(self) -> None:
            raise OSError("no space left")

    job = work.Job.__new__(work.Job)
    job._journal, job._part = Journal(tmp_path / "r.yaml"), Full()  # type: ignore[assignment]
    job._journal.open({})
    with pytest.raises(OSError, match="no space left"):
        job.__exit__()
    other = Journal(tmp_path / "r.yaml")
    other.open({})
    other.close()


def test_candidates_by_default(zoo_args: Any) -> None:
    model, _ = vtc_zoo.load("tiny-llava-shapes")
    found, _ = candidates.planned(model, zoo_args(), videos=False)
    methods = {one.fields["method"] for one in found.values()}
    assert {"grid", "divprune", "fastv", "visionzip"} <= methods
    assert not methods & {"random", "evs", "mustdrop", "stts", "tome", "toca"}
    keeps = {(one.fields["keep"], one.fields["merge"]) for one in found.values()}
    assert keeps >= {(keep, merge) for keep in (0.5, 0.1) for merge in ("none", "nearest")}
    assert "evs" in candidates.default_methods(videos=True)
    assert all(one.recipe.seed == 0 for one in found.values())
    seeded, _ = candidates.planned(model, zoo_args("--seed", "4"), videos=False)
    assert not set(seeded) & set(found)


@pytest.fixture
def zoo_args() -> Any:
    """Parsed options of `vtc tune`."""
    import argparse

    from vtc.tune import command

    def parsed(*more: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        command.configure(parser)
        words = ["--model", "tiny-llava-shapes", "--loyalty", "0.9", "--out", "r.yaml"]
        return parser.parse_args([*words, *more])

    return parsed


def test_a_candidate_that_fails_is_out(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    measure = loyalty.outcome

    def broken(model: Any, inputs: Any, wanted: Any, session: Any) -> Record:
        if session.recipe.steps[0].keep == 0.06:
            raise loyalty.NotNumbers("NaN.")
        return measure(model, inputs, wanted, session)

    monkeypatch.setattr(loyalty, "outcome", broken)
    out = tmp_path / "recipe.yaml"
    for _ in range(2):  # also when it is read from the journal
        assert tune(scenes, out, "--loyalty", 0.01, "--limit", 8, "--holdout", 0) == 0
        assert "not run: divprune at projector keep=0.06: NaN." in capsys.readouterr().out
        assert vtc.Recipe.load(out).steps[0].keep == 0.3
    assert "held out:    nothing" in out.read_text()
    assert json.dumps(outcomes(out))  # plain data


def test_the_chosen_one_may_fail_on_what_was_held_out(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    measure, ran = loyalty.outcome, []

    def broken(*given: Any) -> Record:
        ran.append(1)
        if len(ran) == 4:  # 3 candidates on one batch, then the chosen one on the other
            raise loyalty.NotNumbers("NaN.")
        return measure(*given)

    monkeypatch.setattr(loyalty, "outcome", broken)
    out = tmp_path / "recipe.yaml"
    words = ("--loyalty", 0.01, "--limit", 8, "--batch-size", 6)
    assert tune(scenes, out, *words) == 1 and not out.exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "divprune at projector keep=0.06 was chosen, but fails on an item" in said
    assert tune(scenes, out, *words) == 0
    assert vtc.Recipe.load(out).steps[0].keep == 0.3


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--loyalty", 1.5), 2, "loyalty=1.5"),
        (("--loyalty", 0.9, "--holdout", 1.0), 2, "holdout=1.0"),
        (("--loyalty", 0.9, "--limit", 1), 2, "only one picture"),
        (("--loyalty", 0.9, "--out", "recipe.txt"), 2, "ends in .yaml"),
    ],
)
def test_wrong_options_say_why(
    scenes: Path,
    tmp_path: Path,
    words: Any,
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tune(scenes, tmp_path / "r.yaml", *words) == code
    assert says in capsys.readouterr().err
