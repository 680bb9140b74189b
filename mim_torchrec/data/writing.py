"""Writes a data set directory that appears under its name only when all of it is there."""

import importlib.metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_torchrec.embeddings.files import (
    discard_directory,
    full_disk_reported,
    publish_directory,
    write_json,
)
from mim_torchrec.errors import OutputExists


class DatasetWriter:
    """Context manager that writes tables into `<out>.partial` and renames it at the end.

    Args:
        out: the data set's directory; must not exist.
        name: short name, for dataset.json.
        source: where the data comes from, for dataset.json.

    Raises:
        OutputExists: `out` exists.
    """

    def __init__(self, out: str | Path, *, name: str, source: dict[str, Any]) -> None:
        self.out = Path(out)
        self._refuse_existing()
        self.partial = self.out.with_name(self.out.name + ".partial")
        version = importlib.metadata.version("mim-torchrec")
        self.description: dict[str, Any] = {
            "name": name, "source": source, "created_by": f"mim-torchrec {version}", "counts": {},
        }  # fmt: skip

    def __enter__(self) -> "DatasetWriter":
        discard_directory(self.partial)
        with full_disk_reported(self.out):
            self.partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            discard_directory(self.partial)
            return
        with full_disk_reported(self.out):
            write_json(self.partial / "dataset.json", self.description)
            try:
                publish_directory(self.partial, self.out, replace=False)
            except FileExistsError:
                self._refuse_existing()
                raise

    def write(
        self, folder: str, table: pa.Table, *, row_group_size: int = 1000, file_rows: int = 8000
    ) -> None:
        """Write a table as `<folder>/part-*.parquet` and count its rows under `folder`."""
        directory = self.partial / folder
        directory.mkdir(parents=True)
        for part, start in enumerate(range(0, len(table), file_rows)):
            self._write(directory / f"part-{part:05d}.parquet", table.slice(start, file_rows), row_group_size)
        self.description["counts"][folder] = len(table)

    def append(self, folder: str, table: pa.Table, *, row_group_size: int = 1000) -> None:
        """Write a table as one more `<folder>/part-*.parquet` and add its rows to the count of `folder`."""
        directory = self.partial / folder
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"part-{len(list(directory.iterdir())):05d}.parquet"
        self._write(path, table, row_group_size)
        counts = self.description["counts"]
        counts[folder] = counts.get(folder, 0) + len(table)

    def _write(self, path: Path, table: pa.Table, row_group_size: int) -> None:
        with full_disk_reported(path, table.nbytes), path.open("wb") as file:
            pq.write_table(table, file, row_group_size=row_group_size, compression="zstd")

    def _refuse_existing(self) -> None:
        if self.out.exists():
            raise OutputExists(f"{self.out} exists; choose another directory or remove it")


def lists(values: Any, lengths: Any, kind: pa.DataType) -> pa.ListArray:
    """A list column of flat values (sum(lengths),) and the lengths of its rows (num_rows,)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets).cast(pa.int32()), flat.cast(kind))
