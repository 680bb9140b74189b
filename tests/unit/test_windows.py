"""Windows and their log: written whole or not at all, once, in order, and applied by one rule."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, TableState, frozen_config
from mim_torchrec.embeddings.sharded.item_index import ItemIndex, SpareRowsExhausted
from mim_torchrec.embeddings.sharded.live import apply_window, table_state
from mim_torchrec.embeddings.sharded.load import load_table, table_digest
from mim_torchrec.embeddings.table.diff import diff
from mim_torchrec.embeddings.table.format import (
    DTYPES,
    DuplicateId,
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
from mim_torchrec.embeddings.windows.window import MalformedWindow, Window, WindowGap, is_due

ROOT = Path(__file__).parents[2]
DIM = 8


def tensor(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def window(seq: int = 1, *ids: int, removed: tuple[int, ...] = (), dtype: str = "float16", **words) -> Window:
    words = {"table_version": "v1", "window_id": f"w{seq}"} | words
    words |= {"seq": seq, "dtype": dtype, "removed": tensor(*removed)}
    return Window.of(tensor(*ids), vectors(len(ids), seq), **words)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_is_read_as_written(dtype):
    made = window(3, 7, -5, removed=(9,), dtype=dtype)
    read = Window.from_bytes(made.to_bytes(), "here")
    assert (read.table_version, read.seq, read.window_id, read.dtype, read.dim) == ("v1", 3, "w3", dtype, DIM)
    for name in ("ids", "vectors", "removed"):
        assert torch.equal(getattr(read, name), getattr(made, name)), name


def test_a_window_may_only_take_items_down():
    read = Window.from_bytes(window(1, removed=(4, 5)).to_bytes(), "here")
    assert read.ids.numel() == 0 and read.removed.tolist() == [4, 5]


def test_any_changed_or_missing_byte_is_noticed_and_the_source_named():
    data = window(1, 1, 2, removed=(3,)).to_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(len(data)), 60):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(TableError, match=r"here|window"):
            Window.from_bytes(damaged, "here")
    for length in rng.sample(range(len(data)), 20):
        with pytest.raises(MalformedWindow, match="here"):
            Window.from_bytes(data[:length], "here")


def test_what_no_table_could_hold_is_no_window():
    with pytest.raises(DuplicateId, match="item id 1 is there twice"):
        window(1, 1, 1)
    with pytest.raises(DuplicateId, match="item id 1 is there twice"):
        window(1, 1, removed=(1,))
    wrong = vectors(2)
    wrong[1, 3] = float("nan")
    with pytest.raises(NonFiniteVector, match="item id 6"):
        Window.of(tensor(5, 6), wrong, table_version="v1", seq=1, window_id="w")
    with pytest.raises(TableError, match="3 ids of float16 vectors of 8 need"):
        Window.of(tensor(1, 2, 3), vectors(2), table_version="v1", seq=1, window_id="w")


def test_the_rule():
    assert [is_due("v1", seq, "v1", 4) for seq in (1, 3, 4, 5)] == [False, False, False, True]
    with pytest.raises(WindowGap, match="window 6 comes after 4"):
        is_due("v1", 6, "v1", 4)
    for seq in (1, 5, 6):
        with pytest.raises(VersionMismatch, match="v1.*v2"):
            is_due("v2", seq, "v1", 4)


def test_the_log_numbers_windows_and_gives_them_in_order(tmp_path):
    log = WindowLog(tmp_path / "log", "v1", start=0)
    assert log.last_seq() == 0
    assert [log.append(f"w{k}", tensor(k), vectors(1, k)) for k in range(4)] == [1, 2, 3, 4]
    assert [(w.seq, w.ids.item()) for w in log.after(1)] == [(2, 1), (3, 2), (4, 3)]
    assert WindowLog(tmp_path / "log", "v1", start=0).last_seq() == 4


def test_a_window_that_is_delivered_again_keeps_its_number(tmp_path):
    log, other = (WindowLog(tmp_path / "log", "v1", start=0) for _ in range(2))
    assert log.append("first", tensor(1), vectors(1)) == 1
    assert other.append("second", tensor(2), vectors(1)) == 2
    assert log.append("second", tensor(2), vectors(1)) == 2
    assert other.append("first", tensor(1), vectors(1)) == 1
    assert log.last_seq() == 2


def test_a_log_is_of_one_version(tmp_path):
    WindowLog(tmp_path / "log", "v1", start=0).append("w", tensor(1), vectors(1))
    with pytest.raises(VersionMismatch, match="v1, expected v2"):
        WindowLog(tmp_path / "log", "v2", start=0)
    path = tmp_path / "log" / "0000000000000002.safetensors"
    path.write_bytes(window(2, 3, table_version="v9").to_bytes())
    with pytest.raises(VersionMismatch, match="v9"):
        WindowLog(tmp_path / "log", "v1", start=0).read(2)


def test_a_window_under_a_wrong_number_and_a_missing_one_are_errors(tmp_path):
    log = WindowLog(tmp_path / "log", "v1", start=0)
    (log.root / "0000000000000001.safetensors").write_bytes(window(5, 3).to_bytes())
    with pytest.raises(MalformedWindow, match="holds window 5"):
        log.read(1)
    with pytest.raises(WindowGap, match="no window 7: it keeps 1 to 1"):
        log.read(7)


def test_a_full_disk_leaves_nothing_and_the_window_can_be_appended_later(tmp_path, monkeypatch):
    log = WindowLog(tmp_path / "log", "v1", start=0)
    with monkeypatch.context() as full:

        def refuse(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

        full.setattr("os.fsync", refuse)
        with pytest.raises(OSError, match=r"no space left on device; \d+ bytes are needed, \d+"):
            log.append("w", tensor(1), vectors(1))
    assert log.last_seq() == 0
    assert [path.name for path in log.root.iterdir()] == ["log.json"]
    assert log.append("w", tensor(1), vectors(1)) == 1


WRITER = """
import sys, torch
from mim_torchrec.embeddings.windows.log import WindowLog
log = WindowLog(sys.argv[1], "v1", start=0)
for k in range(int(sys.argv[2])):
    log.append(f"w{k}", torch.tensor([k, 1000 + k]), torch.full((2, 8), float(k)))
    print(k, flush=True)
"""


def start(root: Path, count: int) -> subprocess.Popen:
    words = [sys.executable, "-c", WRITER, str(root), str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, env=environment)


def check(root: Path, count: int) -> None:
    """Every window is there once, whole."""
    found = list(WindowLog(root, "v1", start=0).after(0))
    assert [w.seq for w in found] == list(range(1, count + 1))
    assert sorted(w.window_id for w in found) == sorted(f"w{k}" for k in range(count))
    for w in found:
        k = int(w.window_id[1:])
        assert w.ids.tolist() == [k, 1000 + k] and (decode(w.vectors, w.dtype) == k).all()


@pytest.mark.slow
def test_two_who_append_the_same_windows_at_once_make_one_log(tmp_path):
    writers = [start(tmp_path / "log", 200) for _ in range(2)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    check(tmp_path / "log", 200)


@pytest.mark.slow
def test_a_writer_that_is_killed_at_any_moment_loses_and_doubles_nothing(tmp_path):
    rng, kills, count = random.Random(1), 0, 600
    for _ in range(6):
        writer = start(tmp_path / "log", count)
        for _ in range(rng.randint(1, 60)):  # as many windows, and then at whatever it does
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        kills += writer.returncode == -signal.SIGKILL
    assert kills == 6
    writer = start(tmp_path / "log", count)
    writer.communicate()
    assert writer.returncode == 0
    check(tmp_path / "log", count)


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


def test_a_line_of_forgotten_windows_that_was_broken_off_is_no_window(tmp_path):
    log = WindowLog(tmp_path / "log", "v1", start=0)
    for k in range(3):
        log.append(f"w{k}", tensor(k), vectors(1))
    (log.root / "forgotten.jsonl").write_text('\n{"seq": 1, "window_id": "w0"}\n{"seq": 2, "win')
    assert WindowLog(tmp_path / "log", "v1").append("w1", tensor(1), vectors(1)) == 2
    assert log.forget(2) == 2
    again = WindowLog(tmp_path / "log", "v1")
    assert [again.append(f"w{k}", tensor(k), vectors(1)) for k in range(4)] == [1, 2, 3, 4]


def test_a_name_that_holds_braces_may_be_broken_off_anywhere(tmp_path):
    whole = '\n{"seq": 1, "window_id": "rim:{\\"a.parquet\\": \\"3\\"}"}\n'
    for length in range(len(whole)):
        log = WindowLog(tmp_path / str(length), "v1", start=0)
        name = 'rim:{"a.parquet": "3"}'
        log.append(name, tensor(1), vectors(1))
        (log.root / "forgotten.jsonl").write_text(whole[:length])
        again = WindowLog(log.root, "v1")
        assert again.forget(1) == 1 and again.append(name, tensor(1), vectors(1)) == 1


def test_nobody_appends_behind_a_window_of_another_version(tmp_path):
    log = WindowLog(tmp_path / "log", "v1", start=0)
    log.append("w1", tensor(1), vectors(1))
    external = log.root / "0000000000000002.safetensors"
    external.write_bytes(window(2, 3, table_version="v9").to_bytes())
    for appender in (log, WindowLog(log.root, "v1")):
        with pytest.raises(VersionMismatch, match="0002.*v9.*take the file away"):
            appender.append("w2", tensor(2), vectors(1))
    external.unlink()
    assert log.append("w2", tensor(2), vectors(1)) == 2


def test_names_are_known_though_others_forget_while_one_looks(tmp_path, monkeypatch):
    log, other = (WindowLog(tmp_path / "log", "v1", start=0) for _ in range(2))
    for k in range(6):
        other.append(f"w{k}", tensor(k), vectors(1))
    for look in ("_numbers", "_forgotten", "_name_in"):
        reader, original, through = WindowLog(log.root, "v1"), getattr(WindowLog, look), [log.first_seq()]

        def look_late(self, *args, original=original, through=through):
            found = original(self, *args)
            while through:
                other.forget(through.pop())
            return found

        def look_early(self, *args, original=original, through=through):
            while through:
                other.forget(through.pop())
            return original(self, *args)

        for between in (look_late, look_early):
            through[:] = [other.first_seq()]
            with monkeypatch.context() as meanwhile:
                meanwhile.setattr(WindowLog, look, between)
                reader = WindowLog(log.root, "v1")
                assert sorted(reader.names()) == [f"w{k}" for k in range(6)]
    assert (log.last_seq(), log.first_seq()) == (6, 7)


def test_what_was_broken_off_long_ago_is_removed_by_who_forgets(tmp_path):
    log = WindowLog(tmp_path / "log", "v1", start=0)
    old, new = log.root / ".old.partial", log.root / ".new.partial"
    for path in (old, new):
        path.write_bytes(b"half a window")
    os.utime(old, (0, 0))
    log.forget(0)
    assert not old.exists() and new.exists()
