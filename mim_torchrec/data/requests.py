"""Streaming reader of requests: Parquet row groups in, batches out, as many on every rank.

`request_order` says which rows a rank reads and in which order, `request_files` reads them. Here they are cut
into batches.

Not here: several worker processes for one reader.
"""

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import IterableDataset, get_worker_info

from mim_torchrec.data.batch import REQUEST_IDS, FeatureIds, MappedIds, RequestBatch, keyed
from mim_torchrec.data.columns import ORIGINALS, SECOND_LABEL
from mim_torchrec.data.conventions import Conventions
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import NO_FEATURES, Feature, Features, Role, model_numbers
from mim_torchrec.data.prefetch import prefetched
from mim_torchrec.data.request_buffer import RequestBuffer, concatenate
from mim_torchrec.data.request_columns import Coded, Jagged, RequestColumns
from mim_torchrec.data.request_files import GoodRows, RequestFiles
from mim_torchrec.data.request_order import RequestOrder
from mim_torchrec.data.schema import (
    ORIGINAL,
    REQUESTS,
    REQUESTS_REQUIRED,
    WEIGHT,
    WEIGHTS,
    open_parquet,
    read_row_group,
)
from mim_torchrec.data.vocabulary import IdMapper
from mim_torchrec.embeddings.remote.places import Url, place
from mim_torchrec.errors import OptionError

log = logging.getLogger(__name__)


class _Chunk(NamedTuple):
    """Requests that are permuted together: the place of the first among this rank's, in a buffer."""

    begin: int
    columns: RequestColumns
    rows: np.ndarray


MADE_VALUES = 1 << 17
"""Behaviors, or candidates, of the batches that are made together."""


class RequestReader(IterableDataset):
    """Batches of the requests that fall to one rank.

    Args:
        files: Parquet files with the same columns, see `schema.REQUESTS`.
        batch_size: candidates (labelled samples) in a batch of this rank, on average.
        rank: of this process.
        world_size: number of ranks.
        seed: of the order, with the epoch.
        shuffle: whether there is another order than that of the files.
        buffer_rows: requests that are permuted together, and lie in memory; None are those of eight row
            groups, but at most 262,144.
        max_behaviors: behaviors of a request that are kept, the last ones.
        on_bad_row: "fail" at a malformed row, or "skip" it and count it; to skip, all rows are read once
            beforehand, because ranks must agree on how many batches there are.
        drop_remainder: leave out the last rows of an epoch so that all ranks have equally many requests;
            otherwise the numbers of requests, not of batches, differ by one.
        features: further columns that the batches hold.
        good_rows: where malformed rows are skipped, what `count_good_rows` has found.
        conventions: of the data set, with which the files are compared; by default with each other only.
        originals: whether batches hold ids as people know them, too.
        size_per_rank: whether other numbers of ranks have the same `batch_size`, see `RequestOrder`.

    Raises:
        DataError: a file is malformed, files differ in columns or in what compared columns hold, or there are
            fewer requests than ranks.
    """

    def __init__(
        self,
        files: Sequence[str | Path | Url],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        buffer_rows: int | None = None,
        max_behaviors: int = 50,
        on_bad_row: Literal["fail", "skip"] = "fail",
        drop_remainder: bool = False,
        features: Features = NO_FEATURES,
        good_rows: GoodRows | None = None,
        conventions: Conventions | None = None,
        originals: bool = False,
        size_per_rank: bool = False,
    ) -> None:
        if batch_size < 1 or max_behaviors < 1 or not 0 <= rank < world_size:
            raise OptionError(
                f"impossible: batch_size {batch_size}, max_behaviors {max_behaviors}, {rank}/{world_size}"
            )
        if buffer_rows is not None and buffer_rows < 1:
            raise OptionError(f"buffer_rows is {buffer_rows}; it has to be at least 1")
        if on_bad_row not in ("fail", "skip"):
            raise OptionError(f'on_bad_row is {on_bad_row!r}, not "fail" or "skip"')
        self._features = features
        self._files = RequestFiles(
            [place(file) for file in files],
            max_behaviors,
            on_bad_row,
            features,
            good_rows,
            conventions,
            originals,
        )
        self.skipped = self._files.skipped
        """Malformed rows of all files; 0 where they fail."""
        units = self._files.units
        self.num_requests = sum(unit.rows for unit in units)
        """Good requests of all ranks."""
        self.num_candidates = sum(unit.candidates for unit in units)
        """Candidates of these requests."""
        if self.skipped and rank == 0:
            log.warning("%d malformed requests skipped of %d", self.skipped,
                        self.skipped + self.num_requests)  # fmt: skip
        if rank == 0 and (weights := {WEIGHT, WEIGHTS}.intersection(self.columns)):
            log.info("the loss is weighted by the column %s", *weights)
        if not units and not self.skipped:
            raise DataError("no file has a row; write the data again", file=files[0] if files else None)
        if self.num_requests < world_size:
            problem = f"{self.num_requests} good requests cannot be divided over {world_size} ranks"
            raise DataError(f"{problem}; start fewer ranks", file=files[0] if files else None)
        self._order = RequestOrder(
            [unit.rows for unit in units], self.num_candidates, batch_size=batch_size, rank=rank,
            world_size=world_size, seed=seed, shuffle=shuffle, buffer_rows=buffer_rows,
            drop_remainder=drop_remainder, size_per_rank=size_per_rank,
        )  # fmt: skip

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the files have and batches hold."""
        return self._files.columns

    @property
    def num_batches(self) -> int:
        """Batches of the epoch, or of what is left of it, the same on every rank."""
        return self._order.num_batches

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, epoch: int, done: Sequence[tuple[int, int]] = ()) -> None:
        """Choose the order of the next pass.

        Args:
            epoch: its number.
            done: parts of the epoch that other numbers of ranks have read, in turn: how many ranks, and
                batches of each. What they have left is divided over the ranks of this reader.
        """
        self._order.set_epoch(epoch, done)

    def __iter__(self) -> Iterator[RequestBatch]:
        return self.batches()

    def batches(
        self, first: int = 0, mapper: IdMapper | None = None, ahead: bool = False
    ) -> Iterator[RequestBatch]:
        """Batches of the pass.

        Args:
            first: number of the one to begin with; those before are not decoded.
            mapper: of ids to embedding rows, which the batches then hold as if it were called with each, for
                less work; None leaves ids.
            ahead: a thread fills a second buffer while batches are made of the first; it begins now.
        """
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError("a RequestReader reads in at most one worker process; use more ranks instead")
        bounds = self._order.bounds()[first:]
        if len(bounds) < 2:
            return iter(())
        convert = None if mapper is None else partial(_with_rows, self._features, mapper)
        buffers = [RequestBuffer(convert) for _ in range(2 if ahead else 1)]
        chunks = self._chunks(self._order.chunks(), bounds[0], buffers)
        return self._batches(prefetched(chunks, int(ahead)), bounds, mapper)

    def _chunks(
        self, order: Iterator[np.ndarray], first: int, buffers: Sequence[RequestBuffer]
    ) -> Iterator[_Chunk]:
        """Chunks of this rank's requests from `first` on, in one buffer after the other."""
        begin, free = 0, cycle(buffers)
        for numbers in order:
            stop = begin + len(numbers)
            if stop > first:
                numbers = numbers[max(first - begin, 0) :]
                yield _Chunk(stop - len(numbers), *self._files.read(numbers, next(free)))
            begin = stop

    def _batches(
        self, chunks: Iterator[_Chunk], bounds: Sequence[int], mapper: IdMapper | None
    ) -> Iterator[RequestBatch]:
        place = 0  # of the next batch
        left: list[RequestColumns] = []  # requests of it that earlier chunks had
        for begin, columns, rows in chunks:
            stop = begin + len(rows)
            there = bisect_right(bounds, stop) - 1  # batches before this one are there as a whole
            together = max(1, _fit(columns, MADE_VALUES) * (len(bounds) - 1) // (bounds[-1] - bounds[0]))
            while place < there:
                until = min(place + together, there)
                wanted = rows[max(bounds[place] - begin, 0) : bounds[until] - begin]
                requests = concatenate([*left, columns.take(wanted)])
                own = np.array(bounds[place : until + 1]) - bounds[place]
                yield from _to_batches(requests, own, self._features, mapper)
                left, place = [], until
            if place + 1 < len(bounds) and bounds[place] < stop:
                left.append(columns.take(rows[max(bounds[place] - begin, 0) :]))
            del columns, rows  # so that the buffer can replace its memory


def _fit(columns: RequestColumns, values: int) -> int:
    """How many requests have so many behaviors or candidates, on average."""
    most = max(jagged.stops[-1] for jagged in (columns.behavior, columns.candidate))
    return int(values * len(columns) // max(most, 1))


def _to_batches(
    requests: RequestColumns, bounds: np.ndarray, wanted: Features, mapper: IdMapper | None
) -> Iterator[RequestBatch]:
    """Batches of requests, made together, because each step on all of them costs one call.

    Args:
        requests: of all batches.
        bounds: (num_batches + 1,) where each begins and ends among them.
        wanted: further columns.
        mapper: that has looked up their rows; None leaves ids.
    """
    candidates, behaviors = requests.candidate, requests.behavior
    features = _features(requests, wanted)
    mapped = _unmapped(features, bounds) if mapper is None else mapper.batches(features, bounds)
    known = {name: requests.scalars[key] for key, name in ORIGINALS.items() if key in requests.scalars}
    shown = candidates.values.get("item_id" + ORIGINAL)
    places = {
        "request": bounds,
        "candidate": candidates.starts_of(bounds),
        "behavior": behaviors.starts_of(bounds),
    }
    columns: dict[str, tuple[Role, np.ndarray | torch.Tensor | None]] = {
        "labels": ("candidate", candidates.values["label"]),
        "request_ids": ("request", requests.scalars["request_id"]),
        "request_ts": ("request", requests.scalars.get("ts")),
        "behavior_ts": ("behavior", behaviors.values.get("ts")),
        "second_labels": ("candidate", candidates.values.get(SECOND_LABEL)),
        "weights": ("candidate", candidates.values.get(WEIGHT)),
        "request_dense": ("request", _dense(requests.scalars, wanted.numbers("request"))),
        "candidate_dense": ("candidate", _dense(candidates.values, wanted.numbers("candidate"))),
        "behavior_dense": ("behavior", _dense(behaviors.values, wanted.numbers("behavior"))),
    }
    cut = {
        name: torch.as_tensor(values).split(np.diff(places[role]).tolist())
        for name, (role, values) in columns.items()
        if values is not None
    }
    for k, ids in enumerate(mapped):
        own, of_candidates = slice(*bounds[k : k + 2]), slice(*places["candidate"][k : k + 2])
        originals = {name: values[own] for name, values in known.items()}
        originals |= {} if shown is None else {"item_id": shown[of_candidates]}
        tensors = {name: parts[k] for name, parts in cut.items()}
        yield RequestBatch(**ids._asdict(), **tensors, originals=originals)


def _with_rows(wanted: Features, mapper: IdMapper, requests: RequestColumns) -> RequestColumns:
    """Requests with rows instead of ids, and rows of the multi-modal table as `mm`.

    They are looked up where they are decoded, many of a feature at once: so the table that is searched stays
    in the cache, and what is gathered and copied afterwards is half as long.
    """

    def rows(key: str, ids: np.ndarray) -> np.ndarray:
        return mapper.look_up(key, _writable(ids)).numpy()

    def lists(role: Role, jagged: Jagged) -> Jagged:
        values, coded = dict(jagged.values), dict(jagged.coded)
        for name, key in _keys(role, wanted).items():
            if name in coded:
                own = coded.pop(name)
                values[name] = Coded(own.codes, rows(key, own.ids)).values
            elif name in values:
                values[name] = rows(key, values[name])
        if mapper.has_mm:
            values["mm"] = mapper.look_up_mm(_writable(jagged.values["item_id"])).numpy()
        return Jagged(jagged.lengths, values, coded)

    scalars = {name: rows(name, requests.scalars[name]) for name in REQUEST_IDS if name in requests.scalars}
    ids = {
        name: Jagged(own.lengths, {"id": rows(name, own.values["id"])}) for name, own in requests.ids.items()
    }
    return RequestColumns(
        requests.scalars | scalars,
        lists("behavior", requests.behavior),
        lists("candidate", requests.candidate),
        ids,
    )


def _writable(values: np.ndarray) -> torch.Tensor:
    """A tensor, which does not share the memory of Arrow."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _keys(role: Role, wanted: Features) -> dict[str, str]:
    """Columns of ids of candidates or behaviors, each with its key in a batch."""
    own = {name: f"{role}_{name}" for name in ("item_id", "category")}
    return own | {feature.name: feature.name for feature in wanted.ids(role)}


def _features(requests: RequestColumns, wanted: Features) -> list[FeatureIds]:
    """Features of ids, or of rows, in the order of the keys of a batch."""
    ones = torch.ones(len(requests), dtype=torch.int32)
    scalars = {name: requests.scalars[name] for name in REQUEST_IDS if name in requests.scalars}
    found = [FeatureIds(name, torch.from_numpy(ids), ones) for name, ids in scalars.items()]

    def add(key: str, jagged: Jagged, name: str, lengths: torch.Tensor) -> None:
        if name in jagged.coded:
            found.append(FeatureIds(key, jagged.coded[name], lengths))
        elif name in jagged.values:
            found.append(FeatureIds(key, torch.from_numpy(jagged.values[name]), lengths))

    roles: list[tuple[Role, Jagged, torch.Tensor]] = [
        ("candidate", requests.candidate, _lengths(requests.candidate)),
        ("behavior", requests.behavior, _lengths(requests.behavior)),
    ]
    for name in ("item_id", "category"):
        for role, jagged, lengths in roles:
            add(f"{role}_{name}", jagged, name, lengths)
    for name, jagged in requests.ids.items():
        add(name, jagged, "id", _lengths(jagged))
    for role, jagged, lengths in roles:
        for feature in wanted.ids(role):
            add(feature.name, jagged, feature.name, lengths)
    for role, jagged, lengths in roles:
        add(f"{role}_mm", jagged, "mm", lengths)
    return found


def _lengths(jagged: Jagged) -> torch.Tensor:
    return torch.from_numpy(jagged.lengths.astype(np.int32))


def _unmapped(features: Sequence[FeatureIds], bounds: np.ndarray) -> Iterator[MappedIds]:
    return map(MappedIds, keyed(features, [one.values() for one in features], bounds))


def _dense(values: Mapping[str, np.ndarray], features: Sequence[Feature]) -> torch.Tensor | None:
    return model_numbers(features, {f.name: torch.from_numpy(values[f.name]) for f in features})


def label_classes(files: Sequence[str | Path | Url], conventions: Conventions | None = None) -> set[int]:
    """Labels that request files have, 0 and 1; reading ends when there are two.

    Raises:
        DataError: a file is malformed.
    """
    found: set[int] = set()
    for file in files:
        parquet = open_parquet(file, REQUESTS, REQUESTS_REQUIRED, conventions)
        for group in range(parquet.num_row_groups):
            labels = pc.list_flatten(read_row_group(parquet, group, ["labels"], file)["labels"])
            found |= {int(label) for label in pc.unique(labels).to_pylist() if label in (0, 1)}
            if len(found) > 1:
                return found
    return found
