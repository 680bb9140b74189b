"""The messages of the Open Inference Protocol over gRPC, as far as the server speaks them.

Names and numbers are those of the protocol's `open_inference_grpc.proto` (KServe, Apache-2.0) and, for
configuration, statistics and the repository's index, of Triton's `grpc_service.proto` (BSD-3-Clause). The
messages are described here and made in a pool of their own: generated code would be bound to a major version
of protobuf, and could not be loaded beside the code that clients of Triton and KServe bring.
"""

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2 as pb
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE, SERVICE = "inference", "inference.GRPCInferenceService"
_VERSIONED = {"name": (1, "string"), "version": (2, "string")}
_TENSOR = {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "repeated int64")}
_FILLED = _TENSOR | {"parameters": (4, "map InferParameter"), "contents": (5, "InferTensorContents")}
_DURATION = "StatisticDuration"
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": _VERSIONED,
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": _VERSIONED | {"extensions": (3, "repeated string")},
    "ModelMetadataRequest": _VERSIONED,
    "ModelMetadataResponse": {
        "name": (1, "string"), "versions": (2, "repeated string"), "platform": (3, "string"),
        "inputs": (4, "repeated ModelMetadataResponse.TensorMetadata"),
        "outputs": (5, "repeated ModelMetadataResponse.TensorMetadata"),
    },
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "InferParameter": {
        "bool_param": (1, "oneof bool"), "int64_param": (2, "oneof int64"),
        "string_param": (3, "oneof string"), "double_param": (4, "oneof double"),
        "uint64_param": (5, "oneof uint64"),
    },
    "InferTensorContents": {
        "bool_contents": (1, "repeated bool"), "int_contents": (2, "repeated int32"),
        "int64_contents": (3, "repeated int64"), "uint_contents": (4, "repeated uint32"),
        "uint64_contents": (5, "repeated uint64"), "fp32_contents": (6, "repeated float"),
        "fp64_contents": (7, "repeated double"), "bytes_contents": (8, "repeated bytes"),
    },
    "ModelInferRequest": {
        "model_name": (1, "string"), "model_version": (2, "string"), "id": (3, "string"),
        "parameters": (4, "map InferParameter"),
        "inputs": (5, "repeated ModelInferRequest.InferInputTensor"),
        "outputs": (6, "repeated ModelInferRequest.InferRequestedOutputTensor"),
        "raw_input_contents": (7, "repeated bytes"),
    },
    "ModelInferRequest.InferInputTensor": _FILLED,
    "ModelInferRequest.InferRequestedOutputTensor": {
        "name": (1, "string"), "parameters": (2, "map InferParameter"),
    },
    "ModelInferResponse": {
        "model_name": (1, "string"), "model_version": (2, "string"), "id": (3, "string"),
        "parameters": (4, "map InferParameter"),
        "outputs": (5, "repeated ModelInferResponse.InferOutputTensor"),
        "raw_output_contents": (6, "repeated bytes"),
    },
    "ModelInferResponse.InferOutputTensor": _FILLED,
    "RepositoryIndexRequest": {"repository_name": (1, "string"), "ready": (2, "bool")},
    "RepositoryIndexResponse": {"models": (1, "repeated RepositoryIndexResponse.ModelIndex")},
    "RepositoryIndexResponse.ModelIndex": _VERSIONED | {"state": (3, "string"), "reason": (4, "string")},
    "ModelConfigRequest": _VERSIONED,
    "ModelConfigResponse": {"config": (1, "ModelConfig")},
    "ModelConfig": {
        "name": (1, "string"), "platform": (2, "string"), "max_batch_size": (4, "int32"),
        "input": (5, "repeated ModelInput"), "output": (6, "repeated ModelOutput"),
        "backend": (17, "string"),
    },
    "ModelInput": {
        "name": (1, "string"), "data_type": (2, "enum DataType"), "dims": (4, "repeated int64"),
        "optional": (8, "bool"),
    },
    "ModelOutput": {
        "name": (1, "string"), "data_type": (2, "enum DataType"), "dims": (3, "repeated int64"),
    },
    "ModelStatisticsRequest": _VERSIONED,
    "ModelStatisticsResponse": {"model_stats": (1, "repeated ModelStatistics")},
    "ModelStatistics": _VERSIONED | {
        "last_inference": (3, "uint64"), "inference_count": (4, "uint64"), "execution_count": (5, "uint64"),
        "inference_stats": (6, "InferStatistics"),
    },
    "InferStatistics": {
        "success": (1, _DURATION), "fail": (2, _DURATION), "queue": (3, _DURATION),
        "compute_input": (4, _DURATION), "compute_infer": (5, _DURATION), "compute_output": (6, _DURATION),
        "cache_hit": (7, _DURATION), "cache_miss": (8, _DURATION),
    },
    _DURATION: {"count": (1, "uint64"), "ns": (2, "uint64")},
}  # fmt: skip
"""By name of a message its fields: their numbers and types."""
DATA_TYPES = ("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
              "FP16", "FP32", "FP64", "STRING")  # fmt: skip
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer",
           "ModelConfig", "ModelStatistics", "RepositoryIndex")  # fmt: skip
"""Methods of the service; each takes a message named <method>Request and gives one named <method>Response."""


def message(name: str) -> type[Any]:
    """The class of a message.

    Args:
        name: a key of MESSAGES.
    """
    return GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))


@cache
def _pool() -> DescriptorPool:
    file = pb.FileDescriptorProto(name="mim_torchrec/open_inference.proto", package=PACKAGE, syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(DATA_TYPES):
        types.value.add(name=f"TYPE_{name}", number=number)
    made: dict[str, pb.DescriptorProto] = {}
    for name, fields in MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        made[name] = (made[outer].nested_type if outer else file.message_type).add(name=inner)
        for field, (number, kind) in fields.items():
            _add_field(made[name], name, field, number, kind)
    pool = DescriptorPool()
    pool.Add(file)
    return pool


def _add_field(message: pb.DescriptorProto, owner: str, name: str, number: int, kind: str) -> None:
    label, _, bare = kind.rpartition(" ")
    kinds = pb.FieldDescriptorProto
    added = message.field.add(name=name, number=number, label=kinds.LABEL_OPTIONAL)
    if label in ("repeated", "map"):
        added.label = kinds.LABEL_REPEATED
    if label == "oneof":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        added.oneof_index = 0
    if label == "map":
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        _add_field(entry, owner, "key", 1, "string")
        _add_field(entry, owner, "value", 2, bare)
        bare = f"{owner}.ParametersEntry"
    if label == "enum" or label == "map" or bare in MESSAGES:
        added.type = kinds.TYPE_ENUM if label == "enum" else kinds.TYPE_MESSAGE
        added.type_name = f".{PACKAGE}.{bare}"
    else:
        added.type = kinds.Type.Value(f"TYPE_{bare.upper()}")
