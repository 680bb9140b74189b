"""Requests for scores over gRPC: from messages to what HTTP's bodies are read to, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.messages import BadRequest, ScoreRequest, Scores
from mim_torchrec.serving.protocol import (
    InferRequest,
    checked,
    outputs,
    read_requests,
    unknown_parameters,
)
from mim_torchrec.serving.rpc_messages import message
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.tensors import to_bytes

CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents",
    "UINT32": "uint_contents", "UINT64": "uint64_contents", "FP32": "fp32_contents",
    "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""By datatype the field of typed contents; FP16 has none."""


def read_message(request: Any, limits: Limits, scorer: Scorer) -> tuple[InferRequest, list[ScoreRequest]]:
    """The message and the requests of its users.

    Args:
        request: a ModelInferRequest.
        limits: of requests.
        scorer: of the model.

    Raises:
        BadRequest: it is no request that the model can score.
    """
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequest(f"raw_input_contents has {len(raw)} tensors, and inputs has {len(request.inputs)}")
    inputs, binary = [], {}
    for number, given in enumerate(request.inputs):
        one = {"name": given.name, "shape": list(given.shape), "datatype": given.datatype,
               "parameters": _parameters(given.parameters)}  # fmt: skip
        if raw:
            if given.HasField("contents"):
                raise BadRequest(f"the tensor {given.name}: it has both contents and raw_input_contents")
            binary[given.name] = memoryview(raw[number])
        else:
            one["data"] = _values(given)
        inputs.append(one)
    asked = [{"name": one.name, "parameters": _parameters(one.parameters)} for one in request.outputs]
    made = {"id": request.id or None, "inputs": inputs, "outputs": asked or None,
            "parameters": _parameters(request.parameters)}  # fmt: skip
    sent = checked(lambda: InferRequest.model_validate(made))
    return sent, read_requests(sent, scorer, limits, binary)


def write_message(request: Any, sent: InferRequest, found: Sequence[Scores], name: str, version: str) -> Any:
    """The ModelInferResponse: its outputs are raw where the inputs of the request are.

    Args:
        request: the ModelInferRequest.
        sent: the same, read.
        found: scores of its users.
        name: of the model.
        version: of the model.
    """
    made = message("ModelInferResponse")(model_name=name, model_version=version, id=sent.id or "")
    for kind, count in unknown_parameters(found).items():
        made.parameters[kind].int64_param = count
    for output, values, _ in outputs(sent, found):
        one = made.outputs.add(name=output, datatype="FP32", shape=list(values.shape))
        if request.raw_input_contents:
            made.raw_output_contents.append(to_bytes(values))
        else:
            one.contents.fp32_contents.extend(values.flatten().tolist())
    return made


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    said = {name: (one, one.WhichOneof("parameter_choice")) for name, one in given.items()}
    return {name: getattr(one, choice) for name, (one, choice) in said.items() if choice is not None}


def _values(given: Any) -> list[Any]:
    """The typed contents of a tensor."""
    field = CONTENTS.get(given.datatype)
    wrong = [one.name for one, _ in given.contents.ListFields() if one.name != field]
    if wrong:
        there = f"in {field}" if field else "by raw_input_contents"
        raise BadRequest(
            f"the tensor {given.name}: values of {given.datatype} are sent {there}, not in {wrong[0]}"
        )
    if field is None:
        return []
    values = list(getattr(given.contents, field))
    if field != "bytes_contents":
        return values
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError as error:
        raise BadRequest(f"the tensor {given.name}: its values are text in UTF-8: {error}") from None
