"""What the server says of itself and of its model, in the words of the protocol and of its extensions."""

from typing import Any

from pydantic import BaseModel, Field

from mim_torchrec.serving.inference import Inference
from mim_torchrec.serving.inputs import inputs_of, outputs_of
from mim_torchrec.serving.service import Served
from mim_torchrec.serving.statistics import Statistics
from mim_torchrec.serving.tensors import BYTES

SERVER = "mim-torchrec"
EXTENSIONS = [
    "binary_tensor_data",
    "explanation",
    "model_configuration",
    "model_repository_index",
    "statistics",
]


class Error(BaseModel):
    """What is answered where something is wrong."""

    error: str


class Live(BaseModel):
    """Whether the server runs."""

    live: bool


class ServerAbout(BaseModel):
    """Name, version and extensions of the server."""

    name: str
    version: str
    extensions: list[str]


class TensorAbout(BaseModel):
    """A tensor of a model; -1 in its shape is any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelParameters(BaseModel):
    """Facts of the model."""

    table_version: str | None = Field(description="Version of the multi-modal vectors; null of Base.")
    window_seq: int | None = Field(description="The last window that the vectors have; null of Base.")
    max_behaviors: int = Field(description="Behaviors that the model uses, the last ones of a request.")
    second_label: str | None = Field(description="Label after the click that the model predicts as well.")


class ModelAbout(BaseModel):
    """Inputs, outputs and versions of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorAbout]
    outputs: list[TensorAbout]
    parameters: ModelParameters


class ConfigTensor(BaseModel):
    """A tensor in the configuration of a model."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool = False


class ModelConfig(BaseModel):
    """The configuration of a model, as Triton describes it.

    There is no batch dimension of Triton's kind (0): lists of users are ragged.
    """

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfigTensor]
    output: list[ConfigTensor]


class RepositoryEntry(BaseModel):
    """A model of the repository."""

    name: str
    version: str
    state: str
    reason: str


class ModelStatistics(BaseModel):
    """What the server has done with a version of a model; times are nanoseconds."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: dict[str, dict[str, int]]
    batch_stats: list[dict[str, Any]]


class AllStatistics(BaseModel):
    """Statistics of models."""

    model_stats: list[ModelStatistics]


class OutputTensor(BaseModel):
    """An output: its values, or how many bytes of them are behind the JSON."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float] | None = None
    parameters: dict[str, int] | None = None


class InferOutputs(BaseModel):
    """Scores, and in `parameters` how many ids of each kind are unknown."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, int]
    outputs: list[OutputTensor]


def model_about(name: str, served: Served) -> ModelAbout:
    """Metadata of the model that is served."""
    scorer = served.scorer
    return ModelAbout(
        name=name,
        versions=[served.model_version],
        platform=SERVER,
        inputs=[
            TensorAbout(name=one.name, datatype=one.datatypes[0], shape=[-1])
            for one in inputs_of(scorer).values()
        ],
        outputs=[TensorAbout(name=output, datatype="FP32", shape=[-1]) for output in outputs_of(scorer)],
        parameters=ModelParameters(
            table_version=scorer.bundle.table_version,
            window_seq=served.window_seq,
            max_behaviors=scorer.config.max_behaviors,
            second_label=scorer.config.second_label,
        ),
    )


def model_config(name: str, served: Served) -> ModelConfig:
    """The same as Triton's configuration."""
    about, known = model_about(name, served), inputs_of(served.scorer)
    return ModelConfig(
        name=name,
        platform=SERVER,
        backend=SERVER,
        max_batch_size=0,
        input=[
            ConfigTensor(name=one.name, data_type=_triton(one.datatype), dims=one.shape,
                         optional=not known[one.name].required)
            for one in about.inputs
        ],
        output=[
            ConfigTensor(name=one.name, data_type=_triton(one.datatype), dims=one.shape)
            for one in about.outputs
        ],
    )  # fmt: skip


def model_statistics(name: str, statistics: Statistics, version: str | None = None) -> AllStatistics:
    """Statistics of a version, or of all that were served."""
    found = statistics.by_version()
    return AllStatistics(
        model_stats=[
            ModelStatistics(name=name, version=one, **of)
            for one, of in found.items()
            if version in (None, one)
        ]
    )


async def repository_index(inference: Inference) -> list[RepositoryEntry]:
    """The model that is served, and whether it is ready."""
    problem, version = await inference.health.problem(), inference.service.current.model_version
    state = "READY" if problem is None else "UNAVAILABLE"
    return [RepositoryEntry(name=inference.name, version=version, state=state, reason=problem or "")]


def _triton(datatype: str) -> str:
    return "TYPE_STRING" if datatype == BYTES else f"TYPE_{datatype}"
