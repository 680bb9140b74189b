"""Vocabularies of ids, the scan that fills them, and the rows that a batch gets from them."""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.id_scan import scan_ids
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import REQUESTS, category_ids
from mim_torchrec.data.vocabulary import ALARM_IDS, IdMapper, Vocabulary
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.errors import OptionError
from tests.datasets import CATEGORIES, request_rows, without, write_requests, write_rows
from tests.said import said


def vocabulary(*ids: int) -> Vocabulary:
    return Vocabulary.build(np.array(ids))


def test_rows_ascend_with_the_ids():
    assert vocabulary(30, -5, 10).rows(torch.tensor([-5, 10, 30])).tolist() == [1, 2, 3]


def test_repeated_ids_have_one_row():
    assert vocabulary(7, 9, 7, 7).ids.tolist() == [7, 9]


def test_unknown_ids_get_row_0():
    assert vocabulary(10, 20).rows(torch.tensor([9, 11, 20, 21])).tolist() == [0, 0, 2, 0]


def test_rows_have_the_shape_of_the_ids():
    assert vocabulary(10, 20).rows(torch.tensor([[10, 20], [20, 30]])).tolist() == [[1, 2], [2, 0]]


def test_an_empty_vocabulary_knows_nothing():
    assert vocabulary().rows(torch.tensor([1, 2])).tolist() == [0, 0]


def test_ids_seen_and_unknown_are_counted_over_calls():
    found = vocabulary(10, 20)
    found.rows(torch.tensor([10, 11, 12]))
    found.rows(torch.tensor([20, 13]))
    assert (found.seen, found.unknown) == (5, 3)


@pytest.mark.parametrize("spare_rows, rows", [(0.0, 11), (0.25, 14), (1.0, 21)])
def test_spare_rows_adds_spare_rows_to_those_of_the_ids_and_the_unknown(spare_rows, rows):
    assert Vocabulary.build(np.arange(10), spare_rows).num_embeddings == rows


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="3 ids need 4 rows, not 3"):
        Vocabulary(torch.tensor([1, 2, 3]), num_embeddings=3)


def test_what_is_saved_is_loaded(tmp_path):
    saved = Vocabulary.build(np.array([5, 2**62, -1]), spare_rows=0.5)
    saved.save(tmp_path / "item_id.npz")
    loaded = Vocabulary.load(tmp_path / "item_id.npz")
    assert torch.equal(loaded.ids, saved.ids)
    assert loaded.num_embeddings == saved.num_embeddings


def counted(*impressions: int, shrinkage: float, ids: Sequence[int] = (10, 20)) -> Vocabulary:
    return Vocabulary(torch.tensor(ids), len(ids) + 3, torch.tensor(impressions), shrinkage)


def test_factors_are_the_weight_of_the_data_in_a_posterior_mean():
    found = counted(5, 0, 300, shrinkage=100.0).factors(torch.tensor([0, 1, 2, 2]))
    assert found.tolist() == pytest.approx([5 / 105, 0.0, 0.75, 0.75])
    assert found.dtype == torch.float32
    assert counted(5, 0, 300, shrinkage=0.0).factors(torch.tensor([[0], [1]])).tolist() == [[1.0], [1.0]]


def test_impressions_and_shrinkage_are_saved(tmp_path):
    counted(5, 0, 2**40, shrinkage=100.5).save(tmp_path / "v.npz")
    loaded = Vocabulary.load(tmp_path / "v.npz")
    assert (loaded.impressions.tolist(), loaded.shrinkage) == ([5, 0, 2**40], 100.5)


def test_impressions_that_nothing_needs_are_not_read(tmp_path):
    counted(5, 0, 7, shrinkage=0.0).save(tmp_path / "v.npz")
    assert Vocabulary.load(tmp_path / "v.npz").impressions is None
    assert Vocabulary.load(tmp_path / "v.npz", counts=True).impressions.tolist() == [5, 0, 7]


def test_a_vocabulary_of_an_earlier_release_is_read_without_impressions(tmp_path):
    np.savez(tmp_path / "v.npz", ids=np.array([10, 20]), num_embeddings=np.int64(4))
    loaded = Vocabulary.load(tmp_path / "v.npz", counts=True)
    assert (loaded.ids.tolist(), loaded.num_embeddings, loaded.impressions) == ([10, 20], 4, None)
    with pytest.raises(OptionError, match="--id-shrinkage needs to know in how many training impressions"):
        Vocabulary(loaded.ids, 4, loaded.impressions, shrinkage=3.0)


def test_a_vocabulary_of_a_later_release_is_refused(tmp_path):
    np.savez(tmp_path / "v.npz", format_version=np.int64(3))
    with pytest.raises(DataError, match=r"v\.npz.*format_version 3, this release reads up to 2"):
        Vocabulary.load(tmp_path / "v.npz")


def test_impressions_of_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match="2 ids and row 0 have 2 numbers of impressions"):
        counted(5, 0, shrinkage=1.0)


def test_the_scan_finds_the_distinct_ids_of_all_files_and_row_groups(tmp_path):
    rows = request_rows(20)
    files = [
        write_requests(tmp_path / "0.parquet", rows[:9]),
        write_requests(tmp_path / "1.parquet", rows[9:]),
    ]
    found = {name: ids.tolist() for name, ids in scan_ids(files).items()}
    items = {i for row in rows for i in row["candidate_item_ids"] + row["behavior_item_ids"]}
    assert found == {
        "user_id": sorted({row["user_id"] for row in rows}),
        "query_id": sorted({row["query_id"] for row in rows}),
        "item_id": sorted(items),
        "category": sorted(category_ids(pa.array(CATEGORIES)).tolist()),
    }


def test_the_scan_finds_items_that_are_only_candidates_or_only_behaviors(tmp_path):
    rows = request_rows()
    rows[7]["candidate_item_ids"][0], rows[9]["behavior_item_ids"][0] = 7, 9
    assert {7, 9} < set(scan_ids([write_requests(tmp_path / "r.parquet", rows)])["item_id"].tolist())


def test_the_scan_leaves_out_what_the_files_do_not_have(tmp_path):
    absent = ("query_id", "behavior_categories", "candidate_categories")
    file = write_requests(tmp_path / "r.parquet", without(request_rows(), *absent))
    assert set(scan_ids([file])) == {"user_id", "item_id"}


def test_the_scan_passes_over_nulls_and_empty_histories(tmp_path):
    nothing = {"behavior_item_ids": [], "behavior_categories": None, "query_id": None}
    file = write_requests(tmp_path / "r.parquet", [row | nothing for row in request_rows()])
    found = scan_ids([file])
    assert found["query_id"].tolist() == []
    assert set(found["item_id"]) == {i for row in request_rows() for i in row["candidate_item_ids"]}


def test_the_scan_finds_the_ids_that_readers_give(tmp_path):
    schema = REQUESTS
    for column in ("behavior_item_ids", "candidate_item_ids"):
        schema = schema.set(schema.get_field_index(column), pa.field(column, pa.list_(pa.int32())))
    file = write_rows(tmp_path / "r.parquet", request_rows(), schema)
    mapper = IdMapper({name: Vocabulary.build(ids) for name, ids in scan_ids([file]).items()}, None, 0.0)
    for batch in RequestReader([file], batch_size=4):
        mapper(batch)
    assert mapper.unknown_fractions() == dict.fromkeys(("user_id", "query_id", "item_id", "category"), 0.0)


def batch_of(**features: Sequence[Sequence[int]]) -> RequestBatch:
    """A batch of features by name, of each a list of ids a request."""
    values = [i for lists in features.values() for ids in lists for i in ids]
    lengths = [len(ids) for lists in features.values() for ids in lists]
    sparse = KeyedJaggedTensor(
        keys=list(features), values=torch.tensor(values), lengths=torch.tensor(lengths, dtype=torch.int32)
    )
    candidates = sum(map(len, features["candidate_item_id"]))
    return RequestBatch(sparse, torch.zeros(candidates), torch.arange(sparse.stride()))


def small_batch() -> RequestBatch:
    return batch_of(
        user_id=[[1], [2]],
        candidate_item_id=[[10, 20], [30]],
        behavior_item_id=[[20], []],
        candidate_category=[[7, 8], [7]],
        behavior_category=[[8], []],
    )


VOCABULARIES = {"user_id": (2, 3), "item_id": (10, 20), "category": (7, 8)}


def mapper_of(mm: ItemIndex | None = None, max_unknown: float = 0.5, **ids: Sequence[int]) -> IdMapper:
    """Of the vocabularies above, or others."""
    named = {name: vocabulary(*values) for name, values in (VOCABULARIES | ids).items()}
    return IdMapper(named, mm, max_unknown)


def lists_of(batch: RequestBatch) -> dict[str, list[list[int]]]:
    return {key: [part.tolist() for part in batch.sparse[key].to_dense()] for key in batch.sparse.keys()}  # noqa: SIM118


def test_candidates_and_behaviors_share_a_vocabulary():
    assert lists_of(mapper_of()(small_batch())) == {
        "user_id": [[0], [1]],
        "candidate_item_id": [[1, 2], [0]],
        "behavior_item_id": [[2], []],
        "candidate_category": [[1, 2], [1]],
        "behavior_category": [[2], []],
    }


def test_the_batch_given_is_left_as_it_is():
    batch = small_batch()
    mapper_of(ItemIndex(torch.tensor([10, 30]), capacity=4))(batch)
    assert lists_of(batch) == lists_of(small_batch())


def test_what_is_no_id_is_passed_on():
    batch = small_batch()
    mapped = mapper_of()(batch)
    assert mapped.labels is batch.labels and mapped.request_ids is batch.request_ids
    assert mapped.num_requests == batch.num_requests


def test_a_multi_modal_table_adds_its_rows_as_features():
    index = ItemIndex(torch.tensor([5, 10, 30]), capacity=4)
    mapped = lists_of(mapper_of(index)(small_batch()))
    expected = lists_of(mapper_of()(small_batch()))
    expected |= {"candidate_mm": [[2, 0], [3]], "behavior_mm": [[0], []]}
    assert mapped == expected


def test_a_feature_without_a_vocabulary_is_refused():
    mapper = IdMapper({"user_id": vocabulary(1), "item_id": vocabulary(10)}, None, 0.5)
    with pytest.raises(DataError, match="column candidate_category: .* those of training did not"):
        mapper(small_batch())


def test_a_vocabulary_without_a_feature_is_left_alone():
    assert "query_id" not in lists_of(mapper_of(query_id=(1,))(small_batch()))


def shrinking_mapper(mm: ItemIndex | None = None) -> IdMapper:
    return IdMapper(
        {"user_id": counted(1, 2, 3, shrinkage=10.0, ids=(2, 3)),
         "tags": counted(4, 5, shrinkage=10.0, ids=(6,)),
         "item_id": counted(0, 30, 90, shrinkage=30.0),
         "category": counted(0, 1, 2, shrinkage=0.0, ids=(7, 8))},
        mm, 0.5,
    )  # fmt: skip


def test_a_batch_gets_the_factors_of_its_ids_and_weighted_bags():
    tagged = batch_of(
        user_id=[[1], [2]], tags=[[6, 6, 9], []], candidate_item_id=[[10, 20], [30]],
        behavior_item_id=[[20], []], candidate_category=[[7, 8], [7]], behavior_category=[[8], []],
    )  # fmt: skip
    for mm in (None, ItemIndex(torch.tensor([10, 30]), capacity=4)):
        mapped = shrinking_mapper(mm)(tagged)
        five, four = 5 / 15, 4 / 14
        expected = [1 / 11, 2 / 12, five, five, four, 0.5, 0.75, 0.0, 0.75, 1.0, 1.0, 1.0, 1.0]
        assert mapped.factors.tolist() == pytest.approx(expected)
        assert mapped.bags.keys() == ["user_id", "tags"]
        assert mapped.bags.lengths().tolist() == [1, 1, 3, 0]
        assert mapped.bags.values().tolist() == [0, 1, 1, 1, 0]
        weights = [1 / 11, 2 / 12, five / 3, five / 3, four / 3]
        assert mapped.bags.weights().tolist() == pytest.approx(weights)


def test_a_feature_that_is_named_like_those_of_the_table_is_one_of_ids():
    mapper = shrinking_mapper()
    mapper.vocabularies["length_mm"] = counted(0, 10, shrinkage=10.0, ids=(5,))
    mapped = mapper(
        batch_of(user_id=[[2]], length_mm=[[5, 4]], candidate_item_id=[[10]], behavior_item_id=[[]])
    )
    assert mapped.factors.tolist() == pytest.approx([2 / 12, 0.5, 0.0, 0.5])
    assert mapped.bags.keys() == ["user_id", "length_mm"]
    assert mapper.unknown_fractions() == {"user_id": 0.0, "length_mm": 0.5, "item_id": 0.0}


def test_without_shrinkage_a_batch_has_no_factors():
    mapped = mapper_of()(small_batch())
    assert mapped.factors is None and mapped.bags is None


def test_a_hidden_candidate_has_the_factor_of_an_unknown_id():
    mapper = shrinking_mapper()
    mapped = mapper(batch_of(user_id=[[2]], candidate_item_id=[[10, 20]], behavior_item_id=[[20]]))
    assert mapper.unknown_factor("item_id") == 0.0
    assert mapper.unknown_factor("user_id") == pytest.approx(1 / 11)
    hidden = mapped.with_hidden_candidates(torch.tensor([False, True]), 0.25)
    assert hidden.factors.tolist() == pytest.approx([2 / 12, 0.5, 0.25, 0.75])
    assert mapped.factors.tolist() == pytest.approx([2 / 12, 0.5, 0.75, 0.75])


def test_a_batch_without_lists_has_no_bags_as_its_factors_say_all():
    mapped = shrinking_mapper()(batch_of(user_id=[[2]], candidate_item_id=[[10]], behavior_item_id=[[]]))
    assert mapped.factors.tolist() == pytest.approx([2 / 12, 0.5]) and mapped.bags is None


def test_factors_and_bags_move_with_the_batch():
    tagged = batch_of(user_id=[[2]], tags=[[6, 9]], candidate_item_id=[[10]], behavior_item_id=[[20]])
    moved = shrinking_mapper()(tagged).to(torch.device("meta"))
    assert moved.factors.is_meta and moved.bags.weights().is_meta and moved.bags.values().is_meta


def test_unknown_fractions_count_candidates_and_behaviors_of_all_batches():
    mapper = mapper_of(ItemIndex(torch.tensor([20]), capacity=4))
    mapper(small_batch())
    assert mapper.unknown_fractions() == {"user_id": 1 / 2, "item_id": 1 / 4, "category": 0.0, "mm": 2 / 4}
    mapper(batch_of(user_id=[[3]], candidate_item_id=[[40, 50]], behavior_item_id=[[10, 60]]))
    assert mapper.unknown_fractions() == {"user_id": 1 / 3, "item_id": 4 / 8, "category": 0.0, "mm": 6 / 8}


def test_unknown_fractions_leave_out_what_was_never_seen():
    assert mapper_of().unknown_fractions() == {}


def candidates(count: int, unknown: int) -> RequestBatch:
    return batch_of(candidate_item_id=[[99] * unknown + [10] * (count - unknown)], behavior_item_id=[[]])


def test_more_unknown_ids_than_the_limit_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        mapper_of(max_unknown=0.5)(candidates(ALARM_IDS, ALARM_IDS * 6 // 10))
    assert said(caplog, "data.vocabulary") == [
        "60% of the last 100000 ids of item_id are unknown (limit 50%)"
    ]


def test_as_many_unknown_ids_as_the_limit_are_not_warned_of(caplog):
    mapper_of(max_unknown=0.5)(candidates(ALARM_IDS, ALARM_IDS // 2))
    assert not said(caplog, "data.vocabulary")


def test_fewer_ids_than_the_window_are_not_warned_of(caplog):
    mapper_of(max_unknown=0.5)(candidates(ALARM_IDS - 1, ALARM_IDS - 1))
    assert not said(caplog, "data.vocabulary")


def test_the_window_spans_batches(caplog):
    mapper = mapper_of(max_unknown=0.5)
    for _ in range(4):
        assert not said(caplog, "data.vocabulary")
        mapper(candidates(ALARM_IDS // 4, ALARM_IDS // 4))
    assert len(said(caplog, "data.vocabulary")) == 1


def test_a_window_does_not_count_what_was_unknown_before_it(caplog):
    mapper = mapper_of(max_unknown=0.5)
    mapper(candidates(ALARM_IDS, ALARM_IDS))
    caplog.clear()
    mapper(candidates(ALARM_IDS, ALARM_IDS // 10))
    assert not said(caplog, "data.vocabulary")


def test_unknown_rows_of_the_multi_modal_table_are_warned_of(caplog):
    mapper = mapper_of(ItemIndex(torch.tensor([20]), capacity=4), max_unknown=0.5)
    mapper(candidates(ALARM_IDS, 0))
    assert "100% of the last 100000 ids of mm are unknown" in caplog.text
