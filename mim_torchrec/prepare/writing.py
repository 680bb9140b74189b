"""Writes folders of Parquet as the readers want them, and the manifest that describes them.

Row groups have the size that a reader shuffles by. Ids and categories are dictionary-encoded, in dictionaries
large enough for the distinct ids of a row group.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_torchrec.data.id_scan import COLUMNS, IdCounts
from mim_torchrec.data.schema import category_ids, is_list
from mim_torchrec.embeddings.files import full_disk_reported, sha256

GROUPS_PER_FILE = 8
DICTIONARY_BYTES = 16 * 2**20
IMAGE_ROWS = 1000


class FolderWriter:
    """Writes tables that come one after the other into `part-*.parquet` of folders.

    Args:
        root: of the data set that is being written.
        row_group_rows: rows of a row group; the last one of a folder has fewer.
    """

    def __init__(self, root: Path, row_group_rows: int) -> None:
        self._root, self._rows, self._default = root, row_group_rows, row_group_rows
        self._folder: str | None = None
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        self._groups = 0
        self.files: list[dict[str, Any]] = []
        """`file` (relative to the root), `rows`, `bytes`, `sha256` of what is written."""
        self._next: dict[str, int] = {}
        self._path: Path | None = None

    def write(self, folder: str, table: pa.Table, row_group_rows: int | None = None) -> None:
        """Add rows to a folder, whose file ends when another folder comes.

        Args:
            folder: below the root.
            table: rows, with the columns of those before.
            row_group_rows: of this folder, where it is not that of the others.
        """
        if folder != self._folder:
            self.finish()
            self._folder, self._rows = folder, row_group_rows or self._default
        self._waiting.append(table)
        rows = sum(map(len, self._waiting))
        if rows < self._rows:
            return
        whole = pa.concat_tables(self._waiting)
        for start in range(0, rows - rows % self._rows, self._rows):
            self._write_group(whole.slice(start, self._rows))
        self._waiting = [whole.slice(rows - rows % self._rows)] if rows % self._rows else []

    def finish(self) -> None:
        """Write what waits, and close the file."""
        if self._waiting:
            self._write_group(pa.concat_tables(self._waiting))
        self._waiting = []
        self._close()

    def _write_group(self, table: pa.Table) -> None:
        if self._groups == GROUPS_PER_FILE:
            self._close()
        if self._writer is None:
            assert self._folder is not None
            number = self._next.get(self._folder, 0)
            self._next[self._folder] = number + 1
            self._path = self._root / self._folder / f"part-{number:05d}.parquet"
            with full_disk_reported(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = pq.ParquetWriter(
                    self._path, table.schema, compression="zstd", use_dictionary=_encoded(table.schema),
                    dictionary_pagesize_limit=DICTIONARY_BYTES, write_page_checksum=True,
                )  # fmt: skip
        assert self._path is not None
        with full_disk_reported(self._path, table.nbytes):
            self._writer.write_table(table, row_group_size=self._rows)
        self._groups += 1

    def _close(self) -> None:
        if self._writer is None:
            return
        assert self._path is not None
        with full_disk_reported(self._path):
            self._writer.close()
        self.files.append({
            "file": self._path.relative_to(self._root).as_posix(),
            "rows": pq.read_metadata(self._path).num_rows,
            "bytes": self._path.stat().st_size,
            "sha256": sha256(self._path),
        })  # fmt: skip
        self._writer, self._groups = None, 0


class Vocabularies:
    """Distinct ids of the training part and how often each occurs, as `data.id_scan.scan_ids` finds them.

    Args:
        columns: of the requests.
    """

    def __init__(self, columns: list[str]) -> None:
        present = {name: [c for c in of if c in columns] for name, of in COLUMNS.items()}
        self._columns = {name: of for name, of in present.items() if of}
        self._counts = {name: IdCounts() for name in self._columns}
        self._shown, self._positive = IdCounts(), IdCounts()

    def add(self, requests: pa.Table) -> None:
        """Count the ids of requests that are written."""
        for name, columns in self._columns.items():
            for column in columns:
                values = _flat(requests[column])
                if len(values):
                    counted = pc.value_counts(values)
                    ids, counts = category_ids(counted.field("values")), counted.field("counts")
                    self._counts[name].add(ids, counts.to_numpy())

    def add_popularity(self, requests: pa.Table) -> None:
        """Count what was shown and what had the label 1, before any is left out by sampling."""
        items, labels = _flat(requests["candidate_item_ids"]).to_numpy(), _flat(requests["labels"]).to_numpy()
        ids, place = np.unique(items, return_inverse=True)
        shown = np.bincount(place, minlength=len(ids))
        positive = np.bincount(place, weights=labels, minlength=len(ids)).astype(np.int64)
        self._shown.add(ids, shown)
        self._positive.add(ids, positive)

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        """By name, `id` (int64, ascending) and `count`; `popularity` has `id`, `shown`, `positive`."""
        for name, found in self._counts.items():
            yield name, pa.table({"id": found.ids, "count": found.counts})
        columns = {"id": self._shown.ids, "shown": self._shown.counts, "positive": self._positive.counts}
        yield "popularity", pa.table(columns)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    values = column.combine_chunks()
    return values.flatten() if is_list(values.type) else values


def _encoded(schema: pa.Schema) -> list[str]:
    """Columns that are dictionary-encoded: ids and text; times and images are not."""
    names = []
    for field in schema:
        nested = is_list(field.type)
        kind = field.type.value_type if nested else field.type
        if pa.types.is_string(kind) or (pa.types.is_integer(kind) and field.name != "request_id"):
            names.append(f"{field.name}.list.element" if nested else field.name)
    return names
