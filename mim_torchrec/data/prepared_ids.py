"""The ids of training requests as `mim prepare` has counted them, where the files are still those it wrote.

A file is known by the hash of its footer, which has the place, the size and the range of values of every
column of every row group. What is changed below it is found by the checksums of the pages.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mim_torchrec.data.features import Features, Ids
from mim_torchrec.data.id_scan import COLUMNS, IdCounts
from mim_torchrec.data.schema import Dataset
from mim_torchrec.embeddings.remote.places import Url

log = logging.getLogger(__name__)

FORMAT = 2
"""Of manifest.json: 2 has the footers of files and the impressions of ids."""
TRAIN = "requests/split=train/"
TAIL = 8
READERS = 8


class _Differs(Exception):
    """The manifest is not about these files."""


def prepared_ids(
    dataset: Dataset, files: Sequence[Path | Url], features: Features
) -> dict[str, IdCounts] | None:
    """What `count_ids` finds in training requests, read from what `mim prepare` has counted.

    Args:
        dataset: that the files are of.
        files: of training requests.
        features: further columns.

    Returns:
        None where the data set has no manifest, or one that does not say it of these files; the log has why.
    """
    manifest = dataset.file("manifest.json")
    if manifest is None:
        return None
    try:
        found = _read(dataset, json.loads(manifest.read_bytes()), files, features)
    except (_Differs, OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        log.warning("%s: %s; the ids of %d files are scanned", manifest, error, len(files))
        return None
    log.info("%s has the ids of %d files", manifest, len(files))
    return found


def footer_sha256(file: Path | Url) -> str:
    """SHA-256 of the footer of a Parquet file.

    Raises:
        ValueError: the file has none.
    """
    with file.open("rb") if isinstance(file, Path) else file.open() as stream:
        size = stream.seek(0, 2)
        stream.seek(max(size - TAIL, 0))
        tail = stream.read(TAIL)
        length = int.from_bytes(tail[:4], "little") + TAIL
        if tail[4:] != b"PAR1" or length > size:
            raise ValueError(f"{file} is no Parquet file")
        stream.seek(size - length)
        return hashlib.sha256(stream.read(length)).hexdigest()


def _read(
    dataset: Dataset, manifest: dict[str, Any], files: Sequence[Path | Url], features: Features
) -> dict[str, IdCounts]:
    if manifest["format"] != FORMAT:
        raise _Differs(f"its format is {manifest['format']}, not {FORMAT}")
    counted = manifest["vocabularies"]
    columns = manifest["schema"]["requests"]
    further = [
        name for name, one in features.by_name.items() if isinstance(one.kind, Ids) and name in columns
    ]
    own = [name for name, of in COLUMNS.items() if not set(of).isdisjoint(columns)]
    if missing := sorted({*own, *further} - counted.keys()):
        raise _Differs(f"it has no ids of {', '.join(missing)}")
    written = {one["file"]: one for one in manifest["files"] if one["file"].startswith(TRAIN)}
    there = {dataset.path_of(file): file for file in files}
    if there.keys() != written.keys():
        raise _Differs(f"it has {len(written)} files of the training part, and others are read")
    with ThreadPoolExecutor(READERS) as pool:
        footers = list(pool.map(footer_sha256, there.values()))
    for path, footer in zip(there, footers, strict=True):
        if footer != written[path]["footer_sha256"]:
            raise _Differs(f"{path} is not the file that it was")
    return {name: _load(dataset, counted[name]) for name in sorted(own)}


def _load(dataset: Dataset, entry: dict[str, Any]) -> IdCounts:
    file = dataset.file(entry["file"])
    if file is None:
        raise _Differs(f"{entry['file']} is not there")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise _Differs(f"{entry['file']} is not the file that it was")
    table = pq.read_table(pa.BufferReader(content))
    counts = IdCounts()
    counts.add(*(table[name].to_numpy() for name in ("id", "count", "impressions")))
    return counts
