"""What a reader of requests gives, as rows to compare."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import category_ids
from tests.datasets import Rows

FEATURES = {
    "user_id": "user_id",
    "query_id": "query_id",
    "candidate_item_id": "candidate_item_ids",
    "behavior_item_id": "behavior_item_ids",
    "candidate_category": "candidate_categories",
    "behavior_category": "behavior_categories",
}


def read(files: Iterable[Path], *, epoch: int = 0, batch_size: int = 7, **options) -> list[RequestBatch]:
    reader = RequestReader(list(files), batch_size=batch_size, **options)
    reader.set_epoch(epoch)
    return list(reader)


def as_rows(batches: list[RequestBatch]) -> Rows:
    """Naive: one dict a request, in the schema's names, categories as ids."""
    rows = []
    for batch in batches:
        features = {
            column: [part.tolist() for part in batch.sparse[key].to_dense()]
            for key, column in FEATURES.items()
            if key in batch.sparse.keys()  # noqa: SIM118  a KJT is no mapping
        }
        ends = np.cumsum([len(ids) for ids in features["candidate_item_ids"]])
        labels = np.split(batch.labels.numpy(), ends[:-1])
        ends = np.cumsum([len(ids) for ids in features["behavior_item_ids"]])
        for k in range(batch.num_requests):
            row = {column: values[k] for column, values in features.items()}
            row |= {"request_id": int(batch.request_ids[k]), "labels": labels[k].tolist()}
            for scalar in {"user_id", "query_id"} & set(row):
                (row[scalar],) = row[scalar]
            if batch.request_ts is not None:
                row["ts"] = int(batch.request_ts[k])
            if batch.behavior_ts is not None:
                row["behavior_ts"] = np.split(batch.behavior_ts.numpy(), ends[:-1])[k].tolist()
            rows.append(row)
    return rows


def expected(rows: Rows) -> Rows:
    """The rows with ids for the names of categories."""
    categories = ("behavior_categories", "candidate_categories")
    return [
        row | {c: category_ids(pa.array(row[c], pa.string())).tolist() for c in categories if c in row}
        for row in rows
    ]


def ids(batches: list[RequestBatch]) -> list[int]:
    return [request for batch in batches for request in batch.request_ids.tolist()]
