"""The Open Inference Protocol v2: from JSON tensors to a request, and from scores to JSON tensors.

Inputs by name: `user_id` (1), `candidate_item_id` (n) and `behavior_item_id` (m, oldest first). If the model
was trained with them: `query_id` (1), `candidate_category` and `behavior_category` (n, m), `request_ts` (1)
and `behavior_ts` (m, microseconds since 1970), and further features by name: those that begin with
`candidate_` (n), with `behavior_` (m), and those of the request. Ids and categories are sent as the log has
them: BYTES where they are text or UUIDs, else INT64, INT32 or UINT64. Outputs: `score` (n), of a model with a
second label `second_score` (n), and on request `second_score_given_click` (n) and `content_contribution` (n).
"""

from math import isfinite, prod
from typing import Annotated, Any, Literal

import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr
from torch import Tensor

from mim_torchrec.data.features import Ids, Numbers, StableIds
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.scorer import BadRequest, Scorer, ScoreRequest, Scores

SCORE, CONTRIBUTION = "score", "content_contribution"
SECOND, GIVEN_CLICK = "second_score", "second_score_given_click"
INTEGERS = {"INT64": pa.int64(), "INT32": pa.int32(), "UINT64": pa.uint64()}
DATATYPES = {"FP32": pa.float32(), "FP64": pa.float64(), **INTEGERS, "BYTES": pa.string()}
TIMES = ("request_ts", "behavior_ts")
LONGEST_NAME = 128
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]


class Strict(BaseModel):
    """A message whose fields are known."""

    model_config = ConfigDict(extra="forbid")


class InferInput(Strict):
    """A tensor of a request."""

    name: Name
    shape: Annotated[list[Annotated[StrictInt, Field(ge=0, le=10**9)]], Field(min_length=1, max_length=2)]
    datatype: Literal["INT64", "INT32", "UINT64", "FP32", "FP64", "BYTES"]
    data: Annotated[list[StrictInt | StrictFloat | StrictStr], Field(max_length=200_000)]
    parameters: dict[str, Any] | None = None


class InferOutput(Strict):
    """A tensor that is asked for."""

    name: Literal["score", "content_contribution", "second_score", "second_score_given_click"]
    parameters: dict[str, Any] | None = None


class InferParameters(BaseModel):
    """What a request may say besides its tensors; other parameters are left alone."""

    model_config = ConfigDict(extra="allow")

    timeout_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = None
    table_version: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None


class InferRequest(Strict):
    """A request for scores."""

    id: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=64)]
    outputs: Annotated[list[InferOutput], Field(max_length=4)] | None = None
    parameters: InferParameters | None = None


class _Times(Ids):
    """Microseconds."""

    def accepts(self, value: pa.DataType) -> bool:
        return pa.types.is_integer(value)


def inputs_of(scorer: Scorer) -> dict[str, Ids | Numbers]:
    """The inputs of a model by name, and what each holds."""
    names = [*scorer.of_requests, *scorer.of_candidates, *_lists(scorer)]
    kinds = {name: feature.kind for name, feature in scorer.features.by_name.items()}
    own = {name: Ids() if name.endswith("_category") else StableIds() for name in names}
    return {**own, **dict.fromkeys(TIMES, _Times()), **kinds}


def outputs_of(scorer: Scorer) -> list[str]:
    """The outputs of a model by name."""
    return [SCORE, CONTRIBUTION, *((SECOND, GIVEN_CLICK) if scorer.config.second_label is not None else ())]


def datatypes(kind: Ids | Numbers) -> list[str]:
    """Types of tensors that an input may have, the usual one first."""
    return [name for name, value in DATATYPES.items() if kind.accepts(value)]


def _lists(scorer: Scorer) -> list[str]:
    return [f"{role}_{name}" for name in scorer.of_items for role in ("candidate", "behavior")]


def read_request(sent: InferRequest, scorer: Scorer, limits: Limits) -> ScoreRequest:
    """The request that tensors make.

    Raises:
        BadRequest: a tensor is missing, not known, of another type or size, or too large.
    """
    names = [given.name for given in sent.inputs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadRequest(f"the tensor {twice[0]} is there twice")
    known = inputs_of(scorer)
    lists = _lists(scorer)
    if surplus := sorted(set(names) - known.keys()):
        raise BadRequest(f"the model has no input {surplus[0]!r}; it has {', '.join(sorted(known))}")
    if lacking := [one.name for one in sent.outputs or () if one.name not in outputs_of(scorer)]:
        raise BadRequest(f"the model has no output {lacking[0]!r}; it has {', '.join(outputs_of(scorer))}")
    if missing := sorted({"user_id", "candidate_item_id", "behavior_item_id", *lists} - set(names)):
        raise BadRequest(f"the tensor {missing[0]} is missing")
    tensors = {given.name: _tensor(given, known[given.name]) for given in sent.inputs}
    candidates, behaviors = (tensors[f"{role}_item_id"].numel() for role in ("candidate", "behavior"))
    if not candidates:
        raise BadRequest("there is no candidate")
    if candidates > limits.max_candidates:
        raise BadRequest(f"{candidates} candidates are more than {limits.max_candidates}")
    if behaviors > limits.max_behaviors:
        raise BadRequest(f"{behaviors} behaviors are more than {limits.max_behaviors}")
    for name, values in tensors.items():
        expected = {"candidate": candidates, "behavior": behaviors}.get(name.split("_")[0], 1)
        if name in scorer.of_requests and name in scorer.features.by_name:
            continue  # a list of any length, whose embeddings are averaged
        if values.numel() != expected:
            raise BadRequest(f"the tensor {name} has {values.numel()} values, expected {expected}")
    times = tensors.pop("behavior_ts", None)
    moment = tensors.pop("request_ts", None)
    if times is not None and moment is not None and bool((times > moment).any()):
        raise BadRequest("a behavior is after its request")
    return ScoreRequest(
        ids={name: values for name, values in tensors.items() if isinstance(known[name], Ids)},
        dense={name: values for name, values in tensors.items() if isinstance(known[name], Numbers)},
        request_ts=None if moment is None else int(moment),
        behavior_ts=times,
        contribution=any(output.name == CONTRIBUTION for output in sent.outputs or ()),
    )


def _tensor(given: InferInput, kind: Ids | Numbers) -> Tensor:
    """The values of a tensor, as they are read of a column of the same kind."""
    name, data = given.name, given.data
    if prod(given.shape) != len(data):
        raise BadRequest(f"the tensor {name} has shape {given.shape} and {len(data)} values")
    if given.datatype not in (expected := datatypes(kind)):
        raise BadRequest(f"the tensor {name} is {given.datatype}, expected {', '.join(expected)}")
    if given.datatype == "BYTES":
        if not all(isinstance(value, str) for value in data):
            raise BadRequest(f"the tensor {name} is BYTES: its values are strings")
        stored = pa.string()
    elif given.datatype in INTEGERS and isinstance(kind, Ids):
        least, most = (0, 2**64) if given.datatype == "UINT64" else (-(2**63), 2**63)
        if not all(isinstance(value, int) and least <= value < most for value in data):
            raise BadRequest(f"the tensor {name}: its values are integers of 64 bits")
        stored = pa.uint64() if least == 0 else pa.int64()
    else:
        if not all(isinstance(v, int | float) and abs(v) < 3e38 and isfinite(v) for v in data):
            raise BadRequest(f"the tensor {name}: its values are finite numbers within float32")
        data, stored = [float(value) for value in data], pa.float64()
    try:
        return torch.from_numpy(kind.read(pa.array(data, stored)).copy())
    except (UnicodeEncodeError, pa.ArrowException) as error:
        raise BadRequest(f"the tensor {name}: {error}") from None


def write_response(sent: InferRequest, found: Scores, name: str, version: str) -> dict[str, Any]:
    """What is answered."""
    usual = [SCORE] if found.second is None else [SCORE, SECOND]
    asked: list[str] = [output.name for output in sent.outputs or ()] or usual
    # a model without content interest has nothing that it contributes
    nothing = torch.zeros_like(found.scores)
    values = {
        SCORE: found.scores,
        CONTRIBUTION: nothing if found.contribution is None else found.contribution,
    }
    if found.second is not None:
        values |= dict(zip((SECOND, GIVEN_CLICK), found.second, strict=True))
    outputs = []
    for output in asked:
        data = values[output].tolist()
        outputs.append({"name": output, "shape": [len(data)], "datatype": "FP32", "data": data})
    body = {"model_name": name, "model_version": version, "outputs": outputs,
            "parameters": {f"unknown_{kind}": count for kind, count in found.unknown.items()}}  # fmt: skip
    return body | ({"id": sent.id} if sent.id is not None else {})
