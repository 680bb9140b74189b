"""Inputs and outputs of a model as clients see them: requests are read by this table, and metadata shows it.

Inputs by name: `user_id` (1), `candidate_item_id` (n) and `behavior_item_id` (m, oldest first). If the model
was trained with them: `query_id` (1), `candidate_category` and `behavior_category` (n, m), `request_ts` (1)
and `behavior_ts` (m, microseconds since 1970), and further features by name: those that begin with
`candidate_` (n), with `behavior_` (m), and those of the request. A request of several users has a value of
`user_id`, `query_id` and `request_ts` for each, and lists with lengths (`users.py`).
"""

from dataclasses import dataclass

import pyarrow as pa

from mim_torchrec.data.features import Feature, Ids, Numbers, Role, StableIds
from mim_torchrec.data.id_types import INTEGERS, TEXT
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.lookups import ROLES
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.tensors import BYTES, DATATYPES

SCORE, CONTRIBUTION = "score", "content_contribution"
SECOND, GIVEN_CLICK = "second_score", "second_score_given_click"
LENGTHS = ".lengths"


class Whole(Ids):
    """Microseconds, or lengths of lists."""

    def accepts(self, value: pa.DataType) -> bool:
        return pa.types.is_integer(value)


@dataclass(frozen=True)
class Input:
    """An input of a model.

    Args:
        name: of the tensor.
        kind: what it holds.
        owner: what has one value of it: the request, each candidate or each behavior.
        is_list: whether a request has any number of values, whose embeddings are averaged.
        id_type: "text" or "integers" where it is known what the ids are in the log.
        required: whether the model needs it.
    """

    name: str
    kind: Ids | Numbers
    owner: Role
    is_list: bool = False
    id_type: str | None = None
    required: bool = True

    @property
    def datatypes(self) -> list[str]:
        """Datatypes that it may have, the usual one first."""
        accepted = [name for name, arrow in DATATYPES.items() if self.kind.accepts(arrow)]
        if self.id_type == INTEGERS and BYTES in accepted:
            accepted.remove(BYTES)
        if self.id_type == TEXT and BYTES in accepted:
            accepted.sort(key=lambda name: name != BYTES)
        return accepted


def outputs_of(scorer: Scorer) -> tuple[str, ...]:
    """The outputs of a model by name."""
    second = (SECOND, GIVEN_CLICK) if scorer.config.second_label is not None else ()
    return (SCORE, CONTRIBUTION, *second)


def inputs_of(scorer: Scorer) -> dict[str, Input]:
    """The inputs of a model by name.

    Raises:
        OptionError: a feature has the name of lengths.
    """
    tables, types = scorer.bundle.tables, scorer.bundle.id_types
    found: dict[str, Input] = {}

    def add(name: str, kind: Ids | Numbers, *, is_list: bool = False, required: bool = True) -> None:
        owner = Feature(name, kind).role
        shared = name.removeprefix(f"{owner}_")
        id_type = types.get(name if name in tables else shared)
        found[name] = Input(name, kind, owner, is_list, id_type, required)

    further = {name: feature.kind for name, feature in scorer.features.by_name.items()}
    for name in ("user_id", "candidate_item_id", "behavior_item_id"):
        add(name, StableIds())
    if "query_id" in scorer.lookups.of_requests:
        add("query_id", StableIds())
    for name in scorer.lookups.of_items:
        for role in ROLES:
            add(f"{role}_{name}", Ids() if name == "category" else StableIds())
    for name, kind in further.items():
        add(name, kind, is_list=name in scorer.lookups.of_requests)
    for name in ("request_ts", "behavior_ts"):
        add(name, Whole(), required=scorer.lookups.needs_times)
    for name in (*ROLES, *[name for name, one in found.items() if one.is_list]):
        if name + LENGTHS in found:
            raise OptionError(
                f"the feature {name}{LENGTHS} has the name of the lengths of {name}: rename its column"
            )
        found[name + LENGTHS] = Input(name + LENGTHS, Whole(), "request", required=False)
    return found
