"""The vocabularies of a CTR model: found in the training requests by all ranks, kept in the run.

What a scan finds is kept by the fingerprint of the files, so that other runs on the same files read it.
"""

import json
import logging
from pathlib import Path

import numpy as np

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.data.id_scan import IdCounts, count_ids, fingerprint
from mim_torchrec.data.id_types import id_types
from mim_torchrec.data.schema import Dataset
from mim_torchrec.data.vocabulary import Vocabulary
from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.files import atomic_directory, write_json
from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.row_exchange import exchange_rows, owners_by_id
from mim_torchrec.training.run_directory import RunDirectory

log = logging.getLogger(__name__)

TYPES = "types.json"

Scan = dict[str, tuple[np.ndarray, np.ndarray]]
"""By the name of a vocabulary: ids (n,) int64, ascending, and how often each occurs (n,) int64."""


def scan_vocabularies(
    dataset: Dataset, config: CTRConfig, context: DistributedContext, resumes: bool
) -> dict[str, Vocabulary]:
    """Vocabularies of the training requests, and of the run that a warm start begins from.

    Scanned by all ranks, each a part of the row groups; kept in the run, read by all. A run that resumes
    keeps those that it has.
    """
    folder = RunDirectory(config.out).vocabulary
    if not (resumes and context.broadcast_object(folder.is_dir())):
        scan = _scan(dataset, config, context)
        on_all_ranks(lambda: _write(scan, dataset, config, folder) if context.is_main else None)
    return load_vocabularies(RunDirectory(config.out).root)


def load_vocabularies(run: Path) -> dict[str, Vocabulary]:
    """Vocabularies of a run, by name."""
    folder = RunDirectory(run).vocabulary
    return {path.stem: Vocabulary.load(path) for path in sorted(folder.glob("*.npz"))}


def load_id_types(run: Path) -> dict[str, str]:
    """What the ids of a run's vocabularies are, see `id_types`; {} of a run that did not record it."""
    path = RunDirectory(run).vocabulary / TYPES
    return json.loads(path.read_text()) if path.is_file() else {}


def _write(scan: Scan, dataset: Dataset, config: CTRConfig, folder: Path) -> None:
    begun = config.warm_start
    earlier = {} if begun is None else load_vocabularies(fetched(begun, ["vocabulary"]))
    with atomic_directory(folder) as partial:
        for name, (ids, counts) in scan.items():
            kept = ids[counts >= config.min_count]
            if len(kept) < len(ids):
                log.info("%s: %d of %d ids occur fewer than %d times and have no row of their own", name,
                         len(ids) - len(kept), len(ids), config.min_count)  # fmt: skip
            if name in earlier:
                kept = np.union1d(kept, earlier[name].ids.numpy())
            Vocabulary.build(kept, spare_rows=config.spare_rows).save(partial / f"{name}.npz")
        write_json(partial / TYPES, id_types(dataset, list(scan)))


def _scan(dataset: Dataset, config: CTRConfig, context: DistributedContext) -> Scan:
    """What all ranks find, or what an earlier scan of the same files has found; {} but on rank 0."""
    files, features = dataset.requests("train"), config.features()

    def known() -> Path | None:
        place = (config.id_cache or RunDirectory(config.out).root / "ids") / fingerprint(files, features)
        return place if context.is_main else None

    place = on_all_ranks(known)
    if context.broadcast_object(place is not None and place.is_dir()):
        if place is not None:
            log.info("the ids of %d files are known: %s", len(files), place)
        return on_all_ranks(lambda: {} if place is None else _load(place))
    mine = on_all_ranks(
        lambda: count_ids(files, features, context.rank, context.world_size, dataset.conventions)
    )
    names = sorted({name for names in context.all_gather_objects(list(mine)) for name in names})
    scan = {name: _united(mine.pop(name, IdCounts()), context) for name in names}
    on_all_ranks(lambda: None if place is None else _save(scan, place))
    return scan if context.is_main else {}


def _united(mine: IdCounts, context: DistributedContext) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all ranks on rank 0, nothing on others: each rank adds up a part of them by id."""
    for owner in ("by id", "rank 0"):
        columns = {"id": mine.ids, "count": mine.counts}
        owners = owners_by_id(mine.ids, context.world_size) if owner == "by id" else np.zeros_like(mine.ids)
        rows, mine = exchange_rows(columns, owners, context), IdCounts()
        mine.add(rows["id"], rows["count"])
    return mine.ids, mine.counts


def _save(scan: Scan, place: Path) -> None:
    with atomic_directory(place) as partial:
        for name, (ids, counts) in scan.items():
            np.savez(partial / f"{name}.npz", ids=ids, counts=counts)


def _load(place: Path) -> Scan:
    scan = {}
    for path in sorted(place.glob("*.npz")):
        with np.load(path) as stored:
            scan[path.stem] = stored["ids"], stored["counts"]
    return scan
