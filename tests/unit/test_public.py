"""Public data sets in the layouts of their publishers, generated here, become requests among negatives."""

import datetime as dt
import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mim_torchrec.data import public
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.public import main
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import SPLITS, Dataset

USERS, ITEMS, PER_USER = 12, 30, 12
WITHOUT_IMAGE = 7
START = dt.datetime(2020, 1, 1)
Taken = list[tuple[str, int, int]]
"""User, number of an item, and of a day."""


def taken() -> Taken:
    rng = np.random.default_rng(0)
    return [
        (f"user-{user}", int(item), int(day))
        for user in range(USERS)
        for item, day in zip(rng.permutation(ITEMS)[:PER_USER], rng.integers(100, size=PER_USER), strict=True)
    ]


def write_image(path: Path, color: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())


def write_csv(path: Path, header: str, rows: list) -> None:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def hm_key(item: int) -> str:
    return f"0{108_000_000 + item:09d}"


def write_hm(folder: Path, rows: Taken) -> None:
    """As Kaggle unpacks it: all columns of the two tables, articles with their leading zero."""
    sales = [
        ((START + dt.timedelta(days=day)).date(), hashlib.sha256(user.encode()).hexdigest(), hm_key(item),
         0.05, 2)
        for user, item, day in rows
    ]  # fmt: skip
    header = "t_dat,customer_id,article_id,price,sales_channel_id"
    write_csv(folder / "transactions_train.csv", header, sales)
    header = ("article_id,product_code,prod_name,product_type_no,product_type_name,product_group_name,"
              "colour_group_name,detail_desc")  # fmt: skip
    articles = [
        (hm_key(k), 108, f'"Strap, top {k}"', 253, "Vest top", f"Group {k % 3}", "Black", '"Soft,\nthin"')
        for k in range(ITEMS)
    ]
    write_csv(folder / "articles.csv", header, articles)
    for k in range(ITEMS):
        if k != WITHOUT_IMAGE:
            write_image(folder / "images" / "010" / f"{hm_key(k)}.jpg", k)


def write_microlens(folder: Path, rows: Taken) -> None:
    stamped = [(user.split("-")[1], item, milliseconds(day)) for user, item, day in rows]
    write_csv(folder / "MicroLens-50k_pairs.csv", "user,item,timestamp", stamped)
    write_csv(
        folder / "MicroLens-50k_titles.csv", "item,title", [(k, f'"A clip, {k}"') for k in range(ITEMS)]
    )
    for k in range(ITEMS):
        if k != WITHOUT_IMAGE:
            write_image(folder / "MicroLens-50k_covers" / f"{k}.jpg", k)


def write_amazon(folder: Path, rows: Taken) -> None:
    """A low rating of an item by everybody keeps it out of the negatives and is no positive."""
    rated = [(f"AE{user}", f"B00{item:07d}", 5.0, milliseconds(day)) for user, item, day in rows]
    rated += [(f"AEuser-{user}", "B00LOW", 2.0, milliseconds(1)) for user in range(USERS)]
    write_csv(folder / "All_Beauty.csv", "user_id,parent_asin,rating,timestamp", rated)
    about = [
        {
            "main_category": "All Beauty" if k % 2 else None,
            "title": f"Cream {k}",
            "parent_asin": f"B00{k:07d}",
            "images": [{"large": "https://example.org/a.jpg", "variant": "MAIN"}],
            "price": None,
        }
        for k in range(ITEMS)
    ]
    about.append({"parent_asin": "B00LOW", "title": "Bad cream", "main_category": "All Beauty"})
    with gzip.open(folder / "meta_All_Beauty.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(one) + "\n" for one in about)
    for one in about:
        if one["parent_asin"] != f"B00{WITHOUT_IMAGE:07d}":
            write_image(folder / "images" / f"{one['parent_asin']}.jpg", 3)


def milliseconds(day: int) -> int:
    return int((START + dt.timedelta(days=day)).replace(tzinfo=dt.UTC).timestamp() * 1000)


LAYOUTS = {"hm": write_hm, "microlens": write_microlens, "amazon-reviews-2023": write_amazon}
KEYS = {"hm": hm_key, "microlens": str, "amazon-reviews-2023": lambda k: f"B00{k:07d}"}


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request, tmp_path_factory) -> tuple[str, Path, Dataset]:
    folder = tmp_path_factory.mktemp("public")
    (folder / "source").mkdir()
    LAYOUTS[request.param](folder / "source", taken())
    main(["--layout", request.param, "--source", str(folder / "source"), "--out", str(folder / "out")])
    return request.param, folder, Dataset(folder / "out")


def rows_of(dataset: Dataset) -> dict[str, list[dict]]:
    return {split: pq.read_table(dataset.requests(split)).to_pylist() for split in SPLITS}


def ids_of(layout: str) -> dict[int, int]:
    """Number of an item by its id in the data set."""
    made = stable_ids(pa.array([KEYS[layout](k) for k in range(ITEMS)]))
    return {item: k for k, item in enumerate(made.to_pylist())}


def test_every_positive_is_a_request_with_the_strictly_earlier_ones_as_history(made):
    layout, _, dataset = made
    number, rows = ids_of(layout), [row for part in rows_of(dataset).values() for row in part]
    kept = [one for one in taken() if one[1] != WITHOUT_IMAGE]
    assert len(rows) == len(kept) == len({row["request_id"] for row in rows})
    by_user: dict[int, list[tuple[int, dt.datetime]]] = {}
    for row in rows:
        clicked = row["candidate_item_ids"][row["labels"].index(1)]
        assert sum(row["labels"]) == 1 and len(row["labels"]) == 5
        by_user.setdefault(row["user_id"], []).append((number[clicked], row["ts"]))
    expected: dict[str, list] = {}
    for user, item, day in kept:
        expected.setdefault(user, []).append((item, START + dt.timedelta(days=day)))
    assert sorted(map(sorted, by_user.values())) == sorted(map(sorted, expected.values()))
    for row in rows:
        took = by_user[row["user_id"]]
        earlier = sorted(item for item, ts in took if ts < row["ts"])
        assert sorted(number[item] for item in row["behavior_item_ids"]) == earlier
        shown = [
            item for item, label in zip(row["candidate_item_ids"], row["labels"], strict=True) if not label
        ]
        assert len(set(shown)) == 4
        assert not {number[item] for item in shown} & {item for item, _ in took}


def test_parts_follow_each_other_in_time_and_are_80_10_10_percent(made):
    parts = rows_of(made[2])
    times = {name: [row["ts"] for row in rows] for name, rows in parts.items()}
    assert max(times["train"]) < min(times["validation"]) and max(times["validation"]) < min(times["test"])
    total = sum(map(len, parts.values()))
    assert len(parts["train"]) == pytest.approx(0.8 * total, abs=4)


def test_items_have_titles_images_and_categories_where_there_are_any(made, tmp_path):
    layout, folder, dataset = made
    items = ItemStore.open(dataset, tmp_path)
    number = {item: k for item, k in ids_of(layout).items() if k != WITHOUT_IMAGE}
    known = items.item_ids[np.isin(items.item_ids, list(number))]
    assert len(known) == ITEMS - 1
    titles = dict(zip(known.tolist(), items.titles(items.rows_of(known)), strict=True))
    words = {
        "hm": "Strap, top {} Vest top Black",
        "microlens": "A clip, {}",
        "amazon-reviews-2023": "Cream {}",
    }
    assert titles == {item: words[layout].format(k) for item, k in number.items()}
    assert items.images(np.arange(2))[0].size == (4, 4)
    described = json.loads((folder / "out" / "dataset.json").read_text())
    assert described["items_without_title_or_image"] == 1
    if layout != "microlens":
        categories = set(items.categories(np.arange(len(items))))
        assert categories == (
            {f"Group {k}" for k in range(3)} if layout == "hm" else {"All Beauty", "unknown"}
        )


def test_what_was_made_is_read_by_the_trainer(made):
    batches = list(RequestReader(made[2].requests("train"), batch_size=64))
    assert sum(int(batch.labels.sum()) for batch in batches) > 90


def test_a_low_rating_is_no_positive_and_no_negative_of_who_gave_it(made):
    layout, _, dataset = made
    if layout == "amazon-reviews-2023":
        (low,) = stable_ids(pa.array(["B00LOW"])).to_pylist()
        for rows in rows_of(dataset).values():
            assert not any(low in row["candidate_item_ids"] for row in rows)


def test_users_in_blocks_give_the_same_positives(made, tmp_path, monkeypatch):
    layout, folder, dataset = made
    monkeypatch.setattr(public, "TOGETHER", 30)
    main(["--layout", layout, "--source", str(folder / "source"), "--out", str(tmp_path / "out")])

    def positives(of: Dataset) -> dict[str, list]:
        return {
            name: sorted((row["user_id"], row["ts"], row["candidate_item_ids"][row["labels"].index(1)],
                          tuple(row["behavior_item_ids"])) for row in rows)
            for name, rows in rows_of(of).items()
        }  # fmt: skip

    assert positives(Dataset(tmp_path / "out")) == positives(dataset)


def test_checksums_are_recorded_and_compared(made, tmp_path):
    layout, folder, _ = made
    recorded = json.loads((folder / "out" / "dataset.json").read_text())["source"]["sha256"]
    for name, digest in recorded.items():
        assert hashlib.sha256((folder / "source" / name).read_bytes()).hexdigest() == digest
    words = ["--layout", layout, "--source", str(folder / "source"), "--out", str(tmp_path / "out"),
             "--checksums", str(tmp_path / "sums")]  # fmt: skip
    lines = [f"{digest}  ./{name}" for name, digest in recorded.items()]
    (tmp_path / "sums").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(DataError, match="has no sum in"):
        main(words)
    (tmp_path / "sums").write_text("\n".join([lines[0].replace(lines[0][:8], "0" * 8), *lines[1:]]))
    with pytest.raises(DataError, match="expected 00000000.*download it again"):
        main(words)
    assert not (tmp_path / "out").exists()
    (tmp_path / "sums").write_text("\n".join(lines) + "\n")
    main(words)
    assert (tmp_path / "out" / "dataset.json").is_file()


def test_what_is_missing_is_named(tmp_path):
    write_hm(tmp_path, taken())
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match=r"expected one \*_pairs.csv, found none"):
        main(["--layout", "microlens", "--source", str(tmp_path), *out])
    text = (tmp_path / "transactions_train.csv").read_text().splitlines()
    text[3] = ",".join(["2020-01-02", "", *text[3].split(",")[2:]])
    (tmp_path / "transactions_train.csv").write_text("\n".join(text) + "\n")
    with pytest.raises(DataError, match="row 2, column customer_id: is empty"):
        main(["--layout", "hm", "--source", str(tmp_path), *out])
    assert not (tmp_path / "out").exists()
