"""Exchange the ids of the next batch while this one is computed, by TorchRec's train pipeline.

`TrainPipelineSparseDist.progress` is a whole step of its own: it clears gradients, runs backward and updates.
Ours has the same stages around the steps of the shared loop, which looks at the loss before it updates.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.distributed.types import NoWait
from torchrec.optim.keyed import CombinedOptimizer

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.training.distributed import DistributedContext


def is_pipelined(config: CTRConfig, context: DistributedContext) -> bool:
    """Whether a run exchanges ids a step ahead; one rank has nothing to exchange."""
    several_gpus = context.device.type == "cuda" and context.world_size > 1
    return config.pipeline == "on" or (config.pipeline == "auto" and several_gpus)


class SparseExchange(TrainPipelineSparseDist):
    """Batches whose ids have been exchanged when they are handed out.

    Args:
        model: sharded; its forward pass begins with all lookups.
        optimizer: of the model.
        device: of the rank.
    """

    def __init__(
        self, model: DistributedModelParallel, optimizer: CombinedOptimizer, device: torch.device
    ) -> None:
        super().__init__(model, optimizer, device)

    def exchanged(self, batches: Iterable[RequestBatch]) -> Iterator[RequestBatch]:
        """The batches, on the device, in their order. All ranks have equally many.

        Between one batch and the next, the caller runs the model on the first, and `after_forward`. The model
        is its own again when the batches are used up or the caller stops.
        """
        source = iter(batches)
        self.attach()
        try:
            self.fill_pipeline(source)
            while self.batches:
                self._know_sizes(self.contexts[0])
                self._set_module_context(self.contexts[0])
                self._wait_for_batch()
                if len(self.batches) > 1:
                    self.start_sparse_data_dist(self.batches[1], self.contexts[1])
                self.enqueue_batch(source)
                yield cast(RequestBatch, self.batches[0])
                self.dequeue_batch()
        finally:
            self.detach()
            self.batches.clear()
            self.contexts.clear()

    def _know_sizes(self, context: TrainPipelineContext) -> None:
        """Ask the exchanged ids how many each feature has, on the stream of the exchange.

        TorchRec's lookups ask in the forward pass, where the host would wait for the step before.
        """
        with self._stream_context(cast(torch.cuda.Stream | None, self._data_dist_stream)):
            for name, request in context.input_dist_tensors_requests.items():
                exchanged = request.wait()
                if isinstance(exchanged, KJTList):
                    for features in exchanged:
                        features.length_per_key()
                context.input_dist_tensors_requests[name] = NoWait(exchanged)

    def after_forward(self) -> None:
        """Send the ids of the next batch, which the backward pass of this one hides."""
        if len(self.batches) > 1:
            self.wait_sparse_data_dist(self.contexts[1])
