"""Start a CTR model from one that was trained on an earlier day, with a vocabulary that has changed.

Rows of ids that stay go to their new places, new ids begin as in any run, dense weights are taken over.
Where embeddings are shrunk by their impressions, which have become more, rows are divided by what their
factors have grown by: the model begins with the embeddings that the earlier one has ended with.
Optimizers start from scratch: their state is of another day's losses, and `best` does not hold it.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader
from torchrec.distributed.model_parallel import DistributedModelParallel

from mim_torchrec.ctr.assembly import TrainedRun
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.dense import DenseCTR
from mim_torchrec.ctr.parameters import id_tables, load_trainable_state, trainable_state
from mim_torchrec.ctr.shrinkage import change_scale, scale_of
from mim_torchrec.data.vocabulary import Vocabulary
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.errors import ExpectedError, Status

log = logging.getLogger(__name__)

MAY_DIFFER = {"dropout", "content_dropout", "id_dropout", "aux_weight", "second_weight"}


class WarmStartError(ExpectedError, ValueError):
    """A run cannot be started from another one."""

    status = Status.VERSION


@torch.no_grad()
def warm_start(
    model: DistributedModelParallel,
    config: CTRConfig,
    run: Path | Url,
    vocabularies: dict[str, Vocabulary],
    table_version: str | None,
) -> None:
    """Put the weights of an earlier run into a model. Every rank calls it and reads one table at a time.

    Args:
        model: sharded, over any number of ranks.
        config: of the run that starts.
        run: directory that `mim ctr` has written, or its URL; its best weights are taken.
        vocabularies: of the run that starts; rows of ids that they do not hold are left behind.
        table_version: of the multi-modal table of the run that starts, None for Base.

    Raises:
        ModelMismatch: the earlier run's config.json or vocabulary/ are not those of its weights.
        WarmStartError: the earlier model is another one, or was trained on vectors of another encoder.
    """
    trained = TrainedRun.open(run)
    earlier = trained.config
    old, new = (asdict(c.model()) for c in (earlier, config))
    other = sorted(name for name in new if old[name] != new[name] and name not in MAY_DIFFER)
    if other:
        changes = ", ".join(f"{name} {old[name]!r} (now {new[name]!r})" for name in other)
        raise WarmStartError(f"{run} is of another model: {changes}")
    if earlier.table_version != table_version:
        raise WarmStartError(
            f"{run} was trained on vectors of version {earlier.table_version}, the table has "
            f"{table_version}: vectors of two encoders cannot be compared; train the model from scratch"
        )
    path = str(trained.weights)
    sizes: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    inner = cast(DenseCTR, model.module)
    scale = scale_of(inner).clone() if config.keep_shrinkage else None  # which loading overwrites
    state = trainable_state(model)
    if state.keys() != sizes.keys():
        raise WarmStartError(f"{run} has other weights: {sorted(state.keys() ^ sizes.keys())}")
    tables = id_tables(state)
    dense = {name: value for name, value in state.items() if name not in tables.values()}
    dcp.load(dense, checkpoint_id=path)
    load_trainable_state(model, state)
    if scale is not None:
        change_scale(inner, scale)
    before = trained.vocabularies
    for column, name in tables.items():
        weights = torch.empty(sizes[name].size)
        dcp.load({name: weights}, checkpoint_id=path)
        known, ids = before[column].ids, vocabularies[column].ids
        stay = torch.isin(known, ids, assume_unique=True)
        # row 0 of unknown ids stays, row k + 1 is that of the id at place k
        first = torch.zeros(1, dtype=torch.long)
        rows = torch.cat([first, 1 + torch.nonzero(stay).view(-1)])
        places = torch.cat([first, 1 + torch.searchsorted(ids, known[stay])])
        weights = weights[rows]
        if vocabularies[column].shrinkage:
            weights *= _kept(before[column], vocabularies[column], rows, places)[:, None]
        _take_over(state[name], weights, places)
        log.info("%s: %d rows taken over, %d left behind, %d new", column, len(rows) - 1,
                 len(known) + 1 - len(rows), len(ids) + 1 - len(rows))  # fmt: skip


def _kept(before: Vocabulary, now: Vocabulary, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Factors of rows (n,) of an earlier vocabulary over those at their places (n,) in a later one."""
    earlier, later = before.factors(rows), now.factors(places)
    return torch.where(later > 0, earlier / later, 1.0)  # of ids that are not shown both are 0


def _take_over(table: ShardedTensor, weights: torch.Tensor, places: torch.Tensor) -> None:
    """Copy rows of weights (n, dim) to the places (n,) they have in a table, as far as this rank has them."""
    for piece in table.local_shards():
        first, column = piece.metadata.shard_offsets
        rows, columns = piece.tensor.shape
        here = (places >= first) & (places < first + rows)
        values = weights[here, column : column + columns].to(piece.tensor)
        piece.tensor[(places[here] - first).to(piece.tensor.device)] = values
