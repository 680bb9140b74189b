"""What spares the reader work: lists copied as windows, codes of categories, row groups read together."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mim_torchrec.data import request_files
from mim_torchrec.data.columns import decode
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features
from mim_torchrec.data.id_scan import scan_ids
from mim_torchrec.data.request_buffer import RequestBuffer, concatenate
from mim_torchrec.data.request_columns import Coded, Jagged, RequestColumns
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import REQUESTS
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from tests.datasets import request_rows, write_requests, write_rows
from tests.request_rows import as_rows, expected

LENGTHS = {
    "equal": lambda rng: np.full(40, 5),
    "nearly equal": lambda rng: rng.integers(4, 8, 40),
    "unequal": lambda rng: rng.integers(0, 40, 40) ** 2 // 40,
    "empty": lambda rng: np.zeros(40, np.int64),
    "one long": lambda rng: np.where(np.arange(40) == 17, 90, 1),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_rows_that_follow_one_another_are_those_taken(kind):
    lengths = LENGTHS[kind](np.random.default_rng(0))
    numbers = np.arange(lengths.sum())
    lists = Jagged(lengths, {"id": numbers}, {"code": Coded(numbers.astype(np.int32), numbers * 7)})
    for start, stop in ((0, 40), (0, 3), (11, 29), (39, 40), (7, 7)):
        found, taken = lists.between(start, stop), lists.take(np.arange(start, stop))
        assert found.lengths.tolist() == taken.lengths.tolist()
        assert found.values["id"].tolist() == taken.values["id"].tolist()
        assert found.coded["code"].values.tolist() == taken.coded["code"].values.tolist()


@pytest.mark.parametrize("last", [None, 1, 5])
@pytest.mark.parametrize("kind", LENGTHS)
def test_lists_of_rows_are_those_of_a_loop(kind, last):
    rng = np.random.default_rng(0)
    lengths = LENGTHS[kind](rng)
    numbers = rng.integers(0, 1000, lengths.sum())
    values = {"id": numbers, "float": numbers.astype(np.float32), "text": numbers.astype(str).astype(object)}
    lists = Jagged(lengths, values, {"code": Coded(numbers.astype(np.int32), np.arange(1000) * 7)})
    stops = np.cumsum(lengths)
    for rows in (rng.permutation(40)[:13], np.arange(20, 40), np.array([3]), np.array([0, 39]), stops[:0]):
        own = [numbers[stop - length : stop][-(last or 1000) :] for stop, length
               in zip(stops[rows], lengths[rows], strict=True)]  # fmt: skip
        naive = [value for one in own for value in one.tolist()]
        found = lists.take(rows, last)
        assert found.lengths.tolist() == [len(one) for one in own]
        assert found.values["id"].tolist() == found.values["float"].tolist() == naive
        assert found.values["text"].tolist() == [str(value) for value in naive]
        assert found.coded["code"].values.tolist() == [7 * value for value in naive]
        assert all(one.flags.writeable and one.flags.c_contiguous for one in found.values.values())


def part(first: int, category: np.ndarray | Coded) -> RequestColumns:
    lengths, count = np.array([len(category)]), len(category)
    is_coded = isinstance(category, Coded)
    values = {"item_id": first + np.arange(count)} | ({} if is_coded else {"category": category})
    lists = Jagged(lengths, values, {"category": category} if is_coded else {})
    return RequestColumns({"request_id": np.array([first])}, lists, lists)


def test_parts_that_number_categories_differently_keep_their_categories():
    one, other = (
        Coded(np.array([1, 0, 1], np.int32), np.array([50, 60])),
        Coded(np.array([0, 2], np.int32), np.array([60, 70, 80])),
    )
    found = concatenate([part(1, one), part(9, other)])
    assert found.behavior.coded["category"].values.tolist() == [60, 50, 60, 60, 80]
    assert found.behavior.values["item_id"].tolist() == [1, 2, 3, 9, 10]


def test_categories_that_are_coded_in_some_parts_only_are_joined():
    coded = Coded(np.array([1, 0], np.int32), np.array([50, 60]))
    found = concatenate([part(1, coded), part(9, np.array([7, 8, 9]))])
    assert not found.candidate.coded
    assert found.candidate.values["category"].tolist() == [60, 50, 7, 8, 9]


def test_a_buffer_that_is_filled_again_holds_what_was_added_since():
    coded, plain = Coded(np.array([1, 0], np.int32), np.array([50, 60])), np.array([7, 8, 9])
    buffer = RequestBuffer()
    for numbers, categories, values in (
        ([1, 9], [coded, plain], [60, 50, 7, 8, 9]),
        ([2, 3, 4], [coded] * 3, [60, 50] * 3),
        ([5], [plain], [7, 8, 9]),
        ([6], [coded], [60, 50]),
    ):
        buffer.clear(expected=1)
        for number, category in zip(numbers, categories, strict=True):
            buffer.add(part(number, category))
        found = buffer.requests()
        assert len(buffer) == len(found) == len(numbers)
        assert found.scalars["request_id"].tolist() == numbers
        for lists in (found.behavior, found.candidate):
            assert lists.lengths.tolist() == list(map(len, categories))
            own = lists.coded["category"].values if lists.coded else lists.values["category"]
            assert own.tolist() == values
            assert lists.values["item_id"].tolist() == [
                number + k for number, own in zip(numbers, categories, strict=True) for k in range(len(own))
            ]


def mapper_of(files: list[Path], **options) -> IdMapper:
    """Of every second id of the files."""
    ids = {name: own[::2] for name, own in scan_ids(files, options.get("features", Features())).items()}
    items = torch.from_numpy(ids["item_id"])
    return IdMapper({name: Vocabulary.build(own) for name, own in ids.items()},
                    ItemIndex(items, capacity=len(items)), 1.0)  # fmt: skip


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("buffer_rows", [None, 13])
def test_a_reader_that_maps_gives_what_mapping_its_batches_gives(tmp_path, buffer_rows, further):
    rows = request_rows(60)
    for k, row in enumerate(rows[40:]):
        row["candidate_categories"] = [f"rare {k}"] * len(row["labels"])
    files = [
        write_requests(tmp_path / "0.parquet", rows[:33]),
        write_requests(tmp_path / "1.parquet", rows[33:]),
    ]
    options = {"features": Features(sparse=("query",))} if further else {}
    if further:
        schema = REQUESTS.append(REQUESTS.field("query_id").with_name("query"))
        for file, own in zip(files, (rows[:33], rows[33:]), strict=True):
            write_rows(file, [row | {"query": row["query_id"]} for row in own], schema)
    reader = RequestReader(files, batch_size=11, shuffle=True, seed=2, buffer_rows=buffer_rows, **options)
    one, other = mapper_of(files, **options), mapper_of(files, **options)
    mapped, plain = list(reader.batches(mapper=one)), [other(batch) for batch in reader]
    assert len(mapped) == len(plain) > 3
    for ours, theirs in zip(mapped, plain, strict=True):
        assert ours.sparse.keys() == theirs.sparse.keys()
        assert torch.equal(ours.sparse.values(), theirs.sparse.values())
        assert torch.equal(ours.sparse.lengths(), theirs.sparse.lengths())
        assert ours.sparse.offset_per_key() == theirs.sparse.offset_per_key()
        assert torch.equal(ours.request_ids, theirs.request_ids)
    assert one.unknown_fractions() == other.unknown_fractions()
    assert 0 < one.unknown_fractions()["category"] < 1


def test_a_reader_that_maps_refuses_a_feature_without_a_vocabulary(tmp_path):
    file = write_requests(tmp_path / "r.parquet", request_rows())
    mapper = IdMapper({"user_id": Vocabulary.build(np.array([500]))}, None, 1.0)
    with pytest.raises(DataError, match="query_id: the requests have it, those of training did not"):
        next(RequestReader([file], batch_size=4).batches(mapper=mapper))


def test_row_groups_of_a_buffer_are_decoded_at_once(tmp_path, monkeypatch):
    rows, sizes = request_rows(40), []

    def counted(table, *words) -> tuple[RequestColumns, int]:
        sizes.append(len(table))
        return decode(table, *words)

    monkeypatch.setattr(request_files, "decode", counted)
    files = [
        write_requests(tmp_path / "0.parquet", rows[:20]),
        write_requests(tmp_path / "1.parquet", rows[20:]),
    ]
    found = list(RequestReader(files, batch_size=9, shuffle=True, buffer_rows=40))
    assert sizes == [20, 20]
    assert sorted(as_rows(found), key=lambda row: row["request_id"]) == expected(rows)


def test_few_values_are_read_at_once_where_offsets_of_lists_could_not_count_more(tmp_path, monkeypatch):
    rows, whole = request_rows(40), []
    file = write_requests(tmp_path / "r.parquet", rows)
    for most in (1 << 30, 25):
        monkeypatch.setattr(request_files, "MOST_VALUES", most)
        whole.append(as_rows(list(RequestReader([file], batch_size=9, shuffle=True))))
    assert whole[0] == whole[1]


@pytest.mark.parametrize("bad", [2, 13, 30])
def test_a_bad_row_among_row_groups_read_together_is_named(tmp_path, bad):
    rows = request_rows(40)
    rows[bad]["user_id"] = None
    reader = RequestReader([write_requests(tmp_path / "r.parquet", rows)], batch_size=9, shuffle=True)
    with pytest.raises(DataError, match=rf"row group {bad // 4}, row {bad % 4}, column user_id: is null"):
        list(reader)


def test_row_groups_with_categories_of_their_own_are_read_together(tmp_path):
    rows = request_rows(24)
    for k, row in enumerate(rows):
        row["behavior_categories"] = [f"{k // 4} {b}" for b in range(len(row["behavior_item_ids"]))]
    reader = RequestReader([write_requests(tmp_path / "r.parquet", rows)], batch_size=9, shuffle=True)
    found = sorted(as_rows(list(reader)), key=lambda row: row["request_id"])
    assert found == expected(rows)
