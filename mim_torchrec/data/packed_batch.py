"""A batch of requests that goes to a GPU in one copy, with the layout of its pairs.

A batch has a dozen tensors, and every copy costs the host more than its bytes. So they are put into one
buffer of page-locked memory, where a thread that reads ahead does it, and stay views of one on the GPU. Sizes
that the GPU would have to be waited for go with it (`pair_layout.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.ciubm.pair_layout import PairLayout
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.uploads import in_one_buffer, moved_together


@dataclass
class PackedBatch(RequestBatch):
    """A batch whose tensors are views of one buffer; made by `packed`.

    Args:
        layout: of the pairs of candidates and behaviors.
    """

    layout: PairLayout | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on another device, copied as a whole."""
        return _rebuilt(self, moved_together(list(_parts(self)), device, non_blocking))


def packed(batch: RequestBatch) -> PackedBatch:
    """A batch in memory as views of one buffer; of page-locked memory, where there is a GPU."""
    keys, lengths = batch.sparse.keys(), batch.sparse.lengths().view(len(batch.sparse.keys()), -1)
    of_role = (lengths[keys.index(f"{role}_item_id")] for role in ("candidate", "behavior"))
    values = {one.name: getattr(batch, one.name) for one in fields(RequestBatch)}
    found = PackedBatch(**values, layout=PairLayout.of_lengths(*of_role))
    return _rebuilt(found, in_one_buffer(list(_parts(found))))


def _parts(batch: PackedBatch) -> Iterator[Tensor]:
    """All tensors, in the order in which `_rebuilt` takes them."""
    for one in fields(batch):
        value = getattr(batch, one.name)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, KeyedJaggedTensor):
            yield value.values()
            yield value.lengths()
            if value.weights_or_none() is not None:
                yield value.weights()
        elif isinstance(value, PairLayout):
            yield from value.tensors()


def _rebuilt(batch: PackedBatch, parts: Sequence[Tensor]) -> PackedBatch:
    """The batch with other tensors, whose values are the same."""
    left = iter(parts)
    changed: dict[str, Any] = {}
    for one in fields(batch):
        value = getattr(batch, one.name)
        if isinstance(value, Tensor):
            changed[one.name] = next(left)
        elif isinstance(value, KeyedJaggedTensor):
            values, lengths = next(left), next(left)
            changed[one.name] = KeyedJaggedTensor(
                keys=value.keys(), values=values, lengths=lengths, stride=value.stride(),
                weights=None if value.weights_or_none() is None else next(left),
                length_per_key=value.length_per_key(), offset_per_key=value.offset_per_key(),
            )  # fmt: skip
        elif isinstance(value, PairLayout):
            changed[one.name] = value.moved([next(left) for _ in value.tensors()])
    return replace(batch, **changed)
