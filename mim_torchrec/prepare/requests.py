"""Joined requests to files: one folder a part and day, sampled in the training part, counted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr.types import Table

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.schema import SPLITS
from mim_torchrec.embeddings.files import full_disk_reported
from mim_torchrec.prepare.assembly import Lists, RequestSchema, sample_negatives, to_requests
from mim_torchrec.prepare.config import PrepareConfig
from mim_torchrec.prepare.engines import Engine
from mim_torchrec.prepare.mapping import Ids
from mim_torchrec.prepare.splits import Split, day_name, days
from mim_torchrec.prepare.writing import FolderWriter, Vocabularies


class Candidates:
    """Candidates that come in the order of their requests.

    Args:
        batches: `request` and the values.
        names: of the values.
    """

    def __init__(self, batches: Iterator[pa.Table], names: Sequence[str]) -> None:
        self._batches, self._names = batches, names
        self._waiting: list[pa.Table] = []

    def of(self, requests: pa.Table) -> Lists:
        """The candidates of the next requests.

        Args:
            requests: `request` and `candidates`, how many each has.

        Raises:
            RuntimeError: others come.
        """
        lengths = requests["candidates"].to_numpy().astype(np.int64)
        wanted, have = int(lengths.sum()), sum(map(len, self._waiting))
        while have < wanted:
            batch = next(self._batches, None)
            if batch is None:
                raise RuntimeError("there are fewer candidates than requests have")
            self._waiting.append(batch)
            have += len(batch)
        rows = pa.concat_tables(self._waiting)
        self._waiting = [rows.slice(wanted)]
        rows = rows.slice(0, wanted).combine_chunks()
        expected = requests["request"].take(pa.array(np.repeat(np.arange(len(lengths)), lengths)))
        if not rows["request"].equals(expected):
            raise RuntimeError("candidates are not in the order of their requests")
        return Lists(lengths, {name: rows[name].combine_chunks() for name in self._names})

    def finish(self) -> None:
        """See that no candidate is left. Raises RuntimeError otherwise."""
        if any(map(len, self._waiting)) or any(len(batch) for batch in self._batches):
            raise RuntimeError("there are more candidates than requests have")


class RequestsWriter:
    """Writes requests that come in order of time.

    Args:
        config: options.
        schema: what requests have.
        split: where the parts begin.
        files: to write to.
    """

    def __init__(
        self, config: PrepareConfig, schema: RequestSchema, split: Split, files: FolderWriter
    ) -> None:
        self._config, self._schema, self._split, self._files = config, schema, split, files
        self._vocabularies = Vocabularies()
        self._ids: list[np.ndarray] = []
        self._counts = {split: {"requests": 0, "candidates": 0, "positives": 0, "behaviors": 0}
                        for split in SPLITS}  # fmt: skip
        self._left_out = {"negatives": 0, "requests_without_candidates": 0}
        self._late_labels = 0

    def write(self, joined: pa.Table, shown: Lists, events: Lists) -> None:
        """Write requests; see `assembly.to_requests`."""
        requests = to_requests(joined, shown, events, self._schema)
        self._ids.append(requests["request_id"].to_numpy())
        ts = requests["ts"].cast(pa.int64()).to_numpy()
        part = self._split.of(ts)
        day = days(ts) if self._config.partition == "day" else np.zeros(len(ts), np.int64)
        starts = np.flatnonzero(np.r_[True, (part[1:] != part[:-1]) | (day[1:] != day[:-1])])
        for start, stop in zip(starts, [*starts[1:], len(ts)], strict=True):
            rows = requests.slice(start, stop - start)
            folder = f"requests/split={SPLITS[part[start]]}"
            if self._config.partition == "day":
                folder += f"/dt={day_name(int(day[start]))}"
            if part[start] == 0:
                late = ts[start:stop] + self._config.certain_after() > self._split.validation
                self._late_labels += int(late.sum())
                rows = self._training(rows)
            if len(rows):
                self._count(SPLITS[part[start]], rows)
                self._files.write(folder, rows)

    def finish(self, root: Path) -> dict[str, Any]:
        """Write vocabularies and popularity; returns what `prepare.json` says of the requests.

        Raises:
            DataError: two requests have one id.
        """
        self._files.finish()
        ids = np.sort(np.concatenate(self._ids)) if self._ids else np.empty(0, np.int64)
        twice = ids[1:][ids[1:] == ids[:-1]]
        if len(twice):
            raise DataError(f"two requests have the 64-bit id {twice[0]}; rename one", column="request_id")
        vocabularies = {}
        folder = root / "vocabularies"
        folder.mkdir()
        for name, table in self._vocabularies.tables():
            path = folder / f"{name}.parquet"
            with full_disk_reported(path, table.nbytes):
                pq.write_table(table, path, compression="zstd")
            vocabularies[name] = len(table)
        return {
            "parts": self._counts,
            "vocabularies": vocabularies,
            "sampling": {
                "negative_rate": self._config.negative_rate,
                "negatives_left_out": self._left_out["negatives"],
                "requests_left_out": self._left_out["requests_without_candidates"],
            },
            "leakage": {
                "training_requests_whose_label_window_ends_after_validation_begins": self._late_labels,
            },
        }

    def _training(self, rows: pa.Table) -> pa.Table:
        self._vocabularies.add_popularity(rows)
        if self._config.negative_rate < 1:
            rows, negatives, requests = sample_negatives(rows, self._config.negative_rate, self._config.seed)
            self._left_out["negatives"] += negatives
            self._left_out["requests_without_candidates"] += requests
        if len(rows):
            self._vocabularies.add(rows)
        return rows

    def _count(self, split: str, rows: pa.Table) -> None:
        counts = self._counts[split]
        labels = rows["labels"].combine_chunks().flatten().to_numpy()
        counts["requests"] += len(rows)
        counts["candidates"] += len(labels)
        counts["positives"] += int(labels.sum())
        counts["behaviors"] += len(rows["behavior_item_ids"].combine_chunks().flatten())


def write_users(engine: Engine, ids: Ids, requests: Table, files: FolderWriter) -> None:
    """Write `users/`, the original of every user id, where ids are text."""
    if ids.user != "text":
        return
    users = engine.fetch(requests.select("user").distinct().order_by("user"))["user"]
    files.write("users", pa.table({"user_id": stable_ids(users), "original_id": users.combine_chunks()}))
    files.finish()
