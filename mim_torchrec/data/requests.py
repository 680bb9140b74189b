"""Streaming reader of requests: Parquet row groups in, batches out, as many on every rank.

A collective waits for every rank, so no rank may run out of batches before the others. Row groups are put in
an order of (seed, epoch) that all ranks compute alike; the rows they hold, taken as one sequence, are divided
evenly and contiguously over the ranks; each rank permutes its rows in a buffer of a few row groups and cuts
them into nearly equal batches. What some number of ranks has left of an epoch, another number can go on with.

Not here: several worker processes for one reader.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.columns import RequestColumns, concatenate, decode
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import NO_FEATURES, Feature, Features, tower_numbers
from mim_torchrec.data.schema import (
    REQUESTS,
    REQUESTS_REQUIRED,
    open_parquet,
    present_columns,
    read_row_group,
)
from mim_torchrec.embeddings.remote.places import Url, place
from mim_torchrec.errors import OptionError

log = logging.getLogger(__name__)

BUFFER_ROW_GROUPS = 8


@dataclass(frozen=True)
class _Unit:
    file: Path | Url
    row_group: int
    rows: int
    candidates: int


class RequestReader(IterableDataset):
    """Batches of the requests that fall to one rank.

    Args:
        files: Parquet files with the same columns, see `schema.REQUESTS`.
        batch_size: candidates (labelled samples) in a batch of this rank, on average.
        rank: of this process.
        world_size: number of ranks.
        seed: of the order, with the epoch.
        shuffle: whether there is another order than that of the files.
        max_behaviors: behaviors of a request that are kept, the last ones.
        on_bad_row: "fail" at a malformed row, or "skip" it and count it; to skip, all rows are read once
            beforehand, because ranks must agree on how many batches there are.
        drop_remainder: leave out the last rows of an epoch so that all ranks have equally many requests;
            otherwise the numbers of requests, not of batches, differ by one.
        features: further columns that the batches hold.

    Raises:
        DataError: a file is malformed, files differ in columns, or there are fewer requests than ranks.
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
        max_behaviors: int = 50,
        on_bad_row: Literal["fail", "skip"] = "fail",
        drop_remainder: bool = False,
        features: Features = NO_FEATURES,
    ) -> None:
        if batch_size < 1 or max_behaviors < 1 or not 0 <= rank < world_size:
            raise OptionError(
                f"impossible: batch_size {batch_size}, max_behaviors {max_behaviors}, {rank}/{world_size}"
            )
        if on_bad_row not in ("fail", "skip"):
            raise OptionError(f'on_bad_row is {on_bad_row!r}, not "fail" or "skip"')
        self._rank, self._world_size = rank, world_size
        self._seed, self._shuffle, self._epoch = seed, shuffle, 0
        self._max_behaviors, self._on_bad_row = max_behaviors, on_bad_row
        self._drop_remainder = drop_remainder
        self._features = features
        self._columns: tuple[str, ...] = ()
        self._opened: tuple[Path | Url, pq.ParquetFile] | None = None
        self.skipped = 0
        """Malformed rows of all files; 0 where they fail."""
        self._units = self._scan([place(file) for file in files])
        self._first = np.cumsum([0, *(unit.rows for unit in self._units)])[:-1]
        self._batch_size = batch_size
        self._done: tuple[tuple[int, int], ...] = ()
        self.num_requests = sum(unit.rows for unit in self._units)
        """Good requests of all ranks."""
        self.num_candidates = sum(unit.candidates for unit in self._units)
        """Candidates of these requests."""
        if self.num_requests < world_size:
            problem = f"{self.num_requests} good requests cannot be divided over {world_size} ranks"
            raise DataError(f"{problem}; start fewer ranks", file=files[0] if files else None)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the files have and batches hold."""
        return self._columns

    @property
    def num_batches(self) -> int:
        """Batches of the epoch, or of what is left of it, the same on every rank."""
        return self._count(self._left(self._done), self._world_size)

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, epoch: int, done: Sequence[tuple[int, int]] = ()) -> None:
        """Choose the order of the next pass.

        Args:
            epoch: its number.
            done: parts of the epoch that other numbers of ranks have read, in turn: how many ranks, and
                batches of each. What they have left is divided over the ranks of this reader.
        """
        self._epoch, self._done = epoch, tuple(done)

    def __iter__(self) -> Iterator[RequestBatch]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError("a RequestReader reads in at most one worker process; use more ranks instead")
        pool = self._pool(self._done)
        start, stop = self._share(self._left(self._done), self._rank, self._world_size)
        bounds = _bounds(stop - start, self.num_batches)
        buffer: RequestColumns | None = None
        position, done = 0, 0
        for chunk in self._stream(pool, self._rank, self._world_size):
            rest = [] if buffer is None else [buffer.take(np.arange(position, len(buffer)))]
            buffer, position = concatenate([*rest, self._rows(chunk)]), 0
            while done + 1 < len(bounds) and position + bounds[done + 1] - bounds[done] <= len(buffer):
                size = bounds[done + 1] - bounds[done]
                yield _to_batch(buffer.take(np.arange(position, position + size)), self._features)
                position += size
                done += 1

    def _scan(self, files: list[Path | Url]) -> list[_Unit]:
        units = []
        for file in files:
            parquet = open_parquet(file, REQUESTS, REQUESTS_REQUIRED)
            self._features.check(parquet, file)
            columns = present_columns(parquet, REQUESTS) + self._features.names
            if self._columns and columns != self._columns:
                problem = f"has columns {', '.join(columns)}, but {files[0]} has {', '.join(self._columns)}"
                raise DataError(f"{problem}; write all files with the same columns", file=file)
            if ("behavior_categories" in columns) != ("candidate_categories" in columns):
                raise DataError(
                    "categories of behaviors and of candidates go together; give both columns or none",
                    file=file,
                )
            self._columns = columns
            for group in range(parquet.num_row_groups):
                if self._on_bad_row == "skip":
                    requests, bad = self._read(file, group)
                    units.append(_Unit(file, group, len(requests), int(requests.candidate.lengths.sum())))
                    self.skipped += bad
                else:
                    units.append(_Unit(file, group, *_counts(parquet, group, file)))
        if self.skipped and self._rank == 0:
            log.warning("%d malformed requests skipped of %d", self.skipped,
                        self.skipped + sum(unit.rows for unit in units))  # fmt: skip
        return [unit for unit in units if unit.rows]

    def _count(self, requests: int, world_size: int) -> int:
        """Batches of each rank where so many divide so many requests."""
        each = self._batch_size * self._world_size / world_size * self.num_requests / self.num_candidates
        fewest = requests // world_size
        most = fewest if self._drop_remainder else -(-requests // world_size)
        return min(-(-most // max(1, round(each))), fewest)

    def _share(self, requests: int, rank: int, world_size: int) -> tuple[int, int]:
        """Where a rank's part of so many requests begins and ends."""
        if self._drop_remainder:
            each = requests // world_size
            return rank * each, (rank + 1) * each
        return requests * rank // world_size, requests * (rank + 1) // world_size

    def _read_by(self, requests: int, world_size: int, batches: int) -> list[int]:
        """How many of so many requests each rank has read after some batches."""
        shares = [self._share(requests, rank, world_size) for rank in range(world_size)]
        return [_bounds(stop - start, self._count(requests, world_size))[batches] for start, stop in shares]

    def _left(self, done: Sequence[tuple[int, int]]) -> int:
        """Requests that are left after parts of an epoch."""
        requests = self.num_requests
        for world_size, batches in done:
            shares = [self._share(requests, rank, world_size) for rank in range(world_size)]
            read = self._read_by(requests, world_size, batches)
            requests = sum(stop - start for start, stop in shares) - sum(read)
        return requests

    def _pool(self, done: Sequence[tuple[int, int]]) -> list[np.ndarray] | None:
        """Positions of the rows that are left after parts of an epoch, in chunks; None is the whole epoch."""
        pool: list[np.ndarray] | None = None
        for k, (world_size, batches) in enumerate(done):
            read = self._read_by(self._left(done[:k]), world_size, batches)
            streams = [list(self._stream(pool, rank, world_size)) for rank in range(world_size)]
            pool = [
                chunk for rank, stream in enumerate(streams)
                for chunk in _between(stream, read[rank], sum(map(len, stream)))
            ]  # fmt: skip
        return pool

    def _stream(self, pool: list[np.ndarray] | None, rank: int, world_size: int) -> Iterator[np.ndarray]:
        """Positions of the rows of a rank, in its order, in chunks of a few row groups."""
        requests = self.num_requests if pool is None else sum(map(len, pool))
        start, stop = self._share(requests, rank, world_size)
        yield from self._permuted(start, stop, rank) if pool is None else _between(pool, start, stop)

    def _permuted(self, start: int, stop: int, rank: int) -> Iterator[np.ndarray]:
        """Rows start to stop of the epoch's sequence, permuted within each chunk when shuffling."""
        order = np.arange(len(self._units))
        rng = np.random.default_rng((self._seed, self._epoch, rank + 1))
        if self._shuffle:
            order = np.random.default_rng((self._seed, self._epoch)).permutation(order)
        waiting: list[np.ndarray] = []
        first = 0
        for index in order:
            rows = self._units[index].rows
            begin, end = max(start - first, 0), min(stop - first, rows)
            first += rows
            if begin >= end:
                continue
            waiting.append(self._first[index] + np.arange(begin, end))
            if not self._shuffle or len(waiting) == BUFFER_ROW_GROUPS or first >= stop:
                chunk = np.concatenate(waiting)
                yield chunk[rng.permutation(len(chunk))] if self._shuffle else chunk
                waiting = []

    def _rows(self, positions: np.ndarray) -> RequestColumns:
        """Read rows, given by their positions in the files' own order."""
        units, of_row = np.unique(
            np.searchsorted(self._first, positions, side="right") - 1, return_inverse=True
        )
        parts = [self._read(self._units[u].file, self._units[u].row_group)[0] for u in units]
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        return concatenate(parts).take(starts[of_row] + positions - self._first[units][of_row])

    def _read(self, file: Path | Url, row_group: int) -> tuple[RequestColumns, int]:
        if self._opened is None or self._opened[0] != file:
            self._opened = (file, open_parquet(file, REQUESTS, REQUESTS_REQUIRED))
        table = read_row_group(self._opened[1], row_group, self._columns, file)
        return decode(table, self._max_behaviors, self._on_bad_row, file, row_group, self._features)


def _bounds(rows: int, count: int) -> list[int]:
    """Where `count` nearly equal batches of so many rows begin and end."""
    return [rows * k // count for k in range(count + 1)] if count else [0]


def _between(chunks: Sequence[np.ndarray], start: int, stop: int) -> Iterator[np.ndarray]:
    """Elements start to stop of the concatenation of chunks, in chunks."""
    first = 0
    for chunk in chunks:
        begin, end = max(start - first, 0), min(stop - first, len(chunk))
        first += len(chunk)
        if begin < end:
            yield chunk[begin:end]


def _counts(parquet: pq.ParquetFile, row_group: int, file: Path | Url) -> tuple[int, int]:
    """Rows and candidates of a row group, from the footer of the file. Raises DataError if it is damaged."""
    try:
        group = parquet.metadata.row_group(row_group)
        column = next(
            group.column(k) for k in range(group.num_columns)
            if group.column(k).path_in_schema.split(".")[0] == "labels"
        )  # fmt: skip
    except (UnicodeDecodeError, StopIteration) as error:
        problem = f"the footer is damaged ({type(error).__name__}: {error}); copy or write the file again"
        raise DataError(problem, file=file, row_group=row_group) from None
    return group.num_rows, column.num_values


def _to_batch(requests: RequestColumns, wanted: Features) -> RequestBatch:
    ones = np.ones(len(requests), np.int32)
    features = [("user_id", requests.scalars["user_id"], ones)]
    if "query_id" in requests.scalars:
        features.append(("query_id", requests.scalars["query_id"], ones))
    roles = (("candidate", requests.candidate), ("behavior", requests.behavior))
    for name in ("item_id", "category"):
        features += [
            (f"{role}_{name}", jagged.values[name], jagged.lengths.astype(np.int32))
            for role, jagged in roles
            if name in jagged.values
        ]
    features += [(name, ids.values["id"], ids.lengths.astype(np.int32)) for name, ids in requests.ids.items()]
    candidates = requests.candidate
    features += [
        (feature.name, candidates.values[feature.name], candidates.lengths.astype(np.int32))
        for feature in wanted.ids(of_candidates=True)
    ]
    behavior_ts = requests.behavior.values.get("ts")
    request_ts = requests.scalars.get("ts")
    return RequestBatch(
        sparse=KeyedJaggedTensor(
            keys=[key for key, _, _ in features],
            values=torch.from_numpy(np.concatenate([values for _, values, _ in features])),
            lengths=torch.from_numpy(np.concatenate([lengths for _, _, lengths in features])),
        ),
        labels=torch.from_numpy(requests.candidate.values["label"]),
        request_ids=torch.from_numpy(requests.scalars["request_id"]),
        request_ts=None if request_ts is None else torch.from_numpy(request_ts),
        behavior_ts=None if behavior_ts is None else torch.from_numpy(behavior_ts),
        request_dense=_dense(requests.scalars, wanted.numbers(of_candidates=False)),
        candidate_dense=_dense(candidates.values, wanted.numbers(of_candidates=True)),
    )


def _dense(values: Mapping[str, np.ndarray], features: Sequence[Feature]) -> torch.Tensor | None:
    return tower_numbers(features, {f.name: torch.from_numpy(values[f.name]) for f in features})


def label_classes(files: Sequence[str | Path | Url]) -> set[int]:
    """Labels that request files have; reading ends when there are two.

    Raises:
        DataError: a file is malformed.
    """
    found: set[int] = set()
    for file in files:
        parquet = open_parquet(file, REQUESTS, REQUESTS_REQUIRED)
        for group in range(parquet.num_row_groups):
            labels = pc.list_flatten(read_row_group(parquet, group, ["labels"], file)["labels"])
            found |= {int(label) for label in pc.unique(labels).to_pylist() if label is not None}
            if len(found) > 1:
                return found
    return found
