"""Pairs for C-SFT: which are read, which picture is the query, which item the hard negative."""

import pytest

from mim_torchrec.data.errors import DataError
from mim_torchrec.data.pairs import PairDataset
from tests.datasets import item, open_items, pair, png, write_items, write_pairs

IDS = [item(k)["item_id"] for k in range(12)]  # item k is of category k % 3


@pytest.fixture
def items(tmp_path):
    write_items(tmp_path, [item(k) for k in range(12)])
    return open_items(tmp_path)


def read(tmp_path, items, rows, **options):
    without = options.pop("without", [])
    return PairDataset([write_pairs(tmp_path / "p.parquet", rows, without=without)], items, **options)


def drawn(pairs, index, epochs=40):
    found = []
    for epoch in range(epochs):
        pairs.set_epoch(epoch)
        found.append(pairs.hard_negative(index))
    return found


def test_pairs_of_one_signal_can_be_chosen(tmp_path, items):
    rows = [pair(k, IDS[k], signal=("purchase", "click")[k % 2]) for k in range(6)]
    clicks = read(tmp_path, items, rows, signal="click")
    assert clicks.item_ids.tolist() == [IDS[1], IDS[3], IDS[5]]
    assert [clicks[k]["query_image"] for k in range(3)] == [png(1), png(3), png(5)]


def test_a_signal_that_no_pair_has_is_refused(tmp_path, items):
    with pytest.raises(DataError, match="no pair with signal 'click'"):
        read(tmp_path, items, [pair(0, IDS[0])], signal="click")
    with pytest.raises(DataError, match="column signal: the column is missing"):
        read(tmp_path, items, [pair(0, IDS[0])], signal="click", without=["signal"])


def test_without_a_picture_the_query_is_the_item_of_that_id(tmp_path, items):
    pairs = read(tmp_path, items, [pair(5, IDS[0]), pair(IDS[4], IDS[1], query_image=None)])
    assert pairs.query_is_item.tolist() == [False, True]
    assert pairs.query_image(0) == png(5)
    assert pairs.query_image(1) == item(4)["image"]
    assert str(pairs.query_location(1)) == str(items.location(items.rows_of([IDS[4]])[0], "image"))


def test_without_the_column_of_pictures_every_query_is_an_item(tmp_path, items):
    pairs = read(tmp_path, items, [pair(IDS[4], IDS[1])], without=["query_image"])
    assert pairs.query_image(0) == item(4)["image"]


def test_a_logged_hard_negative_is_kept(tmp_path, items):
    pairs = read(tmp_path, items, [pair(0, IDS[0], hard_negative_item_id=IDS[7]), pair(1, IDS[1])])
    assert set(drawn(pairs, 0)) == {IDS[7]}


def test_a_hard_negative_is_drawn_from_what_other_pairs_of_the_category_bought(tmp_path, items):
    rows = [pair(k, IDS[k]) for k in (0, 3, 6, 1, 2)]  # 0, 3, 6 are of one category, as 9 is
    assert set(drawn(read(tmp_path, items, rows), 0)) == {IDS[3], IDS[6]}


def test_the_query_item_is_no_hard_negative(tmp_path, items):
    rows = [pair(IDS[3], IDS[0], query_image=None), pair(1, IDS[3]), pair(2, IDS[6])]
    assert set(drawn(read(tmp_path, items, rows), 0)) == {IDS[6]}


def test_where_a_category_has_no_other_the_hard_negative_is_of_any(tmp_path, items):
    rows = [pair(0, IDS[0]), pair(1, IDS[1]), pair(2, IDS[2])]
    assert set(drawn(read(tmp_path, items, rows), 0)) == {IDS[1], IDS[2]}


def test_where_all_pairs_have_one_item_the_hard_negative_is_any_item(tmp_path, items):
    found = set(drawn(read(tmp_path, items, [pair(0, IDS[0]), pair(1, IDS[0])]), 0, epochs=200))
    assert found == set(IDS[1:])


def test_draws_are_those_of_seed_epoch_and_index(tmp_path, items):
    rows = [pair(k, IDS[k]) for k in range(12)]
    first, again = read(tmp_path, items, rows), read(tmp_path, items, rows)
    other = read(tmp_path, items, rows, seed=1)
    assert drawn(first, 2) == drawn(again, 2)
    assert drawn(first, 2) != drawn(other, 2)
    assert len(set(drawn(first, 2))) == 3  # of the category, without the positive


def test_too_few_items_are_refused(tmp_path):
    write_items(tmp_path, [item(0), item(1)])
    with pytest.raises(DataError, match="2 items are too few"):
        read(tmp_path, open_items(tmp_path), [pair(0, IDS[0])])
