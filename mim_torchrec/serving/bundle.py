"""A bundle: what a server loads of a trained model (§3.5, CMD).

    <bundle>/bundle.json            configuration, model_version, table_version
    <bundle>/dense.safetensors      weights that are not embeddings, and the rows of unknown ids
    <bundle>/tables/<name>/         one ID table per kind of id, in the format of multi-modal tables

The computation machine holds the dense weights. Rows stay on disk, in the page cache that all processes
share, or are loaded into Redis (`mim store load`). Ids are the keys, so a server needs no vocabulary. Where
the model shrinks embeddings of rare ids, rows are shrunk already, so it needs no counts either.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mim_torchrec.ctr.config import CTRConfig, from_values
from mim_torchrec.ctr.dense import DenseCTR
from mim_torchrec.ctr.tables import id_tables_of
from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.files import atomic_directory, write_json
from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.table.manifest import VersionMismatch
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.table.shards import CHUNK
from mim_torchrec.embeddings.table.writer import TableWriter
from mim_torchrec.embeddings.tensor_files import read_tensors, write_tensors

FORMAT_VERSION = 1
ABOUT, DENSE, TABLES = "bundle.json", "dense.safetensors", "tables"
UNKNOWN = "unknown."


@dataclass(frozen=True)
class Bundle:
    """A bundle on the disk.

    Attributes:
        path: its directory.
        config: the run's.
        model_version: digest of weights and configuration.
        table_version: of the multi-modal vectors that the model was trained on; None for Base.
        mm_dim: their length; 0 for Base.
        tables: names of the ID tables.
        id_types: by name of an ID table whether its ids are "text" or "integers" in the log; a bundle of an
            older release lacks them.
    """

    path: Path
    config: CTRConfig
    model_version: str
    table_version: str | None
    mm_dim: int
    tables: tuple[str, ...]
    id_types: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path | Url) -> "Bundle":
        """Open a bundle.

        Raises:
            DataError: there is none, or it is of another format.
        """
        path = fetched(path)
        try:
            found = json.loads((path / ABOUT).read_text())
            if (version := found["format_version"]) != FORMAT_VERSION:
                raise ValueError(f"format_version {version}, this release reads {FORMAT_VERSION}")
            config = from_values(found["config"])
            return cls(path, config, found["model_version"], found["table_version"], found["mm_dim"],
                       tuple(found["tables"]), found.get("id_types", {}))  # fmt: skip
        except FileNotFoundError:
            raise DataError(f"is no bundle: it has no {ABOUT}; mim bundle writes one", file=path) from None
        except (KeyError, ValueError) as error:
            problem = f"cannot be read: {error}; write the bundle again with mim bundle"
            raise DataError(problem, file=path / ABOUT) from None

    def table(self, name: str) -> Table:
        """An ID table, memory-mapped."""
        return Table.open(self.path / TABLES / name, self.version_of(name), verify=False)

    def version_of(self, name: str) -> str:
        """The version of an ID table's rows: no other model's fit."""
        return f"{self.model_version}.{name}"

    def load(self) -> tuple[DenseCTR, dict[str, Tensor]]:
        """The dense part of the model in evaluation mode and the rows of unknown ids by table.

        Raises:
            DamagedFile: their file is.
            VersionMismatch: the weights are not those of the bundle.
        """
        dense = read_tensors(self.path / DENSE)
        if _digest(dense, self.config, self.table_version) != self.model_version:
            raise VersionMismatch(f"{self.path / DENSE} does not hold the weights of {self.model_version}")
        unknown = {k.removeprefix(UNKNOWN): dense.pop(k) for k in list(dense) if k.startswith(UNKNOWN)}
        dim, found = self.config.embedding_dim, id_tables_of(self.config, self.tables)
        mm_dim = None if self.table_version is None else self.mm_dim
        model = DenseCTR(dim * len(found.requests), dict.fromkeys(found.items, dim), mm_dim, self.config)
        lacking, surplus = model.load_state_dict(dense, strict=False)
        if lacking or surplus:
            raise VersionMismatch(f"{self.path / DENSE} does not fit its model: {[*lacking, *surplus]}")
        return model.eval(), unknown


def save_bundle(
    out: Path,
    config: CTRConfig,
    dense: dict[str, Tensor],
    tables: dict[str, tuple[Tensor, Callable[[], Tensor]]],
    mm_dim: int,
    id_types: Mapping[str, str] | None = None,
) -> Bundle:
    """Write a bundle of weights.

    Args:
        out: its directory; one that is there is replaced when the new one is whole.
        config: of the model, with the `table_version` it was trained on.
        dense: weights that are not embeddings, by their names in the model.
        tables: of every ID table the ids (n,) int64 ascending, and what gives its rows (1 + n or more, dim),
            row 0 that of unknown ids, multiplied by their factors where the model shrinks embeddings.
        mm_dim: length of the multi-modal vectors, 0 for Base.
        id_types: see `Bundle`; None where it is not known.
    """
    dense = dict(dense)
    for name, (_, get_rows) in tables.items():
        dense[UNKNOWN + name] = get_rows()[0].clone()
    version = _digest(dense, config, config.table_version)
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model_version": version,
        "table_version": config.table_version,
        "mm_dim": mm_dim,
        "tables": list(tables),
        "id_types": dict(id_types or {}),
        "config": asdict(config),
    }
    with atomic_directory(out) as folder:
        write_tensors(folder / DENSE, dense)
        for name, (ids, get_rows) in tables.items():
            rows = get_rows()
            writer = TableWriter(
                folder / TABLES / name, table_version=f"{version}.{name}", dim=rows.shape[1], dtype="float32",
                encoder={"id_table": name},
            )  # fmt: skip
            for start in range(0, ids.numel(), CHUNK):
                part = ids[start : start + CHUNK]
                writer.write_shard(part, rows[1 + start : 1 + start + part.numel()])
            writer.finish()
        write_json(folder / ABOUT, facts)
    return Bundle.open(out)


def _digest(dense: dict[str, Tensor], config: CTRConfig, table_version: str | None) -> str:
    digest = hashlib.sha256(json.dumps([asdict(config.model()), table_version], sort_keys=True).encode())
    for name in sorted(dense):
        digest.update(name.encode() + dense[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
