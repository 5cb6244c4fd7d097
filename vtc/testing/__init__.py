"""The contracts of a method, to test one in a package of your own.

    from vtc import testing

    @pytest.mark.parametrize("case", testing.cases("my_method"), ids=str)
    def test_contract(case):
        case.check()

`testing.check_method("my_method")` runs the same without pytest, `testing.refusals("my_method")`
says what the cases leave out. Models are tiny random instances of real classes of transformers
(`testing.families`); what is right says a model that masks dropped tokens instead of dropping them
(`testing.oracle`).
"""

from __future__ import annotations

from .cells import Cell
from .contract import Case, cases, check_method, refusals
from .errors import ContractBroken
from .families import FAMILIES

__all__ = ["FAMILIES", "Case", "Cell", "ContractBroken", "cases", "check_method", "refusals"]
