"""Ids to rows: what is known, what is not, and how that is counted."""

import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.data import vocabulary as module
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.schema import category_ids
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary, scan_ids
from mim_torchrec.embeddings.table.format import RowIndex
from tests.datasets import request, write_requests


def batch(users, candidates, behaviors):
    """One request a user, with one candidate each and the behaviors with the first."""
    lengths = [1] * len(users) + [1] * len(candidates) + [len(behaviors)] + [0] * (len(users) - 1)
    sparse = KeyedJaggedTensor(
        keys=["user_id", "candidate_item_id", "behavior_item_id"],
        values=torch.tensor([*users, *candidates, *behaviors]),
        lengths=torch.tensor(lengths),
    )
    return RequestBatch(sparse, torch.zeros(len(users)), torch.arange(len(users)))


def mapper(mm=None, max_unknown=0.5, users=(1, 2), items=(10, 20, 30)):
    vocabularies = {
        "user_id": Vocabulary.build(np.array(users)),
        "item_id": Vocabulary.build(np.array(items)),
    }
    return IdMapper(vocabularies, mm, max_unknown)


def test_rows_ascend_with_ids_and_unknown_ids_have_row_0():
    vocabulary = Vocabulary.build(np.array([30, 10, 10, -5]))
    assert vocabulary.rows(torch.tensor([[-5, 10], [30, 31]])).tolist() == [[1, 2], [3, 0]]


def test_ids_seen_and_unknown_are_counted():
    vocabulary = Vocabulary.build(np.array([1, 2]))
    vocabulary.rows(torch.tensor([1, 7, 8]))
    vocabulary.rows(torch.tensor([2]))
    assert (vocabulary.seen, vocabulary.unknown) == (4, 2)


def test_head_room_is_spare_rows():
    assert Vocabulary.build(np.arange(10), head_room=0.25).num_embeddings == 1 + 13


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="3 ids need 4 rows, not 3"):
        Vocabulary(torch.tensor([1, 2, 3]), 3)


def test_a_vocabulary_is_loaded_as_it_was_saved(tmp_path):
    saved = Vocabulary.build(np.array([5, 3]), head_room=1.0)
    saved.save(tmp_path / "v.npz")
    loaded = Vocabulary.load(tmp_path / "v.npz")
    assert loaded.ids.tolist() == [3, 5] and loaded.num_embeddings == saved.num_embeddings == 5


def test_scanning_finds_the_distinct_ids_of_all_files(tmp_path):
    rows = [request(k) for k in range(9)]
    files = [
        write_requests(tmp_path / "a.parquet", rows[:5]),
        write_requests(tmp_path / "b.parquet", rows[5:]),
    ]
    found = scan_ids(files)
    assert found["user_id"].tolist() == sorted({row["user_id"] for row in rows})
    items = {i for row in rows for i in row["candidate_item_ids"] + row["behavior_item_ids"]}
    assert found["item_id"].tolist() == sorted(items)
    assert len(found["category"]) == 2


def test_scanning_leaves_out_what_is_not_logged(tmp_path):
    path = write_requests(tmp_path / "r.parquet", [request(3)], without=["query_id"])
    assert "query_id" not in scan_ids([path])


def test_equal_names_of_categories_have_equal_ids_everywhere():
    plain, coded = pa.array(["a", "b", "a"]), pa.array(["b", "a"]).dictionary_encode()
    a, b, again = category_ids(plain).tolist()
    assert a == again != b and category_ids(coded).tolist() == [b, a]


def test_candidates_and_behaviors_share_a_vocabulary():
    mapped = mapper()(batch([1, 9], [20, 99], [30, 10])).sparse
    assert mapped["user_id"].values().tolist() == [1, 0]
    assert mapped["candidate_item_id"].values().tolist() == [2, 0]
    assert mapped["behavior_item_id"].values().tolist() == [3, 1]
    assert mapped["behavior_item_id"].lengths().tolist() == [2, 0]


def test_the_batch_given_stays_as_it_is():
    given = batch([1], [20], [30])
    before = given.sparse.values().clone()
    mapper()(given)
    assert torch.equal(given.sparse.values(), before)


def test_rows_of_the_multi_modal_table_are_added(index_of):
    mapped = mapper(mm=index_of([20, 99]))(batch([1, 9], [20, 99], [30, 99])).sparse
    assert mapped.keys()[-2:] == ["candidate_mm", "behavior_mm"]
    assert mapped["candidate_mm"].values().tolist() == [1, 2]
    assert mapped["behavior_mm"].values().tolist() == [0, 2]
    assert mapped["behavior_mm"].lengths().tolist() == [2, 0]


def test_a_feature_without_a_vocabulary_is_refused_by_name():
    with pytest.raises(DataError, match="column user_id: the requests have it"):
        IdMapper({"item_id": Vocabulary.build(np.array([1]))}, None, 0.5)(batch([1], [1], []))


def test_shares_of_unknown_ids_are_by_vocabulary(index_of):
    ids = mapper(mm=index_of([20]))
    ids(batch([1, 9], [20, 99], [30, 99]))
    assert ids.unknown_shares() == {"user_id": 0.5, "item_id": 0.5, "mm": 0.75}


@pytest.mark.parametrize(("max_unknown", "warned"), [(0.2, True), (0.3, False)])
def test_too_many_unknown_ids_are_warned_of(monkeypatch, caplog, max_unknown, warned):
    monkeypatch.setattr(module, "ALARM_WINDOW", 8)
    ids = mapper(max_unknown=max_unknown, users=(1, 2, 3))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ids(batch([1, 2, 3, 9], [10, 10, 20, 20], []))
    found = [record.getMessage() for record in caplog.records]
    assert found == (["25% of the last 8 ids of user_id are unknown (limit 20%)"] if warned else [])


@pytest.fixture
def index_of():
    """The index of a multi-modal table with these ids."""
    return lambda ids: RowIndex(torch.tensor(ids))
