"""The Open Inference Protocol v2: from a body to a request for scores, and from scores to a body.

A body is JSON, or JSON followed by the bytes of tensors (the extension of binary tensor data). Ids and
categories are sent as the log has them: BYTES where they are text or UUIDs, else integers. Outputs: `score`
(n), of a model with a second label `second_score` (n), and on request `second_score_given_click` (n) and
`content_contribution` (n), n being the candidates of all users. `inputs.py` says what inputs there are.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, WithJsonSchema
from torch import Tensor

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
from mim_torchrec.serving.users import requests_of

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
    text = body if header_length is None else body[:header_length]
    sent = checked(lambda: InferRequest.model_validate_json(text))
    return sent, _split(sent, memoryview(body)[len(body) if header_length is None else header_length :])


def checked(parse: Callable[[], InferRequest]) -> InferRequest:
    """A message that keeps to the protocol.

    Args:
        parse: gives the message.

    Raises:
        BadRequest: it does not, or asks for what is not supported.
    """
    try:
        sent = parse()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{place}: {first['msg']}" if place else first["msg"]) from None
    for said in (*sent.inputs, *(sent.outputs or ())):
        for name in said.parameters.model_extra or () if said.parameters is not None else ():
            if name in NOT_SUPPORTED:
                raise BadRequest(f"{said.name}: the parameter {name} is not supported")
    return sent


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


def read_requests(
    sent: InferRequest, scorer: Scorer, limits: Limits, binary: Mapping[str, memoryview] | None = None
) -> list[ScoreRequest]:
    """The requests that tensors make, one for each user.

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
    shapes = {given.name: given.shape for given in sent.inputs}
    found = requests_of(
        tensors, shapes, known, limits,
        contribution=any(output.name == CONTRIBUTION for output in sent.outputs or ()),
        explain=sent.parameters is not None and sent.parameters.explain,
    )  # fmt: skip
    if found[0].explain:
        if len(found) > 1:
            raise BadRequest(f"an explanation is of one user, and user_id has {len(found)} values")
        if (pairs := scorer.recent(found[0]).num_pairs) > limits.explain_pairs:
            raise BadRequest(
                f"an explanation takes {pairs} pairs of candidate and behavior, more than "
                f"{limits.explain_pairs}; send fewer candidates, or behaviors"
            )
    return found


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


def outputs(sent: InferRequest, found: Sequence[Scores]) -> list[tuple[str, Tensor, bool]]:
    """The outputs that were asked for.

    Args:
        sent: the request.
        found: scores of its users.

    Returns:
        Name, values of all users in their order, (num_candidates,) but for some that explain, and whether
        they are wanted as bytes.
    """
    asked: list[tuple[str, OutputParameters | None]] = [(SCORE, None)]
    if found[0].second is not None:
        asked.append((SECOND, None))
    if sent.outputs:
        asked = [(output.name, output.parameters) for output in sent.outputs]
    by_default = sent.parameters is not None and sent.parameters.binary_data_output is True
    made = []
    for name, parameters in asked:
        said = None if parameters is None else parameters.binary_data
        values = torch.cat([_output(name, one) for one in found])
        made.append((name, values, by_default if said is None else said))
    explanation = found[0].explanation
    if explanation is not None:  # there is one user then
        made += [(name, values, by_default) for name, values in explanation_outputs(explanation).items()]
    return made


def _output(name: str, found: Scores) -> Tensor:
    if name == CONTRIBUTION:
        # a model without content interest has nothing that it contributes
        return torch.zeros_like(found.scores) if found.contribution is None else found.contribution
    if name == SCORE:
        return found.scores
    assert found.second is not None  # the request was refused otherwise
    return found.second[(SECOND, GIVEN_CLICK).index(name)]


def unknown_parameters(found: Sequence[Scores]) -> dict[str, int]:
    """What the `parameters` of an answer say of ids that stores do not know."""
    return {f"unknown_{kind}": sum(one.unknown[kind] for one in found) for kind in found[0].unknown}


def write_response(
    sent: InferRequest, found: Sequence[Scores], name: str, version: str
) -> tuple[bytes, int | None]:
    """What is answered over HTTP.

    Args:
        sent: the request.
        found: scores of its users.
        name: of the model.
        version: of the model.

    Returns:
        The body, and how many bytes of JSON it begins with; None where all of it is JSON.
    """
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for output, data, as_bytes in outputs(sent, found):
        one: dict[str, Any] = {"name": output, "shape": list(data.shape), "datatype": "FP32"}
        if as_bytes:
            parts.append(to_bytes(data))
            one["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            one["data"] = data.flatten().tolist()
        described.append(one)
    body: dict[str, Any] = {} if sent.id is None else {"id": sent.id}
    body |= {"model_name": name, "model_version": version, "outputs": described,
             "parameters": unknown_parameters(found)}  # fmt: skip
    written = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    return b"".join([written, *parts]), len(written) if parts else None
