"""`manifest.json`: what a prepared data set holds, with a fingerprint of every file."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mim_torchrec.data.prepared_ids import FORMAT
from mim_torchrec.embeddings.files import sha256, write_json
from mim_torchrec.prepare.mapping import Mapping
from mim_torchrec.prepare.writing import FolderWriter


def write_manifest(root: Path, files: FolderWriter, report: dict[str, Any], mapping: Mapping) -> None:
    """Write the manifest of what has been written.

    It has `format`, `name`, `counts` and `schema` by folder, `split` (times), `ids` (how each kind is kept),
    `vocabularies` (of the training part: file, ids, sha256), `files` (rows, bytes, hashes of
    the file and of its Parquet footer), and
    `fingerprint`, a hash of all of them.
    """
    schemas = {}
    for one in files.files:
        top = one["file"].split("/")[0]
        if top not in schemas:
            schema = pq.read_schema(root / one["file"])
            schemas[top] = {field.name: str(field.type) for field in schema}
    vocabularies = {
        path.stem: {
            "file": path.relative_to(root).as_posix(),
            "ids": pq.read_metadata(path).num_rows,
            "sha256": sha256(path),
        }
        for path in sorted((root / "vocabularies").glob("*.parquet"))
    }
    parts = [*(one["sha256"] for one in files.files), *(v["sha256"] for v in vocabularies.values())]
    write_json(root / "manifest.json", {
        "format": FORMAT,
        "name": mapping.name,
        "counts": report["written"],
        "schema": schemas,
        "split": report["split"],
        "ids": mapping.ids.model_dump(),
        "vocabularies": vocabularies,
        "files": files.files,
        "fingerprint": hashlib.sha256("".join(parts).encode()).hexdigest(),
    })  # fmt: skip
