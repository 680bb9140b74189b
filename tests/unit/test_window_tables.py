"""Windows on tables: applied to live ones, compacted into new ones, compared and verified."""

import json
from pathlib import Path

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, TableState, frozen_config
from mim_torchrec.embeddings.sharded.live import ItemIndex, SpareRowsExhausted, apply_window, table_state
from mim_torchrec.embeddings.sharded.load import load_table, table_digest
from mim_torchrec.embeddings.table.diff import diff
from mim_torchrec.embeddings.table.format import (
    DTYPES,
    NonFiniteVector,
    Table,
    TableError,
    TableWriter,
    VersionMismatch,
    decode,
)
from mim_torchrec.embeddings.table.main import main as command
from mim_torchrec.embeddings.windows.compact import compact
from mim_torchrec.embeddings.windows.log import WindowLog
from mim_torchrec.embeddings.windows.window import Window, WindowGap
from tests.windows import DIM, tensor, vectors, window


def make_live(folder: Path, dtype: str = "float16", spare_rows: int = 10):
    """A table of items 1 to 9 and its live collection."""
    path = folder / f"table-{dtype}-{spare_rows}"
    if not path.exists():
        writer = TableWriter(
            path, table_version="v1", dim=DIM, dtype=dtype, encoder={}, spare_rows=spare_rows
        )
        writer.write_shard(torch.arange(1, 10), vectors(9))
        writer.finish()
    table = Table.open(path)
    module = FrozenEmbeddingCollection([frozen_config(table, ["item"])], device="cpu")
    load_table(module, table)
    return module, ItemIndex.of(table)


def look_up(module, index: ItemIndex, ids: torch.Tensor) -> torch.Tensor:
    features = KeyedJaggedTensor(["item"], index.rows(ids), lengths=tensor(ids.numel()))
    return module(features)["item"].values().float()


WINDOWS = (
    window(1, 3, 20, 21), window(2, 20, removed=(4,)), window(3, removed=(21, 99)), window(4, 4, 22, 1),
)  # fmt: skip


def naive(dtype: str) -> dict[int, torch.Tensor]:
    """The table after the windows, one item at a time."""
    first = Window.of(torch.arange(1, 10), vectors(9), table_version="v1", seq=1, window_id="", dtype=dtype)
    held = dict(zip(range(1, 10), decode(first.vectors, dtype), strict=True))
    for w in WINDOWS:
        stored = decode(w.stored_as(dtype), dtype)
        held |= dict(zip(w.ids.tolist(), stored, strict=True))
        for item in w.removed.tolist():
            held.pop(item, None)
    return held


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_applied_in_order_give_the_table_of_a_naive_loop(tmp_path, dtype):
    module, index = make_live(tmp_path, dtype)
    for w in WINDOWS:
        assert apply_window(module, index, w).items == w.ids.numel() + (w.removed < 99).sum()
    held, ids = naive(dtype), torch.arange(0, 30)
    expected = torch.stack([held.get(item, torch.zeros(DIM)) for item in ids.tolist()])
    torch.testing.assert_close(look_up(module, index, ids), expected, rtol=0, atol=0)
    assert table_state(module) == TableState("v1", 4)


def test_a_window_that_comes_twice_takes_effect_once_and_a_gap_none(tmp_path):
    module, index = make_live(tmp_path)
    apply_window(module, index, WINDOWS[0])
    before = table_digest(module)
    assert apply_window(module, index, WINDOWS[0]) is None
    with pytest.raises(WindowGap):
        apply_window(module, index, WINDOWS[2])
    with pytest.raises(VersionMismatch):
        apply_window(module, index, window(2, 5, table_version="v2"))
    with pytest.raises(TableError, match="has vectors of 8, window 2 of 4"):
        short = Window.of(tensor(5), torch.ones(1, 4), table_version="v1", seq=2, window_id="w")
        apply_window(module, index, short)
    assert table_digest(module) == before
    assert table_state(module) == TableState("v1", 1)


def test_a_window_without_room_changes_nothing_and_says_how_to_make_room(tmp_path):
    module, index = make_live(tmp_path, spare_rows=1)
    before = table_digest(module)
    with pytest.raises(SpareRowsExhausted, match="mim table grow"):
        apply_window(module, index, window(1, 3, 20, 21))
    assert table_digest(module) == before and len(index) == 9


def test_a_vector_that_overflows_the_tables_type_changes_nothing(tmp_path):
    module, index = make_live(tmp_path)
    large = Window.of(tensor(5), torch.full((1, DIM), 1e30), table_version="v1", seq=1, window_id="w",
                      dtype="float32")  # fmt: skip
    before = table_digest(module)
    with pytest.raises(NonFiniteVector, match="item id 5: the vector overflows float16"):
        apply_window(module, index, large)
    assert table_digest(module) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_compacting_writes_the_table_that_applying_gives(tmp_path, dtype):
    make_live(tmp_path, dtype)
    base, log = tmp_path / f"table-{dtype}-10", WindowLog(tmp_path / "log", "v1", start=0)
    for w in WINDOWS:
        log.append(w.window_id, w.ids, decode(w.vectors, w.dtype), removed=w.removed)
    made = compact(base, log.root, tmp_path / "new")
    table, held = Table.open(tmp_path / "new"), naive(dtype)
    assert table.row_index().ids.tolist() == sorted(held)
    expected = torch.stack([held[item] for item in sorted(held)])
    torch.testing.assert_close(table.read_float(table.row_index().ids), expected, rtol=0, atol=0)
    assert (made.seq, made.capacity, made.table_version) == (4, 19, "v1")
    assert compact(tmp_path / "new", log.root, tmp_path / "again").seq == 4
    again = Table.open(tmp_path / "again")
    assert torch.equal(again.read(again.row_index().ids), table.read(table.row_index().ids))
    module, index = make_live(tmp_path, dtype)
    load_table(module, table)
    index = ItemIndex.of(table)
    assert apply_window(module, index, WINDOWS[3]) is None
    assert apply_window(module, index, window(5, 50)).items == 1


def test_compacting_a_log_with_a_hole_or_of_another_version_leaves_nothing(tmp_path):
    make_live(tmp_path)
    base, log = tmp_path / "table-float16-10", WindowLog(tmp_path / "log", "v1", start=0)
    for k in range(3):
        log.append(f"w{k}", tensor(k), vectors(1))
    (log.root / "0000000000000002.safetensors").unlink()
    with pytest.raises(WindowGap, match="no window 2"):
        compact(base, log.root, tmp_path / "new")
    WindowLog(tmp_path / "foreign", "v2", start=0)
    with pytest.raises(VersionMismatch, match="v2"):
        compact(base, tmp_path / "foreign", tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


def test_the_commands_compact_and_verify(tmp_path, capsys):
    make_live(tmp_path)
    base, log = str(tmp_path / "table-float16-10"), WindowLog(tmp_path / "log", "v1", start=0)
    log.append("w", tensor(3, 20), vectors(2), removed=tensor(4))
    command(["verify", base, "--log", str(log.root)])
    assert "1 windows after 0, 2 vectors, 1 items deleted: all checksums match" in capsys.readouterr().out
    command(["compact", base, "--log", str(log.root), "--out", str(tmp_path / "new")])
    assert "windows up to 1; 9 x 8 float16" in capsys.readouterr().out


def test_the_commands_say_what_a_log_holds_and_forget_what_a_table_does(tmp_path, capsys):
    make_live(tmp_path)
    base, log = str(tmp_path / "table-float16-10"), WindowLog(tmp_path / "log", "v1", start=0)
    for k in range(3):
        log.append(f"w{k}", tensor(100 + k), vectors(1, k), removed=tensor(3))
    command(["info", base, "--log", str(log.root)])
    said = json.loads(capsys.readouterr().out)["log"]
    assert said == {"first_seq": 1, "last_seq": 3, "bytes": log.size(), "to_apply": 3}
    new = str(tmp_path / "new")
    command(["compact", base, "--log", str(log.root), "--out", new, "--forget-hours", "1"])
    assert "0 windows removed" in capsys.readouterr().out
    command(["compact", base, "--log", str(log.root), "--out", f"{new}er", "--forget-hours", "0"])
    assert "3 windows removed" in capsys.readouterr().out
    assert (log.first_seq(), log.last_seq()) == (4, 3)
    command(["diff", base, new])
    said = json.loads(capsys.readouterr().out)
    assert (said["same_version"], said["seq"], said["changed"], said["only_first"]) == (True, [0, 3], 0, 1)
    assert (said["only_second"], said["examples"]) == (3, [[3], [100, 101, 102]])


def test_diff_compares_vectors_of_one_version_and_items_of_two(tmp_path):
    def table(name: str, version: str, rows: torch.Tensor) -> Path:
        writer = TableWriter(tmp_path / name, table_version=version, dim=DIM, dtype="float32", encoder={})
        writer.write_shard(torch.arange(len(rows)), rows)
        writer.finish()
        return tmp_path / name

    rows = vectors(5)
    first = table("first", "v1", rows)
    rows[2] *= -1
    found = diff(first, table("second", "v1", rows))
    assert (found.changed, found.only_first, found.only_second) == (1, 0, 0)
    assert found.max_cosine_error == pytest.approx(2.0)
    other = diff(first, table("third", "v2", rows[:4]))
    assert (other.same_version, other.changed, other.max_cosine_error) == (False, None, None)
    assert other.only_first == 1
