"""The files of a table: local ones or in an object store, Parquet or CSV, all with the same columns."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.listing import data_files
from mim_torchrec.embeddings.remote.places import Url

SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".csv.gz": "csv"}
READERS = 8


@dataclass(frozen=True)
class Files:
    """Files of one table.

    Args:
        place: of the table in the mapping, for messages.
        paths: local paths or URLs, sorted.
        kind: "parquet" or "csv".
        schema: names and types of the columns; those of CSV are all text.
    """

    place: str
    paths: Sequence[str]
    kind: str
    schema: pa.Schema

    def type_of(self, column: str, role: str) -> pa.DataType:
        """The type of a column. Raises DataError if there is none; it names the place in the mapping."""
        index = self.schema.get_field_index(column)
        if index < 0:
            found = ", ".join(self.schema.names)
            problem = f"{self.place}.{role}: there is no such column; the file has {found}"
            raise DataError(problem, file=self.paths[0], column=column)
        kind = self.schema.field(index).type
        return kind.value_type if pa.types.is_dictionary(kind) else kind


def find_files(place: str, path: str | list[str], base: Path, columns: Sequence[str]) -> Files:
    """Find the files of a table and see that they agree.

    Args:
        place: of the table in the mapping.
        path: file, folder, pattern, URL, or a list of them.
        base: folder that relative paths are relative to.
        columns: those that must have one type in all files, as far as files have them.

    Raises:
        DataError: there is none, some are Parquet and some CSV, one cannot be read, or two differ in the type
            of a column; the message names both.
        NoSuchPlace, StoreError: a URL cannot be read, for want of a package or of rights.
    """
    paths = sorted({one for p in ([path] if isinstance(path, str) else path) for one in _expand(p, base)})
    if not paths:
        raise DataError(f"{place}.path: no *.parquet or *.csv file is there; check the path", file=str(path))
    kinds = {one: next(kind for suffix, kind in SUFFIXES.items() if one.endswith(suffix)) for one in paths}
    if len(set(kinds.values())) > 1:
        first, second = (next(p for p, k in kinds.items() if k == kind) for kind in ("parquet", "csv"))
        raise DataError(f"{place}.path: {first} is Parquet and {second} is CSV; name one kind")
    kind = kinds[paths[0]]
    read = parquet_schema if kind == "parquet" else csv_schema
    with ThreadPoolExecutor(READERS) as pool:
        schemas = list(pool.map(read, paths))
    for file, schema in zip(paths, schemas, strict=True):
        if kind == "csv" and schema.names != schemas[0].names:
            problem = f"{place}: the header is not that of {paths[0]}; write all files with the same columns"
            raise DataError(problem, file=file)
        for column in columns:
            here, there = (
                str(s.field(column).type) if column in s.names else "missing" for s in (schema, schemas[0])
            )
            if here != there:
                what = f"{place}: the column is {here} here and {there} in {paths[0]}"
                raise DataError(f"{what}; write all files with the same columns", file=file, column=column)
    return Files(place, paths, kind, schemas[0])


def is_url(path: str) -> bool:
    """Whether a path names a file system."""
    return "://" in path


def resolve(path: str, base: Path) -> str:
    """A path relative to a folder; URLs and absolute paths stay."""
    return path if is_url(path) else str(base / path)


def parquet_schema(path: str) -> pa.Schema:
    """Columns of a Parquet file. Raises DataError if it is none."""
    try:
        with fsspec.open(path, "rb") as file:
            return pq.read_schema(file)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"not a readable Parquet file ({error}); copy or write it again", file=path) from None


def csv_schema(path: str) -> pa.Schema:
    """Columns of a CSV file with a header, all text. Raises DataError if it is none."""
    compression = "gzip" if path.endswith(".gz") else None
    try:
        with fsspec.open(path, "rb", compression=compression) as file:
            with pyarrow.csv.open_csv(file) as reader:
                return pa.schema([(name, pa.string()) for name in reader.schema.names])
    except pa.ArrowException as error:
        raise DataError(f"not a readable CSV file with a header ({error})", file=path) from None


def _expand(path: str, base: Path) -> list[str]:
    suffixes = tuple(SUFFIXES)
    if is_url(path):
        with Url(path).reported() as (system, root):
            found = system.glob(root) if any(c in root for c in "*?[") else [root]
            kinds = {one: system.info(one)["type"] for one in found}
            files = [f for one in found for f in (system.find(one) if kinds[one] == "directory" else [one])]
        return [system.unstrip_protocol(f) for f in files if f.endswith(suffixes) and not _hidden(f, root)]
    place = base / path
    if any(c in path for c in "*?["):
        found = sorted(base.glob(path)) if not Path(path).is_absolute() else sorted(Path("/").glob(path[1:]))
    else:
        found = [place]
    files = []
    for one in found:
        if one.is_dir():
            files += [file for suffix in suffixes for file in data_files(one, suffix)]
        elif one.is_file():
            files.append(one)
    return [str(file) for file in files if str(file).endswith(suffixes)]


def _hidden(path: str, root: str) -> bool:
    below = path.removeprefix(root).split("/")
    return any(p.startswith(".") or (p.startswith("_") and "=" not in p) for p in below)
