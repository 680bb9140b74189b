"""PairDataset: queries with their images, what was bought or clicked, and a hard negative each."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_torchrec.data.errors import DataError, Location
from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.schema import ITEMS, PAIRS, Dataset
from tests.datasets import (
    CATEGORIES,
    Rows,
    item_rows,
    open_items,
    pair_rows,
    png,
    without,
    write_pairs,
    write_rows,
)

EPOCHS = 80


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> ItemStore:
    """Items 100 to 109: lamps 100, 103, 106, 109; rugs 101, 104, 107; vases 102, 105, 108."""
    return open_items(tmp_path_factory.mktemp("items"))


def pairs_of(folder: Path, items: ItemStore, rows: Rows | None = None, **options) -> PairDataset:
    return PairDataset([write_pairs(folder / "p.parquet", rows)], items, **options)


def bought(*item_ids: int, **changes) -> Rows:
    """A pair of every item given."""
    rows = pair_rows(len(item_ids))
    return [row | {"item_id": item} | changes for row, item in zip(rows, item_ids, strict=True)]


def drawn(pairs: PairDataset, index: int) -> set[int]:
    """Hard negatives of a pair over many epochs."""
    found = set()
    for epoch in range(EPOCHS):
        pairs.set_epoch(epoch)
        found.add(pairs.hard_negative(index))
    return found


def category(item_id: int) -> str:
    return CATEGORIES[(item_id - 100) % 3]


def test_entries_are_the_pairs_of_all_files_and_row_groups_in_order(tmp_path, items):
    rows = bought(100, 103, 106, 109, 100, 103, 106, 109, 100, hard_negative_item_id=101)
    files = [write_pairs(tmp_path / "0.parquet", rows[:6]), write_pairs(tmp_path / "1.parquet", rows[6:])]
    pairs = PairDataset(files, items)
    assert len(pairs) == len(rows)
    names = ("query_image", "query_id", "item_id", "hard_negative_item_id")
    assert [pairs[k] for k in range(len(pairs))] == [{name: row[name] for name in names} for row in rows]


def test_an_index_counts_from_the_end_when_negative(tmp_path, items):
    pairs = pairs_of(tmp_path, items)
    assert pairs[-1] == pairs[len(pairs) - 1]


def test_an_index_beyond_the_pairs_is_refused(tmp_path, items):
    pairs = pairs_of(tmp_path, items)
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def with_clicks() -> Rows:
    """Purchases and clicks in turn, but a second row group of purchases only."""
    rows = pair_rows(12)
    for k in (1, 3, 9, 11):
        rows[k]["signal"] = "click"
    return rows


@pytest.mark.parametrize("signal", ["purchase", "click"])
def test_a_signal_keeps_its_pairs_only(tmp_path, items, signal):
    pairs = pairs_of(tmp_path, items, with_clicks(), signal=signal)
    expected = [row for row in with_clicks() if row["signal"] == signal]
    assert pairs.query_ids.tolist() == [row["query_id"] for row in expected]
    assert pairs.item_ids.tolist() == [row["item_id"] for row in expected]
    assert [pairs.query_image(k) for k in range(len(pairs))] == [row["query_image"] for row in expected]


def test_without_a_signal_all_pairs_are_kept(tmp_path, items):
    assert len(pairs_of(tmp_path, items, with_clicks())) == 12


def test_hard_negatives_come_from_pairs_of_the_signal(tmp_path, items):
    rows = bought(100, 103, 106, 109)
    rows[3]["signal"] = "click"
    assert drawn(pairs_of(tmp_path, items, rows, signal="purchase"), 0) == {103, 106}


def test_no_pair_of_the_signal_is_refused(tmp_path, items):
    with pytest.raises(DataError, match=r"p\.parquet: no pair with signal 'click'"):
        pairs_of(tmp_path, items, signal="click")


def test_a_signal_cannot_be_told_without_its_column(tmp_path, items):
    with pytest.raises(DataError, match=r"p\.parquet, column signal: the column is missing"):
        pairs_of(tmp_path, items, without(pair_rows(), "signal"), signal="purchase")


def test_an_unknown_signal_is_refused(tmp_path, items):
    with pytest.raises(ValueError, match="'view' is not one of purchase, click"):
        pairs_of(tmp_path, items, signal="view")


def test_a_query_without_an_image_has_that_of_the_item_it_names(tmp_path, items):
    rows = pair_rows()
    rows[5] |= {"query_image": None, "query_id": 109}
    pairs = pairs_of(tmp_path, items, rows)
    assert pairs.query_is_item.tolist() == [k == 5 for k in range(len(rows))]
    assert [pairs.query_image(k) for k in (4, 5)] == [rows[4]["query_image"], png(9)]


def test_without_the_column_all_queries_are_items(tmp_path, items):
    rows = [row | {"query_id": 100 + k} for k, row in enumerate(without(pair_rows(), "query_image"))]
    pairs = pairs_of(tmp_path, items, rows)
    assert pairs.query_is_item.all()
    assert [pairs.query_image(k) for k in range(len(pairs))] == [png(k) for k in range(len(rows))]


def test_the_location_of_a_query_is_its_row_in_the_file(tmp_path, items):
    pairs = pairs_of(tmp_path, items, with_clicks(), signal="click")
    file = tmp_path / "p.parquet"
    places = [pairs.query_location(k) for k in range(len(pairs))]
    assert places == [Location(file, *place, "query_image") for place in ((0, 1), (0, 3), (2, 1), (2, 3))]


def test_the_location_of_a_query_that_is_an_item_is_the_items(tmp_path, items):
    rows = pair_rows()
    rows[5] |= {"query_image": None, "query_id": 109}
    row = int(items.rows_of(np.array(109)))
    assert pairs_of(tmp_path, items, rows).query_location(5) == items.location(row, "image")


@pytest.mark.parametrize("absent", [("hard_negative_item_id",), ("signal", "ts"), ("ts",)], ids="+".join)
def test_optional_columns_may_be_absent(tmp_path, items, absent):
    pairs = pairs_of(tmp_path, items, without(pair_rows(), *absent))
    assert pairs.item_ids.tolist() == [row["item_id"] for row in pair_rows()]


def test_logged_hard_negatives_are_kept(tmp_path, items):
    rows = pair_rows()
    rows[2]["hard_negative_item_id"] = 101
    rows[5]["hard_negative_item_id"] = 109
    pairs = pairs_of(tmp_path, items, rows)
    assert (drawn(pairs, 2), drawn(pairs, 5)) == ({101}, {109})


def test_hard_negatives_are_the_other_items_bought_in_the_category(tmp_path, items):
    rows = bought(100, 101, 102, 103, 104, 106, 100)
    pairs = pairs_of(tmp_path, items, rows)
    for index, row in enumerate(rows):
        others = {other["item_id"] for other in rows} - {row["item_id"]}
        same = {other for other in others if category(other) == category(row["item_id"])}
        assert drawn(pairs, index) == (same or others)


def test_what_is_bought_more_often_is_drawn_more_often(tmp_path, items):
    pairs = pairs_of(tmp_path, items, bought(100, 103, *[106] * 9))
    found = []
    for epoch in range(400):
        pairs.set_epoch(epoch)
        found.append(pairs.hard_negative(0))
    assert found.count(106) / len(found) == pytest.approx(0.9, abs=0.06)


def test_the_query_is_no_hard_negative_where_it_is_an_item(tmp_path, items):
    rows = bought(100, 103, 106, 109)
    rows[0] |= {"query_image": None, "query_id": 106}
    assert drawn(pairs_of(tmp_path, items, rows), 0) == {103, 109}


def test_the_id_of_a_query_with_an_image_excludes_no_item(tmp_path, items):
    rows = bought(100, 103, 106)
    rows[0]["query_id"] = 106
    assert drawn(pairs_of(tmp_path, items, rows), 0) == {103, 106}


def test_a_category_of_one_item_draws_from_other_categories(tmp_path, items):
    pairs = pairs_of(tmp_path, items, bought(100, 100, 101, 104))
    assert drawn(pairs, 0) == {101, 104}


def test_a_category_of_the_positive_and_the_query_draws_from_other_categories(tmp_path, items):
    rows = bought(100, 103, 101)
    rows[0] |= {"query_image": None, "query_id": 103}
    assert drawn(pairs_of(tmp_path, items, rows), 0) == {101}


def test_pairs_of_one_item_draw_from_all_items(tmp_path, items):
    assert drawn(pairs_of(tmp_path, items, bought(100, 100)), 0) == set(range(101, 110))


def test_items_without_categories_draw_from_all_that_is_bought(tmp_path):
    items = open_items(tmp_path, [row | {"category": None} for row in item_rows()])
    assert drawn(pairs_of(tmp_path, items, bought(100, 101, 102)), 0) == {101, 102}


def all_drawn(pairs: PairDataset, epoch: int) -> list[int]:
    pairs.set_epoch(epoch)
    return [pairs.hard_negative(k) for k in range(len(pairs))]


def test_a_hard_negative_depends_on_seed_epoch_and_index_only(tmp_path, items):
    first, again = (pairs_of(tmp_path, items, pair_rows(40), seed=3) for _ in range(2))
    expected = all_drawn(first, 2)
    again.set_epoch(2)
    backwards = [again.hard_negative(k) for k in reversed(range(40))]
    assert backwards[::-1] == expected


def test_another_epoch_or_seed_draws_others(tmp_path, items):
    pairs = pairs_of(tmp_path, items, pair_rows(40), seed=3)
    other = pairs_of(tmp_path, items, pair_rows(40), seed=4)
    draws = [all_drawn(pairs, 0), all_drawn(pairs, 1), all_drawn(other, 0)]
    assert len({tuple(draw) for draw in draws}) == 3


def test_equal_pairs_of_one_epoch_draw_for_themselves(tmp_path, items):
    pairs = pairs_of(tmp_path, items, bought(*[100] * 20, 103, 106, 109))
    assert set(all_drawn(pairs, 0)[:20]) == {103, 106, 109}


def test_fewer_than_three_items_are_refused(tmp_path):
    items = open_items(tmp_path, item_rows()[:2])
    ids = [row["item_id"] for row in item_rows()[:2]]
    with pytest.raises(DataError, match="2 items are too few to draw hard negatives from"):
        pairs_of(tmp_path, items, bought(*ids))


def test_three_items_are_enough(tmp_path):
    items = open_items(tmp_path, item_rows()[:3])
    positive, query, other = (row["item_id"] for row in item_rows()[:3])
    rows = bought(positive, query_image=None, query_id=query)
    assert drawn(pairs_of(tmp_path, items, rows), 0) == {other}


def test_hard_negatives_may_come_from_all_items_of_the_category(tmp_path, items):
    pairs = pairs_of(tmp_path, items, bought(100, 103, 101), negatives_from="items")
    assert drawn(pairs, 0) == {103, 106, 109}
    assert drawn(pairs, 2) == {104, 107}
    pairs.select(np.ones(3, bool), items.item_ids[items.item_ids != 106])
    assert drawn(pairs, 0) == {103, 109}


def test_narrower_ids_and_large_images_give_the_same_pairs(tmp_path, items):
    types = {"query_image": pa.large_binary(), "query_id": pa.int32(), "item_id": pa.int32(),
             "hard_negative_item_id": pa.int32()}  # fmt: skip
    schema = pa.schema([(field.name, types.get(field.name, field.type)) for field in PAIRS])
    other = PairDataset([write_rows(tmp_path / "other.parquet", pair_rows(), schema)], items)
    pairs = pairs_of(tmp_path, items)
    assert [other[k] for k in range(len(other))] == [pairs[k] for k in range(len(pairs))]


def test_pairs_and_items_may_have_ids_of_text(tmp_path):
    rows = [row | {"item_id": f"sku-{row['item_id']}"} for row in item_rows()]
    schema = pa.schema([pa.field("item_id", pa.string()) if f.name == "item_id" else f for f in ITEMS])
    write_rows(tmp_path / "items" / "i.parquet", rows, schema)
    items = ItemStore.open(Dataset(tmp_path), tmp_path / "cache")
    pairs = pair_rows()
    for row in pairs:
        row |= {"item_id": f"sku-{row['item_id']}", "query_id": f"q{row['query_id']}"}
    text = {"item_id", "query_id", "hard_negative_item_id"}
    schema = pa.schema([pa.field(f.name, pa.string()) if f.name in text else f for f in PAIRS])
    file = write_rows(tmp_path / "p.parquet", pairs, schema)
    found = PairDataset([file], items)
    wanted = [row["item_id"] for row in pairs]
    assert found.item_ids.tolist() == stable_ids(pa.array(wanted)).to_pylist()
    assert items.titles(items.rows_of(found.item_ids)) == [f"item {w.removeprefix('sku-10')}" for w in wanted]
    pairs[3]["item_id"] = "sku-of-nobody"
    file = write_rows(tmp_path / "q.parquet", pairs, schema)
    with pytest.raises(DataError, match="row 3, column item_id: item sku-of-nobody is not in the item table"):
        PairDataset([file], items)


@pytest.mark.parametrize("absent", [(), ("query_image",)], ids=["images", "no images"])
def test_an_index_of_query_images_gives_what_the_files_have(tmp_path, items, absent):
    rows = [row | {"query_id": 100 + k % 10} for k, row in enumerate(without(pair_rows(11), *absent))]
    if not absent:
        rows[3]["query_image"] = rows[9]["query_image"] = None
    files = [write_pairs(tmp_path / "0.parquet", rows[:6]), write_pairs(tmp_path / "1.parquet", rows[6:])]
    plain, mapped = (PairDataset(files, items, cache=cache) for cache in (None, tmp_path / "cache"))
    assert [mapped[k] for k in range(11)] == [plain[k] for k in range(11)]
    assert mapped.query_is_item.tolist() == [row.get("query_image") is None for row in rows]
    assert (tmp_path / "cache" / "pairs.arrow").exists() == (not absent)


def test_an_index_of_query_images_is_made_again_only_when_a_file_changes(tmp_path, items):
    file = write_pairs(tmp_path / "p.parquet")
    first = PairDataset([file], items, cache=tmp_path / "cache")
    before = (tmp_path / "cache" / "pairs.arrow").stat().st_ino
    PairDataset([file], items, cache=tmp_path / "cache")
    assert (tmp_path / "cache" / "pairs.arrow").stat().st_ino == before
    rows = [row | {"query_image": png(7)} for row in pair_rows()]
    changed = pairs_of(tmp_path, items, rows, cache=tmp_path / "cache")
    assert (tmp_path / "cache" / "pairs.arrow").stat().st_ino != before
    assert (first.query_image(2), changed.query_image(2)) == (png(202), png(7))


def test_pairs_that_are_left_out_take_their_images_with_them(tmp_path, items):
    pairs = pairs_of(tmp_path, items, cache=tmp_path / "cache")
    pairs.select(np.arange(8) % 2 == 1, np.arange(100, 110))
    assert [pairs.query_image(k) for k in range(4)] == [png(201 + 2 * k) for k in range(4)]
    assert pairs.query_location(3) == Location(tmp_path / "p.parquet", 1, 3, "query_image")
