"""A batch of requests: what readers yield and what CTR models take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from mim_torchrec.data.request_columns import Coded

REQUEST_IDS = ("user_id", "query_id")
"""Features of which a request has one id; of any other it may have a list."""


class FeatureIds(NamedTuple):
    """Ids of one feature of B requests, or their rows, before they are part of a batch.

    Args:
        key: name of the feature.
        ids: (n,) int64, or rows that may be int32; or coded.
        lengths: (B,) int32, how many of them each request has.
    """

    key: str
    ids: Tensor | Coded
    lengths: Tensor

    def values(self) -> Tensor:
        """(n,) ids or rows."""
        return self.ids if isinstance(self.ids, Tensor) else torch.from_numpy(self.ids.values)


class MappedIds(NamedTuple):
    """Ids of a batch as rows of embedding tables; see `RequestBatch`, whose attributes they are."""

    sparse: KeyedJaggedTensor
    factors: Tensor | None = None
    bags: KeyedJaggedTensor | None = None


def keyed(
    features: Sequence[FeatureIds], values: Sequence[Tensor], bounds: np.ndarray
) -> Iterator[KeyedJaggedTensor]:
    """Values of features as the tensors of batches.

    Args:
        features: of the requests of all batches.
        values: (num_ids,) of each feature, in the order of its ids.
        bounds: (num_batches + 1,) where each batch begins and ends among the requests.
    """
    keys = [one.key for one in features]
    lengths = torch.stack([one.lengths for one in features])
    starts = np.zeros((len(keys), lengths.shape[1] + 1), np.int64)
    np.cumsum(lengths.numpy(), axis=1, out=starts[:, 1:])
    sizes = np.diff(starts[:, bounds])
    parts = [own.split(each) for own, each in zip(values, sizes.tolist(), strict=True)]
    requests = np.diff(bounds).tolist()
    for own, of_batch, each, stride in zip(
        zip(*parts, strict=True), lengths.split(requests, dim=1), sizes.T.tolist(), requests, strict=True
    ):
        kind = np.float32 if own[0].is_floating_point() else np.int64
        # by NumPy: torch would divide so much among threads, beside those of another rank or of the model
        joined = np.concatenate([one.numpy() for one in own], dtype=kind)
        yield KeyedJaggedTensor(
            keys=keys,
            values=torch.from_numpy(joined),
            lengths=of_batch.reshape(-1),
            stride=stride,
            length_per_key=each,
        )


@dataclass
class RequestBatch(Pipelineable):
    """B requests, each with one history and some labelled candidates.

    Args:
        sparse: ids by feature, with a stride of B: `user_id`, `query_id` (where logged), `candidate_item_id`,
            `behavior_item_id`, `candidate_category` and `behavior_category` (where logged), in this order,
            and further ones by the names of their columns.
        labels: (sum_candidates,) float32, 0 or 1, in the order of `candidate_item_id`.
        request_ids: (B,) int64.
        request_ts: (B,) int64, microseconds since 1970, or None where not logged.
        behavior_ts: (sum_behaviors,) int64 likewise, in the order of `behavior_item_id`.
        request_dense: (B, num_features) float32, None where there are none.
        candidate_dense: (sum_candidates, num_features) float32 likewise.
        behavior_dense: (sum_behaviors, num_features) float32 likewise.
        second_labels: (sum_candidates,) float32, 0 or 1, None where there is no second label.
        factors: (num_ids,) float32, by which embeddings of the ids of `sparse` are multiplied, in the order
            of its values and without those of multi-modal rows; None where they are left as they are.
        bags: where there are factors and requests have lists of ids, the features of requests, weighted so
            that the sum of a list is the mean of its shrunk embeddings. Without lists, `factors` say all.
        weights: (sum_candidates,) float32, how often each candidate counts; None counts each once.
        originals: ids as people know them, where they are no int64 and the reader was asked for them:
            `request_id`, `user_id`, `query_id` (B,) and `item_id` (sum_candidates,); they stay on the CPU.
    """

    sparse: KeyedJaggedTensor
    labels: Tensor
    request_ids: Tensor
    request_ts: Tensor | None = None
    behavior_ts: Tensor | None = None
    request_dense: Tensor | None = None
    candidate_dense: Tensor | None = None
    behavior_dense: Tensor | None = None
    second_labels: Tensor | None = None
    weights: Tensor | None = None
    factors: Tensor | None = None
    bags: KeyedJaggedTensor | None = None
    originals: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        return self.sparse.stride()

    @property
    def num_candidates(self) -> int:
        return self.labels.numel()

    def to(self, device: torch.device, non_blocking: bool = False) -> "RequestBatch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors()
        }
        if self.bags is not None:
            moved["bags"] = self.bags.to(device, non_blocking=non_blocking)
        return replace(self, sparse=self.sparse.to(device, non_blocking=non_blocking), **moved)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until the stream has used it; on a CPU there is no stream to wait for."""
        if not self.labels.is_cuda:
            return
        for ids in (self.sparse, self.bags):
            if ids is not None:
                ids.record_stream(cast(torch.cuda.Stream, stream))
        for _, tensor in self._tensors():
            tensor.record_stream(stream)

    def with_hidden_candidates(self, hidden: Tensor, factor: float = 1.0) -> "RequestBatch":
        """The same batch of rows with row 0, that of an unknown id, instead of some candidates' items.

        Args:
            hidden: (sum_candidates,) bool. Their categories and vectors stay.
            factor: of row 0, where the batch has factors.
        """
        keys = self.sparse.keys()
        ends = self.sparse.offset_per_key()
        place = keys.index("candidate_item_id")
        values = self.sparse.values().clone()
        values[ends[place] : ends[place + 1]].masked_fill_(hidden, 0)
        factors = None if self.factors is None else self.factors.clone()
        if factors is not None:
            factors[ends[place] : ends[place + 1]].masked_fill_(hidden, factor)
        sparse = KeyedJaggedTensor(keys=keys, values=values, lengths=self.sparse.lengths())
        return replace(self, sparse=sparse, factors=factors)

    def pin_memory(self) -> "RequestBatch":
        """The same batch in page-locked memory."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors()}
        if self.bags is not None:
            pinned["bags"] = self.bags.pin_memory()
        return replace(self, sparse=self.sparse.pin_memory(), **pinned)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """What is there besides ids."""
        named = [(one.name, getattr(self, one.name)) for one in fields(self) if one.name != "sparse"]
        return [(name, value) for name, value in named if isinstance(value, Tensor)]
