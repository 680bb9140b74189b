"""What a lookup of a sharded frozen collection remembers between its stages, and how it is waited for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torchrec.distributed.types import Awaitable, LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.streamable import Multistreamable

from mim_torchrec.embeddings.sharded.bounds import Limits
from mim_torchrec.embeddings.sharded.exchange import RowCounts
from mim_torchrec.embeddings.sharded.frozen import FrozenTable
from mim_torchrec.embeddings.sharded.semisync import accept_gradients

Out = TypeVar("Out")
Out_co = TypeVar("Out_co", covariant=True)


@dataclass
class FrozenContext(Multistreamable):
    """What one step needs to remember between the stages.

    ``index`` says which distinct row each id has, ``inverse`` which bag each example has where batch sizes
    vary by feature; ``later`` holds the limits of rows on a GPU.
    """

    features: KeyedJaggedTensor | None = None
    index: list[Tensor | None] = field(default_factory=list)
    counts: list[RowCounts] = field(default_factory=list)  # of each exchange
    inverse: dict[str, Tensor] | None = None
    later: list[Limits] = field(default_factory=list)

    def looked_up(self) -> KeyedJaggedTensor:
        """The features of the step, which `input_dist` has set."""
        assert self.features is not None
        return self.features

    def record_stream(self, stream: torch.Stream) -> None:
        if self.features is not None:
            self.features.record_stream(cast(torch.cuda.Stream, stream))
            for feature in self.features.to_dict().values():  # with offsets that `input_dist` has made
                feature.record_stream(cast(torch.cuda.Stream, stream))
        for index in (*self.index, *(self.inverse or {}).values()):
            if index is not None:
                index.record_stream(stream)


class Assembling(Protocol[Out_co]):
    """A sharded frozen collection, as far as waiting for its vectors goes."""

    @property
    def forward(self) -> Callable[..., Any]:
        """The call of the module, which a pipeline may have replaced."""

    def frozen_tables(self) -> dict[str, FrozenTable]:
        """What this process has of each table, by name."""

    def settle(self, later: list[Limits]) -> None:
        """Examine the limits of rows on a GPU, now or before the next lookup."""

    def assemble(self, ctx: FrozenContext, vectors: list[Tensor]) -> Out_co:
        """Give every feature its vectors."""


class FrozenAwaitable(LazyAwaitable[Out], Generic[Out]):
    """Waits for vectors and has the module give every feature its own; an error is raised at every wait.

    Args:
        module: the collection.
        ctx: of the step.
        vectors: of each table that is not exchanged, by its name.
        exchanged: names of tables, and what gives their vectors.
    """

    def __init__(
        self,
        module: "Assembling[Out]",
        ctx: FrozenContext,
        vectors: dict[str, Tensor],
        exchanged: list[tuple[list[str], Awaitable[list[Tensor]]]],
    ) -> None:
        super().__init__()
        self._module, self._ctx, self._vectors, self._exchanged = module, ctx, vectors, exchanged
        self._error: Exception | None = None

    def _wait_impl(self) -> Out:
        if self._error is not None:  # vectors can be waited for once
            raise self._error
        try:
            return self._assemble()
        except Exception as error:
            self._error = error
            raise

    def _assemble(self) -> Out:
        self._module.settle(self._ctx.later)
        for tables, awaitable in self._exchanged:
            self._vectors.update(zip(tables, awaitable.wait(), strict=True))
        found = self._module.assemble(
            self._ctx, [self._vectors[name] for name in self._module.frozen_tables()]
        )
        accept_gradients(self._module.forward, cast(KeyedTensor | dict[str, JaggedTensor], found))
        return found
