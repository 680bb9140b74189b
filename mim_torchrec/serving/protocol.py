"""The Open Inference Protocol v2: from a body to a request for scores, and from scores to a body.

A body is JSON, or JSON followed by the bytes of tensors (the extension of binary tensor data). Ids and
categories are sent as the log has them: BYTES where they are text or UUIDs, else integers. Outputs: `score`
(n), of a model with a second label `second_score` (n), and on request `second_score_given_click` (n) and
`content_contribution` (n). What inputs there are `inputs.py` says.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, WithJsonSchema
from torch import Tensor

from mim_torchrec.data.features import Ids, Numbers
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.inputs import (
    CONTRIBUTION,
    GIVEN_CLICK,
    SCORE,
    SECOND,
    Input,
    inputs_of,
    outputs_of,
)
from mim_torchrec.serving.messages import BadRequest, Explanation, ScoreRequest, Scores
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.tensors import BadTensor, from_bytes, from_json, to_bytes

LONGEST_NAME = 128
EXPLAIN = "explain_"
"""What the names of outputs that explain others begin with."""
NOT_SUPPORTED = ("shared_memory_region", "classification")
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Datatype = Literal["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16",
                   "FP32", "FP64", "BYTES"]  # fmt: skip
_VALUES = [{"type": kind} for kind in ("integer", "number", "string", "boolean")]
_NESTED = {"type": "array", "items": {"anyOf": _VALUES}}
Data = Annotated[
    list[Any],
    WithJsonSchema({"type": "array", "items": {"anyOf": [*_VALUES, _NESTED]}}),
]


class Strict(BaseModel):
    """A message whose fields are known."""

    model_config = ConfigDict(extra="forbid")


class InputParameters(BaseModel):
    """What may be said of a tensor; other parameters are left alone."""

    model_config = ConfigDict(extra="allow")

    binary_data_size: Annotated[StrictInt, Field(ge=0)] | None = None
    """Bytes of the tensor behind the JSON; the tensor has no `data` then."""


class InferInput(Strict):
    """A tensor of a request."""

    name: Name
    shape: Annotated[list[Annotated[StrictInt, Field(ge=0, le=10**9)]], Field(min_length=1, max_length=2)]
    datatype: Datatype
    data: Data | None = None
    parameters: InputParameters | None = None

    @property
    def binary_size(self) -> int | None:
        """Bytes behind the JSON, None where the values are in it."""
        return None if self.parameters is None else self.parameters.binary_data_size


class OutputParameters(BaseModel):
    """What may be said of an output; other parameters are left alone."""

    model_config = ConfigDict(extra="allow")

    binary_data: bool | None = None
    """Whether its values come as bytes behind the JSON."""


class InferOutput(Strict):
    """A tensor that is asked for."""

    name: Literal["score", "content_contribution", "second_score", "second_score_given_click"]
    parameters: OutputParameters | None = None


class InferParameters(BaseModel):
    """What a request may say besides its tensors; other parameters are left alone."""

    model_config = ConfigDict(extra="allow")

    timeout_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = None
    """Milliseconds after which no answer is wanted; at most those of the server."""
    timeout: Annotated[int, Field(ge=0)] | None = None
    """The same in microseconds, as Triton's clients say it; 0 is that of the server."""
    table_version: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    """Version that the vectors must have."""
    explain: bool = False
    """Whether to answer what every interest and every behavior contributed as well."""
    binary_data_output: bool | None = None
    """Whether outputs that do not say it themselves come as bytes behind the JSON."""


class InferRequest(Strict):
    """A request for scores."""

    id: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    model_name: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    """Of the model, as clients of KServe send it; the one of the address."""
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=64)]
    outputs: Annotated[list[InferOutput], Field(max_length=4)] | None = None
    parameters: InferParameters | None = None

    @property
    def patience_ms(self) -> float | None:
        """Milliseconds that the client waits; None where it does not say."""
        if self.parameters is None:
            return None
        said = self.parameters.timeout_ms
        return self.parameters.timeout / 1000 if said is None and self.parameters.timeout else said


def read_body(body: bytes, header_length: int | None = None) -> tuple[InferRequest, dict[str, memoryview]]:
    """The request in a body, and the bytes of its tensors by name.

    Args:
        body: of the HTTP request, not compressed.
        header_length: bytes of JSON at its beginning; None where all of it is JSON.

    Raises:
        BadRequest: it is no such request.
    """
    if header_length is not None and not 0 < header_length <= len(body):
        raise BadRequest(
            f"the body has {len(body)} bytes, and its header names {header_length} bytes of JSON"
        )
    try:
        sent = InferRequest.model_validate_json(body if header_length is None else body[:header_length])
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{place}: {first['msg']}" if place else first["msg"]) from None
    for said in (*sent.inputs, *(sent.outputs or ())):
        for name in said.parameters.model_extra or () if said.parameters is not None else ():
            if name in NOT_SUPPORTED:
                raise BadRequest(f"{said.name}: the parameter {name} is not supported")
    return sent, _split(sent, memoryview(body)[len(body) if header_length is None else header_length :])


def _split(sent: InferRequest, rest: memoryview) -> dict[str, memoryview]:
    """What is behind the JSON, by tensor."""
    parts, at = {}, 0
    for given in sent.inputs:
        if given.binary_size is not None:
            parts[given.name] = rest[at : at + given.binary_size]
            at += given.binary_size
    if at != len(rest):
        raise BadRequest(f"the tensors have {at} bytes behind the JSON, and {len(rest)} were sent")
    return parts


def read_request(
    sent: InferRequest, scorer: Scorer, limits: Limits, binary: Mapping[str, memoryview] | None = None
) -> ScoreRequest:
    """The request that tensors make.

    Args:
        sent: the message.
        scorer: of the model.
        limits: of requests.
        binary: bytes of tensors by name, see `read_body`.

    Raises:
        BadRequest: a tensor is missing, not known, of another type or size, or too large.
    """
    names = [given.name for given in sent.inputs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadRequest(f"the tensor {twice[0]} is there twice")
    known = inputs_of(scorer)
    if surplus := sorted(set(names) - known.keys()):
        raise BadRequest(f"the model has no input {surplus[0]!r}; it has {', '.join(sorted(known))}")
    there = outputs_of(scorer)
    if lacking := [output.name for output in sent.outputs or () if output.name not in there]:
        raise BadRequest(f"the model has no output {lacking[0]!r}; it has {', '.join(there)}")
    if missing := sorted({name for name, one in known.items() if one.required} - set(names)):
        raise BadRequest(f"the tensor {missing[0]} is missing: the model needs the feature {missing[0]}")
    tensors = {given.name: _tensor(given, known[given.name], binary or {}) for given in sent.inputs}
    counts = {role: tensors[f"{role}_item_id"].numel() for role in ("candidate", "behavior")}
    if not counts["candidate"]:
        raise BadRequest("there is no candidate")
    if counts["candidate"] > limits.max_candidates:
        raise BadRequest(f"{counts['candidate']} candidates are more than {limits.max_candidates}")
    if counts["behavior"] > limits.max_behaviors:
        raise BadRequest(f"{counts['behavior']} behaviors are more than {limits.max_behaviors}")
    for name, values in tensors.items():
        expected = counts.get(known[name].owner, 1)
        if not known[name].is_list and values.numel() != expected:
            raise BadRequest(f"the tensor {name} has {values.numel()} values, expected {expected}")
    times = tensors.pop("behavior_ts", None)
    moment = tensors.pop("request_ts", None)
    if times is not None and moment is not None and bool((times > moment).any()):
        raise BadRequest("a behavior is after its request")
    made = ScoreRequest(
        ids={name: values for name, values in tensors.items() if isinstance(known[name].kind, Ids)},
        dense={name: values for name, values in tensors.items() if isinstance(known[name].kind, Numbers)},
        request_ts=None if moment is None else int(moment),
        behavior_ts=times,
        contribution=any(output.name == CONTRIBUTION for output in sent.outputs or ()),
        explain=sent.parameters is not None and sent.parameters.explain,
    )
    if made.explain and (pairs := scorer.recent(made).num_pairs) > limits.explain_pairs:
        raise BadRequest(
            f"an explanation takes {pairs} pairs of candidate and behavior, more than "
            f"{limits.explain_pairs}; send fewer candidates, or behaviors"
        )
    return made


def _tensor(given: InferInput, known: Input, binary: Mapping[str, memoryview]) -> Tensor:
    """The values of a tensor, as they are read of a column of the same kind."""
    name, accepted = given.name, known.datatypes
    if given.datatype not in accepted:
        of = "" if known.id_type is None else f", the ids of the training data are {known.id_type}"
        raise BadRequest(f"the tensor {name} is {given.datatype}, expected {', '.join(accepted)}{of}")
    try:
        if name in binary:
            if given.data is not None:
                raise BadTensor("it has both data and binary_data_size")
            values = from_bytes(given.datatype, given.shape, binary[name])
        elif given.data is None:
            raise BadTensor("it has neither data nor binary_data_size")
        else:
            values = from_json(given.datatype, given.shape, given.data)
        return torch.from_numpy(known.kind.read(values).copy())
    except (BadTensor, pa.ArrowException) as error:
        raise BadRequest(f"the tensor {name}: {error}") from None


def explanation_outputs(explanation: Explanation) -> dict[str, Tensor]:
    """The outputs of an answer that explain it, by name; see `Explanation`."""
    found = {f"{EXPLAIN}logit": explanation.logits}
    found |= {f"{EXPLAIN}{name}": lost for name, lost in explanation.interests.items()}
    found[f"{EXPLAIN}behavior"] = explanation.behaviors
    if explanation.relevance is not None:
        found[f"{EXPLAIN}relevance"] = explanation.relevance
    return found


def write_response(sent: InferRequest, found: Scores, name: str, version: str) -> tuple[bytes, int | None]:
    """What is answered.

    Args:
        sent: the request.
        found: its scores.
        name: of the model.
        version: of the model.

    Returns:
        The body, and how many bytes of JSON it begins with; None where all of it is JSON.
    """
    asked: list[tuple[str, OutputParameters | None]] = [(SCORE, None)]
    if found.second is not None:
        asked.append((SECOND, None))
    if sent.outputs:
        asked = [(output.name, output.parameters) for output in sent.outputs]
    by_default = sent.parameters is not None and sent.parameters.binary_data_output is True
    # a model without content interest has nothing that it contributes
    nothing = torch.zeros_like(found.scores)
    values = {
        SCORE: found.scores,
        CONTRIBUTION: nothing if found.contribution is None else found.contribution,
    }
    if found.second is not None:
        values |= dict(zip((SECOND, GIVEN_CLICK), found.second, strict=True))
    if found.explanation is not None:
        explained = explanation_outputs(found.explanation)
        values |= explained
        asked += [(name, None) for name in explained]
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for output, parameters in asked:
        data = values[output]
        described: dict[str, Any] = {"name": output, "shape": list(data.shape), "datatype": "FP32"}
        said = None if parameters is None else parameters.binary_data
        if by_default if said is None else said:
            parts.append(to_bytes(data))
            described["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            described["data"] = data.flatten().tolist()
        outputs.append(described)
    body: dict[str, Any] = {} if sent.id is None else {"id": sent.id}
    body |= {"model_name": name, "model_version": version, "outputs": outputs,
             "parameters": {f"unknown_{kind}": count for kind, count in found.unknown.items()}}  # fmt: skip
    written = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    return b"".join([written, *parts]), len(written) if parts else None
