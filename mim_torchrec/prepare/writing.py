"""Writes folders of Parquet as the readers want them, and the manifest that describes them.

Row groups have the size that a reader shuffles by. Ids and categories are dictionary-encoded, in dictionaries
large enough for the distinct ids of a row group.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_torchrec.data.features import Ids
from mim_torchrec.data.id_scan import CANDIDATES, COLUMNS, IdCounts, distinct
from mim_torchrec.data.prepared_ids import footer_sha256
from mim_torchrec.data.schema import is_list
from mim_torchrec.embeddings.files import full_disk_reported, sha256

GROUPS_PER_FILE = 8
DICTIONARY_BYTES = 16 * 2**20
IMAGE_ROWS = 1000
COUNTED_ROWS = 65_536
WAITING_BYTES = 64 * 2**20
"""Of tables that wait to be written, where more than one does."""
WRITERS = 2
"""Files that are written side by side."""


class FolderWriter:
    """Writes tables that come one after the other into `part-*.parquet` of folders, each file by one thread.

    Args:
        root: of the data set that is being written.
        row_group_rows: rows of a row group; the last one of a folder has fewer.
    """

    def __init__(self, root: Path, row_group_rows: int) -> None:
        self._root, self._rows, self._default = root, row_group_rows, row_group_rows
        self._folder: str | None = None
        self._waiting: list[pa.Table] = []
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="parquet") for _ in range(WRITERS)]
        self._running: deque[tuple[Future[None], int]] = deque()
        self._closed: list[Future[dict[str, Any]]] = []
        self._file: _File | None = None
        self._next: dict[str, int] = {}
        self.files: list[dict[str, Any]] = []
        """`file` (relative to the root), `rows`, `bytes`, `sha256` and `footer_sha256` of what is written."""

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self._threads:
            thread.shutdown()

    def write(self, folder: str, table: pa.Table, row_group_rows: int | None = None) -> None:
        """Add rows to a folder, whose file ends when another folder comes.

        Args:
            folder: below the root.
            table: rows, with the columns of those before.
            row_group_rows: of this folder, where it is not that of the others.
        """
        if folder != self._folder:
            self._flush()
            self._folder, self._rows = folder, row_group_rows or self._default
        self._waiting.append(table)
        rows = sum(map(len, self._waiting))
        if rows < self._rows:
            return
        whole = pa.concat_tables(self._waiting)
        for start in range(0, rows - rows % self._rows, self._rows):
            self._write(folder, whole.slice(start, self._rows))
        self._waiting = [whole.slice(rows - rows % self._rows)] if rows % self._rows else []

    def finish(self) -> None:
        """Write what waits, and close the files."""
        self._flush()
        self._folder = None
        while self._running:
            self._running.popleft()[0].result()
        self.files += [closed.result() for closed in self._closed]
        self._closed = []

    def _flush(self) -> None:
        if self._waiting:
            assert self._folder is not None
            self._write(self._folder, pa.concat_tables(self._waiting))
        self._waiting = []
        self._close()

    def _write(self, folder: str, table: pa.Table) -> None:
        """Let the thread of a file write a row group, when enough of those before are written."""
        size = table.nbytes
        while self._running and (
            self._running[0][0].done() or size + sum(waiting for _, waiting in self._running) > WAITING_BYTES
        ):
            self._running.popleft()[0].result()
        if self._file is not None and self._file.groups == GROUPS_PER_FILE:
            self._close()
        if self._file is None:
            number = self._next.get(folder, 0)
            self._next[folder] = number + 1
            thread = self._threads[sum(self._next.values()) % WRITERS]
            self._file = _File(self._root / folder / f"part-{number:05d}.parquet", thread)
        self._running.append((self._file.write(table, self._rows), size))

    def _close(self) -> None:
        if self._file is not None:
            self._closed.append(self._file.close(self._root))
            self._file = None


class _File:
    """A file that is being written, all of it by one thread."""

    def __init__(self, path: Path, thread: ThreadPoolExecutor) -> None:
        self._path, self._thread = path, thread
        self._writer: pq.ParquetWriter | None = None
        self.groups = 0

    def write(self, table: pa.Table, rows: int) -> Future[None]:
        self.groups += 1
        return self._thread.submit(self._write, table, rows)

    def close(self, root: Path) -> Future[dict[str, Any]]:
        return self._thread.submit(self._close, root)

    def _open(self, schema: pa.Schema) -> pq.ParquetWriter:
        with full_disk_reported(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return pq.ParquetWriter(
                self._path, schema, compression="zstd", use_dictionary=_encoded(schema),
                dictionary_pagesize_limit=DICTIONARY_BYTES, write_page_checksum=True,
                store_schema=not any(map(_has_dictionary, schema.types)),  # readers get text
            )  # fmt: skip

    def _write(self, table: pa.Table, rows: int) -> None:
        if self._writer is None:
            self._writer = self._open(table.schema)
        with full_disk_reported(self._path, table.nbytes):
            self._writer.write_table(table, row_group_size=rows)

    def _close(self, root: Path) -> dict[str, Any]:
        assert self._writer is not None
        with full_disk_reported(self._path):
            self._writer.close()
        return {
            "file": self._path.relative_to(root).as_posix(),
            "rows": pq.read_metadata(self._path).num_rows,
            "bytes": self._path.stat().st_size,
            "sha256": sha256(self._path),
            "footer_sha256": footer_sha256(self._path),
        }


class Vocabularies:
    """Distinct ids of the training part and how often each occurs, as `data.id_scan.count_ids` finds them.

    Ids of many requests are counted at once, because most of them occur again and again, by a thread.
    """

    def __init__(self) -> None:
        self._counts: dict[str, IdCounts] = {}
        self._shown, self._positive = IdCounts(), IdCounts()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="counts")
        self._written = _Waiting(self._count, self._thread)
        self._seen = _Waiting(self._count_popularity, self._thread)

    def add(self, requests: pa.Table) -> None:
        """Count the ids of requests that are written."""
        wanted = [column for columns in COLUMNS.values() for column in columns]
        self._written.add(requests.select([name for name in requests.column_names if name in wanted]))

    def add_popularity(self, requests: pa.Table) -> None:
        """Count what was shown and what had the label 1, before any is left out by sampling."""
        self._seen.add(requests.select([CANDIDATES, "labels"]))

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        """By name, `id` (int64, ascending), `count` and `impressions`.

        `popularity` has `id`, `shown` and `positive`.
        """
        self._written.finish()
        self._seen.finish()
        self._thread.shutdown()
        for name, found in self._counts.items():
            yield name, pa.table({"id": found.ids, "count": found.counts, "impressions": found.impressions})
        columns = {"id": self._shown.ids, "shown": self._shown.counts, "positive": self._positive.counts}
        yield "popularity", pa.table(columns)

    def _count(self, requests: pa.Table) -> None:
        shown = pc.list_value_length(requests[CANDIDATES]).to_numpy().astype(np.int64)
        for name, columns in COLUMNS.items():
            for column in columns:
                if column in requests.column_names:
                    found = distinct(column, requests[column], Ids(), shown)
                    self._counts.setdefault(name, IdCounts()).add(*found)

    def _count_popularity(self, requests: pa.Table) -> None:
        flat = {name: requests[name].combine_chunks().flatten() for name in (CANDIDATES, "labels")}
        grouped = pa.table(flat).group_by(CANDIDATES, use_threads=False)
        found = grouped.aggregate([([], "count_all"), ("labels", "sum")])
        ids = found[CANDIDATES].to_numpy()
        self._shown.add(ids, found["count_all"].to_numpy())
        self._positive.add(ids, found["labels_sum"].to_numpy())


class _Waiting:
    """Requests that wait until many can be counted at once, while those before are counted."""

    def __init__(self, count: Callable[[pa.Table], None], thread: ThreadPoolExecutor) -> None:
        self._count, self._thread, self._rows = count, thread, 0
        self._tables: list[pa.Table] = []
        self._running: Future[None] | None = None

    def add(self, requests: pa.Table) -> None:
        self._tables.append(requests)
        self._rows += len(requests)
        if self._rows >= COUNTED_ROWS:
            self._flush()

    def finish(self) -> None:
        self._flush()
        if self._running is not None:
            self._running.result()

    def _flush(self) -> None:
        if self._running is not None:
            self._running.result()
        if self._tables:
            self._running = self._thread.submit(self._counted, self._tables)
        self._tables, self._rows = [], 0

    def _counted(self, tables: list[pa.Table]) -> None:
        self._count(pa.concat_tables(tables).combine_chunks())


def _has_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind.value_type if is_list(kind) else kind)


def _encoded(schema: pa.Schema) -> list[str]:
    """Columns that are dictionary-encoded: ids and text; times and images are not."""
    names = []
    for field in schema:
        nested = is_list(field.type)
        kind = field.type.value_type if nested else field.type
        if (
            pa.types.is_string(kind)
            or pa.types.is_dictionary(kind)
            or (pa.types.is_integer(kind) and field.name != "request_id")
        ):
            names.append(f"{field.name}.list.element" if nested else field.name)
    return names
