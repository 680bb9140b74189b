"""What training and evaluation of a CTR model have in common: readers, vocabularies, the sharded model."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from mim_torchrec.ctr.config import CTRConfig, from_values
from mim_torchrec.ctr.sharding import build_model, shard
from mim_torchrec.ctr.shrinkage import input_scale, set_scale
from mim_torchrec.ctr.vocabularies import load_vocabularies
from mim_torchrec.ctr.windows import LiveWindows
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.request_files import GoodRows, count_good_rows
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import Dataset
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.sharded.frozen import frozen_config
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.load import load_table, open_table, table_digest
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.errors import OptionError
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.model_record import check_model_record
from mim_torchrec.training.run_directory import RunDirectory
from mim_torchrec.training.sharded_state import damage

PARTS = ("config.json", "vocabulary", "best")
"""What is read of an earlier run."""


@dataclass(frozen=True)
class Assembled:
    """A model with what its batches need.

    Attributes:
        model: sharded, its frozen table loaded.
        optimizer: of everything trainable.
        mapper: ids to embedding rows.
        table: the multi-modal table on the disk, None for Base.
        index: of its items, which the mapper uses.
        frozen: the collection of multi-modal vectors, None for Base.
        facts: `rows`, `dim`, `dtype`, `table_version`, `seq`, `content` and `digest_before` of the table,
            None for Base.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    mapper: IdMapper
    table: Table | None
    index: ItemIndex | None
    frozen: nn.Module | None
    facts: dict[str, Any] | None


def assemble(
    config: CTRConfig, vocabularies: dict[str, Vocabulary], context: DistributedContext
) -> Assembled:
    """Build and shard the model that a configuration describes.

    Raises:
        VersionMismatch: the table has another version than `config.table_version`.
    """
    table = None
    if config.mim == "on":
        if config.table is None:
            raise OptionError("--mim on needs --table; train Base with --mim off")
        table = open_table(config.table, config.table_version)
    index = ItemIndex.of(table) if table is not None else None
    mapper = IdMapper(vocabularies, index, config.max_unknown)
    mm = frozen_config(table, ["candidate_mm", "behavior_mm"], name="mm") if table is not None else None
    rows = {name: vocabulary.num_embeddings for name, vocabulary in vocabularies.items()}
    built = build_model(config, rows, mm, torch.device("meta"))
    if config.keep_shrinkage:
        set_scale(built, input_scale(built, vocabularies))
    model, optimizer = shard(built, config, context)
    frozen = cast(nn.Module | None, model.module.mm_embeddings)
    facts = None
    if table is not None and frozen is not None:
        load_table(frozen, table, "mm")
        facts = {
            "rows": table.manifest.rows,
            "dim": table.manifest.dim,
            "dtype": table.manifest.dtype,
            "table_version": table.manifest.table_version,
            "seq": table.manifest.seq,
            "content": table.manifest.content,
            "digest_before": table_digest(frozen),
        }
    return Assembled(model, optimizer, mapper, table, index, frozen, facts)


def live_windows(
    config: CTRConfig, assembled: Assembled, context: DistributedContext, begin: bool = False
) -> LiveWindows | None:
    """The windows that go into the model's table, None where there is no log of them.

    Args:
        config: names the log.
        assembled: the model.
        context: the process group.
        begin: a log that is not there yet.

    Raises:
        OptionError: there is a log and no table.
        VersionMismatch: the log is of another version than the table.
    """
    if config.windows is None:
        return None
    if assembled.table is None or assembled.index is None:
        raise OptionError("--windows changes the multi-modal table, which --mim off has not")
    manifest = assembled.table.manifest
    log = open_log(config.windows, manifest.table_version, start=manifest.seq if begin else None)
    return LiveWindows(assembled.model, assembled.index, log, config.windows_every, context)


def open_reader(
    config: CTRConfig,
    dataset: Dataset,
    split: str,
    context: DistributedContext,
    training: bool = False,
    originals: bool = False,
) -> RequestReader:
    """This rank's share of a split; to train on, it is shuffled and cut to equal shares.

    With `originals`, batches hold ids as people know them, too.

    Raises:
        OptionError: the batch size is not a multiple of the number of ranks.
        DataError: a file is malformed.
    """
    per_rank = config.batch_size_per_rank
    if per_rank is None and config.batch_size % context.world_size:
        raise OptionError(f"--batch-size {config.batch_size} is not a multiple of {context.world_size} ranks")
    files = dataset.requests(split)
    good_rows: GoodRows | None = None
    if config.on_bad_row == "skip":  # all rows are read, by all ranks together
        mine = on_all_ranks(
            lambda: count_good_rows(
                files, config.features(), context.rank, context.world_size, dataset.conventions
            )
        )
        good_rows = {k: counts for part in context.all_gather_objects(mine) for k, counts in part.items()}
    reader = RequestReader(
        files,
        batch_size=config.batch_size // context.world_size if per_rank is None else per_rank,
        size_per_rank=per_rank is not None,
        rank=context.rank,
        world_size=context.world_size,
        seed=config.seed,
        shuffle=training,
        buffer_rows=config.buffer_rows if training else None,
        max_behaviors=config.max_behaviors,
        on_bad_row=config.on_bad_row,
        drop_remainder=training,
        features=config.features(),
        conventions=dataset.conventions,
        originals=originals,
        good_rows=good_rows,
    )
    _check_needs(config, reader.columns, files[0])
    return reader


def _check_needs(config: CTRConfig, columns: Sequence[str], file: Path | Url) -> None:
    """See before training that the requests have what the user behavior model reads besides ids."""
    needs = config.ubm_options.needs if config.id_interest else frozenset()
    if "recency" in needs and config.recency == "time":
        if missing := sorted({"ts", "behavior_ts"}.difference(columns)):
            raise DataError(
                f"--ubm {config.ubm} needs to know how far behaviors lie back, in seconds; with "
                f"--recency order it counts behaviors (missing: {', '.join(missing)})",
                file=file,
            )
    if "categories" in needs:
        if missing := sorted({"behavior_categories", "candidate_categories"}.difference(columns)):
            raise DataError(
                f"--ubm {config.ubm} with these options needs the categories of candidates and behaviors "
                f"(missing: {', '.join(missing)})",
                file=file,
            )


def read_config(run: Path) -> CTRConfig:
    """The configuration that a run was trained with.

    Raises:
        DataError: there is none, or it is of another format.
    """
    found = RunDirectory(run)
    values = found.read_config()
    try:
        return from_values(values)
    except ValueError as error:
        problem = f"is not a configuration of this version of mim ctr: {error}"
        raise DataError(problem, file=found.config) from None


def describe_model(config: CTRConfig, vocabularies: dict[str, Vocabulary]) -> dict[str, Any]:
    """What makes the weights of a model readable: `model.json` beside them, see `training/model_record.py`.

    Args:
        config: of the run, with the version of its table.
        vocabularies: of the run.
    """
    digests = {
        f"vocabulary of {name}": hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()
        for name, found in vocabularies.items()
    }
    digests |= {
        f"impressions of {name}": hashlib.sha256(found.impressions.numpy().tobytes()).hexdigest()
        for name, found in vocabularies.items()
        if found.shrinkage and found.impressions is not None
    }
    rows = {f"rows of {name}": found.num_embeddings for name, found in vocabularies.items()}
    shrinkage = {f"shrinkage of {name}": found.shrinkage for name, found in vocabularies.items()}
    return {
        **asdict(config.model()), "table_version": config.table_version,
        "max_behaviors": config.max_behaviors, **digests, **rows, **shrinkage,
    }  # fmt: skip


@dataclass(frozen=True)
class TrainedRun:
    """A run of `mim ctr` whose weights are about to be read.

    Attributes:
        config: it was trained with.
        vocabularies: of its ids.
        weights: directory of a checkpoint.
        name: of the weights in reports: where they lie, also if that is a URL.
        path: of the run on this host.
    """

    config: CTRConfig
    vocabularies: dict[str, Vocabulary]
    weights: Path
    name: str
    path: Path

    @classmethod
    def open(cls, run: Path | Url, checkpoint: str = "best") -> "TrainedRun":
        """Open a run; its ranks compare the digests of the weights together.

        Args:
            run: directory that `mim ctr` has written, or its URL.
            checkpoint: `best`, or one of the names in the run's `checkpoints`, or the directory of one.

        Raises:
            DataError: it is no run, or the checkpoint is damaged.
            OptionError: it has no such checkpoint.
            ModelMismatch: the weights are of another configuration or vocabulary than the run has.
        """
        place, run = run, fetched(run, (*PARTS, checkpoint, f"checkpoints/{checkpoint}"))
        config, vocabularies = read_config(run), load_vocabularies(run)
        weights = find_checkpoint(run, checkpoint)
        check_model_record(weights, describe_model(config, vocabularies))
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

        def verify() -> None:
            problem = damage(weights, rank, world_size)
            if problem is not None:
                raise DataError(f"{problem}; take another --checkpoint, or train again", file=weights)

        on_all_ranks(verify)
        name = f"{place}/{weights.relative_to(run)}" if weights.is_relative_to(run) else str(weights)
        return cls(config, vocabularies, weights, name, run)


def find_checkpoint(run: Path, name: str) -> Path:
    """The directory of a checkpoint of a run.

    Raises:
        OptionError: there is no such checkpoint; it names those there are.
    """
    folder = RunDirectory(run).checkpoints
    for path in (run / name, folder / name, Path(name)):
        if (path / ".metadata").is_file() or (path / "state" / ".metadata").is_file():
            return path
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise OptionError(f"{run} has no checkpoint {name!r}; it has {', '.join(['best', *names])}")
