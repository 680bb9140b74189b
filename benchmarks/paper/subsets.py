"""Table 2 in the paper's form: all requests and seven categories, with the counts of Table 1 beside.

A subset holds the impressions of one category's items, with the whole history of their users. Base and
Base+MIM are trained and tested on it alone; the multi-modal table is that of all items, as the paper has one
C-SFT.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_torchrec.benchmarks.harness.pages import Section
from mim_torchrec.data.features import NO_FEATURES
from mim_torchrec.data.id_scan import fingerprint
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.embeddings.files import atomic_directory, write_json
from mim_torchrec.errors import OptionError

ALL = "ALL"
COLUMNS = (ALL, "Toys", "FMCG", "Sports", "Cars", "Clothes", "Pets", "Home Decoration")
PAPER: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    "avg_pooling": (
        (0.6965, 0.6958, 0.7044, 0.7045, 0.6965, 0.6810, 0.6844, 0.6748),
        (0.7030, 0.6989, 0.7168, 0.7148, 0.7065, 0.6828, 0.6911, 0.6796),
        (0.0066, 0.0032, 0.0123, 0.0104, 0.0100, 0.0017, 0.0067, 0.0048),
    ),
    "din": (
        (0.7004, 0.6969, 0.7187, 0.6986, 0.6928, 0.6753, 0.7099, 0.6802),
        (0.7047, 0.7006, 0.7225, 0.7027, 0.6963, 0.6812, 0.7126, 0.6864),
        (0.0042, 0.0037, 0.0039, 0.0041, 0.0036, 0.0058, 0.0028, 0.0062),
    ),
    "dien": (
        (0.7010, 0.6975, 0.7190, 0.6989, 0.6934, 0.6761, 0.7102, 0.6809),
        (0.7055, 0.7013, 0.7233, 0.7033, 0.6970, 0.6822, 0.7131, 0.6872),
        (0.0046, 0.0038, 0.0044, 0.0045, 0.0036, 0.0061, 0.0029, 0.0063),
    ),
    "bst": (
        (0.6995, 0.6965, 0.7177, 0.6973, 0.6924, 0.6740, 0.7093, 0.6796),
        (0.7049, 0.7000, 0.7229, 0.7026, 0.6964, 0.6807, 0.7129, 0.6861),
        (0.0054, 0.0035, 0.0053, 0.0053, 0.0040, 0.0068, 0.0036, 0.0065),
    ),
    "twin": (
        (0.7028, 0.6992, 0.7214, 0.7013, 0.6951, 0.6776, 0.7126, 0.6825),
        (0.7051, 0.7010, 0.7229, 0.7032, 0.6968, 0.6813, 0.7134, 0.6867),
        (0.0023, 0.0018, 0.0016, 0.0019, 0.0017, 0.0037, 0.0009, 0.0042),
    ),
    "sim": (
        (0.7024, 0.7017, 0.7111, 0.7024, 0.6945, 0.6869, 0.7058, 0.6928),
        (0.7062, 0.7067, 0.7153, 0.7065, 0.6993, 0.6893, 0.7112, 0.6951),
        (0.0038, 0.0050, 0.0042, 0.0041, 0.0048, 0.0024, 0.0054, 0.0023),
    ),
}
"""AUC of Base, of Base+MIM and the difference as printed, in the order of `COLUMNS`."""
PAPER_COUNTS = {
    "#Data": ("1.83+ B", "51.6+ M", "0.21+ B", "0.1+ B", "60.75+ M", "0.91+ B", "24.81+ M", "0.15+ B"),
    "#Query": ("56.34+ M", "2.32+ M", "6.72+ M", "3.56+ M", "3.66+ M", "15.07+ M", "0.73+ M", "5.32+ M"),
    "#Users": ("0.12+ B", "7.04+ M", "25.95+ M", "16.34+ M", "6.62+ M", "55.77+ M", "2.63+ M", "14.04+ M"),
    "#Items": ("16.16+ M", "0.42+ M", "1.11+ M", "0.65+ M", "0.91+ M", "3.74+ M", "0.22+ M", "1.50+ M"),
}
"""Table 1 as printed, in the order of `COLUMNS`."""
SHARE_SEED = 0
VERSIONS = ("Base", "Base+MIM", "Δ")


def read_requests(data: Path) -> dict[str, pa.Table]:
    """The requests of a data set by split."""
    dataset = Dataset(data)
    return {
        split: pa.concat_tables([pq.read_table(file, partitioning=None) for file in dataset.requests(split)])
        for split in SPLITS
    }


def of_category(requests: pa.Table, category: str) -> pa.Table:
    """Requests with their candidates of one category, without those that have none."""
    column = requests["candidate_categories"].combine_chunks()
    kept = pc.equal(column.flatten(), category).to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(requests)), np.diff(column.offsets.to_numpy()))
    lengths = np.bincount(owner[kept], minlength=len(requests))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    for place, name in enumerate(requests.column_names):
        if name.startswith(("candidate_", "labels")):
            values = requests[name].combine_chunks().flatten().filter(pa.array(kept))
            made = pa.ListArray.from_arrays(offsets, values)
            requests = requests.set_column(place, name, made.cast(requests.schema.field(name).type))
    return requests.filter(pa.array(lengths > 0))


def largest_categories(requests: Mapping[str, pa.Table], count: int) -> list[str]:
    """The categories with the most impressions in training.

    Raises:
        OptionError: there are fewer.
    """
    names, shown = np.unique(
        requests["train"]["candidate_categories"].combine_chunks().flatten().to_numpy(zero_copy_only=False),
        return_counts=True,
    )
    if len(names) < count:
        raise OptionError(f"{count} categories are asked for, the training requests have {len(names)}")
    return [str(name) for name in names[np.argsort(-shown, kind="stable")[:count]]]


def write_subset(data: Path, requests: Mapping[str, pa.Table], category: str, out: Path) -> Path:
    """Write the data set of a category; it is made again."""
    if out.exists():
        shutil.rmtree(out)
    return _write(data, {split: of_category(rows, category) for split, rows in requests.items()}, out)


def write_share(data: Path, share: float, out: Path) -> Path:
    """Write a data set with a random share of the training requests, the same whenever it is made.

    Validation and test requests, histories and items stay. One that was made of the same files is kept.

    Args:
        data: the whole data set.
        share: of its training requests, above 0 and at most 1.
        out: directory of the data set.
    """
    made_of = {"files": fingerprint(Dataset(data).requests("train"), NO_FEATURES), "share": share}
    record = out / "made_of.json"
    if record.is_file() and json.loads(record.read_text()) == made_of:
        return out
    requests = read_requests(data)
    count = len(requests["train"])
    kept = np.random.default_rng(SHARE_SEED).permutation(count)[: max(round(share * count), 1)]
    with atomic_directory(out) as partial:
        _write(data, requests | {"train": requests["train"].take(np.sort(kept))}, partial)
        write_json(partial / record.name, made_of)
    return out


def _write(data: Path, requests: Mapping[str, pa.Table], out: Path) -> Path:
    """Write requests beside the items of a data set and its description, if it has one."""
    for split, rows in requests.items():
        folder = out / "requests" / split
        folder.mkdir(parents=True)
        pq.write_table(rows, folder / "part-00000.parquet", row_group_size=1000, compression="zstd")
    shutil.copytree(data / "items", out / "items", copy_function=os.link)
    if (description := data / "dataset.json").is_file():
        said = json.loads(description.read_text())
        write_json(out / description.name, {name: said[name] for name in said if name != "counts"})
    return out


def counts(requests: Mapping[str, pa.Table]) -> dict[str, int]:
    """Table 1 of a data set: impressions, distinct queries, users, and items that were shown."""
    whole = pa.concat_tables(requests.values())
    shown = whole["candidate_item_ids"].combine_chunks().flatten()
    return {"#Data": len(shown), "#Query": pc.count_distinct(whole["query_id"]).as_py(),
            "#Users": pc.count_distinct(whole["user_id"]).as_py(),
            "#Items": pc.count_distinct(shown).as_py()}  # fmt: skip


def sections(
    columns: Sequence[str],
    lines: Mapping[str, Mapping[str, Mapping[str, float]]],
    of_columns: Mapping[str, Mapping[str, int]],
) -> list[Section]:
    """Table 2 and Table 1 of ours in the paper's form, and the paper's own below each.

    Args:
        columns: `ALL` and our categories.
        lines: by model and column `base_auc`, `mim_auc` and `delta`.
        of_columns: `counts` by column.
    """
    ours: list[Sequence[str]] = []
    printed: list[Sequence[str]] = []
    for ubm, by_column in lines.items():
        for version, field in zip(VERSIONS, ("base_auc", "mim_auc", "delta"), strict=True):
            form = "+.4f" if field == "delta" else ".4f"
            ours.append([ubm, version, *(format(by_column[name][field], form) for name in columns)])
            values = PAPER[ubm][VERSIONS.index(version)]
            printed.append([ubm, version, *(format(value, form) for value in values)])
    of_ours = [[name, *(f"{of_columns[column][name]:,}" for column in columns)] for name in PAPER_COUNTS]
    text = [
        "Models of a category are trained and tested on its impressions. The columns are categories of the "
        "shop, those with the most impressions. They are not the paper's."
    ]
    return [
        Section("Table 2 by category", text=text, columns=["model", "version", *columns], rows=ours),
        Section("Table 1", text=[], columns=["", *columns], rows=of_ours),
        Section("Table 2 of the paper", text=[], columns=["model", "version", *COLUMNS], rows=printed),
        Section("Table 1 of the paper", text=[], columns=["", *COLUMNS],
                rows=[[name, *values] for name, values in PAPER_COUNTS.items()]),
    ]  # fmt: skip
