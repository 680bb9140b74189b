"""`mim import taobao-mm` through its `main`, on made-up files of that layout, and training on the result."""

import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.cli import main as mim
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.taobao_mm import main
from mim_torchrec.embeddings.table.format import Table

USERS, ITEMS, SAMPLES = 40, 60, 400
CLICKED, NOT_CLICKED = [0, 1], [1, 0]


def identity(k: int) -> int:
    """An id as wide as those of the data set, negative or not."""
    return (k * 0x9E3779B97F4A7C15 + 12345) % 2**64 - 2**63


def write_source(folder: Path, *, missing_user: bool = False) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    items = [
        {"205": identity(k), "206": identity(1000 + k % 5), "213": k % 3, "214": k % 7} for k in range(ITEMS)
    ]
    pq.write_table(pa.Table.from_pylist(items), folder / "item_features.parquet")
    vectors = rng.integers(-30, 30, (ITEMS, 128)).astype(np.int8)
    table = pa.table({
        "205": [identity(k) for k in range(ITEMS)],
        "205_c": pa.array(vectors.tolist(), pa.list_(pa.int8())),
    })  # fmt: skip
    pq.write_table(table, folder / "scl_embedding_int8_p90.parquet")
    for split, samples in (("train", SAMPLES), ("test", SAMPLES // 4)):
        users = []
        for k in range(USERS):
            history = rng.integers(ITEMS, size=rng.integers(0, 12))
            users.append({
                "129_1": identity(2000 + k), **{f"130_{i}": int(k % (i + 1)) for i in range(1, 6)},
                "150_2_180": [identity(int(i)) for i in history],
                "151_2_180": [identity(1000 + int(i) % 5) for i in history],
            })  # fmt: skip
        rows = [
            {"label_0": CLICKED if rng.random() < 0.2 else NOT_CLICKED,
             "129_1": identity(2000 + int(rng.integers(USERS))), "205": identity(int(rng.integers(ITEMS)))}
            for _ in range(samples)
        ]  # fmt: skip
        if missing_user:
            rows[0]["129_1"] = 1
            rows[1]["205"] = 2
        (folder / f"{split}_user_features").mkdir()
        half = USERS // 2
        for part, some in enumerate((users[:half], users[half:])):
            pq.write_table(pa.Table.from_pylist(some), folder / f"{split}_user_features" / f"{part}.parquet")
        schema = pa.schema([("label_0", pa.list_(pa.int8())), ("129_1", pa.int64()), ("205", pa.int64())])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{split}_samples.parquet")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("taobao") / "source")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("converted") / "data"
    main(["--source", str(source), "--out", str(out), "--partitions", "3", "--max-candidates", "4"])
    return out


def samples(out: Path, *splits: str) -> list[tuple]:
    """User, item, label and history of every sample."""
    found = []
    for split in splits:
        for row in pq.read_table(out / "requests" / split).to_pylist():
            history = tuple(zip(row["behavior_item_ids"], row["behavior_categories"], strict=True))
            found += [
                (row["user_id"], item, label, history)
                for item, label in zip(row["candidate_item_ids"], row["labels"], strict=True)
            ]
    return sorted(found)


def expected(source: Path, split: str, length: int = 1000) -> list[tuple]:
    users = {row["129_1"]: row for row in pq.read_table(source / f"{split}_user_features").to_pylist()}
    found = []
    for row in pq.read_table(source / f"{split}_samples.parquet").to_pylist():
        user = users[row["129_1"]]
        history = tuple(zip(user["150_2_180"], user["151_2_180"], strict=True))[-length:]
        found.append((row["129_1"], row["205"], int(row["label_0"] == CLICKED), history))
    return sorted(found)


def test_every_sample_is_there_once_with_its_users_history(source, converted):
    assert samples(converted, "train", "validation") == expected(source, "train")
    assert samples(converted, "test") == expected(source, "test")


def test_the_validation_part_is_a_share_of_the_training_samples(converted):
    share = len(samples(converted, "validation")) / SAMPLES
    assert share == pytest.approx(0.05, abs=0.04)


def test_requests_are_of_one_user_and_not_longer_than_asked_for(converted):
    rows = pq.read_table(converted / "requests" / "train").to_pylist()
    assert max(len(row["labels"]) for row in rows) == 4
    assert len({row["request_id"] for row in rows}) == len(rows)
    assert {f"user_130_{k}" for k in range(1, 6)} <= set(rows[0])


def test_categories_are_those_of_the_items(source, converted):
    of_item = {row["205"]: row["206"] for row in pq.read_table(source / "item_features.parquet").to_pylist()}
    for row in pq.read_table(converted / "requests" / "test").to_pylist():
        assert row["candidate_categories"] == [of_item[item] for item in row["candidate_item_ids"]]


def test_the_table_holds_the_vectors(source, converted):
    table = Table.open(converted / "table")
    assert (table.manifest.rows, table.manifest.dim, table.manifest.dtype) == (ITEMS, 128, "int8")


@pytest.mark.parametrize("partitions", ["1", "7"])
def test_the_number_of_parts_changes_no_sample(source, converted, tmp_path, partitions):
    out = tmp_path / "data"
    main(["--source", str(source), "--out", str(out), "--partitions", partitions])
    assert samples(out, "train", "validation") == samples(converted, "train", "validation")
    assert samples(out, "test") == samples(converted, "test")


def test_histories_are_cut_to_the_newest_at_either_end(source, tmp_path):
    last, first = tmp_path / "last", tmp_path / "first"
    main(["--source", str(source), "--out", str(last), "--max-behaviors", "3"])
    assert samples(last, "test") == expected(source, "test", 3)
    main(["--source", str(source), "--out", str(first), "--max-behaviors", "3", "--newest", "first"])
    whole = {row[:3]: row[3] for row in expected(source, "test")}
    for user, item, label, history in samples(first, "test"):
        assert history == whole[user, item, label][:3][::-1]


def test_the_printed_command_trains_on_it(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--source", str(source), "--out", "data"])
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert words[:2] == ["mim", "ctr"]
    with pytest.raises(SystemExit, match="^0$"):
        mim([*words[1:], "--epochs", "1", "--batch-size", "64", "--embedding-dim", "8"])
    report = json.loads((tmp_path / "runs" / "taobao-mm" / "metrics.json").read_text())
    assert report["n"] == SAMPLES // 4
    assert report["unknown_ids"]["mm"] == 0
    assert report["gauc_by_query"] is None


def test_a_sample_without_its_user_or_item_is_an_error_or_left_out(tmp_path, caplog):
    source = write_source(tmp_path / "source", missing_user=True)
    with pytest.raises(DataError, match="1 samples of a part have no (user|item)"):
        main(["--source", str(source), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    main(["--source", str(source), "--out", str(tmp_path / "out"), "--on-bad-row", "skip"])
    assert "left out: 2 samples without their user, 2 without their item" in caplog.text
    assert len(samples(tmp_path / "out", "train", "validation")) == SAMPLES - 2


def test_labels_the_other_way_round_are_an_error(source, tmp_path):
    with pytest.raises(DataError, match="samples are clicks, which no advertising has"):
        main(["--source", str(source), "--out", str(tmp_path / "out"), "--label-order", "clicked_first"])


def test_another_layout_is_an_error_that_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"neither item_features\*.parquet nor item_features/"):
        main(["--source", str(tmp_path), "--out", str(tmp_path / "out")])
    source = write_source(tmp_path / "source")
    table = pq.read_table(source / "train_samples.parquet").rename_columns(["label_0", "user", "205"])
    pq.write_table(table, source / "train_samples.parquet")
    with pytest.raises(DataError, match=r"column 129_1: the column is missing"):
        main(["--source", str(source), "--out", str(tmp_path / "out")])
