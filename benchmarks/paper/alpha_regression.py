r"""Logistic regression on statistics of the relevance $\alpha$ (Eq. 7): the floor of every CTR model.

It knows the multi-modal table and which items a history holds, and neither ids nor categories. Seven numbers
of a candidate: how many behaviors have a vector, their largest $\alpha$ and its recency-weighted mean, of
the last five and of all, and the plain mean of all. It is trained with scikit-learn in seconds.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mim_torchrec.ciubm.content import content_relevance
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.similarity import similarity_interest
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import Dataset
from mim_torchrec.embeddings.files import atomic_directory, write_json
from mim_torchrec.embeddings.remote.places import stat_of
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.pipeline import spec
from mim_torchrec.pipeline.fingerprints import source_of
from mim_torchrec.training.metrics import auc

SPANS = (5, 0)
NUM_STATISTICS = 3 * len(SPANS) + 1
BATCH = 8192


def statistics(batch: RequestBatch, table: Table) -> torch.Tensor:
    """Statistics of the relevance of each candidate's history.

    Args:
        batch: requests with ids of items, not rows.
        table: of their vectors.

    Returns:
        (sum_candidates, 7): of the last five behaviors log(1 + number), maximum and recency-weighted mean,
        the same of all, and the mean of all. Zeros without a behavior that has a vector.
    """
    candidates, behaviors = (batch.sparse[f"{role}_item_id"] for role in ("candidate", "behavior"))
    pairs = RequestPairs.build(candidates.offsets(), behaviors.offsets())
    vectors = [table.read_float(ids.values()) for ids in (candidates, behaviors)]
    alpha = content_relevance(vectors[0], vectors[1], pairs)
    empty = alpha.new_zeros(pairs.num_candidates)
    total, number = (empty.index_add(0, pairs.candidate_index, of) for of in (alpha, (alpha != 0).float()))
    mean = total / number.clamp(min=1)
    return torch.cat([similarity_interest(alpha, pairs, 1, SPANS), mean[:, None]], dim=1)


def read_split(data: Path, split: str, table: Table, max_behaviors: int) -> dict[str, np.ndarray]:
    """The impressions of a split, and `statistics` (n, 7) of them.

    Args:
        data: the data set.
        split: `train`, `validation` or `test`.
        table: of the items' vectors.
        max_behaviors: last behaviors of a request that are looked at.
    """
    dataset = Dataset(data)
    reader = RequestReader(
        dataset.requests(split),
        batch_size=BATCH,
        max_behaviors=max_behaviors,
        conventions=dataset.conventions,
    )
    parts: list[dict[str, np.ndarray]] = []
    for batch in reader:
        items = batch.sparse["candidate_item_id"]
        repeats = items.lengths().long()
        users = batch.sparse["user_id"].values()
        parts.append({
            "request_id": batch.request_ids.repeat_interleave(repeats).numpy(),
            "user_id": users.repeat_interleave(repeats).numpy(),
            "item_id": items.values().numpy().copy(),
            "label": batch.labels.numpy(),
            "statistics": statistics(batch, table).numpy(),
        })  # fmt: skip
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def source() -> str:
    """Hash of the code of these statistics and of the CTR models that they stand beside."""
    of_models = source_of(spec.Stage(component="mim.ctr"))
    return hashlib.sha256(Path(__file__).read_bytes() + of_models.encode()).hexdigest()


def fit(data: Path, table: Table, out: Path, max_behaviors: int = 50) -> Path:
    """Train the regression on a data set and score its test requests, as a run of `mim ctr` does.

    A result of the same requests, the same table and the same code is kept.

    Args:
        data: the data set.
        table: of the items' vectors.
        out: directory that gets metrics.json (`auc`, `validation_auc`) and predictions.parquet.
        max_behaviors: last behaviors of a request that are looked at.
    """
    files = [file for split in ("train", "validation", "test") for file in Dataset(data).requests(split)]
    made_of = {
        "table_version": table.manifest.table_version, "max_behaviors": max_behaviors, "source": source(),
        "files": [[str(file), *stat_of(file)] for file in files],
    }  # fmt: skip
    metrics = out / "metrics.json"
    if metrics.is_file() and json.loads(metrics.read_text())["made_of"] == made_of:
        return out
    train, validation, test = (
        read_split(data, split, table, max_behaviors) for split in ("train", "validation", "test")
    )
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(train["statistics"], train["label"])
    scores = [model.predict_proba(part["statistics"])[:, 1] for part in (validation, test)]
    found = {
        "auc": auc(test["label"], scores[1]), "validation_auc": auc(validation["label"], scores[0]),
        "n": len(test["label"]), "made_of": made_of,
    }  # fmt: skip
    columns = {name: column for name, column in test.items() if name != "statistics"} | {"score": scores[1]}
    with atomic_directory(out) as partial:
        pq.write_table(pa.table(columns), partial / "predictions.parquet")
        write_json(partial / metrics.name, found)
    return out
