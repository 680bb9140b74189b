"""Frozen lookups under ``TrainPipelineSemiSync``, which runs the backward pass of every lookup by itself.

The pipeline detaches what a lookup returns, requires a gradient of it, and hands that gradient to the
backward pass of the lookup. Frozen vectors have no backward pass, and autograd refuses to start one. Here
they become leaves that a gradient can be given to; it is freed with the step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.train_pipeline.runtime_forwards import (
    EmbeddingPipelinedForward,
    InSyncEmbeddingPipelinedForward,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor


def accept_gradients(forward: Callable[..., Any], found: KeyedTensor | dict[str, JaggedTensor]) -> None:
    """Let vectors take a gradient if the pipeline that looks them up is going to give them one.

    Args:
        forward: of the sharded collection, which a pipeline has replaced by its own.
        found: what the collection returns.
    """
    if not isinstance(forward, EmbeddingPipelinedForward) or not torch.is_grad_enabled():
        return
    if isinstance(forward, InSyncEmbeddingPipelinedForward):  # detaches nothing
        return
    tensors: list[Tensor] = (
        [found.values()] if isinstance(found, KeyedTensor) else [jagged.values() for jagged in found.values()]
    )
    for vectors in tensors:
        if not vectors.requires_grad:  # bags whose weights get gradients have a backward pass
            vectors.requires_grad_()
