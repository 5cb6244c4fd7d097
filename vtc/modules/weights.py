"""Weights of a module as one safetensors file, read back only where everything fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import InvalidInput


def save_weights(module: nn.Module, path: str | Path, about: Mapping[str, str]) -> None:
    """Write all weights; `about`: settings that their shapes do not tell."""
    from safetensors.torch import save_file

    if not Path(path).parent.is_dir():
        raise InvalidInput(f"cannot write {str(path)!r}: there is no folder {Path(path).parent}")
    state = {k: v.detach().cpu().contiguous().clone() for k, v in _own(module).items()}
    save_file(state, str(path), metadata={"format": "pt", **about})


def load_weights(module: nn.Module, path: str | Path, about: Mapping[str, str]) -> None:
    """Read weights into `module`, in its own dtype and on its own device.

    Raises:
        ValueError: there is no such file, or its names, shapes or settings are not those of
            `module` (settings are compared as far as the file has them).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            told: Mapping[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidInput(
            f"cannot read weights from {str(path)!r}: {error}. Give a safetensors file"
        ) from error
    wanted = {n: tuple(v.shape) for n, v in _own(module).items()}
    stored = {n: tuple(v.shape) for n, v in state.items()}
    wrong = _differences(wanted, stored) + [
        f"{name} is {told[name]!r} there and {value!r} here"
        for name, value in about.items()
        if told.get(name, value) != value
    ]
    if wrong:
        raise InvalidInput(
            f"the weights in {str(path)!r} do not fit this model: {'; '.join(wrong)}. Give the "
            f"file that was saved for a model of this width and depth, with these settings"
        )
    module.load_state_dict(state, strict=False)  # names of tied weights are missing


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module; weights that are tied have their first name only."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {n: v for n, v in state.items() if first.setdefault(id(v), n) == n}


def _differences(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is missing, too much or of another shape, with an example each."""
    missing, more = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    other = sorted(n for n in wanted.keys() & stored.keys() if wanted[n] != stored[n])
    return [
        f"{len(names)} {what}, the first is {names[0]}{detail(names[0])}"
        for names, what, detail in (
            (missing, "missing", lambda n: f" {wanted[n]}"),
            (more, "too many", lambda n: f" {stored[n]}"),
            (other, "of another shape", lambda n: f": {stored[n]} there, {wanted[n]} here"),
        )
        if names
    ]
