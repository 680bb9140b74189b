"""``mim table``: import, look at, check, compare, convert, grow, compact and permute multi-modal tables."""

import json
import uuid
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
import tyro

from mim_torchrec import program
from mim_torchrec.domains import Domain, Natural, Weight, check_domains
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.embeddings.table.convert import convert
from mim_torchrec.embeddings.table.diff import diff
from mim_torchrec.embeddings.table.format import Manifest, Table
from mim_torchrec.embeddings.table.grow import grow
from mim_torchrec.embeddings.table.importing import import_vectors
from mim_torchrec.embeddings.table.permute import permute
from mim_torchrec.embeddings.table.shards import CHUNK
from mim_torchrec.embeddings.windows.compact import compact
from mim_torchrec.embeddings.windows.transport import open_log

ItemId = Annotated[int, Domain(least=-(2**63), most=2**63 - 1)]
Dtype = Literal["float32", "float16", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Import:
    """Import vectors that others have made into a table.

    Sources are Parquet files with a column of ids and one of lists of numbers (or many columns of a number
    each), directories of such files, .npy files (num_rows, dim) with --ids, .npz and .safetensors files with
    an array of each, and one table of a directory of torch.distributed.checkpoint (--key), whose rows are
    kept by number. Ids are integers, text or UUIDs; the manual says which numbers the latter become. Rows may
    come in any order; arranging them takes as much disk again as the vectors while it lasts. Memory does not
    grow with the vectors, only by 8 bytes a row with the ids, and with the arrays of an .npz.
    """

    sources: tyro.conf.Positional[tuple[LocalPath, ...]]
    """Files, or directories of Parquet files; all their rows make one table. Or one checkpoint."""
    out: Place
    """Directory of the new table; must not exist."""
    dtype: Dtype | None = None
    """Type stored; by default int8 for int8 vectors, which keeps them exactly, and else float16. A table of a
    checkpoint keeps its own. A vector that the type would change by more than 1% (int8 10%) is an error."""
    id_column: str | None = None
    """Column or tensor of the ids: integers, text or UUIDs; by default the only column of integers, or the
    tensor "ids"."""
    vector_column: str | None = None
    """Column or tensor of the vectors; by default the only column of lists of floats or int8, or the tensor
    "vectors". A name with a star takes wide columns: 'v*' is v0, v1, ..., in the order of their numbers."""
    ids: tyro.conf.UseAppendAction[tuple[LocalPath, ...]] = ()
    """A .npy of ids (num_rows,), once for each .npy of vectors and in their order; or of the rows of a
    checkpoint, which otherwise are kept by number: row r of the table is row r of the checkpoint."""
    key: str | None = None
    """Name of the table in a checkpoint; a wrong one lists them. By default the only one there is."""
    table_version: str | None = None
    """Name of what made the vectors. By default it is a hash of them, for which they are read once more."""
    spare_rows: Natural = 0
    """Rows that stay free for new items in a live table made from this one."""

    def run(self) -> None:
        with written(self.out) as out:
            made = import_vectors(
                self.sources, out, dtype=self.dtype, id_column=self.id_column,
                vector_column=self.vector_column, ids=self.ids, key=self.key,
                table_version=self.table_version, spare_rows=self.spare_rows, show_progress=True,
            )  # fmt: skip
        origin = made.encoder["imported"]
        print(
            f"{self.out}: ids from {origin['columns']['id']!r}, vectors from {origin['columns']['vector']!r} "
            f"({', '.join(origin['vectors'])}); {summary(made)}; table_version {made.table_version}"
        )


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print the manifest of a table, as JSON, and with it how large the table is."""

    table: tyro.conf.Positional[Place]
    """The table's directory."""
    log: str | None = None
    """Window log whose windows are listed, a directory or a Redis URL."""

    def run(self) -> None:
        manifest = Table.open(self.table, verify=False).manifest
        sizes = {
            "spare_rows": manifest.spare_rows,
            "row_bytes": manifest.row_bytes,
            "vector_bytes": manifest.rows * manifest.row_bytes,
            "live_bytes": manifest.num_embeddings * manifest.row_bytes,
            "summary": summary(manifest),
        }
        if self.log is not None:
            windows = open_log(self.log, manifest.table_version)
            first, last = windows.first_seq(), windows.last_seq()
            sizes["log"] = {"first_seq": first, "last_seq": last, "bytes": windows.size(),
                            "to_apply": max(last - manifest.seq, 0)}  # fmt: skip
        print(json.dumps({**sizes, **asdict(manifest)}, indent=2))


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every checksum, id and vector of a table."""

    table: tyro.conf.Positional[Place]
    """The table's directory."""
    table_version: str | None = None
    """The version that the table must have."""
    log: str | None = None
    """Window log whose windows after the table's seq are verified too, a directory or a Redis URL."""

    def run(self) -> None:
        table = Table.open(self.table, expected_version=self.table_version)
        manifest = table.manifest
        with Progress(manifest.rows, "verify", "row", scale=True) as bar:
            end = manifest.first_row + manifest.rows
            for start in range(manifest.first_row, end, CHUNK):
                stop = min(start + CHUNK, end)
                table.rows_for(start, stop)
                bar.update(stop - start)
        print(
            f"{self.table}: {manifest.rows} x {manifest.dim} {manifest.dtype} in {len(manifest.shards)} "
            f"shards, table_version {manifest.table_version}: all checksums match, ids are unique, "
            f"vectors are finite"
        )
        if self.log is not None:
            windows = list(open_log(self.log, manifest.table_version).after(manifest.seq))
            items = sum(window.ids.numel() for window in windows)
            gone = sum(window.removed.numel() for window in windows)
            print(
                f"{self.log}: {len(windows)} windows after {manifest.seq}, {items} vectors, {gone} items "
                "deleted: all checksums match"
            )


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a copy in another storage type, with the same table_version, its shards in the order of ids.

    int8 and int4 are row-wise: at dim 128 a row takes 136 and 68 bytes against 256 of float16. The mean
    cosine error against the table converted is printed and kept in the manifest.
    """

    table: tyro.conf.Positional[Place]
    """The table to copy."""
    out: Place
    """Directory of the new table; must not exist."""
    dtype: Dtype
    """Type the vectors are stored in; the table's own puts shards in order and changes no vector."""

    def run(self) -> None:
        table = fetched(self.table)
        rows = Table.open(table, verify=False).manifest.rows
        with written(self.out) as out, Progress(rows, "convert", "row", scale=True) as bar:
            made = convert(table, out, self.dtype, progress=bar.update)
        print(
            f"{self.out}: {rows} rows as {self.dtype}, {made.manifest.row_bytes} bytes a row, table_version "
            f"{made.manifest.table_version}, cosine error {made.mean_cosine_error:.2e} (mean), "
            f"{made.max_cosine_error:.2e} (largest)"
        )


@dataclass(frozen=True, kw_only=True)
class Grow:
    """Write a copy with more spare rows for new items, which keeps every row, byte, table_version and seq."""

    table: tyro.conf.Positional[Place]
    """The table to copy."""
    out: Place
    """Directory of the new table; must not exist."""
    spare_rows: Natural
    """Spare rows of the new table in all; more than the table has."""
    link: bool = False
    """Link the shards instead of copying them (on one file system): at once, but the bytes are shared."""

    def run(self) -> None:
        with written(self.out) as out:
            made = grow(fetched(self.table), out, self.spare_rows, link=self.link)
        print(f"{self.out}: {summary(made)}")


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Apply the windows of a log to a table; write the result as a new table, with the seq of the last."""

    table: tyro.conf.Positional[Place]
    """The table that the windows change."""
    log: str
    """Directory or URL of the windows."""
    out: Place
    """Directory of the new table; must not exist."""
    forget_hours: Weight | None = None
    """Then remove from the log the windows that the new table holds and that are older than this. Readers
    that lag further behind have to load the new table. By default all are kept."""

    def run(self) -> None:
        with written(self.out) as out:
            made = compact(fetched(self.table), self.log, out)
        print(f"{self.out}: windows up to {made.seq}; {summary(made)}")
        if self.forget_hours is not None:
            log = open_log(self.log, made.table_version)
            print(f"{self.log}: {log.forget(made.seq, self.forget_hours * 3600)} windows removed")


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Print, as JSON, what differs between two tables: items of one only, and vectors of both.

    Vectors of two versions cannot be compared; then only items are, which says whether a table of a new
    encoder covers that of the old one.
    """

    table: tyro.conf.Positional[Place]
    """A table's directory."""
    other: tyro.conf.Positional[Place]
    """The other's."""

    def run(self) -> None:
        print(json.dumps(asdict(diff(fetched(self.table), fetched(self.other))), indent=2))


@dataclass(frozen=True, kw_only=True)
class Delete:
    """Delete items: append a window with their tombstones to the log."""

    items: tyro.conf.Positional[tuple[ItemId, ...]]
    """Item ids."""
    log: str
    """Directory or URL of the window log."""
    table: Place
    """A base table of the log's version."""

    def run(self) -> None:
        manifest = Table.open(self.table, verify=False).manifest
        log = open_log(self.log, manifest.table_version, start=manifest.seq)
        seq = log.append(
            f"delete:{uuid.uuid4().hex}", torch.empty(0, dtype=torch.int64), torch.empty(0, manifest.dim),
            dtype=manifest.dtype, removed=torch.tensor(self.items, dtype=torch.int64).unique(),
        )  # fmt: skip
        print(f"{self.log}: window {seq} takes {len(set(self.items))} items down")


@dataclass(frozen=True, kw_only=True)
class Permute:
    """Write a copy whose vectors are permuted among the ids (negative control)."""

    table: tyro.conf.Positional[Place]
    """The table to copy."""
    out: Place
    """Directory of the permuted table; must not exist."""
    seed: Natural = 0
    """Seed of the permutation."""

    def run(self) -> None:
        with written(self.out) as out:
            manifest = permute(fetched(self.table), out, self.seed)
        print(f"{self.out}: {manifest.rows} rows, table_version {manifest.table_version}")


def summary(manifest: Manifest) -> str:
    """Say how large a table is; sizes are in powers of 1000.

    >>> summary(Manifest(
    ...     format_version=2, table_version="v", rows=35_000_000, capacity=36_000_000, dim=128, dtype="int8",
    ...     seq=0, encoder={}, shards=(),
    ... ))
    '35,000,000 x 128 int8, 136 bytes a row, 4.76 GB; 1,000,000 spare rows, capacity 36,000,000, 4.90 GB live'
    """
    width = manifest.row_bytes
    return (
        f"{manifest.rows:,} x {manifest.dim} {manifest.dtype}, {width} bytes a row, "
        f"{_size(manifest.rows * width)}; {manifest.spare_rows:,} spare rows, "
        f"capacity {manifest.capacity:,}, {_size(manifest.num_embeddings * width)} live"
    )


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.2f} {unit}"


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Grow, tyro.conf.subcommand("grow")]
    | Annotated[Compact, tyro.conf.subcommand("compact")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Delete, tyro.conf.subcommand("delete")]
    | Annotated[Permute, tyro.conf.subcommand("permute")]
)


def main(argv: list[str] | None = None) -> None:
    """Run ``mim table`` with the arguments ``argv`` (``None``: those of the process)."""
    command = tyro.cli(Command, args=argv, prog="mim table")
    check_domains(command)
    command.run()


if __name__ == "__main__":
    program.run(main)
