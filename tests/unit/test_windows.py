"""Windows and their log: written whole or not at all, once, in order, and applied by one rule."""

import errno
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mim_torchrec.embeddings.table.format import (
    DTYPES,
    DuplicateId,
    NonFiniteVector,
    TableError,
    VersionMismatch,
    decode,
)
from mim_torchrec.embeddings.windows.log import WindowLog
from mim_torchrec.embeddings.windows.window import MalformedWindow, Window, WindowGap, is_due
from tests.windows import DIM, tensor, vectors, window


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
    sys.stdin.readline()  # once for each window, or nothing at the end of the input
    log.append(f"w{k}", torch.tensor([k, 1000 + k]), torch.full((2, 8), float(k)))
    print(k, flush=True)
"""


@pytest.fixture
def start(forked, tmp_path) -> Callable[[int], subprocess.Popen]:
    """Starts a writer of the log."""

    def start(count: int) -> subprocess.Popen:
        words = ["python", "-c", WRITER, str(tmp_path / "log"), str(count)]
        environment = {**os.environ, **forked}
        return subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    return start


def check(root: Path, count: int) -> None:
    """Every window is there once, whole."""
    found = list(WindowLog(root, "v1", start=0).after(0))
    assert [w.seq for w in found] == list(range(1, count + 1))
    assert sorted(w.window_id for w in found) == sorted(f"w{k}" for k in range(count))
    for w in found:
        k = int(w.window_id[1:])
        assert w.ids.tolist() == [k, 1000 + k] and (decode(w.vectors, w.dtype) == k).all()


@pytest.mark.slow
def test_two_who_append_the_same_windows_at_once_make_one_log(start, tmp_path):
    writers = [start(200) for _ in range(2)]
    for writer in writers:
        writer.stdin.close()
    for writer in writers:
        with writer:
            writer.stdout.read()
        assert writer.returncode == 0
    check(tmp_path / "log", 200)


@pytest.mark.slow
def test_a_writer_that_is_killed_at_any_moment_loses_and_doubles_nothing(start, tmp_path):
    rng, count = random.Random(1), 130
    for _ in range(6):
        writer = start(count)
        before = rng.randint(1, 60)
        writer.stdin.write(b"\n" * (before + 60))  # it cannot end before it is killed
        writer.stdin.flush()
        for _ in range(before):  # as many windows, and then at whatever it does
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL
    writer = start(count)
    writer.communicate()
    assert writer.returncode == 0
    check(tmp_path / "log", count)


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
    for look in ("_numbers", "_forgotten_through", "_name_in"):
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
