"""What a sharded frozen collection remembers of a step between its stages."""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from mim_torchrec.embeddings.sharded.bounds import Limits
from mim_torchrec.embeddings.sharded.exchange import RowCounts


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
        for index in (*self.index, *(self.inverse or {}).values()):
            if index is not None:
                index.record_stream(stream)
