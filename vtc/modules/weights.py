"""Weights in files: those of a module as one safetensors file, and models that other libraries
load. They are used only where everything was read, fits and is finite: nothing is cast from
integers, and nothing that is missing stays random."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInput, InvalidWeights

#: what files call their dtypes -> what torch calls them
_KINDS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
#: those that are cast to each other; smaller floats need scales that no cast knows
_FLOATS = ("float64", "float32", "float16", "bfloat16")

#: how pickles begin: archives of torch.save, and plain ones by protocol
_PICKLES = (b"PK", *(bytes((0x80, protocol)) for protocol in range(2, 6)))


def save_weights(module: nn.Module, path: str | Path, about: Mapping[str, str]) -> None:
    """Write all weights; `about`: settings that their shapes do not tell."""
    from safetensors.torch import save_file

    if not Path(path).parent.is_dir():
        raise InvalidInput(f"cannot write {str(path)!r}: there is no folder {Path(path).parent}")
    state = {k: v.detach().cpu().contiguous().clone() for k, v in _own(module).items()}
    save_file(state, str(path), metadata={"format": "pt", **about})


def load_weights(
    module: nn.Module,
    path: str | Path,
    about: Mapping[str, str] | None = None,
    known: Callable[[str], str] = str,
) -> None:
    """Read weights into `module`, in its own dtype and on its own device.

    Args:
        about: settings that the file has to agree with, as far as it has them.
        known: from the name of a weight in the file to its name in `module`.

    Raises:
        InvalidWeights: there is no such file or it cannot be read; its names, shapes, dtypes or
            settings are not those of `module`; or a number in it is not finite, as it is stored or
            in the module's own dtype.
    """
    state, told = read_weights(path)
    state = {known(name): value for name, value in state.items()}
    own = _own(module)
    kinds = {n: _kind(v) for n, v in state.items()}
    wrong = _differences(
        {n: tuple(v.shape) for n, v in own.items()}, {n: tuple(v.shape) for n, v in state.items()}
    )
    wrong += _of_other_kinds(
        {n: k for n, k in kinds.items() if n in own and k not in _fitting(_kind(own[n]))}
    )
    wrong += [
        f"{name} is {told[name]!r} there and {value!r} here"
        for name, value in (about or {}).items()
        if told.get(name, value) != value
    ]
    if wrong:
        raise InvalidWeights(
            f"the weights in {str(path)!r} do not fit this model: {'; '.join(wrong)}. Give the "
            f"file that was saved for a model of this width and depth, with these settings"
        )
    check_finite(state, path)
    state = {n: v.to(own[n].dtype) for n, v in state.items()}
    check_finite(state, path, f" in {', '.join(sorted({_kind(v) for v in own.values()}))}")
    module.load_state_dict(state, strict=False)  # names of tied weights are missing


def load_pretrained(load: Callable[..., Any], source: str | Path, **options: Any) -> Any:
    """A model that another library reads, checked as `load_weights` does. Tensors that the model
    has no place for are left alone, as those libraries do.

    Args:
        load: a `from_pretrained` of transformers or diffusers.
        source: a folder, or the id of a model on the hub.
        options: more for `load`.

    Raises:
        InvalidWeights: a file is damaged; weights are missing or of another shape, which would
            leave random ones; integers stand where the model has none; numbers are not finite.
    """
    try:
        model, info = load(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        if not _kinds_of(source):  # which says so where a damaged file is the reason
            raise InvalidWeights(
                f"no weights of {str(source)!r} were found: {_first(error)}. Give a folder as it "
                f"was saved"
            ) from error
        raise
    shapes = {n: f": {tuple(a)} there, {tuple(b)} here" for n, a, b in info["mismatched_keys"]}
    wrong = _listed(set(info["missing_keys"]) - shapes.keys(), "missing")
    wrong += _listed(shapes, "of another shape", shapes.__getitem__)
    state = _own(model)
    if getattr(model.config, "quantization_config", None) is None:
        whole = {_leaf(n) for n, v in state.items() if not v.is_floating_point()}
        kinds = _kinds_of(source).items()
        wrong += _of_other_kinds(
            {n: k for n, k in kinds if k not in _FLOATS and _leaf(n) not in whole}
        )
    if wrong:
        raise InvalidWeights(
            f"the weights in {str(source)!r} do not fit this model: {'; '.join(wrong)}. Give the "
            f"files that were saved together for it"
        )
    check_finite({n: v for n, v in state.items() if not v.is_meta}, source)
    return model


# ---------------------------------------------------------------------- files


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """All tensors of a safetensors file, and the settings beside them."""
    from safetensors import safe_open

    with _reading(path), safe_open(str(path), "pt") as file:
        about = file.metadata() or {}
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def read_settings(path: str | Path) -> dict[str, Any]:
    """The JSON object that says which module the weights beside it belong to."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidWeights(
            f"cannot read {str(path)!r}: {_first(error)}. Give a folder as it was saved"
        ) from error
    if not isinstance(found, dict):
        raise InvalidWeights(f"{str(path)!r} holds no JSON object. Give a folder as it was saved")
    return found


@contextmanager
def building(path: str | Path) -> Iterator[None]:
    """Name the file of settings of which no module can be built."""
    try:
        yield
    except Exception as error:  # constructors raise anything for values that nobody expects
        raise InvalidWeights(
            f"{str(path)!r} describes no model that can be built: {type(error).__name__}: "
            f"{_first(error)}. Give a folder as it was saved"
        ) from error


def stored_dtype(path: str | Path) -> torch.dtype:
    """That of the first weight in a safetensors file that has a fraction."""
    kinds = [kind for kind in _stored(Path(path)).values() if kind in _FLOATS]
    return getattr(torch, kinds[0]) if kinds else torch.float32


def _kinds_of(source: str | Path) -> dict[str, str]:
    """Names -> dtypes in the files of a model that transformers or diffusers wrote."""
    from transformers.utils import cached_file

    folder = Path(source)
    if not folder.is_dir():  # an id on the hub, whose files are kept in a folder of their own
        folder = Path(cached_file(str(source), "config.json") or "").parent
    files = sorted(folder.glob("*model*.safetensors")) or sorted(folder.glob("*model*.bin"))
    return {name: kind for file in files for name, kind in _stored(file).items()}


def _stored(path: Path) -> dict[str, str]:
    """Names -> dtypes in a file, of which little more than the header is read."""
    from safetensors import safe_open

    with _reading(path):
        if path.suffix == ".bin":
            state = torch.load(path, map_location="meta", weights_only=True)
            return {name: _kind(value) for name, value in state.items()}
        with safe_open(str(path), "pt") as file:
            names = file.keys()
            kinds = {name: str(file.get_slice(name).get_dtype()) for name in names}
        return {name: _KINDS.get(kind, kind) for name, kind in kinds.items()}


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """One error for files that are missing, cut off, damaged, or something else."""
    try:
        yield
    except Exception as error:  # readers of damaged files raise anything
        why = _first(error)
        if Path(path).suffix == ".bin":
            why = "it is damaged, or a pickle of more than tensors"
        elif Path(path).is_file() and _begins(path) in _PICKLES:
            why = "it is a pickle, as torch.save writes them, which may hold code"
        raise InvalidWeights(
            f"cannot read weights from {str(path)!r}: {why}. Give a safetensors file"
        ) from error


def _begins(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2)


# ---------------------------------------------------------------------- what is wrong


def check_finite(state: Mapping[str, Tensor], path: str | Path, where: str = "") -> None:
    """Refuse weights that hold NaN or infinity. where: in which form they do."""
    ends = {n: v.detach().aminmax() for n, v in state.items() if castable(v) and v.numel()}
    finite = {n: torch.stack(tuple(pair)).isfinite().all() for n, pair in ends.items()}
    wrong = _listed([n for n, fine in finite.items() if not fine], f"not finite{where}")
    if wrong:
        raise InvalidWeights(
            f"weights in {str(path)!r} hold NaN or infinity: {wrong[0]}. Give weights of a "
            f"training that did not diverge, and a dtype that holds them"
        )


def castable(value: Tensor) -> bool:
    """Whether these are numbers with a fraction, of a size that needs no scale beside it."""
    return _kind(value) in _FLOATS


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module; weights that are tied have their first name only."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {n: v for n, v in state.items() if first.setdefault(id(v), n) == n}


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _fitting(kind: str) -> Collection[str]:
    """The dtypes that a file may have for a weight of this one."""
    return _FLOATS if kind in _FLOATS else (kind,)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _of_other_kinds(kinds: Mapping[str, str]) -> list[str]:
    return _listed(kinds, "of a dtype that is not cast", lambda n: f": {kinds[n]}")


def _differences(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is missing, too much or of another shape."""
    missing, more = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    other = [n for n in wanted.keys() & stored.keys() if wanted[n] != stored[n]]
    return (
        _listed(missing, "missing", lambda n: f" {wanted[n]}")
        + _listed(more, "too many", lambda n: f" {stored[n]}")
        + _listed(other, "of another shape", lambda n: f": {stored[n]} there, {wanted[n]} here")
    )


def _listed(
    names: Collection[str], what: str, detail: Callable[[str], str] = lambda _: ""
) -> list[str]:
    """How many there are, with an example; nothing for none."""
    first = min(names, default="")
    return [f"{len(names)} {what}, the first is {first}{detail(first)}"] if names else []
