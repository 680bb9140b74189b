"""What of a frozen collection is not as in TorchRec, on purpose: the list of ``docs/frozen_tables.md``.

Every entry says of which cases it speaks and what ours must do in them. A case that differs and is of no
entry is a fault.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mim_torchrec.benchmarks.parity.configurations import Configuration
from mim_torchrec.benchmarks.parity.outcomes import Outcome, difference

EQUAL, REFUSED, DOCUMENTED, DIFFERS = "equal", "refused_by_both", "documented", "differs"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration, built in one way, on one rank.

    Args:
        configuration: what was built.
        way: "unsharded", "one rank" or "all ranks".
        theirs: what TorchRec's collection gave, built in this way.
        ours: what the frozen collection gave.
        reference: what TorchRec's unsharded collection gave, with the bags of all examples.
    """

    configuration: Configuration
    way: str
    theirs: Outcome
    ours: Outcome
    reference: Outcome

    @property
    def is_sharded(self) -> bool:
        return self.way != "unsharded"

    @property
    def ours_is_right(self) -> bool:
        """Whether ours gave what TorchRec's unsharded collection did."""
        return (
            self.ours.found is not None
            and self.reference.found is not None
            and not difference(self.reference.found, self.ours.found)
        )


def _duplicate_keys(case: Case) -> bool:
    return case.configuration.fault == "duplicate key" and isinstance(case.ours.error, ValueError)


def _rows_outside(case: Case) -> bool:
    fault = case.configuration.fault in ("row outside", "negative row")
    return case.is_sharded and fault and isinstance(case.ours.error, IndexError)


def _float_ids(case: Case) -> bool:
    fault = case.configuration.fault == "float values"
    return case.is_sharded and fault and isinstance(case.ours.error, TypeError)


def _missing_weights(case: Case) -> bool:
    fault = case.configuration.fault == "weights missing"
    return case.is_sharded and fault and isinstance(case.ours.error, ValueError)


def _weights_of_a_mean(case: Case) -> bool:
    made = case.configuration
    return case.is_sharded and made.has_weights and not made.is_weighted and case.ours_is_right


def _theirs_fails(case: Case) -> bool:
    fails = case.theirs.error is not None and not case.configuration.fault
    return case.is_sharded and fails and case.ours_is_right


DIFFERENCES: dict[str, Callable[[Case], bool]] = {
    "duplicate keys are refused": _duplicate_keys,
    "rows outside the table are refused": _rows_outside,
    "ids that are not integers are refused": _float_ids,
    "a weighted collection without weights is refused": _missing_weights,
    "weights of an unweighted collection are ignored": _weights_of_a_mean,
    "TorchRec's sharded collection fails on a CPU": _theirs_fails,
}


def judge(case: Case) -> tuple[str, str]:
    """Return EQUAL, REFUSED, DOCUMENTED or DIFFERS, and the documented difference or what differs."""
    theirs, ours = case.theirs, case.ours
    if theirs.error is not None and ours.error is not None:
        return REFUSED, ""
    detail = f"TorchRec raised {theirs.error!r}, ours raised {ours.error!r}"
    if theirs.found is not None and ours.found is not None:
        detail = difference(theirs.found, ours.found)
        if not detail:
            return EQUAL, ""
    for name, speaks_of in DIFFERENCES.items():
        if speaks_of(case):
            return DOCUMENTED, name
    return DIFFERS, f"{case.way}: {detail}"
