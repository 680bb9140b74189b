"""A live table: new items, new vectors, items deleted, and what is refused."""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, TableState, frozen_config
from mim_torchrec.embeddings.sharded.item_index import ItemIndex, SpareRowsExhausted
from mim_torchrec.embeddings.sharded.live import delete_items, update_items
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, table_digest
from mim_torchrec.embeddings.table.format import (
    DTYPES,
    DuplicateId,
    NonFiniteVector,
    Table,
    TableError,
    TableWriter,
    VersionMismatch,
    decode,
    encode,
)

IDS = [30, 10, 20]


def tensor(*ids):
    return torch.tensor(ids, dtype=torch.int64)


@pytest.fixture
def live(tmp_path):
    def make(dtype="float16", spare_rows=2):
        writer = TableWriter(
            tmp_path / dtype, table_version="v1", dim=4, dtype=dtype, encoder={}, spare_rows=spare_rows
        )
        writer.write_shard(tensor(*IDS), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
        writer.finish()
        table = Table.open(tmp_path / dtype)
        module = FrozenEmbeddingCollection([frozen_config(table, ["item"])], device="cpu")
        load_table(module, table)
        return module, ItemIndex.of(table), table

    return make


def look_up(module, index, *ids):
    rows = index.rows(tensor(*ids))
    return module(KeyedJaggedTensor(["item"], rows, lengths=tensor(len(ids))))["item"].values()


def apply(module, index, ids, vectors, seq=1, version="v1"):
    return update_items(module, index, tensor(*ids), vectors, table_version=version, seq=seq)


def test_an_unknown_item_is_the_zero_vector_and_counted(live):
    module, index, _ = live()
    assert not look_up(module, index, 99, 98).any() and look_up(module, index, 30).any()
    assert (index.seen, index.unknown) == (3, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_items_and_new_vectors_are_found_by_the_next_lookup(live, dtype):
    module, index, table = live(dtype)
    vectors = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    report = apply(module, index, [25, 10, 5], vectors)
    assert (report.items, report.rows, report.spare_rows) == (3, 3, 0)
    assert torch.equal(look_up(module, index, 25, 10, 5), decode(encode(vectors, dtype), dtype))
    assert torch.equal(look_up(module, index, 30, 20), table.read_float(tensor(30, 20)))


def test_the_storage_does_not_move(live):
    module, index, _ = live()
    store = find_frozen(module, "mm")[1].store
    where = store.tensor.data_ptr()
    apply(module, index, [25], torch.ones(1, 4))
    delete_items(module, index, tensor(30), table_version="v1", seq=2)
    assert store.tensor.data_ptr() == where


def test_rows_of_new_items_do_not_depend_on_their_order_in_the_window(live):
    first, second = ItemIndex(tensor(1, 2), 5), ItemIndex(tensor(1, 2), 5)
    assert first.add(tensor(9, 1, 7)).tolist() == [4, 1, 3]
    assert second.add(tensor(7, 9, 1)).tolist() == [3, 4, 1]


def test_a_window_is_remembered_by_its_number(live):
    module, index, _ = live()
    apply(module, index, [25], torch.ones(1, 4), seq=7)
    assert find_frozen(module, "mm")[1].state == TableState("v1", 7)


def test_an_item_deleted_is_unknown_and_its_row_is_zero(live):
    module, index, _ = live()
    row = index.rows(tensor(30))
    report = delete_items(module, index, tensor(30, 99), table_version="v1", seq=1)
    assert (report.items, report.rows, len(index)) == (1, 1, 2)
    assert not look_up(module, index, 30).any() and index.rows(tensor(30)).tolist() == [0]
    assert not module.frozen_tables()["mm"].store.gather(row).any()


def test_an_item_that_comes_back_has_the_row_it_had(live):
    module, index, _ = live()
    apply(module, index, [25], torch.ones(1, 4), seq=1)
    before = index.rows(tensor(25, 30))
    delete_items(module, index, tensor(25, 30), table_version="v1", seq=2)
    apply(module, index, [26], torch.full((1, 4), 2.0), seq=3)
    apply(module, index, [30, 25], torch.full((2, 4), 3.0), seq=4)
    assert torch.equal(index.rows(tensor(25, 30)), before)
    assert look_up(module, index, 25, 26, 30)[:, 0].tolist() == [3.0, 2.0, 3.0]


def test_without_room_the_error_names_the_command_and_nothing_is_changed(live):
    module, index, table = live()
    before = table_digest(module), index.spare_rows
    command = "mim table grow .*float16 --out DIR --spare-rows 5"
    with pytest.raises(SpareRowsExhausted, match=f"3 new items, 2 free rows of 5: .*{command}"):
        apply(module, index, [30, 1, 2, 3], torch.ones(4, 4))
    assert (table_digest(module), index.spare_rows) == before
    assert index.rows(tensor(1, 2, 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e6])
def test_a_vector_that_cannot_be_stored_changes_nothing(live, wrong):
    module, index, _ = live()
    before = table_digest(module)
    vectors = torch.ones(2, 4)
    vectors[1, 2] = wrong
    with pytest.raises(NonFiniteVector, match="window 1, item id 26"):
        apply(module, index, [25, 26], vectors)
    assert table_digest(module) == before and index.spare_rows == 2


def test_windows_of_another_encoder_an_old_window_and_repeated_items_are_refused(live):
    module, index, _ = live()
    apply(module, index, [25], torch.ones(1, 4), seq=3)
    with pytest.raises(VersionMismatch, match="mm has table_version v1, window 4 has v2"):
        apply(module, index, [25], torch.ones(1, 4), seq=4, version="v2")
    with pytest.raises(TableError, match="has applied windows up to 3; window 3 is not newer"):
        apply(module, index, [25], torch.ones(1, 4), seq=3)
    with pytest.raises(DuplicateId, match="item id 25 is there twice"):
        apply(module, index, [25, 25], torch.ones(2, 4), seq=4)
    with pytest.raises(TableError, match=r"need vectors floating point \(1, 4\), found .* \(1, 3\)"):
        apply(module, index, [25], torch.ones(1, 3), seq=4)


def test_a_table_that_is_not_loaded_is_not_updated(live):
    _, index, table = live()
    module = FrozenEmbeddingCollection([frozen_config(table, ["item"])], device="cpu")
    with pytest.raises(TableError, match="mm is not loaded"):
        apply(module, index, [25], torch.ones(1, 4))
