"""Every error a user can meet. The text always says what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path


class VtcError(Exception):
    """Base class of every error raised on purpose by vtc."""


class UnknownName(VtcError, LookupError):
    """A method, adapter, parameter or configuration key that does not exist."""


class UnsupportedModel(VtcError, TypeError):
    """No adapter can attach to this model, or the model cannot run this way while attached."""


class UnsupportedSite(VtcError, ValueError):
    """The model does not have this site, or the method does not work there."""


class MissingSignal(VtcError, ValueError):
    """A method needs a signal that this model does not offer at this site."""


class InvalidBudget(VtcError, ValueError):
    """A keep ratio, token count or schedule that makes no sense."""


class InvalidRecipe(VtcError, ValueError):
    """A recipe that cannot be read: wrong key, wrong type, wrong value."""


class InvalidInput(VtcError, ValueError):
    """Tensors that cannot be reduced: NaN, empty batch, inconsistent masks."""


class InvalidWeights(InvalidInput):
    """A file of weights that cannot be read, does not fit, or holds what is not a finite number."""


class InvalidPlan(VtcError, ValueError):
    """A method returned a plan that breaks the contract of `vtc.plan.Plan`."""


class InvalidVideo(VtcError, ValueError):
    """A file that is no video, or a damaged one, or one without the frames that were asked for."""


class InvalidQuestions(VtcError, ValueError):
    """A file of questions that cannot be read, or that holds none."""


class OutputRefused(VtcError, RuntimeError):
    """An output that cannot be written: the disk refuses, another run is writing it, or it holds
    answers of another run."""


class NothingReduced(VtcError, RuntimeError):
    """A session ended and a step that should have reduced tokens never did."""


class PluginWarning(UserWarning):
    """A method of another package is left out, because it cannot be used."""


def unknown(kind: str, name: object, known: Iterable[str], hint: str = "") -> UnknownName:
    """An `UnknownName` that lists what exists and suggests the nearest spelling."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownName(f"unknown {kind} {name!r}.{guess} Known: {', '.join(names)}.{hint}")


#: what to do where the system refuses to write
_REFUSED = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), " Free some space, or name another place."),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), " Name another place."),
}


def storage(error: OSError, doing: str = "read or write", path: str | Path | None = None) -> str:
    """What the system said about a file, in one line: the name, the reason, what to do.

    path: where the error itself names none, or another name is the one that was given.
    """
    name = error.filename if path is None else path
    where = "" if name is None else f" {str(name)!r}"
    why = error.strerror or " ".join(str(error).split()) or type(error).__name__
    advice = _REFUSED.get(error.errno or 0, "") if "write" in doing else ""
    return f"cannot {doing}{where}: {why.rstrip('.')}.{advice}"
