"""The multi-modal table on disk (§3.5, MFM): one vector per item, written once and then only read.

A table is a directory of ``manifest.json`` and ``shard-*.safetensors``; a shard holds ``ids`` (num_rows,)
int64, strictly ascending, and ``vectors`` (num_rows, stored_width). It is written under ``<path>.partial``
and renamed when complete, so a directory with a manifest is always whole. Ascending ids make the rows of any
range of ids one contiguous slice of every shard: a rank that owns a range reads nothing else.

This module gathers the names that users need: ``manifest.py`` says what a table is, ``writer.py`` and
``reader.py`` write and read it, ``quantize.py`` knows the storage types. Not here: updates of a table in
place (windows of new items).
"""

from mim_torchrec.embeddings.table.manifest import (
    ChecksumMismatch,
    DuplicateId,
    IncompleteTable,
    LossyVector,
    Manifest,
    NonFiniteVector,
    ShardInfo,
    TableError,
    VersionMismatch,
    partial_path,
)
from mim_torchrec.embeddings.table.quantize import DTYPES, decode, encode, row_bytes, stored_width
from mim_torchrec.embeddings.table.reader import RowIndex, Table
from mim_torchrec.embeddings.table.shards import verify_shard
from mim_torchrec.embeddings.table.writer import TableWriter

__all__ = [
    "DTYPES",
    "ChecksumMismatch",
    "DuplicateId",
    "IncompleteTable",
    "LossyVector",
    "Manifest",
    "NonFiniteVector",
    "RowIndex",
    "ShardInfo",
    "Table",
    "TableError",
    "TableWriter",
    "VersionMismatch",
    "decode",
    "encode",
    "partial_path",
    "row_bytes",
    "stored_width",
    "verify_shard",
]
