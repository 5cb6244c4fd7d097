"""How a check says that a method breaks a contract."""

from __future__ import annotations

from ..errors import VtcError


class ContractBroken(VtcError, AssertionError):
    """A method does not do what every method promises."""


def require(ok: bool, says: str) -> None:
    """Raise `ContractBroken` unless `ok`."""
    if not ok:
        raise ContractBroken(says)
