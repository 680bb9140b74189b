"""What a server loads, made of a trained run: `mim bundle`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import tyro
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mim_torchrec import program
from mim_torchrec.ctr.assembly import TrainedRun
from mim_torchrec.ctr.parameters import id_tables, is_dense
from mim_torchrec.ctr.vocabularies import load_id_types
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.remote.places import Place, Url
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.quiet import quiet
from mim_torchrec.serving.bundle import Bundle, save_bundle
from mim_torchrec.serving.exported import NAME, export_dense


def write_bundle(run: Path | Url, out: Path, checkpoint: str = "best") -> Bundle:
    """Write a bundle of a run of `mim ctr`; memory holds one ID table at a time.

    Args:
        run: directory of the run, or its URL.
        out: directory of the bundle; one that is there is replaced when the new one is whole.
        checkpoint: as of `mim evaluate`.

    Raises:
        DataError: `run` is no run.
        OptionError: it has no such checkpoint.
        ModelMismatch: its config.json or vocabulary/ are not those of the weights.
    """
    trained = TrainedRun.open(run, checkpoint)
    config, path, vocabularies = trained.config, trained.weights, trained.vocabularies
    state, prefix = (path / "state", "model.") if (path / "state").is_dir() else (path, "")
    sizes = {
        name.removeprefix(prefix): (name, found.size, found.properties.dtype)
        for name, found in FileSystemReader(state).read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(found, TensorStorageMetadata)
    }
    where = id_tables(sizes)

    def read(names: list[str]) -> dict[str, Tensor]:
        tensors = {sizes[n][0]: torch.empty(sizes[n][1], dtype=sizes[n][2]) for n in names}
        with quiet("torch.distributed is disabled"):  # which is what no_dist means
            dcp.load(tensors, checkpoint_id=str(state), no_dist=True)
        return {name: tensors[sizes[name][0]] for name in names}

    def rows_of(name: str) -> Tensor:
        vocabulary, rows = vocabularies[name], read([where[name]])[where[name]]
        rows = rows[: 1 + vocabulary.ids.numel()]
        return rows * vocabulary.factors(torch.arange(len(rows)))[:, None] if vocabulary.shrinkage else rows

    mm_dim = 0
    if config.mim == "on":
        assert config.table is not None  # `mim ctr --mim on` has refused to train without
        mm_dim = Table.open(config.table, config.table_version, verify=False).manifest.dim
    dense = read([name for name in sizes if is_dense(name)])
    tables: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {
        name: (vocabularies[name].ids, partial(rows_of, name)) for name in where
    }
    return save_bundle(out, config, dense, tables, mm_dim, load_id_types(trained.path))


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Write what a server loads of a trained model: dense weights, and its ID tables by id."""

    run: Place
    """Directory that `mim ctr` has written."""
    out: Place
    """Directory of the bundle."""
    checkpoint: str = "best"
    """`best`, or one of the names in the run's `checkpoints`, or the directory of a checkpoint."""
    export: bool = False
    """Also write dense.pt2 into the bundle: the dense part as a file of torch.export, which scores the rows
    of one request without this package."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``mim bundle``."""
    config = tyro.cli(BundleConfig, args=argv, prog="mim bundle")
    with written(config.out, replace=True) as out:
        made = write_bundle(config.run, out, config.checkpoint)
        if config.export:
            export_dense(made, made.path / NAME)
    print(f"{config.out}: model {made.model_version}, of table_version {made.table_version}, tables "
          f"{', '.join(made.tables)}")  # fmt: skip


if __name__ == "__main__":
    program.run(main)
