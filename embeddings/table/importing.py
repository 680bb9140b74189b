"""Bring vectors that another team has made into a table: ``mim table import``.

Sources whose ids ascend stream straight through; the rows of others are first brought into the order of ids
on the disk (``arranging.py``). Either way memory holds a batch of rows, the shard being written with its
copies, and at first 8 bytes a row of ids. Without a version given, the vectors are read once more to hash
them. ``external.py`` and its three readers say what the files may hold.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.embeddings.listing import data_files
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.embeddings.table.arranging import Buckets
from mim_torchrec.embeddings.table.convert import SHARD_BYTES, shard_rows
from mim_torchrec.embeddings.table.external import ExternalVectors, places, type_name
from mim_torchrec.embeddings.table.external_dcp import CheckpointSource, is_checkpoint
from mim_torchrec.embeddings.table.external_parquet import ParquetSource
from mim_torchrec.embeddings.table.external_tensors import open_npy, open_npz, open_safetensors
from mim_torchrec.embeddings.table.manifest import DuplicateId, Manifest, NonFiniteVector, TableError
from mim_torchrec.embeddings.table.quantize import DTYPES, encode, finite_rows, fuse_codes, stored_width
from mim_torchrec.embeddings.table.shards import check_loss
from mim_torchrec.embeddings.table.writer import TableWriter

Parts = Iterator[
    tuple[Tensor, Tensor]
]  # ids (num_rows,) int64 and vectors (num_rows, dim), a batch at a time


def import_vectors(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    dtype: str | None = None,
    id_column: str | None = None,
    vector_column: str | None = None,
    ids: Sequence[str | Path] = (),
    key: str | None = None,
    table_version: str | None = None,
    spare_rows: int = 0,
    rows_per_shard: int | None = None,
    show_progress: bool = False,
) -> Manifest:
    """Write the vectors of external files as a table, its shards in ascending order of ids.

    int8 vectors have no scale: they are stored as int8 exactly (:func:`quantize.fuse_codes`), and in another
    type as the floats that the codes are. Rows may come in any order; arranging them takes as much disk as
    their vectors in ``<out>.partial``, given back as the shards are written.

    Args:
        paths: ``.parquet``, ``.npy``, ``.npz`` or ``.safetensors`` files, or directories of Parquet files,
            also nested; or the directory of one distributed checkpoint (DCP).
        out: directory of the new table; must not exist.
        dtype: "float32", "float16", "bfloat16", "int8" or "int4"; ``None`` is int8 for int8
            vectors, the type of the rows for a checkpoint, else float16.
        id_column: column (Parquet) or tensor (safetensors, npz) of the ids: integers, text or UUIDs, see
            :func:`stable_ids.stable_ids`. ``None``: the only column of integers, or the tensor ``ids``.
        vector_column: likewise of the vectors; ``v*`` takes the columns v0, v1, … of a number each. ``None``:
            the only column of lists of floats or int8, or the tensor ``vectors``.
        ids: for each ``.npy`` of vectors, the ``.npy`` of its ids (num_rows,); for a checkpoint, that of the
            ids of its rows. None for a checkpoint keeps its rows by number: row r of a live table is row r of
            the checkpoint, row 0 too.
        key: of a checkpoint, the name of the table; ``None``: the only tensor of two dimensions.
        table_version: name of what made the vectors; ``None`` makes one of what they are, see
            :func:`content_version`.
        spare_rows: rows that a live table made from this one keeps free for new items.
        rows_per_shard: rows of a shard; ``None`` makes shards of 256 MiB.
        show_progress: show the progress of every pass.

    Returns:
        The new table's manifest; ``encoder["imported"]`` says where it comes from.

    Raises:
        TableError: a file, column, id or vector cannot be imported.
        OutputExists: ``out`` exists.
        DuplicateId: an item has two vectors; both places are named.
        NonFiniteVector: a vector holds NaN or infinity, or overflows ``dtype``.
        LossyVector: a vector is too small for ``dtype``, see :func:`shards.check_loss`.
            Nothing is left at ``out`` after any of them.
    """
    if spare_rows < 0:
        raise TableError(f"{out}: --spare-rows is {spare_rows}, expected 0 or more")
    if table_version is not None and not table_version.strip():
        raise TableError(f"{out}: the table_version given is empty; leave it out to make one of the content")
    given = [paths] if isinstance(paths, str | Path) else paths
    files, its_ids = [Path(path) for path in given], [Path(path) for path in ids]
    if any(is_checkpoint(file) for file in files):
        sources = _open_checkpoint(files, its_ids, key, id_column or vector_column)
        dtype = dtype or type_name(sources[0].dtype)
    elif key is not None:
        raise TableError(f"{files[0]}: --key names a table of a checkpoint, and this is none")
    else:
        sources = _open(files, id_column, vector_column, its_ids)
    first = sources[0]
    dtype = dtype or ("int8" if first.dtype == torch.int8 else "float16")
    try:
        stored_width(dtype, first.dim)
    except ValueError as error:
        raise TableError(f"{first.path}, column {first.columns[1]!r}: {error} (--dtype float16)") from None
    writer = TableWriter(
        out, table_version=table_version or "", dim=first.dim, dtype=dtype, spare_rows=spare_rows,
        encoder={"imported": _origin(sources, dtype, spare_rows)},
        by_number=first.format == CheckpointSource.format and not its_ids,
    )  # fmt: skip
    try:
        read = _in_order(sources, writer.partial / "arranged", rows_per_shard, show_progress)
        if table_version is None:
            with closing(_with_bar(read(False), sources, "hash", show_progress)) as parts:
                writer.table_version = content_version(parts)
        with closing(_with_bar(read(True), sources, "write", show_progress)) as parts:
            _write(writer, parts, rows_per_shard or shard_rows(dtype, first.dim), sources)
        return writer.finish()
    except BaseException:
        writer.discard()
        raise


def content_version(parts: Iterable[tuple[Tensor, Tensor]]) -> str:
    """Return ``imported-`` and 16 hexadecimal digits that say which vectors a table has.

    They are the first of SHA-256(SHA-256(ids as int64) + SHA-256(vectors as float32)), both little-endian in
    ascending order of ids: equal content has equal versions, however it was stored, split or ordered, and
    whatever type the table stores.

    Args:
        parts: ids (num_rows,) and vectors (num_rows, dim), a batch at a time, in ascending order of ids.

    >>> content_version([(torch.tensor([4, 9]), torch.tensor([[1, 2], [3, 4]]))])
    'imported-5a0a2189ee4eeb5e'
    """
    of_ids, of_vectors = hashlib.sha256(), hashlib.sha256()
    for ids, vectors in parts:
        of_ids.update(np.ascontiguousarray(ids.numpy(), dtype="<i8").data)
        of_vectors.update(np.ascontiguousarray(vectors.float().numpy(), dtype="<f4").data)
    return f"imported-{hashlib.sha256(of_ids.digest() + of_vectors.digest()).hexdigest()[:16]}"


def _in_order(
    sources: Sequence[ExternalVectors], folder: Path, rows: int | None, show_progress: bool
) -> Callable[[bool], Parts]:
    """A function that gives all rows in ascending order of ids; called with True, for the last time."""
    ids = np.empty(sum(source.rows for source in sources), dtype=np.int64)
    at = 0
    with _bar(sources, "read ids", show_progress) as bar:
        for part in (part for source in sources for part in source.ids()):
            ids[at : at + part.numel()] = part.numpy()
            at += part.numel()
            bar.update(part.numel())
    if bool((ids[1:] > ids[:-1]).all()):
        return lambda last: _straight(sources)
    ids.sort()
    if (twice := np.flatnonzero(ids[1:] == ids[:-1])).size:
        item = int(ids[twice[0]])
        raise DuplicateId(f"item id {item} has more than one vector: {', '.join(places(sources, item))}")
    dtypes = {source.dtype for source in sources}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    rows = rows or max(1, SHARD_BYTES // (sources[0].dim * dtype.itemsize))
    buckets = Buckets(folder, ids, rows, sources[0].dim, dtype)
    del ids
    with _bar(sources, "arrange", show_progress) as bar:
        for part_ids, vectors in _straight(sources):
            buckets.add(part_ids, vectors)
            bar.update(part_ids.numel())
    return buckets.read


def _straight(sources: Sequence[ExternalVectors]) -> Parts:
    for source in sources:
        yield from source.read()


def _write(writer: TableWriter, parts: Parts, step: int, sources: Sequence[ExternalVectors]) -> None:
    """Write rows that come in ascending order of ids as shards of ``step`` rows."""
    total = sum(source.rows for source in sources)
    ids = torch.empty(min(step, total), dtype=torch.int64)
    shard = torch.empty(ids.numel(), writer.stored_width, dtype=DTYPES[writer.dtype])
    filled = 0
    for part_ids, vectors in parts:
        stored = _stored(part_ids, vectors, writer.dtype, sources)
        at = 0
        while at < part_ids.numel():
            count = min(ids.numel() - filled, part_ids.numel() - at)
            ids[filled : filled + count] = part_ids[at : at + count]
            shard[filled : filled + count] = stored[at : at + count]
            filled, at = filled + count, at + count
            if filled == ids.numel():
                writer.write_shard(ids, shard)
                filled = 0
    if filled:
        writer.write_shard(ids[:filled], shard[:filled])


def _stored(ids: Tensor, vectors: Tensor, dtype: str, sources: Sequence[ExternalVectors]) -> Tensor:
    if vectors.dtype == torch.int8 and dtype == "int8":
        return fuse_codes(vectors)
    stored = encode(vectors.float(), dtype)
    if (wrong := (~finite_rows(stored, dtype)).nonzero()).numel():
        item = int(ids[wrong[0]])
        raise NonFiniteVector(
            f"{places(sources, item)[0]}, item id {item}, column {sources[0].columns[1]!r}: the vector is "
            f"too large for {dtype}; import as --dtype float32 or bfloat16, or scale the vectors"
        )
    column = sources[0].columns[1]
    check_loss(
        vectors, stored, dtype, ids, lambda row: f"{places(sources, int(ids[row]))[0]}, column {column!r}",
        "import as --dtype float32, or scale the vectors",
    )  # fmt: skip
    return stored


def _bar(sources: Sequence[ExternalVectors], name: str, show: bool) -> Progress:
    return Progress(sum(source.rows for source in sources), name, "row", scale=True, show=show)


def _with_bar(
    parts: Parts, sources: Sequence[ExternalVectors], name: str, show: bool
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The parts; whoever stops before the last one closes it, or the bar ends when it is collected."""
    with _bar(sources, name, show) as bar:
        for ids, vectors in parts:
            yield ids, vectors
            bar.update(ids.numel())


def _origin(sources: Sequence[ExternalVectors], dtype: str, spare_rows: int) -> dict[str, Any]:
    first = sources[0]
    return {
        "files": [source.path.name for source in sources],
        "format": sorted({source.format for source in sources}),
        "columns": {"id": first.columns[0], "vector": first.columns[1]},
        "vectors": sorted({type_name(source.dtype) for source in sources}),
        "options": {"dtype": dtype, "spare_rows": spare_rows},
        "created_by": f"mim-torchrec {importlib.metadata.version('mim-torchrec')}",
    }


def _open_checkpoint(
    files: Sequence[Path], ids: Sequence[Path], key: str | None, column: str | None
) -> list[ExternalVectors]:
    if len(files) > 1 or len(ids) > 1:
        raise TableError(
            f"{files[0]}: a checkpoint is imported alone, with at most one .npy of ids; found {len(files)} "
            f"sources and {len(ids)} of ids"
        )
    if column is not None:
        raise TableError(f"{files[0]}: a checkpoint has no columns; name its table with --key")
    return [CheckpointSource(files[0], key, next(iter(ids), None))]


def _open(
    paths: Sequence[Path], id_column: str | None, vector_column: str | None, ids: Sequence[Path]
) -> list[ExternalVectors]:
    """The files that have rows, at least one; those of a directory in the order of their names."""
    files = [file for path in paths for file in _files(path)]
    arrays = [file for file in files if file.suffix == ".npy"]
    if len(arrays) != len(ids):
        raise TableError(
            f"{len(arrays)} .npy files of vectors and {len(ids)} of ids; give each .npy of vectors, in the "
            f"same order, a .npy of its ids: --ids FILE"
        )
    if arrays and (id_column or vector_column):
        raise TableError(
            f"{arrays[0]}: a .npy file has no columns; leave out --id-column and --vector-column"
        )
    ids_left = iter(ids)
    sources: list[ExternalVectors] = []
    names: tuple[str | None, str | None] = (id_column, vector_column)
    for file in files:
        if file.suffix == ".npy":
            source: ExternalVectors = open_npy(file, next(ids_left))
        elif file.suffix in (".safetensors", ".npz"):
            open_named = open_npz if file.suffix == ".npz" else open_safetensors
            source = open_named(file, id_column or "ids", vector_column or "vectors")
        else:
            source = ParquetSource(file, *names)
            names = source.columns
        sources.append(source)
    filled = [source for source in sources if source.rows]
    if not filled:
        raise TableError(
            f"{', '.join(map(str, paths)) or 'no source was given'}: there are no rows to import"
        )
    first = filled[0]
    for source in filled[1:]:
        if source.dim != first.dim:
            raise TableError(
                f"{source.path}: vectors of {source.dim} values, those of {first.path} have {first.dim}; "
                f"import them into two tables"
            )
        if source.has_text_ids != first.has_text_ids:
            own, other = ("text" if one.has_text_ids else "integers" for one in (source, first))
            raise TableError(
                f"{source.path}: ids are {own}, those of {first.path} are {other}; write all of one type"
            )
        if (source.dtype == torch.int8) != (first.dtype == torch.int8):
            raise TableError(
                f"{source.path}: vectors are {type_name(source.dtype)}, those of {first.path} "
                f"{type_name(first.dtype)}; codes and floats do not make one table"
            )
    return filled


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        if files := data_files(path):
            return files
        raise TableError(f"{path}: there are no .parquet files in this directory")
    if not path.is_file():
        raise TableError(f"{path}: not found")
    if path.suffix not in (".parquet", ".npy", ".npz", ".safetensors"):
        raise TableError(
            f"{path}: not a .parquet, .npy, .npz or .safetensors file, nor a directory of Parquet files or "
            f"of a checkpoint"
        )
    return [path]
