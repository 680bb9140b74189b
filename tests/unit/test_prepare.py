"""`mim prepare` on DuckDB: every row is that of a naive loop, whatever form the log has."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.features import Features
from mim_torchrec.data.id_scan import scan_ids
from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.prepare import run, writing
from mim_torchrec.prepare.config import PrepareConfig
from mim_torchrec.prepare.run import prepare
from tests.datasets import png
from tests.naive_prepare import Requests, naive, naive_pairs
from tests.raw_logs import SECOND, START, TYPES, Log, add_versions, make_log, write_log
from tests.raw_logs import table as raw_table

OPTIONS = {"max_behaviors": 4, "threads": 1, "memory": "500MB", "row_group_rows": 8}


def config(mapping: Path, out: Path, **changes: Any) -> PrepareConfig:
    return PrepareConfig(mapping=mapping, out=out, **(OPTIONS | changes))


def rows_of(out: Path) -> dict[int, dict[str, Any]]:
    """All requests by id, with times in microseconds and the name of the split."""
    found = {}
    for split in SPLITS:
        for file in Dataset(out).requests(split):
            table = pq.read_table(file, partitioning=None)
            for name, kind in (("ts", pa.int64()), ("behavior_ts", pa.list_(pa.int64()))):
                table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
            for row in table.to_pylist():
                assert row["request_id"] not in found
                found[row.pop("request_id")] = row | {"split": split}
    return found


def assert_same(found: dict[int, dict[str, Any]], expected: Requests, ids: Any = int) -> None:
    """Compare rows, those of the loop with its ids mapped."""
    assert len(expected) > 50
    assert {ids("request", key) for key in expected} == set(found)
    for key, row in expected.items():
        own = found[ids("request", key)]
        for name, value in row.items():
            if name == "user_id":
                value = ids("user", value)
            if name.endswith("item_ids"):
                value = [ids("item", item) for item in value]
            assert own[name] == value, (key, name)


def as_they_are(role: str, value: int) -> int:
    return value


def hashed(role: str, value: int) -> int:
    return stable_ids(pa.array([f"{role}-{value}"]))[0].as_py()


def of_moments(role: str, value: Any) -> int:
    """Requests have text ids, of a user and a moment; the others are as they are."""
    return stable_ids(pa.array([value]))[0].as_py() if role == "request" else value


@pytest.mark.parametrize("arrived", [False, True], ids=["event time", "arrival time"])
@pytest.mark.parametrize("form, text", [("parquet", False), ("csv", False), ("parquet", True), ("csv", True)])
def test_requests_are_those_of_a_naive_loop(tmp_path, form, text, arrived):
    log = make_log()
    leave_out = () if arrived else ("arrived",)
    mapping = write_log(log, tmp_path / "raw", form=form, text=text, leave_out=leave_out)
    options = config(mapping, tmp_path / "out")
    prepare(options)
    expected = naive(log, options, arrived=arrived)
    if text:  # at equal positions and times the order is that of the text
        assert_same_sets(rows_of(tmp_path / "out"), expected)
    else:
        assert_same(rows_of(tmp_path / "out"), expected, as_they_are)


def assert_same_sets(found: dict[int, dict[str, Any]], expected: Requests) -> None:
    assert {hashed("request", key) for key in expected} == set(found)
    for key, row in expected.items():
        own = found[hashed("request", key)]
        assert own["user_id"] == hashed("user", row["user_id"])
        assert own["labels"] == row["labels"] and own["behavior_ts"] == row["behavior_ts"]
        assert own["candidate_item_ids"] == [hashed("item", item) for item in row["candidate_item_ids"]]


def one_log(log: Log, folder: Path) -> Path:
    """The log as one file of all events, whose copies share an id; returns its mapping."""
    rows = [
        row | {"event": kind, "id": repr(sorted((k, str(v)) for k, v in row.items() if k != "arrived"))}
        for kind, own in log.events.items() for row in own
    ]  # fmt: skip
    folder.mkdir()
    columns = [name for name in TYPES if any(name in row for row in rows)]
    made = raw_table(rows, columns).append_column("id", pa.array([row["id"] for row in rows]))
    pq.write_table(made, folder / "events.parquet")
    pq.write_table(raw_table(log.catalog, ["item", "category"]), folder / "catalog.parquet")
    lines = ['name = "one"']
    for kind in ("impression", "click", "purchase"):
        lines += [
            f"[events.{kind}]",
            'path = "events.parquet"',
            'time_unit = "us"',
            'id = "id"',
            f'where = {{ event = "{kind}" }}',
            'position = "position"' if kind == "impression" else "",
        ]
        lines += [f'{name} = "{name}"' for name in ("request", "user", "item", "ts", "arrived")]
    lines += ["[catalog]", 'path = "catalog.parquet"', 'item = "item"', 'category = "category"']
    (folder / "prepare.toml").write_text("\n".join(lines))
    return folder / "prepare.toml"


def test_one_log_of_all_events_whose_copies_share_an_id(tmp_path):
    log = make_log()
    options = config(one_log(log, tmp_path / "raw"), tmp_path / "out")
    prepare(options)
    del log.events["image_search"][:]
    assert_same(rows_of(tmp_path / "out"), naive(log, options), as_they_are)


def test_categories_are_those_of_the_time_of_the_event(tmp_path):
    log = make_log()
    add_versions(log)
    mapping = write_log(log, tmp_path / "raw", versions=True)
    options = config(mapping, tmp_path / "out")
    report = prepare(options)
    expected = naive(log, options, versions=True)
    names = {c for row in expected.values() for c in row["candidate_categories"]}
    assert {"moved", "", "c1"} <= names
    assert_same(rows_of(tmp_path / "out"), expected, as_they_are)
    assert report["input"]["catalog"]["versions"] > report["input"]["catalog"]["items"]


def test_actions_without_a_request_belong_to_the_last_impression(tmp_path):
    log = make_log()
    del log.events["image_search"][:], log.events["purchase"][:]
    mapping = write_log(log, tmp_path / "raw", leave_out=("request", "arrived"))
    options = config(mapping, tmp_path / "out", behaviors=("click",))
    prepare(options)
    expected = naive(log, options, arrived=False, has_request=False)
    found = rows_of(tmp_path / "out")
    assert {stable_ids(pa.array([key]))[0].as_py() for key in expected} == set(found)
    for key, row in expected.items():
        own = found[stable_ids(pa.array([key]))[0].as_py()]
        assert [own[name] for name in ("labels", "behavior_item_ids")] == [
            row["labels"], row["behavior_item_ids"]
        ]  # fmt: skip


def test_purchases_can_be_the_label(tmp_path):
    log = make_log()
    mapping = write_log(log, tmp_path / "raw")
    options = config(mapping, tmp_path / "out", label="purchase", label_window=60_000)
    log_end = "2026-11-02T12:00:00"
    prepare(config(mapping, tmp_path / "out", label="purchase", label_window=60_000, log_end=log_end))
    found = rows_of(tmp_path / "out")
    expected = naive(log, options)
    assert expected and all(found[key]["labels"] == row["labels"] for key, row in expected.items())
    assert any(1 in row["labels"] for row in expected.values())


@pytest.mark.parametrize("has_request", [True, False], ids=["named", "last impression"])
def test_a_second_label_follows_the_first_within_a_window_of_its_own(tmp_path, has_request):
    log = make_log()
    if not has_request:
        del log.events["image_search"][:]
    leave_out = () if has_request else ("request", "arrived")
    mapping = write_log(log, tmp_path / "raw", leave_out=leave_out)
    options = config(mapping, tmp_path / "out", second_label="purchase", second_window=100)
    report = prepare(options)
    expected = naive(log, options, arrived=has_request, has_request=has_request)
    found = rows_of(tmp_path / "out")
    assert_same(found, expected, as_they_are if has_request else of_moments)
    pairs = {
        pair for row in found.values() for pair in zip(row["labels"], row["labels_purchase"], strict=True)
    }
    assert pairs == {(0, 0), (1, 0), (1, 1)}
    assert report["attribution"]["purchase"]["after_the_window"] > 0
    features = Features(second_label="purchase")
    reader = RequestReader(Dataset(tmp_path / "out").requests("train"), batch_size=16, features=features)
    positives = sum(sum(row["labels_purchase"]) for row in found.values() if row["split"] == "train")
    assert sum(int(batch.second_labels.sum()) for batch in reader) == positives > 0


def test_batches_of_any_size_give_the_same_rows(tmp_path, monkeypatch):
    log = make_log()
    mapping = write_log(log, tmp_path / "raw")
    prepare(config(mapping, tmp_path / "whole", row_group_rows=1000))
    monkeypatch.setattr(run, "ROWS", 7)
    monkeypatch.setattr(writing, "COUNTED_ROWS", 5)
    prepare(config(mapping, tmp_path / "batches", row_group_rows=3))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "batches")
    for file in (tmp_path / "whole" / "vocabularies").iterdir():
        assert pq.read_table(file).equals(pq.read_table(tmp_path / "batches" / "vocabularies" / file.name))


def test_the_parts_are_cut_at_two_times_for_all_users(tmp_path):
    mapping = write_log(make_log(), tmp_path / "raw")
    prepare(config(mapping, tmp_path / "out"))
    found = rows_of(tmp_path / "out")
    ts = sorted(row["ts"] for row in found.values())
    cuts = ts[len(ts) * 8 // 10], ts[len(ts) * 9 // 10]
    for row in found.values():
        assert row["split"] == SPLITS[(row["ts"] >= cuts[0]) + (row["ts"] >= cuts[1])]


def test_vocabulary_and_popularity_are_those_of_the_training_part(tmp_path):
    mapping = write_log(make_log(), tmp_path / "raw")
    prepare(config(mapping, tmp_path / "out"))
    scanned = scan_ids(Dataset(tmp_path / "out").requests("train"))
    folder = tmp_path / "out" / "vocabularies"
    assert {path.stem for path in folder.iterdir()} == {*scanned, "popularity"}
    for name, ids in scanned.items():
        assert pq.read_table(folder / f"{name}.parquet")["id"].to_pylist() == ids.tolist()
    shown: dict[int, list[int]] = {}
    for row in rows_of(tmp_path / "out").values():
        if row["split"] == "train":
            for item, label in zip(row["candidate_item_ids"], row["labels"], strict=True):
                counts = shown.setdefault(item, [0, 0])
                counts[0] += 1
                counts[1] += label
    popularity = pq.read_table(folder / "popularity.parquet").to_pylist()
    assert {row["id"]: [row["shown"], row["positive"]] for row in popularity} == shown


def test_sampled_negatives_have_the_weight_that_restores_their_number(tmp_path):
    mapping = write_log(make_log(requests=400), tmp_path / "raw")
    prepare(config(mapping, tmp_path / "all"))
    report = prepare(config(mapping, tmp_path / "some", negative_rate=0.25))
    whole, some = rows_of(tmp_path / "all"), rows_of(tmp_path / "some")
    weights, negatives = [], 0
    for key, row in whole.items():
        before = list(zip(row["candidate_item_ids"], row["labels"], strict=True))
        if row["split"] != "train":
            assert some[key]["labels"] == row["labels"]
            continue
        own = some.get(key, {"candidate_item_ids": [], "labels": [], "candidate_weights": []})
        after = list(zip(own["candidate_item_ids"], own["labels"], strict=True))
        assert [one for one in before if one in after] == after
        assert [one for one in before if one[1]] == [one for one in after if one[1]]
        negatives += sum(1 - label for _, label in before)
        weights += [w for w, label in zip(own["candidate_weights"], own["labels"], strict=True) if not label]
        assert all(w == 1 for w, label in zip(own["candidate_weights"], own["labels"], strict=True) if label)
    assert set(weights) == {4.0}
    assert abs(sum(weights) - negatives) < 4 * np.sqrt(negatives * 0.25 * 0.75) * 4
    assert report["sampling"]["negatives_left_out"] == negatives - len(weights)


def test_readers_read_what_is_written(tmp_path):
    mapping = write_log(make_log(), tmp_path / "raw")
    report = prepare(config(mapping, tmp_path / "out"))
    reader = RequestReader(Dataset(tmp_path / "out").requests("train"), batch_size=16, shuffle=True)
    assert sum(len(batch.request_ids) for batch in reader) == report["parts"]["train"]["requests"]


def test_days_are_folders_and_row_groups_have_their_size(tmp_path):
    mapping = write_log(make_log(), tmp_path / "raw")
    prepare(config(mapping, tmp_path / "days"))
    folders = {path.parent.name for path in (tmp_path / "days" / "requests").rglob("*.parquet")}
    assert folders == {"dt=2026-11-01"}
    prepare(config(mapping, tmp_path / "none", partition="none", log_lag=60))
    files = Dataset(tmp_path / "none").requests("train")
    sizes = [pq.read_metadata(f).row_group(g).num_rows for f in files
             for g in range(pq.read_metadata(f).num_row_groups)]  # fmt: skip
    assert set(sizes[:-1]) == {8} and len(files) > 1
    meta = pq.read_metadata(files[0]).row_group(0)
    encodings = {meta.column(k).path_in_schema: meta.column(k).encodings for k in range(meta.num_columns)}
    for name in ("candidate_item_ids", "candidate_categories", "behavior_categories", "behavior_kinds"):
        assert "RLE_DICTIONARY" in encodings[f"{name}.list.element"]
    assert pq.read_schema(files[0]).field("behavior_kinds").type == pa.list_(pa.string())
    assert rows_of(tmp_path / "days") == rows_of(tmp_path / "none")


def test_the_report_counts_every_rule(tmp_path):
    log = make_log()
    mapping = write_log(log, tmp_path / "raw")
    report = prepare(config(mapping, tmp_path / "out", log_end="2026-11-01T11:00:00"))
    stored = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert stored == json.loads(json.dumps(report))
    shown = report["input"]["impression"]
    assert shown["rows"] == len(log.events["impression"])
    assert shown["incomplete"] == 3 and shown["of_unknown_items"] > 0 and shown["repeated"] > 0
    left = shown["incomplete"] + shown["repeated"] + shown["of_unknown_items"]
    assert shown["kept"] == shown["rows"] - left
    assert report["requests"]["of_several_users"] == 1
    assert report["requests"]["too_young_for_their_label"] > 0
    assert report["attribution"]["click"]["before_their_impression"] > 0
    assert report["attribution"]["click"]["after_the_window"] > 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"] == report["written"]
    assert sum(one["rows"] for one in manifest["files"]) == sum(report["written"].values())


def images_of(log: Log, folder: Path) -> None:
    folder.mkdir()
    for k, row in enumerate(log.catalog + log.events["image_search"]):
        if row["image"] not in ("5.jpg", "7.jpg"):
            (folder / row["image"]).write_bytes(png(k % 200))
    (folder / "9.jpg").write_bytes(b"")


def pairs_of(out: Path) -> pa.Table:
    """Pairs with times in microseconds."""
    table = pq.read_table(out / "pairs")
    return table.set_column(table.column_names.index("ts"), "ts", table["ts"].cast(pa.int64()))


@pytest.mark.parametrize("form", ["path", "bytes"])
def test_pairs_are_those_of_a_naive_loop(tmp_path, form):
    log = make_log()
    for row in log.events["image_search"]:
        row["image"] = f"search-{row['request']}.jpg"
    images_of(log, tmp_path / "images")
    mapping = write_log(log, tmp_path / "raw", images=tmp_path / "images")
    if form == "bytes":
        for file in [
            *(tmp_path / "raw" / "searches").rglob("*.parquet"),
            tmp_path / "raw" / "catalog.parquet",
        ]:
            table = pq.read_table(file, partitioning=None)
            read = [(tmp_path / "images" / name) for name in table["image"].to_pylist()]
            data = pa.array([path.read_bytes() if path.exists() else None for path in read], pa.binary())
            pq.write_table(table.set_column(table.column_names.index("image"), "image", data), file)
    options = config(mapping, tmp_path / "out")
    report = prepare(options)
    split = json.loads((tmp_path / "out" / "manifest.json").read_text())["split"]
    before = int(np.datetime64(split["validation_from"].rstrip("Z"), "us").astype(np.int64))
    expected = naive_pairs(log, options, before)
    table = pairs_of(tmp_path / "out")
    found = {(row["query_id"], row["item_id"], row["signal"]): row for row in table.to_pylist()}
    assert len(expected) > 10 and len(found) == len(table)
    assert {key: row["ts"] for key, row in found.items()} == expected
    for (query, _, _), row in found.items():
        assert row["query_image"] == (tmp_path / "images" / f"search-{query}.jpg").read_bytes()
    items = {row["item_id"]: row for row in pq.read_table(tmp_path / "out" / "items").to_pylist()}
    assert len(items) == 30 and report["items"]["without_image"] == 3
    for item, row in items.items():
        expected_image = None if item in (5, 7, 9) else (tmp_path / "images" / f"{item}.jpg").read_bytes()
        assert row["image"] == expected_image
    assert items[1]["title"] == "item 1" and items[10]["category"] == ""


def test_hard_negatives_of_the_category_are_listed_others(tmp_path):
    log = make_log()
    for row in log.catalog:
        row["listed_at"] = START + row["item"] * 700 * SECOND
    for row in log.events["image_search"]:
        row["image"] = f"search-{row['request']}.jpg"
    images_of(log, tmp_path / "images")
    mapping = write_log(log, tmp_path / "raw", images=tmp_path / "images")
    prepare(config(mapping, tmp_path / "sold"))
    prepare(config(mapping, tmp_path / "category", hard_negatives="category"))
    sold = pairs_of(tmp_path / "sold")
    assert sold["hard_negative_item_id"].null_count == len(sold)
    items = {row["item"]: row for row in log.catalog}
    drawn = set()
    for row in pairs_of(tmp_path / "category").to_pylist():
        possible = {
            item for item, one in items.items()
            if item != row["item_id"] and one["listed_at"] < row["ts"]
            and (one["category"] or "") == (items[row["item_id"]]["category"] or "")
        }  # fmt: skip
        negative = row["hard_negative_item_id"]
        assert (negative in possible) if possible else negative is None
        drawn.add(negative)
    assert len(drawn) > 8
    dataset = Dataset(tmp_path / "sold")
    store = ItemStore.open(dataset, tmp_path / "cache")
    assert len(PairDataset(dataset.pairs(), store, signal="purchase")) > 5
