"""The synthetic shop: the same from the same seed, and as its description says."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.data.shop import ShopConfig, main, make_catalog, make_crowd, make_shop, requests_table

SMALL = {
    "items": 400, "users": 80, "requests": 600, "searches": 60, "browsing": 2000, "categories": 4, "days": 10,
    "image_size": 16,
}  # fmt: skip
DEFAULTS = {"candidates": 5, "max_behaviors": 50, "style_weight": 1.0, "seed": 0}


def read(root, folder):
    return pa.concat_tables(pq.read_table(file) for file in sorted((root / folder).glob("*.parquet")))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    out = tmp_path_factory.mktemp("shop") / "shop"
    main([word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
         + ["--out", str(out)])  # fmt: skip
    return out


def test_equal_seeds_give_equal_tables(shop, tmp_path):
    make_shop(ShopConfig(out=tmp_path / "again", **SMALL))
    make_shop(ShopConfig(out=tmp_path / "other", seed=1, **SMALL))
    for folder in ("items", "pairs", "requests/train", "truth/test"):
        assert read(shop, folder).equals(read(tmp_path / "again", folder))
        assert not read(shop, folder).equals(read(tmp_path / "other", folder))


def test_the_data_set_says_what_made_it_and_how_much_there_is(shop):
    description = json.loads((shop / "dataset.json").read_text())
    assert description["source"] == {"command": "mim shop", **DEFAULTS, **SMALL}
    assert description["counts"]["items"] == 400 and description["counts"]["requests/train"] == 480


def test_its_requests_pass_every_check_of_the_reader(shop):
    for split in SPLITS:
        assert sum(b.num_requests for b in RequestReader(Dataset(shop).requests(split), batch_size=64)) in (
            480,
            60,
        )


def test_splits_follow_one_another_in_time(shop):
    times = [read(shop, f"requests/{split}")["ts"].to_numpy() for split in SPLITS]
    assert times[0].max() <= times[1].min() and times[1].max() <= times[2].min()


def test_searches_are_in_training_time_a_purchase_and_a_click_each(shop):
    pairs = read(shop, "pairs")
    assert pairs["signal"].to_pylist() == ["purchase", "click"] * 60
    assert pairs["ts"].to_numpy().max() < read(shop, "requests/validation")["ts"].to_numpy().min()


def test_items_are_listed_before_they_are_shown_and_some_late(shop):
    items = read(shop, "items")
    listed = dict(zip(items["item_id"].to_pylist(), items["listed_at"].to_numpy(), strict=True))
    for split in SPLITS:
        requests = read(shop, f"requests/{split}")
        for ts, shown in zip(
            requests["ts"].to_numpy(), requests["candidate_item_ids"].to_pylist(), strict=True
        ):
            assert all(listed[item] <= ts for item in shown)
    start = read(shop, "requests/test")["ts"].to_numpy().min()
    shown = {i for row in read(shop, "requests/test")["candidate_item_ids"].to_pylist() for i in row}
    assert any(listed[item] >= start for item in shown)


def test_labels_are_drawn_from_the_true_probabilities(shop):
    truth, requests = read(shop, "truth/train"), read(shop, "requests/train")
    assert truth["request_id"].equals(requests["request_id"])
    p = np.concatenate(truth["click_probability"].to_pylist())
    labels = np.concatenate(requests["labels"].to_pylist())
    assert len(p) == len(labels)
    error = np.sqrt((p * (1 - p)).sum()) / len(p)
    assert abs(labels.mean() - p.mean()) < 4 * error
    assert labels[p > 0.5].mean() > labels[p < 0.2].mean()


def _match(config):
    """Of everything shown: how well its style fits the user's tastes, and the true click probability."""
    catalog, crowd = make_catalog(config), make_crowd(config)
    requests, truth = requests_table(config, catalog, crowd)
    item_at = {item: k for k, item in enumerate(catalog.ids.tolist())}
    user_at = {user: k for k, user in enumerate(crowd.ids.tolist())}
    match = [
        (crowd.tastes[user_at[user]] @ catalog.style[item_at[item]]).max()
        for user, shown in zip(requests["user_id"].to_pylist(), requests["candidate_item_ids"].to_pylist(),
                               strict=True)
        for item in shown
    ]  # fmt: skip
    return np.array(match), np.concatenate(truth["click_probability"].to_pylist())


def test_users_click_what_fits_their_taste_unless_they_do_not_care(tmp_path):
    config = ShopConfig(out=tmp_path / "x", **SMALL)
    caring, careless = (np.corrcoef(*_match(replace(config, style_weight=w)))[0, 1] for w in (1.0, 0.0))
    assert caring > 0.5 and abs(careless) < 0.1


def test_those_who_do_not_care_are_shown_the_same_items(shop, tmp_path):
    make_shop(ShopConfig(out=tmp_path / "careless", style_weight=0.0, **SMALL))
    assert read(shop, "items").equals(read(tmp_path / "careless", "items"))


def test_too_small_a_shop_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 10 requests"):
        make_shop(ShopConfig(out=tmp_path / "x", **SMALL | {"requests": 9}))
    with pytest.raises(ValueError, match="too few for 5 candidates"):
        make_shop(ShopConfig(out=tmp_path / "x", **SMALL | {"items": 30}))
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_there_is_refused(shop):
    with pytest.raises(DataError, match="exists; choose another"):
        make_shop(ShopConfig(out=shop, **SMALL))
