"""What of a frozen collection is not as in TorchRec, on purpose (``docs/frozen_tables_manual.md``).

Every entry says of which cases it speaks and what ours must do in them. A case that differs and is of no
entry is a fault.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torchrec.modules.embedding_configs import PoolingType

from mim_torchrec.benchmarks.parity.configurations import Configuration
from mim_torchrec.benchmarks.parity.outcomes import Outcome, difference

ERRORS = (
    "cannot reshape tensor of 0 elements",  # no examples
    "Expected input_num_indices[0] > 0",  # likewise, where batch sizes vary by feature
    "pre-allocated vbe_output is not supported on CPU",  # several poolings where batch sizes vary by feature
)
NAMED = (ValueError, TypeError, IndexError)
FAILS = "TorchRec's sharded collection fails on a CPU"
EQUAL, REFUSED, DOCUMENTED, DIFFERS = "equal", "refused_by_both", "documented", "differs"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration, built in one way, on one rank.

    Args:
        configuration: what was built.
        way: "unsharded", "sharded on 1" or "sharded on 2".
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
            and not difference({"": self.reference.gradient}, {"": self.ours.gradient})
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


def _weighted_mean(case: Case) -> bool:
    fault = case.configuration.fault == "weighted mean"
    return case.is_sharded and fault and isinstance(case.ours.error, ValueError)


def _row_wise_mean(case: Case) -> bool:
    made = case.configuration
    names = [name for table in made.tables for name in table.features]
    means = made.pooled and PoolingType.MEAN in [table.pooling for table in made.tables]
    is_wrong = made.variable_batch or len(set(names)) < len(names)
    return case.is_sharded and made.sharding == "row_wise" and means and is_wrong and case.ours_is_right


def _theirs_fails(case: Case) -> bool:
    is_known = any(text in str(case.theirs.error) for text in ERRORS)
    return case.is_sharded and is_known and not case.configuration.fault and case.ours_is_right


DIFFERENCES: dict[str, Callable[[Case], bool]] = {
    "duplicate keys are refused": _duplicate_keys,
    "rows outside the table are refused": _rows_outside,
    "ids that are not integers are refused": _float_ids,
    "a weighted collection without weights is refused": _missing_weights,
    "weights of an unweighted collection are ignored": _weights_of_a_mean,
    "a weighted mean is refused": _weighted_mean,
    "means divide by the lengths of their own bags": _row_wise_mean,
    FAILS: _theirs_fails,
}


def judge(case: Case) -> tuple[str, str]:
    """Return EQUAL, REFUSED, DOCUMENTED or DIFFERS, and the documented difference or what differs."""
    theirs, ours = case.theirs, case.ours
    if theirs.error is not None and ours.error is not None:
        if isinstance(ours.error, NAMED) or repr(ours.error) == repr(theirs.error):  # of the batch itself
            return REFUSED, ""
        return DIFFERS, f"{case.way}: ours raised {ours.error!r}, which names nothing"
    detail = f"TorchRec raised {theirs.error!r}, ours raised {ours.error!r}"
    if theirs.found is not None and ours.found is not None:
        detail = difference(theirs.found, ours.found)
        if not detail and case.reference.found is not None:
            # TorchRec's sharded collections give weights no gradient
            detail = difference({"gradient": case.reference.gradient}, {"gradient": ours.gradient})
        if not detail:
            return EQUAL, ""
    for name, speaks_of in DIFFERENCES.items():
        if speaks_of(case):
            return DOCUMENTED, name
    return DIFFERS, f"{case.way}: {detail}"
