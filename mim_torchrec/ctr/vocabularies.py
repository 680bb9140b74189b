"""The vocabularies of a CTR model: found in the training requests by all ranks, kept in the run.

Requests that `mim prepare` has written are not scanned: it has counted their ids (`data/prepared_ids.py`).
What a scan finds is kept by the fingerprint of the files, so that other runs on the same files read it.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.data.id_scan import IdCounts, count_ids, fingerprint
from mim_torchrec.data.id_types import id_types
from mim_torchrec.data.prepared_ids import prepared_ids
from mim_torchrec.data.schema import Dataset
from mim_torchrec.data.vocabulary import Vocabulary
from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.files import atomic_directory, write_json
from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.errors import OptionError
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.row_exchange import exchange_rows, owners_by_id
from mim_torchrec.training.run_directory import RunDirectory

log = logging.getLogger(__name__)

TYPES = "types.json"

Scan = dict[str, IdCounts]
"""By the name of a vocabulary."""


def scan_vocabularies(
    dataset: Dataset,
    config: CTRConfig,
    context: DistributedContext,
    resumes: bool,
    check: Callable[[], object] = lambda: None,
) -> dict[str, Vocabulary]:
    """Vocabularies of the training requests, and of the run that a warm start begins from.

    Scanned by all ranks, each a part of the row groups; kept in the run, read by all. A run that resumes
    keeps those that it has. Before they are written, all ranks call `check`, which may refuse that.
    """
    folder = RunDirectory(config.out).vocabulary
    if not (resumes and context.broadcast_object(folder.is_dir())):
        scan = _scan(dataset, config, context)
        check()
        on_all_ranks(lambda: _write(scan, dataset, config, folder) if context.is_main else None)
    return load_vocabularies(RunDirectory(config.out).root)


def load_vocabularies(run: Path, counts: bool = False) -> dict[str, Vocabulary]:
    """Vocabularies of a run, by name.

    Args:
        run: its directory.
        counts: read all counts of ids, also those that only a warm start needs.
    """
    folder = RunDirectory(run).vocabulary
    return {path.stem: Vocabulary.load(path, counts) for path in sorted(folder.glob("*.npz"))}


def load_id_types(run: Path) -> dict[str, str]:
    """What the ids of a run's vocabularies are, see `id_types`; {} of a run that did not record it."""
    path = RunDirectory(run).vocabulary / TYPES
    return json.loads(path.read_text()) if path.is_file() else {}


def _write(scan: Scan, dataset: Dataset, config: CTRConfig, folder: Path) -> None:
    begun = config.warm_start
    earlier = {} if begun is None else load_vocabularies(fetched(begun, ["vocabulary"]), counts=True)
    for flag, named in (("--id-shrinkage-of", config.id_shrinkage_of), ("--max-ids", config.max_ids)):
        if unknown := sorted(named.keys() - scan.keys()):
            raise OptionError(
                f"{flag} {', '.join(unknown)}: there is no such table of ids; the requests have "
                f"{', '.join(sorted(scan))}"
            )
    with atomic_directory(folder) as partial:
        for name, found in scan.items():
            _vocabulary(name, found, earlier.get(name), config).save(partial / f"{name}.npz")
        write_json(partial / TYPES, id_types(dataset, list(scan)))


def _vocabulary(name: str, found: IdCounts, before: Vocabulary | None, config: CTRConfig) -> Vocabulary:
    """The ids that get rows: frequent enough, known before, and of these the most frequent ones.

    Raises:
        OptionError: there are too many, and the earlier run has not counted its own.
    """
    kept = found.ids[found.counts >= config.min_count]
    if len(kept) < len(found.ids):
        log.info("%s: %d of %d ids occur fewer than %d times and have no row of their own", name,
                 len(found.ids) - len(kept), len(found.ids), config.min_count)  # fmt: skip
    if before is not None:
        kept = np.union1d(kept, before.ids.numpy())
    occurrences = _occurrences(kept, found, before, config.count_decay)
    limit = config.max_ids.get(name, len(kept))
    if len(kept) > limit:
        if occurrences is None:
            raise OptionError(
                f"--max-ids {name}: the run of --warm-start has not counted its ids, so the rare ones cannot "
                "be told; train it again, or start without it"
            )
        stay = np.sort(np.lexsort((kept, -occurrences))[:limit])
        log.info("%s: the %d most frequent of %d ids have rows of their own", name, limit, len(kept))
        kept, occurrences = kept[stay], occurrences[stay]
    return Vocabulary.build(
        kept,
        config.spare_rows,
        impressions=_impressions(kept, found, before),
        shrinkage=config.shrinkage(name),
        occurrences=occurrences,
    )


def _occurrences(
    kept: np.ndarray, found: IdCounts, before: Vocabulary | None, decay: float
) -> np.ndarray | None:
    """How often ids occur in the training requests, and decayed, in those of the runs before.

    Returns:
        (n,) float64; None where the earlier run has not counted.
    """
    counts = np.zeros(len(kept))
    _add(counts, kept, found.ids, found.counts)
    if before is not None:
        if before.occurrences is None:
            return None
        _add(counts, kept, before.ids.numpy(), decay * before.occurrences.numpy())
    return counts


def _impressions(kept: np.ndarray, found: IdCounts, before: Vocabulary | None) -> np.ndarray | None:
    """Training impressions by row, of this run and of the one that it begins from, whose counts add up.

    Returns:
        (n + 1,) int64, of row 0 those of ids without a row. None where the earlier run has not counted.
    """
    counts = np.zeros(len(kept) + 1, np.int64)
    counts[0] = _add(counts[1:], kept, found.ids, found.impressions)
    if before is not None:
        if before.impressions is None:
            return None
        shown = before.impressions.numpy()
        counts[0] += _add(counts[1:], kept, before.ids.numpy(), shown[1:]) + shown[0]
    return counts


def _add(to: np.ndarray, kept: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> np.number:
    """Add counts (m,) of ids (m,) to those (n,) of the ids kept (n,); returns the sum of the other ids'."""
    if len(ids) == len(kept) and (ids == kept).all():
        to += counts
        return counts[:0].sum()
    has_row = np.isin(ids, kept, assume_unique=True)
    to[np.searchsorted(kept, ids[has_row])] += counts[has_row]
    return counts[~has_row].sum()


def _scan(dataset: Dataset, config: CTRConfig, context: DistributedContext) -> Scan:
    """What `mim prepare` has counted, an earlier scan has found, or all ranks find; {} but on rank 0."""
    files, features = dataset.requests("train"), config.features()
    counted = on_all_ranks(lambda: prepared_ids(dataset, files, features) if context.is_main else None)
    if context.broadcast_object(counted is not None):
        return counted or {}

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


def _united(mine: IdCounts, context: DistributedContext) -> IdCounts:
    """The ids of all ranks on rank 0, nothing on others: each rank adds up a part of them by id."""
    for owner in ("by id", "rank 0"):
        columns = {"id": mine.ids, "count": mine.counts, "impressions": mine.impressions}
        owners = owners_by_id(mine.ids, context.world_size) if owner == "by id" else np.zeros_like(mine.ids)
        rows, mine = exchange_rows(columns, owners, context), IdCounts()
        mine.add(rows["id"], rows["count"], rows["impressions"])
    return mine


def _save(scan: Scan, place: Path) -> None:
    with atomic_directory(place) as partial:
        for name, found in scan.items():
            np.savez(partial / f"{name}.npz", ids=found.ids, counts=found.counts,
                     impressions=found.impressions)  # fmt: skip


def _load(place: Path) -> Scan:
    scan = {}
    for path in sorted(place.glob("*.npz")):
        with np.load(path) as stored:
            scan[path.stem] = IdCounts()
            scan[path.stem].add(stored["ids"], stored["counts"], stored["impressions"])
    return scan
