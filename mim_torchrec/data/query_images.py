"""Images of queries by their place in the files of pairs, read where they lie and not held in memory.

With a folder for it, they are copied once into an Arrow file that is memory-mapped, one record batch a row
group; ranks of one machine share its pages. Without, row groups are read again, one at a time.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.schema import PAIRS, PAIRS_REQUIRED, TableFile, open_parquet, read_row_group
from mim_torchrec.embeddings.files import atomic_file
from mim_torchrec.embeddings.remote.places import Url, stat_of

log = logging.getLogger(__name__)

COLUMN = "query_image"
_SOURCE = b"mim.source"
_SCHEMA = pa.schema([(COLUMN, pa.large_binary())])


class QueryImages:
    """Images by the number of the row group and the row in it.

    Args:
        units: file and row group, by number.
        cache: folder for the Arrow file; None for none. Several ranks may make it at once; the last one's
            stays.
        conventions: of the data set.

    Raises:
        DataError: a file is malformed.
    """

    def __init__(
        self,
        units: Sequence[tuple[Path | Url, int]],
        cache: Path | None = None,
        conventions: Conventions | None = None,
    ) -> None:
        self._units, self._conventions = units, conventions
        self._has_images = {
            file: self._opened(file).schema_arrow.get_field_index(COLUMN) >= 0 for file, _ in units
        }
        self._read: tuple[int, pa.Array] | None = None
        self._mapped: pa.ipc.RecordBatchFileReader | None = None
        if cache is not None and any(self._has_images.values()):
            index, source = cache / "pairs.arrow", _describe(units)
            if not index.is_file() or _source_of(index) != source:
                self._build(index, source)
            self._mapped = pa.ipc.open_file(pa.memory_map(str(index)))

    def are_null(self, unit: int) -> np.ndarray:
        """(num_rows,) bool, the rows of a row group that have no image."""
        return self._column(unit).is_null().to_numpy(zero_copy_only=False)

    def image(self, unit: int, row: int) -> bytes:
        """An encoded image."""
        return self._column(unit)[row].as_py()

    def _column(self, unit: int) -> pa.Array:
        if self._mapped is not None:
            return self._mapped.get_batch(unit).column(0)
        if self._read is None or self._read[0] != unit:
            self._read = unit, self._from_file(unit)
        return self._read[1]

    def _from_file(self, unit: int) -> pa.Array:
        file, group = self._units[unit]
        parquet = self._opened(file)
        if not self._has_images[file]:
            return pa.nulls(parquet.metadata.row_group(group).num_rows, pa.large_binary())
        column = read_row_group(parquet, group, [COLUMN], file)[COLUMN]
        return column.cast(pa.large_binary()).combine_chunks()

    def _opened(self, file: Path | Url) -> TableFile:
        return open_parquet(file, PAIRS, PAIRS_REQUIRED, self._conventions)

    def _build(self, index: Path, source: str) -> None:
        schema = _SCHEMA.with_metadata({_SOURCE: source.encode()})
        index.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(index) as file, pa.ipc.new_file(file, schema) as writer:
            for unit in range(len(self._units)):
                writer.write_batch(pa.record_batch([self._from_file(unit)], schema=schema))
        log.info("index of query images %s: %d row groups", index, len(self._units))


def _describe(units: Sequence[tuple[Path | Url, int]]) -> str:
    """What the Arrow file is made from: it is made again when this changes."""
    stats = {file: stat_of(file) for file, _ in units}
    return json.dumps([[str(file), group, *stats[file]] for file, group in units])


def _source_of(index: Path) -> str:
    with pa.memory_map(str(index)) as file:
        return ((pa.ipc.open_file(file).schema.metadata or {}).get(_SOURCE, b"")).decode()
