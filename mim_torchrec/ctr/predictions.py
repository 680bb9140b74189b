"""Predictions of a model, batch by batch: kept as columns of this rank, and written into one file of all.

A rank holds its own predictions and no others. Those of a run's results go through a file of each rank into
`predictions.parquet`, in the order of the ranks, which is that of the requests.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from mim_torchrec.ctr.dense import Prediction
from mim_torchrec.ctr.esmm import second_scores
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.prefetch import prefetched
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.vocabulary import IdMapper
from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.files import full_disk_reported
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.shared_directory import begin_directory, partial_of

Columns = dict[str, np.ndarray]
ROW_GROUP = 1024 * 1024
"""Predictions of a row group of the file, as PyArrow's default is."""
BUFFER = 64 * 1024
"""Predictions that a rank holds before it writes them."""


@torch.no_grad()
def predict(
    model: nn.Module, reader: RequestReader, mapper: IdMapper, device: torch.device, prefetch: int = 4
) -> Iterator[Columns]:
    """Score every candidate that the reader yields; every rank uses the iterator up.

    Args:
        model: gives a `Prediction` for a batch; scores in evaluation mode and is left in the mode it had.
        reader: this rank's share, not shuffled.
        mapper: ids to embedding rows.
        device: of the model.
        prefetch: batches that a thread reads ahead.

    Yields:
        Of each batch arrays of equal length: `request_id`, `user_id`, `query_id` (where logged), `item_id`,
        `label`, `score` (a probability), and `weight` where the log has weights. Of a second label
        `second_label`, `second_score` (pCTCVR) and `second_score_given_click` (pCVR). Ids that are text,
        UUIDs or uint64 in the log are there, too, as `user_id_original` and so on.
    """
    was_training = model.training
    model.eval()
    try:
        for batch, rows in prefetched(((batch, mapper(batch)) for batch in reader), prefetch):
            candidates = batch.sparse["candidate_item_id"]
            users = batch.sparse["user_id"].values()
            repeats = candidates.lengths().long()
            found = model(rows.to(device))
            queries = {}
            if "query_id" in batch.sparse.keys():  # noqa: SIM118  a KJT is no mapping
                of_request = batch.sparse["query_id"].values()
                queries["query_id"] = of_request.repeat_interleave(repeats).numpy()
            yield {
                "request_id": batch.request_ids.repeat_interleave(repeats).numpy(),
                "user_id": users.repeat_interleave(repeats).numpy(),
                **queries,
                **_originals(batch, repeats.numpy()),
                "item_id": candidates.values().numpy().copy(),  # not with the ids of the whole batch
                "label": batch.labels.numpy(),
                "score": torch.sigmoid(found.logits.float()).cpu().numpy(),
                **_second(found, batch),
                **({} if batch.weights is None else {"weight": batch.weights.numpy()}),
            }
    finally:
        model.train(was_training)


def _second(found: Prediction, batch: RequestBatch) -> Columns:
    """What there is of a second label."""
    if found.conversion_logits is None or batch.second_labels is None:
        return {}
    both, given_click = second_scores(found.logits, found.conversion_logits)
    return {
        "second_label": batch.second_labels.numpy(),
        "second_score": both.cpu().numpy(),
        "second_score_given_click": given_click.cpu().numpy(),
    }


def _originals(batch: RequestBatch, repeats: np.ndarray) -> Columns:
    """Ids of impressions as people know them, beside those of int64."""
    return {
        f"{name}_original": ids if name == "item_id" else ids.repeat(repeats)
        for name, ids in batch.originals.items()
    }


def collect(batches: Iterable[Columns], names: Sequence[str], context: DistributedContext) -> Columns:
    """The columns of this rank's predictions that are named, as far as there are any.

    Raises:
        DataError: no rank has any; on all ranks.
    """
    parts = [{name: batch[name] for name in names if name in batch} for batch in batches]
    # a rank without requests has columns like those of the others
    kinds = [{name: column.dtype for name, column in parts[0].items()} if parts else None]
    known = [found for (found,) in context.all_gather_objects(kinds) if found is not None]
    if not known:
        raise DataError("there is nothing to predict: no rank has read a request; give a split with requests")
    return {
        name: np.concatenate([np.zeros(0, dtype), *(part[name] for part in parts)])
        for name, dtype in known[0].items()
    }


class PredictionFile:
    """`predictions.parquet` of all ranks in the making.

    Args:
        path: the file that it will be; every rank sees its folder.
        context: the process group; every rank makes one and calls every method.
    """

    def __init__(self, path: Path, context: DistributedContext) -> None:
        self._path, self._context = path, context
        self._folder = partial_of(path)
        begin_directory(path, context)

    def written(self, batches: Iterable[Columns]) -> Iterator[Columns]:
        """The batches as they come, each of them written to this rank's own file."""
        path, batches = self._part(self._context.rank), iter(batches)
        with full_disk_reported(path), path.open("wb") as file:
            first = next(batches, None)
            if first is None:  # the file stays empty
                return
            with pq.ParquetWriter(file, pa.table(first).schema) as writer:
                waiting: list[pa.Table] = []
                for batch in chain([first], batches):
                    waiting.append(pa.table(batch))
                    if sum(map(len, waiting)) >= BUFFER:
                        writer.write_table(pa.concat_tables(waiting))
                        waiting = []
                    yield batch
                if waiting:
                    writer.write_table(pa.concat_tables(waiting))

    def joined(self) -> Path | None:
        """One file of the parts of all ranks, which takes the name of `path` later; None but on rank 0."""
        self._context.barrier()
        whole = self._folder / self._path.name
        on_all_ranks(lambda: self._join(whole) if self._context.is_main else None)
        return whole if self._context.is_main else None

    def _join(self, whole: Path) -> None:
        parts = [self._part(rank) for rank in range(self._context.world_size)]
        files = [pq.ParquetFile(part) for part in parts if part.stat().st_size]
        waiting, count = [], 0
        with full_disk_reported(whole), whole.open("wb") as file:
            with pq.ParquetWriter(file, files[0].schema_arrow) as writer:
                for batch in (batch for part in files for batch in part.iter_batches(BUFFER)):
                    waiting.append(pa.Table.from_batches([batch]))
                    count += len(batch)
                    if count >= ROW_GROUP:
                        table = pa.concat_tables(waiting)
                        writer.write_table(table.slice(0, ROW_GROUP), ROW_GROUP)
                        waiting = [table.slice(ROW_GROUP)]
                        count -= ROW_GROUP
                if count:
                    writer.write_table(pa.concat_tables(waiting), ROW_GROUP)
        for part in parts:
            part.unlink()

    def _part(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.parquet"
