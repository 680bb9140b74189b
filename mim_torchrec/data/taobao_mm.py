"""TAOBAO-MM, public display advertising of Taobao, in our schema (`mim import taobao-mm`).

Of the data that comes with MUSE (arXiv 2512.07216):

    item_features                205 item, 206 its category, 213 and 214 further attributes
    {train,test}_user_features   129_1 user, 130_* attributes, 150_2_180 items clicked, 151_2_180 categories
    {train,test}_samples         129_1 user, 205 item, label_0 [not clicked, clicked]
    scl_embedding_int8_p90       205 item, 205_c its frozen multi-modal vector, 128 int8

Samples of a user become requests, so that its thousand behaviors are stored once; there is no query and no
time. Samples and users are joined by parts: both are first divided over files by a hash of the user. Memory
holds a part of the users, and 16 bytes an item. The vectors become the frozen table in `<out>/table`.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from mim_torchrec import program
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.schema import open_parquet
from mim_torchrec.data.writing import DatasetWriter, lists
from mim_torchrec.domains import Count, Domain, Natural, check_domains
from mim_torchrec.embeddings.listing import data_files
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.embeddings.table.importing import import_vectors

log = logging.getLogger("mim_torchrec.data.taobao_mm")  # also where it runs as __main__

IDS = pa.list_(pa.int64())
ITEM_COLUMNS = pa.schema([(name, pa.int64()) for name in ("205", "206", "213", "214")])
USER_COLUMNS = pa.schema([("129_1", pa.int64()), ("150_2_180", IDS), ("151_2_180", IDS)])
SAMPLE_COLUMNS = pa.schema([("129_1", pa.int64()), ("205", pa.int64()), ("label_0", IDS)])
SOME_ROWS, MANY_ROWS = 8192, 1_000_000


@dataclass(frozen=True, kw_only=True)
class TaobaoMMConfig:
    """Convert TAOBAO-MM: samples of display advertising as requests, vectors as a frozen table."""

    source: LocalPath
    """Folder with the data set's Parquet files, each a file or a folder of files of that name."""
    out: Place
    """Directory to make; must not exist. The table is `table` in it."""
    dtype: Literal["int8", "float16", "float32"] = "int8"
    """Storage type of the table; the vectors are int8."""
    max_behaviors: Count = 1000
    """Longest history of a request, the newest behaviors."""
    newest: Literal["last", "first"] = "last"
    """End of a history at which the newest behavior stands; the data set does not say."""
    max_candidates: Count = 50
    """Most samples of a user in a request."""
    validation_fraction: Annotated[float, Domain(above=0, below=1)] = 0.05
    """Fraction of the training samples, drawn at random, that becomes the validation part."""
    label_order: Literal["not_clicked_first", "clicked_first"] = "not_clicked_first"
    """Meaning of the two numbers of `label_0`."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Stop at a sample whose user or item is missing, or leave it out and count it."""
    partitions: Count = 64
    """Parts in which samples and users are joined; more take less memory."""
    seed: Natural = 0
    """Seed of the validation part."""


def find(source: Path, name: str) -> list[Path]:
    """Files of a table, `<name>*.parquet` or all in `<name>/`. Raises DataError if there are none."""
    files = data_files(source / name) or sorted(source.glob(f"{name}*.parquet"))
    if not files:
        raise DataError(
            f"neither {name}*.parquet nor {name}/*.parquet is there; put all files of the data set there",
            file=source,
        )
    return files


def batches(
    files: Sequence[Path], required: pa.Schema, rows: int = SOME_ROWS, more: str = ""
) -> Iterator[pa.Table]:
    """Columns of files, some rows at a time.

    Args:
        files: of one table.
        required: columns, all of which must be there.
        rows: at a time.
        more: columns whose names begin so are read too.

    Raises:
        DataError: a file cannot be read, lacks a column, or has one of another type or with nulls.
    """
    for file in files:
        parquet = open_parquet(file, required, required.names)
        others = [n for n in parquet.schema_arrow.names if more and n.startswith(more)]
        try:
            for batch in parquet.iter_batches(rows, columns=[*required.names, *others]):
                for name in required.names:
                    if batch[name].null_count:
                        raise DataError("is null; leave the row out", file=file, column=name)
                yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot be read ({error}); copy it again", file=file) from None


class Items:
    """Categories of items by id, 16 bytes each."""

    def __init__(self, ids: np.ndarray, categories: np.ndarray) -> None:
        order = np.argsort(ids, kind="stable")
        self._ids, self._categories = ids[order], categories[order]

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which ids are known (n,) bool, and their categories (n,), 0 where they are not."""
        place = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        known = self._ids[place] == ids
        return known, np.where(known, self._categories[place], 0)


def write_items(config: TaobaoMMConfig, writer: DatasetWriter) -> Items:
    """The item table; returns what requests need of it."""
    ids, categories = [], []
    for table in batches(find(config.source, "item_features"), ITEM_COLUMNS, MANY_ROWS):
        columns = table.rename_columns(["item_id", "category", "attribute_213", "attribute_214"])
        writer.append("items", columns)
        ids.append(columns["item_id"].to_numpy())
        categories.append(columns["category"].to_numpy())
    found = Items(np.concatenate(ids), np.concatenate(categories))
    twice = len(found) - len(np.unique(np.concatenate(ids)))
    if twice:
        raise DataError(
            f"{twice} items are there twice; remove the repeated rows", file=config.source, column="205"
        )
    return found


def divide(tables: Iterator[pa.Table], folder: Path, partitions: int) -> list[Path]:
    """Divide tables over files by a hash of the user, keeping their order; none is made without rows."""
    folder.mkdir()
    writers: dict[int, pq.ParquetWriter] = {}
    try:
        for table in tables:
            part = _hash(table["129_1"].to_numpy()) % np.uint64(partitions)
            for k in np.unique(part):
                rows = table.filter(pa.array(part == k))
                if int(k) not in writers:
                    path = folder / f"{int(k):05d}.parquet"
                    writers[int(k)] = pq.ParquetWriter(path, rows.schema, compression="zstd")
                writers[int(k)].write_table(rows)
    finally:
        for writer in writers.values():
            writer.close()
    return sorted(folder.iterdir())


def _hash(ids: np.ndarray) -> np.ndarray:
    return (ids.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)


class RequestsWriter:
    """Samples of a part of the users as requests.

    Args:
        config: of the conversion.
        items: of the item table.
    """

    def __init__(self, config: TaobaoMMConfig, items: Items) -> None:
        self._config, self._items = config, items
        self._rng = np.random.default_rng(config.seed)
        self._next = 1
        self.skipped = {"user": 0, "item": 0}
        """Samples that were left out because there is no such user or item."""
        self.samples = self.clicks = 0

    def make(self, samples: pa.Table, users: pa.Table, split: str) -> Iterator[tuple[str, pa.Table]]:
        """Requests of a part, with the split that they belong to."""
        user_id, item_id = samples["129_1"].to_numpy(), samples["205"].to_numpy()
        label = self._labels(samples)
        row = pc.index_in(samples["129_1"], users["129_1"].combine_chunks())
        has_user = row.is_valid().to_numpy()
        has_item, category = self._items.find(item_id)
        self._refuse("user", user_id[~has_user], "129_1")
        self._refuse("item", item_id[has_user & ~has_item], "205")
        self.samples, self.clicks = self.samples + len(label), self.clicks + int(label.sum())
        held_out = np.zeros(len(label), bool)
        if split == "train":
            held_out = self._rng.random(len(label)) < self._config.validation_fraction
        row = row.fill_null(0).to_numpy()
        for name, chosen in ((split, ~held_out), ("validation", held_out)):
            kept = np.flatnonzero(chosen & has_user & has_item)
            kept = kept[np.argsort(row[kept], kind="stable")]
            if len(kept):
                yield name, self._table(row[kept], item_id[kept], category[kept], label[kept], users)

    def _table(
        self, row: np.ndarray, item_id: np.ndarray, category: np.ndarray, label: np.ndarray, users: pa.Table
    ) -> pa.Table:
        first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
        of_user = np.arange(len(row)) - np.repeat(first, np.diff(np.r_[first, len(row)]))
        starts = np.flatnonzero(of_user % self._config.max_candidates == 0)
        sizes = np.diff(np.r_[starts, len(row)])
        mine = users.take(pa.array(row[starts]))
        ids = np.arange(self._next, self._next + len(starts))
        self._next += len(starts)
        columns: dict[str, Any] = {
            "request_id": ids,
            "user_id": mine["129_1"],
            "behavior_item_ids": self._newest(mine["150_2_180"]),
            "behavior_categories": self._newest(mine["151_2_180"]),
            "candidate_item_ids": lists(item_id, sizes, pa.int64()),
            "candidate_categories": lists(category, sizes, pa.int64()),
            "labels": lists(label.astype(np.int8), sizes, pa.int8()),
        }
        more = {f"user_{name}": mine[name] for name in mine.column_names if name.startswith("130_")}
        self.features = sorted(more)
        return pa.table(columns | more)

    def _newest(self, column: pa.ChunkedArray) -> pa.Array:
        """Histories in order of time, cut to their newest behaviors."""
        column = column.combine_chunks()
        ends = column.offsets.to_numpy()
        kept = np.minimum(np.diff(ends), self._config.max_behaviors)
        new_ends = np.cumsum(kept)
        place = np.arange(new_ends[-1] if len(new_ends) else 0) - np.repeat(new_ends - kept, kept)
        if self._config.newest == "last":
            source = np.repeat(ends[1:] - kept, kept) + place
        else:
            source = np.repeat(ends[:-1] + kept, kept) - 1 - place
        return lists(column.values.take(pa.array(source)), kept, pa.int64())

    def _labels(self, samples: pa.Table) -> np.ndarray:
        column = samples["label_0"].combine_chunks()
        pair = column.flatten().to_numpy()
        if (np.diff(column.offsets.to_numpy()) != 2).any() or (pair.reshape(-1, 2).sum(1) != 1).any():
            problem = "a label is not one of [1, 0] and [0, 1]; fix or leave out such samples"
            raise DataError(problem, file=self._config.source, column="label_0")
        place = 1 if self._config.label_order == "not_clicked_first" else 0
        return pair.reshape(-1, 2)[:, place].astype(np.int64)

    def _refuse(self, kind: str, ids: np.ndarray, column: str) -> None:
        if len(ids) and self._config.on_bad_row == "fail":
            raise DataError(
                f"{len(ids)} samples of a part have no {kind} in the features, the first is {ids[0]}; "
                "--on-bad-row skip leaves them out", file=self._config.source, column=column,
            )  # fmt: skip
        self.skipped[kind] += len(ids)


def convert(config: TaobaoMMConfig) -> dict[str, Any]:
    """Write the data set and its table.

    Returns:
        `items`, `samples`, `clicks`, `skipped`, `requests` by split, and `features`, columns of users that
        were kept.

    Raises:
        OutputExists: `out` exists.
        DataError: a file is missing or malformed, a split has no sample left, or most samples
            are clicks, which no advertising has.
        TableError: the vectors cannot be imported.
    """
    check_domains(config)
    source = {"command": "mim import taobao-mm", "of": "arXiv 2512.07216", "newest": config.newest}
    with written(config.out) as out, DatasetWriter(out, name="taobao-mm", source=source) as writer:
        items = write_items(config, writer)
        requests = RequestsWriter(config, items)
        scratch = Path(tempfile.mkdtemp(prefix="parts-", dir=writer.partial))
        for split in ("train", "test"):
            users = batches(find(config.source, f"{split}_user_features"), USER_COLUMNS, more="130_")
            samples = batches(find(config.source, f"{split}_samples"), SAMPLE_COLUMNS)
            parts = {path.name: path for path in divide(users, scratch / f"{split}-users", config.partitions)}
            for path in divide(samples, scratch / f"{split}-samples", config.partitions):
                part = pq.read_table(path)
                mine = pq.read_table(parts[path.name]) if path.name in parts else _nobody()
                for name, table in requests.make(part, mine, split):
                    writer.append(f"requests/{name}", table)
            shutil.rmtree(scratch / f"{split}-users")
            shutil.rmtree(scratch / f"{split}-samples")
        shutil.rmtree(scratch)
        counts = {name: writer.description["counts"].get(f"requests/{name}", 0)
                  for name in ("train", "validation", "test")}  # fmt: skip
        if not all(counts.values()):
            problem = f"no sample is left of a split: requests {counts}, left out {requests.skipped}"
            raise DataError(f"{problem}; give more samples, with their users and items", file=config.source)
        if requests.clicks > requests.samples / 2:
            raise DataError(
                f"{requests.clicks} of {requests.samples} samples are clicks, which no advertising has; is "
                "--label-order the other one?", file=config.source, column="label_0",
            )  # fmt: skip
        vectors = find(config.source, "scl_embedding_int8_p90")
        import_vectors(vectors, writer.partial / "table", dtype=config.dtype, id_column="205",
                       vector_column="205_c", show_progress=True)  # fmt: skip
    return {"items": len(items), "samples": requests.samples, "clicks": requests.clicks,
            "skipped": requests.skipped, "requests": counts, "features": requests.features}  # fmt: skip


def _nobody() -> pa.Table:
    return USER_COLUMNS.empty_table()


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim import taobao-mm`."""
    config = tyro.cli(TaobaoMMConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    found = convert(config)
    if any(found["skipped"].values()):
        log.warning("left out: %d samples without their user, %d without their item",
                    found["skipped"]["user"], found["skipped"]["item"])  # fmt: skip
    log.info("%d items, %d samples, %.2f%% of them clicks, requests %s", found["items"], found["samples"],
             100 * found["clicks"] / max(found["samples"], 1), found["requests"])  # fmt: skip
    features = " ".join(["--sparse-features", *found["features"]]) if found["features"] else ""
    print(
        f"mim ctr --data {config.out} --table {config.out / 'table'} --preset recommended --ubm sim "
        f"--recency order --max-behaviors {config.max_behaviors} --out runs/taobao-mm {features}"
    )


if __name__ == "__main__":
    program.run(main)
