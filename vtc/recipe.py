"""Recipe: what to do where, as data. Strict YAML in and out; defaults live only here."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .budget import Budget, Keep, parse_schedule
from .context import Site
from .errors import InvalidBudget, InvalidRecipe, unknown
from .idle import refuse_idle
from .reducer import Composite, Host, Rewriter, Selector, Trained
from .registry import REDUCERS
from .strict_yaml import check, read, shown

#: more than any model has sites
MOST_STEPS = 1000


@dataclass(frozen=True)
class Step:
    """One method at one site.

    Attributes:
        method: registered name.
        at: site, e.g. "projector" or "decoder.2".
        keep: share (float) or number (int) of visual tokens that stay, per image; "auto" where
            the method decides itself; see `Budget`.
        merge: "nearest" averages a dropped token into its most similar kept token.
        merge_threshold: least cosine for that; below it the token is dropped. -1 accepts all.
        mass: strength of log(tokens stood for) on the attention logits of kept tokens, 0 = off. It
            holds until the next step that drops, inside the tower and behind it.
        positions: "original" keeps the position of every token that stays; "renumber" closes all
            gaps that this and earlier steps left, also where this one drops nothing, for the layers
            of the language model after it, as code does that drops before the model sees positions.
            At `vision.<i>` (gaps of all steps in the tower), `projector` and `decoder.<i>`.
        scope: "image" gives every image its own budget, "sample" pools the images of a prompt.
        until: at `dit.<i>`: block before which all tokens are there again, such as "dit.20"; by
            default behind the last one.
        noise: at `dit.<i>`: act only while the images are this noisy, from 0 (data) to 1 (noise).
        params: hyper-parameters of the method.
    """

    method: str
    at: str
    keep: Keep
    merge: Literal["none", "nearest"] = "none"
    merge_threshold: float = -1.0
    mass: float = 0.0
    positions: Literal["original", "renumber"] = "original"
    scope: Literal["image", "sample"] = "image"
    until: str | None = None
    noise: tuple[float, float] = (0.0, 1.0)
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        site = Site.parse(self.at)
        Budget(self.keep)
        object.__setattr__(self, "params", {k: _frozen(v) for k, v in self.params.items()})
        if site.kind == "cache" and (self.merge != "none" or self.mass):
            raise InvalidRecipe("merge and mass act on hidden states: not at the site 'cache'.")
        for name in ("mass", "merge_threshold"):
            _check_type(name, getattr(self, name), float)
        if self.merge not in ("none", "nearest"):
            raise InvalidRecipe(f"merge={self.merge!r}: use 'none' or 'nearest'.")
        if self.positions not in ("original", "renumber"):
            raise InvalidRecipe(f"positions={self.positions!r}: use 'original' or 'renumber'.")
        if self.positions == "renumber" and site.kind in ("cache", "dit"):
            raise InvalidRecipe(
                f"positions='renumber' is possible at vision.<i>, projector and decoder.<i>, "
                f"not at {self.at!r}."
            )
        if self.scope not in ("image", "sample"):
            raise InvalidRecipe(f"scope={self.scope!r}: use 'image' or 'sample'.")
        if self.scope == "sample" and site.kind == "vision":
            raise InvalidRecipe(
                f"scope='sample' pools the images of a prompt, which the vision tower does not "
                f"know: not at {self.at!r}."
            )
        _check_diffusion(self, site)
        if not (math.isfinite(self.mass) and 0.0 <= self.mass <= 1.0):
            raise InvalidRecipe(f"mass={self.mass}: use a number from 0 (off) to 1 (full).")
        if self.merge_threshold != -1.0 and self.merge == "none" and not self.mass:
            raise InvalidRecipe("merge_threshold acts on merge='nearest' and on mass: set one.")
        if not -1.0 <= self.merge_threshold <= 1.0:
            raise InvalidRecipe(f"merge_threshold={self.merge_threshold}: a cosine, -1 to 1.")

    @property
    def site(self) -> Site:
        return Site.parse(self.at)

    @property
    def end(self) -> int | None:
        """Block before which dropped tokens of a diffusion transformer come back."""
        return None if self.until is None else Site.parse(self.until).layer

    @property
    def budget(self) -> Budget:
        return Budget(self.keep)

    def build(self) -> Any:
        """The method object; wrong parameters raise with the list of right ones."""
        cls = REDUCERS[self.method]
        known = _fields(cls)
        for key, value in self.params.items():
            if key not in known:
                raise unknown(f"parameter of {self.method!r}", key, known or ["(it has none)"])
            _check_type(f"{self.method}.{key}", value, known[key])
        _refuse_composite(self.method)
        if issubclass(cls, Trained) and (self.merge != "none" or self.mass):
            raise InvalidRecipe(
                f"{self.method!r} chooses or writes its tokens without merge and mass: use "
                f"merge='none' and mass=0."
            )
        if self.merge != "none" and cls.merging:
            raise _merges_itself(self.method)
        _check_budget(self.method, self.keep)
        return cls(**self.params)


@dataclass(frozen=True)
class Recipe:
    """Steps in the order they act, and the seed of methods that draw."""

    steps: tuple[Step, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            raise InvalidRecipe("a recipe needs at least one step.")
        _check_length("recipe", self.steps)
        order = [
            ("vision", "projector", "decoder", "cache", "dit").index(s.site.kind)
            for s in self.steps
        ]
        sites = (step.site for step in self.steps)
        places = [(o, s.layer or 0, s.part) for o, s in zip(order, sites, strict=True)]
        if len(set(places)) < len(places):
            raise InvalidRecipe(f"two steps at one site: {', '.join(s.at for s in self.steps)}.")
        ranked = sorted(zip(places, self.steps, strict=True), key=lambda pair: pair[0])
        object.__setattr__(self, "steps", tuple(step for _, step in ranked))
        refuse_idle(self.steps)

    @classmethod
    def build(
        cls,
        method: str,
        depth: int,
        keep: Keep | None = None,
        at: str | Sequence[str] | None = None,
        schedule: Mapping[int, float | int] | None = None,
        seed: int = 0,
        host: Host | None = None,
        **options: Any,
    ) -> Recipe:
        """A recipe from the arguments of `vtc.attach` for a model with `depth` decoder layers.

        host: more about that model, for methods of several steps.
        """
        reducer = REDUCERS[method]
        shared = {f.name for f in dataclasses.fields(Step)} - {"method", "at", "keep", "params"}
        step = {k: v for k, v in options.items() if k in shared}
        params = {k: _frozen(v) for k, v in options.items() if k not in shared}
        takes = _fields(reducer)
        for key, value in params.items():
            if key not in takes:
                known = [*takes, *shared, "keep", "at", "schedule", "seed"]
                raise unknown(f"parameter of {method!r}", key, known)
            _check_type(f"{method}.{key}", value, takes[key])
        if issubclass(reducer, Composite):
            if schedule is not None or at is not None:
                raise InvalidRecipe(
                    f"{method!r} knows its own sites: give neither at nor schedule."
                )
            if keep is not None:
                Budget(keep)
            built, merge = [], step.get("merge", "none") != "none"
            for part in reducer(**params).parts(host or Host(depth), keep):
                own: dict[str, Any] = step
                if merge and REDUCERS[part.method].merging:
                    own = {k: v for k, v in step.items() if k not in ("merge", "merge_threshold")}
                if Site.parse(part.at).kind == "vision":
                    own = {k: v for k, v in own.items() if k != "scope"}
                if part.at == "cache":
                    own = {k: v for k, v in own.items() if k == "scope"}
                elif part.mass and "mass" not in own:
                    own = own | {"mass": part.mass}
                built.append(Step(part.method, part.at, part.keep, params=part.params, **own))
            if merge and all(s.merge == "none" for s in built):
                raise _merges_itself(method)
            return cls(tuple(built), seed)
        if schedule is not None:
            if keep is not None or at is not None:
                raise InvalidRecipe("give `schedule` alone: it already says keep and at.")
            places: Mapping[str, Keep]
            places = {f"decoder.{i}": b.keep for i, b in parse_schedule(schedule).items()}
        elif at is not None:
            if not isinstance(at, str) and not isinstance(at, Sequence):
                raise InvalidRecipe(f"at={at!r}: give a site such as 'projector' or 'decoder.2'.")
            if keep is None and reducer.budgets == {"auto"}:
                keep = "auto"
            if keep is None:
                raise InvalidRecipe(
                    f"say how many tokens stay at {at!r}, e.g. keep=0.25 or keep=64."
                )
            places = dict.fromkeys([at] if isinstance(at, str) else at, keep)
        else:
            if keep is not None:
                Budget(keep)
                _check_budget(method, keep)
            places = reducer(**params).places(depth, keep)
            if issubclass(reducer, Selector) and host is not None:
                places = {host.selecting(where): k for where, k in places.items()}
            if not places:
                raise InvalidRecipe(f"{method!r} needs a budget: e.g. keep=0.25 or keep=64.")
        steps = tuple(Step(method, where, k, params=params, **step) for where, k in places.items())
        return cls(steps, seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every default left out."""
        steps = []
        for step in self.steps:
            data: dict[str, Any] = {}
            for f in dataclasses.fields(Step):
                value = getattr(step, f.name)
                default = {} if f.name == "params" else f.default
                if value != default:
                    data[f.name] = _plain(value)
            steps.append(data)
        return {"steps": steps, **({"seed": self.seed} if self.seed else {})}

    def dump(self, path: str | Path | None = None) -> str:
        """YAML text, also written to `path` when given."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> Recipe:
        """From a YAML file, YAML text (anything with a line break) or plain data."""
        name, data = "recipe", source
        if isinstance(source, Mapping):
            check(source, name)
        elif isinstance(source, str) and "\n" in source:
            data = read(source, name)
        else:
            name = str(source)
            data = read(Path(source), f"recipe {shown(name)}")
        if not isinstance(data, Mapping) or not isinstance(data.get("steps"), list):
            raise InvalidRecipe(f"{name}: a recipe is a mapping with a list `steps`.")
        for key in data:
            if key in typing.get_type_hints(Step):
                raise InvalidRecipe(f"{name}: {key!r} belongs inside a step.")
            if key not in ("steps", "seed"):
                raise unknown(f"key in {name}", key, ["steps", "seed"])
        _check_length(name, data["steps"])
        _check_type(f"{name}: seed", data.get("seed", 0), int)
        hints = typing.get_type_hints(Step)
        steps = []
        for number, item in enumerate(data["steps"], start=1):
            where = f"{name}, step {number}"
            if not isinstance(item, Mapping):
                raise InvalidRecipe(f"{where}: expected keys such as method, at, keep.")
            known, own = item.get("method"), {}
            if isinstance(known, str) and known in REDUCERS:
                _refuse_composite(known)
                own = _fields(REDUCERS[known])
            item = {key: _frozen(v) if key == "noise" else v for key, v in item.items()}
            for key, value in item.items():
                if key not in hints and key in own:
                    raise InvalidRecipe(
                        f"{where}: {key!r} is a parameter of {known!r}: write it as "
                        f"params: {{{key}: {shown(value)}}}."
                    )
                if key not in hints:
                    raise unknown(f"key in {where}", key, hints)
                _check_type(f"{where}: {key}", value, hints[key])
            missing = [key for key in ("method", "at", "keep") if key not in item]
            if missing:
                raise InvalidRecipe(f"{where}: missing {', '.join(missing)}.")
            step = Step(**item)
            step.build()
            steps.append(step)
        return cls(tuple(steps), data.get("seed", 0))


def _check_length(name: str, steps: Sequence[Any]) -> None:
    if len(steps) > MOST_STEPS:
        raise InvalidRecipe(f"{name} has {len(steps):,} steps: {MOST_STEPS:,} are the most.")


def _check_diffusion(step: Step, site: Site) -> None:
    """What a step says about diffusion, at a site that has it."""
    noise = _frozen(step.noise)
    _check_type("noise", noise, tuple[float, float])
    object.__setattr__(step, "noise", noise)
    if not 0.0 <= noise[0] < noise[1] <= 1.0:
        raise InvalidRecipe(f"noise={noise}: give (least, most) from 0 (data) to 1 (noise).")
    if site.kind != "dit" and (step.until is not None or noise != (0.0, 1.0)):
        raise InvalidRecipe(f"until and noise are for diffusion transformers, not for {step.at!r}.")
    _check_type("until", step.until, str | None)
    if step.until is None:
        return
    end = Site.parse(step.until)
    if site.part or end.kind != "dit" or end.part or (end.layer or 0) <= (site.layer or 0):
        raise InvalidRecipe(
            f"at={step.at!r} until={step.until!r}: give two blocks such as at='dit.4', "
            f"until='dit.20', the second behind the first."
        )


def _frozen(value: Any) -> Any:
    """Lists as tuples, paths as text: YAML knows no others, and parameters are compared, hashed."""
    if isinstance(value, Path):
        return str(value)
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """The way back, for YAML."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def _check_budget(method: str, keep: Keep) -> None:
    """Raise where a method decides itself how many tokens stay, or cannot."""
    cls = REDUCERS[method]
    kind = "auto" if keep == "auto" else "fixed"
    if kind not in cls.budgets:
        allowed = "keep='auto'" if kind == "fixed" else "keep=0.25 or keep=64, for instance"
        if issubclass(cls, Rewriter):
            known = ", ".join(_fields(cls))
            allowed += f" (leave keep out: {known} say how many tokens there are)"
        raise InvalidBudget(f"{method!r}: keep={keep!r}, but it takes {allowed}.")


def _merges_itself(method: str) -> InvalidRecipe:
    return InvalidRecipe(f"{method!r} merges every token itself: leave merge out.")


def _refuse_composite(method: str) -> None:
    """A method of several steps is no step."""
    cls = REDUCERS[method]
    if issubclass(cls, Composite):
        steps = dict.fromkeys(part.method for part in cls().parts(Host(32), None))
        raise InvalidRecipe(
            f"{method!r} is made of several steps: use vtc.attach(model, {method!r}, ...), or "
            f"write its steps into the recipe: {', '.join(steps)} (see configs/)."
        )


def _fields(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _check_type(where: str, value: Any, hint: Any) -> None:
    """Raise when `value` does not fit the annotation: literals, unions, plain types."""
    if not _fits(value, hint):
        raise InvalidRecipe(f"{where}: {shown(value)} is not {_name(hint)}.")


def _name(hint: Any) -> str:
    """`float | int | 'auto'`."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_name, typing.get_args(hint)))
    if origin is tuple:
        parts = ("..." if part is ... else _name(part) for part in typing.get_args(hint))
        return f"({', '.join(parts)})"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        parts = typing.get_args(hint)
        if parts[-1] is ...:
            parts = parts[:1] * len(value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
