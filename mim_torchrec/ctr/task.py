"""CTR training as a task of the shared loop: batches, loss, validation, checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.warmup import WarmupOptimizer

from mim_torchrec.ctr.esmm import joint_logits
from mim_torchrec.ctr.parameters import load_trainable_state, trainable_state
from mim_torchrec.ctr.pipeline import SparseExchange
from mim_torchrec.ctr.predictions import collect, predict
from mim_torchrec.ctr.report import EPOCH_COLUMNS, epoch_metrics
from mim_torchrec.ctr.sharding import set_sparse_iterations, sparse_iterations
from mim_torchrec.ctr.windows import LiveWindows
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.packed_batch import packed
from mim_torchrec.data.prefetch import prefetched
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.vocabulary import IdMapper
from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.errors import OptionError
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.model_record import write_model_record
from mim_torchrec.training.sharded_state import save_state, seal
from mim_torchrec.training.shared_directory import shared_atomic_directory


def global_mean_loss(
    logits: Tensor, labels: Tensor, world_size: int, weights: Tensor | None = None
) -> Tensor:
    """Binary cross entropy whose mean over ranks is the weighted mean over all candidates of the step.

    Ranks hold different numbers of candidates, so a mean of their means would weigh the candidates of a
    short rank more. Gradients are averaged over ranks, hence: local sum x ranks / global sum of weights.

    Args:
        logits: (sum_candidates,) of this rank.
        labels: (sum_candidates,) of this rank.
        world_size: number of ranks.
        weights: (sum_candidates,) how often each candidate counts; None counts each once.
    """
    total = F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
    if world_size == 1 and weights is None:
        return total / max(labels.numel(), 1)
    count = total.new_full((), labels.numel()) if weights is None else weights.sum()
    if world_size > 1:
        dist.all_reduce(count)
    # an auxiliary task may have nothing to compare, and all weights of a step may be 0
    return total * world_size / torch.where(count > 0, count, 1)


class CTRState:
    """What checkpoints hold of a sharded model and its optimizers, each rank its shards.

    Args:
        model: the sharded model.
        optimizer: of everything trainable.
        windows: that go into the frozen table.

    Attributes:
        steps: taken so far.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        windows: LiveWindows | None = None,
    ) -> None:
        self._model, self._optimizer, self._windows = model, optimizer, windows
        self.steps = 0
        self._epoch = 0
        self._done: list[tuple[int, int]] = []

    def done(self, epoch: int) -> list[tuple[int, int]]:
        """Parts of an epoch that other numbers of ranks have read: how many ranks, batches of each."""
        return self._done if epoch == self._epoch else []

    def shared(self) -> dict[str, Any]:
        """Everything trainable, and the optimizers' state, which is made where no step has made it yet.

        Raises:
            TableError: ranks have applied different windows; on all ranks.
        """
        if self._windows is not None:
            self._windows.check_ranks()
        for _, optimizer in self._optimizer.optimizers:
            # the state of a warm-up is there from the start
            if len(optimizer.params) > len(optimizer.state) <= isinstance(optimizer, WarmupOptimizer):
                optimizer.init_state()  # a step of gradients that are 0; what it changes is loaded over
                optimizer.zero_grad()
        return {"model": trainable_state(self._model), "optimizer": self._optimizer.state_dict()}

    def load_shared(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint filled."""
        load_trainable_state(self._model, state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def local(self) -> dict[str, Any]:
        """What other numbers of ranks have read of the epoch, counts of steps, and the last window."""
        seq = None if self._windows is None else self._windows.seq
        done = [list(part) for part in self._done]
        iterations = sparse_iterations(self._model)
        return {"epoch": self._epoch, "done": done, "steps": self.steps, "iterations": iterations, "seq": seq}

    def load_local(self, state: dict[str, Any]) -> None:
        """Take what `local` gave."""
        self._epoch, self._done = state["epoch"], [(ranks, batches) for ranks, batches in state["done"]]
        self.steps = state["steps"]
        set_sparse_iterations(self._model, state["iterations"])
        if self._windows is not None and state["seq"] is not None:
            self._windows.catch_up(state["seq"])

    def reshard(self, epoch: int, step: int, world_size: int) -> int:
        """Divide what is left of the epoch over the ranks that there are now."""
        self._done = [*self.done(epoch), *([(world_size, step)] if step else [])]
        self._epoch = epoch
        return 0


class CTRTask:
    """What `training.loop.fit` needs to train a CTR model.

    Args:
        model: the sharded model.
        optimizer: of everything trainable.
        train: reader of this rank's share of the training requests.
        validation: reader of this rank's share of the validation requests.
        mapper: ids to embedding rows.
        context: the process group.
        aux_weight: weight of the auxiliary loss of the user behavior model, if it has one.
        id_dropout: probability that the item id of a training candidate is hidden.
        seed: of what is hidden.
        pipeline: exchange the ids of the next batch while this one is computed.
        windows: of new items, None for none.
        record: what `model.json` beside the weights says, see `describe_model`.
        prefetch: batches that a thread reads ahead.
        second_weight: weight of the loss of the second label, if there is one.
        epochs: of the run, so that the first requests of the next epoch are read during the evaluation.

    Raises:
        OptionError: `id_dropout` is no probability below 1.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        train: RequestReader,
        validation: RequestReader,
        mapper: IdMapper,
        context: DistributedContext,
        aux_weight: float = 1.0,
        id_dropout: float = 0.0,
        seed: int = 0,
        pipeline: bool = False,
        windows: LiveWindows | None = None,
        record: dict[str, Any] | None = None,
        prefetch: int = 4,
        second_weight: float = 1.0,
        epochs: int = 1,
    ) -> None:
        if not 0 <= id_dropout < 1:
            raise OptionError(f"id dropout is {id_dropout}; it has to be at least 0 and below 1")
        self.model = model
        self.optimizer = optimizer
        self._train = train
        self._validation = validation
        self._mapper = mapper
        self._context = context
        self._aux_weight, self._second_weight = aux_weight, second_weight
        self._id_dropout, self._seed = id_dropout, seed
        self._exchange = SparseExchange(model, optimizer, context.device) if pipeline else None
        self._windows, self._record, self._prefetch = windows, record, prefetch
        self._epochs = epochs
        self._begun: tuple[int, Iterator[RequestBatch]] | None = None
        self.state = CTRState(model, optimizer, windows)

    def num_batches(self, epoch: int) -> int:
        """Steps of an epoch, or of what other numbers of ranks have left of it; the same on every rank."""
        self._train.set_epoch(epoch, self.state.done(epoch))
        return self._train.num_batches

    def batches(self, epoch: int, first: int = 0) -> Iterator[RequestBatch]:
        """Batches of an epoch from `first` on, ids mapped to rows and on the rank's device."""
        if self._windows is not None:  # before the first batch is mapped
            self._windows.before_step(self.state.steps)
        begun, self._begun = self._begun, None
        if begun is not None and (epoch, first) == (begun[0], 0):
            batches = begun[1]
        else:
            batches = self._read(epoch, first)
        if self._windows is None:
            batches = prefetched(self._mapped(batches, epoch, first), self._prefetch)
        else:  # ids are mapped when a batch is asked for: by then windows may have made more of them known
            batches = self._mapped(prefetched(batches, self._prefetch), epoch, first)
        if self._exchange is not None:
            return self._exchange.exchanged(batches)
        return (batch.to(self._context.device, non_blocking=True) for batch in batches)

    def _read(self, epoch: int, first: int) -> Iterator[RequestBatch]:
        """Batches of an epoch, with rows unless windows change which ids are known; reading begins now."""
        self._train.set_epoch(epoch, self.state.done(epoch))
        mapper = self._mapper if self._windows is None else None
        return self._train.batches(first, mapper, ahead=self._prefetch > 0)

    def _mapped(self, batches: Iterator[RequestBatch], epoch: int, first: int) -> Iterator[RequestBatch]:
        """Batches with rows for ids, in page-locked memory where they go to a GPU."""
        for place, batch in enumerate(batches, first):
            rows = batch if self._windows is None else self._mapper(batch)
            if self._id_dropout:
                rng = np.random.default_rng((self._seed, epoch, place, self._context.rank))
                hidden = rng.random(rows.num_candidates) < self._id_dropout
                factor = self._mapper.unknown_factor("item_id")
                rows = rows.with_hidden_candidates(torch.from_numpy(hidden), factor)
            yield packed(rows) if self._context.device.type == "cuda" else rows

    def num_samples(self, batch: RequestBatch) -> int:
        """Candidates in a batch."""
        return batch.labels.numel()

    def batch_ids(self, batch: RequestBatch) -> dict[str, list[int]]:
        """Ids of a batch's requests."""
        return {"request_ids": batch.request_ids.tolist()}

    def training_forward(self, batch: RequestBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch; of a further part its value before its weight is reported."""
        if self._windows is not None:
            self._windows.before_step(self.state.steps)
        self.state.steps += 1
        logits, auxiliary, conversion_logits = self.model(batch)
        if self._exchange is not None:
            self._exchange.after_forward()
        loss = global_mean_loss(logits, batch.labels, self._context.world_size, batch.weights)
        report = {}
        if conversion_logits is not None and batch.second_labels is not None:
            report["second_loss"] = global_mean_loss(
                joint_logits(logits, conversion_logits), batch.second_labels, self._context.world_size,
                batch.weights,
            )  # fmt: skip
            loss = loss + self._second_weight * report["second_loss"]
        if auxiliary is None:
            return loss, report
        targets = batch.labels if auxiliary.targets is None else auxiliary.targets
        weights = batch.weights if auxiliary.targets is None else None  # behaviors have none
        auxiliary_loss = global_mean_loss(auxiliary.logits, targets, self._context.world_size, weights)
        return loss + self._aux_weight * auxiliary_loss, report | {"auxiliary_loss": auxiliary_loss}

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Validation metrics, the same on every rank; a metric that is undefined is left out."""
        if self._prefetch and epoch + 1 < self._epochs:
            self._begun = epoch + 1, self._read(epoch + 1, 0)
        predictions = predict(
            self.model, self._validation, self._mapper, self._context.device, self._prefetch
        )
        return epoch_metrics(collect(predictions, EPOCH_COLUMNS, self._context), self._context)

    def save(self, path: Path) -> None:
        """Write the trainable state, see `save_model`."""
        with shared_atomic_directory(path, self._context) as folder:
            save_model(self.model, folder)
            on_all_ranks(lambda: self._seal(folder) if self._context.is_main else None)

    def _seal(self, folder: Path) -> None:
        write_model_record(folder, self._record or {})
        seal(folder)


def save_model(model: DistributedModelParallel, path: Path) -> None:
    """Write the trainable state into a directory, each rank its shards.

    The frozen table is left out: it has files of its own.
    """
    save_state(trainable_state(model), path)


def load_model(model: DistributedModelParallel, path: Path) -> None:
    """Read what `save_model` wrote, or the model of a run's checkpoint, into any number of ranks."""
    state = trainable_state(model)
    if (path / "state").is_dir():
        dcp.load({"model": state}, checkpoint_id=str(path / "state"))
    else:
        dcp.load(state, checkpoint_id=str(path))
    load_trainable_state(model, state)
