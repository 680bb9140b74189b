"""Floating-point operations of a training step, with the sparse products that torch's counter leaves out.

Attention on packed pairs is a sampled dense product and weighted bags (`mim_torchrec.ciubm.packed`);
`FlopCounterMode` knows neither. Lookups, unweighted sums and elementwise operations count nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _sampled(structure: Tensor, rows: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    return 2 * structure._nnz() * rows.shape[1]


def _weighted_bags(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> int:
    return 0 if per_sample_weights is None else 2 * indices.numel() * weight.shape[1]


for _formula in (_sampled, _weighted_bags):
    _formula._get_raw = True  # tensors, not their shapes: the number of pairs is not a size of an argument

PACKED = {
    aten.sparse_sampled_addmm: _sampled,
    aten._embedding_bag: _weighted_bags,
    aten._embedding_bag_forward_only: _weighted_bags,
}


def count_flops(call: Callable[[], Any]) -> int:
    """Operations of a call, a multiply and an add counting as two."""
    with FlopCounterMode(display=False, custom_mapping=PACKED) as counter:
        call()
    return counter.get_total_flops()
