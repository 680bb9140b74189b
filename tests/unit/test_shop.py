"""The synthetic shop: its tables obey the schema's rules of time, and its truth is the truth."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.images import decode_image
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.data.shop import DAY, START, ShopConfig, main, make_catalog, make_crowd, make_shop
from mim_torchrec.data.shop_log import SECOND_TASTE
from mim_torchrec.errors import OptionError, OutputExists
from tests.datasets import Rows

SIZES = {"items": 300, "users": 60, "requests": 400, "searches": 50, "browsing": 600, "categories": 4,
         "days": 10, "image_size": 16, "max_behaviors": 8}  # fmt: skip
FOLDERS = ("items", "pairs", *(f"{kind}/{split}" for kind in ("requests", "truth") for split in SPLITS))


def config(out: Path, **changes) -> ShopConfig:
    return ShopConfig(out=out, **(SIZES | changes))


def made(out: Path, **changes) -> Dataset:
    make_shop(config(out, **changes))
    return Dataset(out)


def table(dataset: Dataset, folder: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((dataset.root / folder).glob("*.parquet")))


def rows_of(dataset: Dataset, folder: str) -> Rows:
    """With times in microseconds."""
    found = table(dataset, folder)
    for k, name in enumerate(found.column_names):
        if name in ("ts", "listed_at"):
            found = found.set_column(k, name, found[name].cast(pa.int64()))
        if name == "behavior_ts":
            found = found.set_column(k, name, found[name].cast(pa.list_(pa.int64())))
    return found.to_pylist()


def of_all_splits(dataset: Dataset, kind: str) -> Rows:
    return [row for split in SPLITS for row in rows_of(dataset, f"{kind}/{split}")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    out = tmp_path_factory.mktemp("shop") / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    main(["--out", str(out), *options])
    return Dataset(out)


@pytest.fixture(scope="module")
def control(tmp_path_factory) -> Dataset:
    """The shop whose users do not care for style."""
    return made(tmp_path_factory.mktemp("control") / "out", style_weight=0.0)


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory) -> Dataset:
    return made(tmp_path_factory.mktemp("other") / "out", seed=1)


@pytest.fixture(scope="module")
def requests(dataset) -> Rows:
    return of_all_splits(dataset, "requests")


@pytest.fixture(scope="module")
def truth(dataset) -> Rows:
    return of_all_splits(dataset, "truth")


@pytest.fixture(scope="module")
def listed_at(dataset) -> dict[int, int]:
    return {row["item_id"]: row["listed_at"] for row in rows_of(dataset, "items")}


def test_equal_seeds_give_equal_tables(dataset, tmp_path):
    again = made(tmp_path / "again")
    for folder in FOLDERS:
        assert table(again, folder).equals(table(dataset, folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_another_seed_gives_other_tables(dataset, other_seed, folder):
    assert not table(other_seed, folder).equals(table(dataset, folder))


def test_there_is_as_much_of_everything_as_asked_for(dataset, requests, truth):
    assert len(table(dataset, "items")) == SIZES["items"]
    assert len(table(dataset, "pairs")) == 2 * SIZES["searches"]
    assert [len(table(dataset, f"requests/{split}")) for split in SPLITS] == [320, 40, 40]
    assert len(requests) == len(truth) == SIZES["requests"]
    assert {len(row["candidate_item_ids"]) for row in requests} == {5}
    assert len({row["category"] for row in rows_of(dataset, "items")}) == SIZES["categories"]


def test_the_description_names_the_settings_and_counts(dataset):
    described = json.loads((dataset.root / "dataset.json").read_text())
    settings = asdict(config(dataset.root))
    del settings["out"], settings["raw"]
    assert described["source"] == {"command": "mim shop", **settings}
    assert described["counts"] == {folder: len(table(dataset, folder)) for folder in FOLDERS}


def test_readers_accept_all_of_it(dataset, tmp_path):
    items = ItemStore.open(dataset, tmp_path)
    assert len(PairDataset(dataset.pairs(), items)) == 2 * SIZES["searches"]
    for split in SPLITS:
        reader = RequestReader(dataset.requests(split), batch_size=50)
        batches = list(reader)
        assert sum(batch.num_requests for batch in batches) == reader.num_requests
        for batch in batches:
            for role in ("candidate", "behavior"):
                items.rows_of(batch.sparse[f"{role}_item_id"].values().numpy())


def test_images_have_the_size_asked_for(dataset):
    (item, *_), (pair, *_) = rows_of(dataset, "items"), rows_of(dataset, "pairs")
    for data in (item["image"], pair["query_image"]):
        assert decode_image(data).size == (SIZES["image_size"], SIZES["image_size"])


def test_behaviors_are_in_order_and_strictly_before_their_request(requests):
    assert sum(len(row["behavior_ts"]) for row in requests) > 100
    for row in requests:
        assert row["behavior_ts"] == sorted(row["behavior_ts"])
        assert all(ts < row["ts"] for ts in row["behavior_ts"])


def test_histories_are_as_long_as_allowed_at_most(requests):
    assert max(len(row["behavior_item_ids"]) for row in requests) == SIZES["max_behaviors"]


def test_requests_are_within_the_days_of_the_log(requests):
    assert all(START <= row["ts"] < START + SIZES["days"] * DAY for row in requests)


def test_splits_follow_each_other_in_time(dataset):
    times = [[row["ts"] for row in rows_of(dataset, f"requests/{split}")] for split in SPLITS]
    assert all(part == sorted(part) for part in times)
    assert times[0][-1] < times[1][0] and times[1][-1] < times[2][0]


def test_no_request_is_in_two_splits(requests):
    assert len({row["request_id"] for row in requests}) == len(requests)


def test_pairs_lie_before_the_first_validation_request(dataset):
    first = rows_of(dataset, "requests/validation")[0]["ts"]
    assert max(row["ts"] for row in rows_of(dataset, "pairs")) < first


def test_a_search_is_a_purchase_and_a_click_of_one_query_with_different_items(dataset):
    pairs = rows_of(dataset, "pairs")
    for purchase, click in zip(pairs[::2], pairs[1::2], strict=True):
        assert (purchase["signal"], click["signal"]) == ("purchase", "click")
        assert purchase["item_id"] != click["item_id"]
        for name in ("query_id", "query_image", "ts"):
            assert purchase[name] == click[name]


def test_items_are_listed_in_the_time_of_every_split(dataset, listed_at):
    for split in SPLITS:
        times = [row["ts"] for row in rows_of(dataset, f"requests/{split}")]
        assert any(times[0] < listed < times[-1] for listed in listed_at.values())


def test_a_third_of_the_items_is_listed_before_the_start(listed_at):
    assert sum(listed < START for listed in listed_at.values()) == SIZES["items"] // 3


def test_candidates_are_listed_before_their_request(requests, listed_at):
    for row in requests:
        assert all(listed_at[item] < row["ts"] for item in row["candidate_item_ids"])


def test_behaviors_are_with_items_listed_before_them(requests, listed_at):
    for row in requests:
        behaviors = zip(row["behavior_item_ids"], row["behavior_ts"], strict=True)
        assert all(listed_at[item] < ts for item, ts in behaviors)


def test_pairs_are_of_items_listed_before_the_search(dataset, listed_at):
    assert all(listed_at[row["item_id"]] < row["ts"] for row in rows_of(dataset, "pairs"))


def test_items_listed_in_test_time_are_shown_there(dataset, listed_at):
    shown = rows_of(dataset, "requests/test")
    late = [item for row in shown for item in row["candidate_item_ids"] if listed_at[item] > shown[0]["ts"]]
    assert late


def test_candidates_of_a_request_are_distinct(requests):
    assert all(len(set(row["candidate_item_ids"])) == 5 for row in requests)


def test_categories_are_those_of_the_items(dataset, requests):
    category = {row["item_id"]: row["category"] for row in rows_of(dataset, "items")}
    for row in requests:
        for role in ("candidate", "behavior"):
            found = [category[item] for item in row[f"{role}_item_ids"]]
            expected = row["candidate_categories" if role == "candidate" else "behavior_categories"]
            assert found == expected


def test_the_truth_is_aligned_with_the_candidates(requests, truth):
    assert [row["request_id"] for row in truth] == [row["request_id"] for row in requests]
    for row, true in zip(requests, truth, strict=True):
        assert len(true["click_probability"]) == len(row["candidate_item_ids"])
        assert all(0 < p < 1 for p in true["click_probability"])


def flat(rows: Rows, column: str) -> np.ndarray:
    return np.array([value for row in rows for value in row[column]], np.float64)


def test_the_truth_is_calibrated(requests, truth):
    labels, probability = flat(requests, "labels"), flat(truth, "click_probability")
    error = np.sqrt((probability * (1 - probability)).sum()) / len(labels)
    assert abs(labels.mean() - probability.mean()) < 4 * error


@pytest.mark.parametrize("likely", [True, False])
def test_the_truth_is_calibrated_of_the_likely_and_the_unlikely(requests, truth, likely):
    labels, probability = flat(requests, "labels"), flat(truth, "click_probability")
    chosen = (probability > np.median(probability)) == likely
    labels, probability = labels[chosen], probability[chosen]
    error = np.sqrt((probability * (1 - probability)).sum()) / len(labels)
    assert abs(labels.mean() - probability.mean()) < 4 * error


def test_clicks_are_in_later_histories_of_their_user(requests):
    """Up to a minute later, when the click was, and within what a history keeps."""
    checked = 0
    for k, row in enumerate(requests):
        clicked = [i for i, y in zip(row["candidate_item_ids"], row["labels"], strict=True) if y]
        later = [r for r in requests[k + 1 :] if r["user_id"] == row["user_id"]]
        later = [r for r in later if r["ts"] > row["ts"] + 60_000_000]
        later = [r for r in later if not r["behavior_ts"] or r["behavior_ts"][0] < row["ts"]][:1]
        for after in later:
            assert set(clicked) <= set(after["behavior_item_ids"])
            checked += len(clicked)
    assert checked > 20


def dependence_on_style(dataset: Dataset, **changes) -> float:
    """Correlation of the true logit with how well the item's style matches the user's tastes."""
    settings = config(dataset.root, **changes)
    catalog, crowd = make_catalog(settings), make_crowd(settings)
    item_at = {item: k for k, item in enumerate(catalog.ids.tolist())}
    user_at = {user: k for k, user in enumerate(crowd.ids.tolist())}
    match = []
    for row in of_all_splits(dataset, "requests"):
        first, second = crowd.tastes[user_at[row["user_id"]]]
        for item in row["candidate_item_ids"]:
            style = catalog.style[item_at[item]]
            style = style / np.linalg.norm(style)
            match.append(max(style @ first, style @ second - SECOND_TASTE))
    probability = flat(of_all_splits(dataset, "truth"), "click_probability")
    return float(np.corrcoef(match, np.log(probability / (1 - probability)))[0, 1])


def test_clicks_depend_on_style(dataset):
    assert dependence_on_style(dataset) > 0.7


def test_without_style_weight_clicks_do_not_depend_on_style(control):
    assert abs(dependence_on_style(control, style_weight=0.0)) < 0.1


@pytest.mark.parametrize("folder", ["items", "pairs"])
def test_without_style_weight_there_are_the_very_same_items_and_pairs(dataset, control, folder):
    assert table(control, folder).equals(table(dataset, folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"users": 0},
        {"requests": 9},
        {"searches": 0},
        {"categories": 0},
        {"days": 0},
        {"items": 100},
        {"candidates": 0},
        {"candidates": 10_000},
        {"max_behaviors": 0},
        {"image_size": 0},
        {"browsing": -1},
        {"seed": -1},
    ],
    ids=str,
)
def test_too_small_a_shop_is_refused_and_leaves_nothing_behind(tmp_path, changes):
    with pytest.raises(OptionError, match="it must be at least|too few"):
        make_shop(config(tmp_path / "out", **changes))
    assert not list(tmp_path.iterdir())


def test_ten_requests_make_a_shop(tmp_path):
    dataset = made(tmp_path / "out", requests=10, browsing=0)
    assert [len(table(dataset, f"requests/{split}")) for split in SPLITS] == [8, 1, 1]


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists, match="out exists"):
        make_shop(config(tmp_path / "out"))


def test_names_of_categories_stay_distinct_beyond_the_nouns(tmp_path):
    dataset = made(tmp_path / "out", categories=45, items=600)
    names = {row["category"] for row in rows_of(dataset, "items")}
    assert len(names) == 45
