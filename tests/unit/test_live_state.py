"""An index and the rows of its table agree, also after a checkpoint; what does not is refused."""

import copy
import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.live import (
    apply_window,
    check_index,
    check_ranks,
    delete_items,
    restore_index,
    table_state,
    update_items,
)
from mim_torchrec.embeddings.sharded.load import load_table
from mim_torchrec.embeddings.sharded.state_keys import frozen_keys
from mim_torchrec.embeddings.table.format import Table, TableError, TableWriter, VersionMismatch
from mim_torchrec.embeddings.windows.window import Window

DIM = 4


def tensor(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


class Model(nn.Module):
    def __init__(self, table: Table, store_rows: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(DIM, 1)
        self.mm = FrozenEmbeddingCollection(
            [frozen_config(table, ["item"])], device="cpu", store_rows=store_rows
        )

    def look_up(self, index: ItemIndex, *ids: int) -> list[float]:
        """First numbers of the vectors."""
        rows = index.rows(tensor(*ids))
        features = KeyedJaggedTensor(["item"], rows, lengths=tensor(len(ids)))
        return self.mm(features)["item"].values()[:, 0].tolist()


class Older(nn.Module):
    """The model before it had a table."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(DIM, 1)


@pytest.fixture
def table(tmp_path) -> Table:
    return make_table(tmp_path / "table")


def make_table(path, version: str = "v1", spare_rows: int = 3, ids=(10, 20, 30)) -> Table:
    writer = TableWriter(path, table_version=version, dim=DIM, encoder={}, spare_rows=spare_rows)
    writer.write_shard(tensor(*ids), tensor(*ids).float()[:, None].expand(-1, DIM))
    writer.finish()
    return Table.open(path)


def make(table: Table, store_rows: bool = True) -> tuple[Model, ItemIndex]:
    model = Model(table, store_rows)
    load_table(model, table)
    return model, ItemIndex.of(table)


def put(model: nn.Module, index: ItemIndex, seq: int, **vectors: float) -> None:
    ids = tensor(*(int(name[1:]) for name in vectors))
    values = torch.tensor(list(vectors.values()))[:, None].expand(-1, DIM)
    update_items(model, index, ids, values, table_version="v1", seq=seq)


def window(seq: int, value: float, *ids: int, removed: tuple[int, ...] = ()) -> Window:
    vectors = torch.full((len(ids), DIM), value)
    return Window.of(tensor(*ids), vectors, table_version="v1", seq=seq, window_id=f"w{seq}",
                     removed=tensor(*removed))  # fmt: skip


def changed(table: Table) -> tuple[Model, ItemIndex]:
    """A model with a new vector, two new items and a deleted one."""
    model, index = make(table)
    put(model, index, 4, i25=1.0, i10=2.0, i5=3.0)
    delete_items(model, index, tensor(30), table_version="v1", seq=5)
    return model, index


ASKED, FOUND = (5, 10, 20, 25, 30, 40), [3.0, 2.0, 20.0, 1.0, 0.0, 0.0]


def test_a_checkpoint_with_rows_gives_a_new_index_their_items(table):
    model, index = changed(table)
    assert model.look_up(index, *ASKED) == FOUND
    resumed, fresh = Model(table, store_rows=True), ItemIndex.of(table)
    resumed.load_state_dict(model.state_dict())
    restore_index(resumed, fresh)
    assert resumed.look_up(fresh, *ASKED) == FOUND
    assert (fresh.seq, table_state(resumed).seq) == (5, 5)
    check_index(resumed, fresh)
    for each, its in ((model, index), (resumed, fresh)):  # both continue alike
        put(each, its, 6, i40=7.0, i30=8.0)
        assert each.look_up(its, *ASKED) == [3.0, 2.0, 20.0, 1.0, 8.0, 7.0]
    assert resumed.state_dict()["mm._extra_state"] == model.state_dict()["mm._extra_state"]


def test_until_an_index_has_the_items_of_a_checkpoint_nothing_is_looked_up_or_changed(table):
    resumed, fresh = Model(table, store_rows=True), ItemIndex.of(table)
    resumed.load_state_dict(changed(table)[0].state_dict())
    wanted = r"mm: .* windows up to 5 with 2 new items, which no index has; call restore_index"
    with pytest.raises(TableError, match=wanted):
        resumed.look_up(fresh, 10)
    with pytest.raises(TableError, match=wanted):
        put(resumed, fresh, 6, i40=7.0)
    with pytest.raises(TableError, match=wanted):
        check_index(resumed, fresh)
    again = Model(table, store_rows=True)
    again.load_state_dict(resumed.state_dict())  # what is saved before is whole
    restore_index(again, fresh)
    assert again.look_up(fresh, *ASKED) == FOUND


def test_an_index_that_is_behind_its_rows_is_refused(table):
    model, _ = changed(table)
    stale = ItemIndex.of(table)
    for call in (
        lambda: put(model, stale, 6, i40=7.0),
        lambda: delete_items(model, stale, tensor(10), table_version="v1", seq=6),
        lambda: apply_window(model, stale, window(6, 1.0, 40)),
        lambda: check_index(model, stale),
    ):
        with pytest.raises(TableError, match="rows have windows up to 5, its index up to 0"):
            call()
    assert stale.spare_rows == 3 and table_state(model).seq == 5


def test_an_index_of_another_table_is_refused(table, tmp_path):
    model, _ = make(table)
    with pytest.raises(TableError, match="mm has 7 rows, the index is of a table of 8"):
        put(model, ItemIndex.of(make_table(tmp_path / "larger", spare_rows=4)), 1, i40=1.0)
    with pytest.raises(VersionMismatch, match="mm has table_version v1, the index v2"):
        check_index(model, ItemIndex.of(make_table(tmp_path / "other", "v2")))
    resumed = Model(table, store_rows=True)
    resumed.load_state_dict(changed(table)[0].state_dict())
    with pytest.raises(TableError, match="has other items than the table of the checkpoint"):
        restore_index(resumed, ItemIndex.of(make_table(tmp_path / "items", ids=(10, 21, 30))))
    with pytest.raises(TableError, match="has loaded no index of items"):
        restore_index(model, ItemIndex.of(table))


def test_windows_that_an_index_has_already_change_rows_alone(table):
    """As where rows were loaded again, or two tables share an index."""
    log = [window(1, 1.0, 25, 10), window(2, 2.0, 5, removed=(25, 99)), window(3, 3.0, 25, removed=(20,))]
    first, index = make(table)
    for each in log:
        apply_window(first, index, each)
    second, _ = make(table)
    put_twice = [apply_window(second, index, each) for each in log]
    assert [report.rows for report in put_twice] == [2, 2, 2]
    for model in (first, second):
        check_index(model, index)
        assert model.look_up(index, 5, 10, 20, 25, 30) == [2.0, 1.0, 0.0, 3.0, 30.0]
    assert index.spare_rows == 1


def test_an_index_that_is_ahead_is_refused_for_lookups_and_for_later_windows(table):
    model, index = make(table)
    put(model, index, 4, i25=1.0)
    load_table(model, table)
    with pytest.raises(TableError, match="index has the items of windows up to 4, the rows .* up to 0"):
        check_index(model, index)
    with pytest.raises(
        TableError, match="rows have windows up to 0, its index up to 4; window 5 comes after"
    ):
        put(model, index, 5, i26=1.0)
    with pytest.raises(TableError, match="index has windows up to 4 but not item id 27 of window 3"):
        put(model, index, 3, i27=1.0)


def test_a_copy_of_a_model_has_items_of_its_own(table):
    model, index = changed(table)
    twin = copy.deepcopy(model)
    put(model, index, 6, i40=7.0)
    saved = Model(table, store_rows=True)
    saved.load_state_dict(twin.state_dict())
    restore_index(saved, own := ItemIndex.of(table))
    assert saved.look_up(own, *ASKED) == FOUND


def test_rows_that_a_checkpoint_does_not_hold_are_compared_and_not_taken_for_its_own(table, tmp_path):
    state = changed(table)[0].state_dict()
    del state["mm.embeddings.mm.weight"]
    model, _ = make(table)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"mm.embeddings.mm.weight\""):
        model.load_state_dict(state)
    assert table_state(model).seq == 0
    other, _ = make(make_table(tmp_path / "other", "v2"))
    with pytest.raises(VersionMismatch, match="rows are of table_version v2, the checkpoint .* v1"):
        other.load_state_dict(state, strict=False)


@pytest.mark.parametrize("store_rows", [False, True])
def test_a_checkpoint_from_before_the_table_is_loaded_and_reported(table, caplog, store_rows):
    older, (model, index) = Older(), make(table, store_rows)
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(older.state_dict())
    assert "no frozen tables at mm, it is of a model without them: tables ['mm'] stay as they" in caplog.text
    assert torch.equal(model.dense.weight, older.dense.weight)
    assert model.look_up(index, 10, 20) == [10.0, 20.0]
    with pytest.raises(RuntimeError, match="dense.bias"):
        model.load_state_dict({"dense.weight": older.dense.weight})


@pytest.mark.parametrize("store_rows", [False, True])
def test_a_distributed_checkpoint_from_before_the_table_is_loaded_without_its_keys(
    table, tmp_path, store_rows
):
    older, (model, index) = Older(), make(table, store_rows)
    path = str(tmp_path / "checkpoint")
    dcp.save({"model": older.state_dict()}, checkpoint_id=path, no_dist=True)
    state = model.state_dict()
    own = {key: state.pop(key) for key in frozen_keys(model)}
    dcp.load({"model": state}, checkpoint_id=path, no_dist=True)
    model.load_state_dict({**state, **own})
    assert torch.equal(model.dense.weight, older.dense.weight)
    assert model.look_up(index, 10, 20) == [10.0, 20.0] and table_state(model).table_version == "v1"


def test_the_keys_of_frozen_tables_are_those_of_the_state(table):
    for store_rows in (False, True):
        model, _ = make(table, store_rows)
        assert {*frozen_keys(model), *Older().state_dict()} == set(model.state_dict())
    assert frozen_keys(Older()) == []


def test_one_process_agrees_with_itself(table):
    check_ranks(changed(table)[0])
