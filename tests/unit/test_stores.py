"""Parameter stores: rows as the table and its windows say, in this process, in Redis and in a cluster."""

import json
import random
import signal
import subprocess
from pathlib import Path
from threading import Event

import pytest
import torch

from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.embeddings.stores.embedded import EmbeddedStore
from mim_torchrec.embeddings.stores.main import main as command
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.stores.store import catch_up, follow, open_store
from mim_torchrec.embeddings.table.format import DTYPES, Table, TableError, TableWriter, VersionMismatch
from mim_torchrec.embeddings.table.quantize import decode, encode
from mim_torchrec.embeddings.windows.compact import compact
from mim_torchrec.embeddings.windows.redis_address import RedisFull, locate
from mim_torchrec.embeddings.windows.redis_connection import connect
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.embeddings.windows.window import Window, WindowGap
from tests.said import said
from tests.unit.test_packaging import ROOT
from tests.unit.test_windows import DIM, tensor, vectors, window

ROWS = 500


def write_table(
    path: Path, dtype: str = "float16", rows: int = ROWS, seq: int = 0, version: str = "v1"
) -> Table:
    """A table of items -5, -3, … in two shards."""
    ids, stored = torch.arange(rows) * 2 - 5, encode(vectors(rows, seed=9), dtype)
    writer = TableWriter(path, table_version=version, dim=DIM, dtype=dtype, encoder={}, seq=seq)
    for part in (slice(0, rows // 2), slice(rows // 2, rows)):
        writer.write_shard(ids[part], stored[part])
    writer.finish()
    return Table.open(path)


@pytest.fixture(params=["embedded", "redis", "cluster"])
def make(request):
    """Put a table into a store."""
    if request.param == "embedded":
        return EmbeddedStore
    url = request.getfixturevalue(f"{request.param}_url")
    return lambda table: RedisStore.load(url, table)


def expect(store, expected: dict[int, torch.Tensor], ids: list[int]) -> None:
    found_vectors, found = store.lookup(torch.tensor(ids, dtype=torch.int64))
    assert found_vectors.dtype == torch.float32 and found_vectors.shape == (len(ids), DIM)
    for item, vector, is_found in zip(ids, found_vectors, found.tolist(), strict=True):
        assert is_found == (item in expected), item
        assert torch.equal(vector, expected.get(item, torch.zeros(DIM))), item


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_table_bit_for_bit(make, tmp_path, dtype):
    table = write_table(tmp_path / "table", dtype)
    ids = table.row_index().ids
    held = dict(zip(ids.tolist(), table.read_float(ids), strict=True))
    store = make(table)
    expect(store, held, [-5, 3, 3, 4, 10**12, -4, 993, 995, -(2**63), 2**63 - 1])
    expect(store, held, [])
    assert torch.equal(store.lookup(ids)[0], table.read_float(ids))
    assert (store.dim, store.table_version, store.seq) == (DIM, "v1", 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_change_what_they_name_and_nothing_else(make, tmp_path, dtype):
    table = write_table(tmp_path / "table", dtype)
    store, rng = make(table), random.Random(1)
    held = dict(zip(table.row_index().ids.tolist(), table.read_float(table.row_index().ids), strict=True))
    for seq in range(1, 12):
        named = rng.sample(range(-10, 1200), 450 if seq == 5 else 60)
        ids, gone = named[:-7], named[-7:]
        w = Window.of(tensor(*ids), vectors(len(ids), seq), table_version="v1", seq=seq, window_id=f"w{seq}",
                      dtype=dtype, removed=tensor(*gone))  # fmt: skip
        assert store.apply(w) and not store.apply(w)
        held |= dict(zip(ids, decode(w.vectors, dtype), strict=True))
        for item in gone:
            held.pop(item, None)
        expect(store, held, named)
        assert store.seq == seq
    expect(store, held, list(range(-10, 1200)))


def test_the_rule_holds(make, tmp_path):
    store = make(write_table(tmp_path / "table", seq=3))
    assert store.seq == 3 and not store.apply(window(3, 1))
    with pytest.raises(WindowGap, match="window 5 comes after 3"):
        store.apply(window(5, 1))
    with pytest.raises(VersionMismatch, match="v1.*v2"):
        store.apply(window(4, 1, table_version="v2"))
    short = Window.of(tensor(1), torch.ones(1, 4), table_version="v1", seq=4, window_id="w")
    with pytest.raises(TableError, match="has vectors of 8, window 4 of 4"):
        store.apply(short)
    assert store.seq == 3 and store.apply(window(4, 1))


def test_a_store_catches_up_with_a_log(make, tmp_path):
    store, log = make(write_table(tmp_path / "table")), open_log(tmp_path / "log", "v1", start=0)
    for k in range(5):
        log.append(f"w{k}", tensor(k), vectors(1, k))
    assert (catch_up(store, log), catch_up(store, log), store.seq) == (5, 0, 5)


def test_the_overlay_does_not_grow_with_windows_of_the_same_items(tmp_path):
    store = EmbeddedStore(write_table(tmp_path / "table"))
    for seq in range(1, 200):
        store.apply(window(seq, *range(50)))
    assert store._overlay.rows.shape[0] <= 1024
    expect(store, dict(enumerate(window(199, *range(50)).vectors.float())), [0, 49])


def test_a_reader_of_an_older_overlay_keeps_what_it_saw(tmp_path):
    store = EmbeddedStore(write_table(tmp_path / "table"))
    store.apply(window(1, 7))
    before = store._overlay
    for seq in range(2, 60):
        store.apply(window(seq, *range(100)))
    assert torch.equal(before.rows[before.layers[0].places[0]], window(1, 7).vectors[0])


def test_many_windows_of_some_items_each_leave_the_last_vector_of_each(tmp_path):
    store, draw = EmbeddedStore(write_table(tmp_path / "table")), random.Random(1)
    expected: dict[int, torch.Tensor] = {}
    base = store.lookup(torch.arange(300))
    for seq in range(1, 150):
        items = draw.sample(range(300), draw.randrange(12))
        gone = items[::3]
        one = window(seq, *(item for item in items if item not in gone), removed=gone)
        store.apply(one)
        expected |= dict(zip(one.ids.tolist(), one.vectors.float(), strict=True))
        expected |= dict.fromkeys(gone, None)
    whole = {k: row for k, row in enumerate(base[0]) if base[1][k]} | expected
    expect(store, {k: row for k, row in whole.items() if row is not None}, list(range(300)))
    assert len(store._overlay.layers) <= 4


def test_a_consumer_that_was_overtaken_writes_nothing(redis_url, tmp_path):
    table = write_table(tmp_path / "table")
    slow, fast = RedisStore.load(redis_url, table), RedisStore.open(redis_url, "v1")
    commands = list(slow._base.commands(window(1, 3), [b"old" * 8], [0]))
    assert fast.apply(window(1, 3)) and fast.apply(window(2, 3))
    from mim_torchrec.embeddings.stores.redis_store import APPLY

    for keys, arguments in commands:
        assert slow._client.eval(APPLY, len(keys), *keys, *arguments) == 0
    expect(slow, {3: window(2, 3).vectors[0].float()}, [3])
    assert not slow.apply(window(1, 3)) and slow.apply(window(3, 4))


def test_no_part_of_a_window_is_written_before_the_parts_ahead_of_it(redis_url, tmp_path):
    from mim_torchrec.embeddings.stores.redis_store import APPLY

    store = RedisStore.load(redis_url, write_table(tmp_path / "table"))
    large = window(1, *range(450), removed=(495,))
    values = [row.view(torch.uint8).numpy().tobytes() for row in large.vectors]
    parts = list(store._base.commands(large, values, [0]))

    def send(*numbers: int) -> list[int]:
        return [store._client.eval(APPLY, len(parts[k][0]), *parts[k][0], *parts[k][1]) for k in numbers]

    assert len(parts) == 3 and send(1, 2) == [0, 0] and store.seq == 0
    assert send(0, 2, 0, 1) == [1, 0, 1, 1] and store.seq == 0
    assert send(0, 2) == [1, 1] and store.seq == 1  # another one's first part takes nothing back
    assert send(0, 1, 2) == [0, 0, 0] and not store.apply(large)
    expect(store, dict(zip(range(450), large.vectors.float(), strict=True)), [*range(450), 495])
    assert store.apply(window(2, 7))


def test_what_a_load_that_broke_off_has_left_is_removed_by_the_next(redis_url, tmp_path, monkeypatch):
    RedisStore.load(redis_url, write_table(tmp_path / "table"))
    newer = write_table(tmp_path / "newer", seq=2, rows=30)
    with monkeypatch.context() as broken:
        broken.setattr(RedisStore, "_drop_older", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            RedisStore.load(redis_url, newer)
    store, at = RedisStore.load(redis_url, newer), locate(redis_url)
    assert len(list(connect(at).scan_iter(match=f"{{{at.name}*"))) == 2 + 30 and store.seq == 2


def test_a_follower_waits_for_a_disk_or_a_server_that_is_full(tmp_path, monkeypatch, caplog):
    store, log = EmbeddedStore(write_table(tmp_path / "table")), open_log(tmp_path / "log", "v1", start=0)
    log.append("w1", tensor(1), vectors(1))
    stop, errors = Event(), [OSError(5, "the disk is away"), RedisFull("no memory left")]
    original = store.apply

    def apply(made):
        if errors:
            raise errors.pop(0)
        stop.set()
        return original(made)

    monkeypatch.setattr(store, "apply", apply)
    monkeypatch.setattr("mim_torchrec.embeddings.stores.store.WAIT", 0.01)
    follow(store, log, stop)
    assert store.seq == 1 and "the disk is away; trying again" in caplog.text


def test_a_newer_base_takes_the_place_of_the_old_one_under_readers(redis_url, tmp_path):
    table = write_table(tmp_path / "table")
    store, log = RedisStore.load(redis_url, table), open_log(tmp_path / "log", "v1", start=0)
    log.append("w1", tensor(-5), vectors(1), removed=tensor(-3))
    log.append("w2", tensor(10**9), vectors(1, 1))
    compact(tmp_path / "table", tmp_path / "log", tmp_path / "newer")
    RedisStore.load(redis_url, Table.open(tmp_path / "newer"))
    assert store.seq == 2
    found = store.lookup(tensor(-5, -3, 10**9))
    assert found[1].tolist() == [True, False, True]
    assert torch.equal(found[0][0], vectors(1)[0].half().float())
    with pytest.raises(TableError, match="newer base, of seq 2"):
        RedisStore.load(redis_url, table)
    at = locate(redis_url)
    keys = list(connect(at).scan_iter(match=f"{{{at.name}*"))
    assert len(keys) == 2 + ROWS  # nothing of the old base is left


def test_two_versions_lie_beside_each_other(redis_url, tmp_path):
    old = RedisStore.load(redis_url, write_table(tmp_path / "old"))
    RedisStore.load(redis_url, write_table(tmp_path / "new", version="v2", rows=10))
    assert (old.lookup(tensor(900))[1].item(), old.lookup(tensor(901))[1].item()) == (False, True)
    assert not open_store(redis_url, "v2").lookup(tensor(901))[1].item()
    with pytest.raises(TableError, match="no table of table_version v3"):
        open_store(redis_url, "v3")
    with pytest.raises(ValueError, match="several versions"):
        open_store(redis_url)
    with pytest.raises(VersionMismatch, match="v1, expected v2"):
        open_store(tmp_path / "old", "v2")


def test_a_server_that_may_drop_rows_is_refused(tmp_path):
    server = RedisServer(tmp_path / "redis", "--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(TableError, match="may drop rows.*allkeys-lru"):
            RedisStore.load(server.url, write_table(tmp_path / "table"))
    finally:
        server.kill()


def test_a_server_that_may_drop_rows_from_now_on_is_noticed(tmp_path, caplog):
    server = RedisServer(tmp_path / "redis", "--maxmemory", "50mb")
    try:
        store = RedisStore.load(server.url, write_table(tmp_path / "table"))
        server.client().config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(TableError, match="may drop rows.*allkeys-lru.*loaded again"):
            _ = store.seq
        with pytest.raises(TableError, match="may drop rows"):
            RedisStore.open(server.url, "v1")
        server.client().config_set("maxmemory-policy", "noeviction")
        assert store.seq == 0
        server.client().acl_setuser("default", commands=["-info"])
        assert (store.seq, store.seq) == (0, 0)
        assert [line.split(": ", 1)[1][:27] for line in said(caplog, "embeddings.stores.redis_store")] == [
            "this user may not ask INFO;"
        ]
    finally:
        server.kill()


def test_rows_that_a_server_has_lost_are_an_error(redis_url, tmp_path):
    store = RedisStore.load(redis_url, write_table(tmp_path / "table"))
    connect(locate(redis_url)).delete(store._base.mark(0))
    with pytest.raises(TableError, match="has lost shards"):
        store.apply(window(1, 3))


def test_the_commands_load_follow_and_check(redis_url, tmp_path, capsys):
    write_table(tmp_path / "table")
    table, log = str(tmp_path / "table"), open_log(tmp_path / "log", "v1", start=0)
    command(["load", table, "--store", redis_url])
    assert "500 rows of table_version v1, windows up to 0" in capsys.readouterr().out
    log.append("w1", tensor(1, 2), vectors(2), removed=tensor(3))
    with pytest.raises(SystemExit) as behind:
        command(["check", table, "--store", redis_url, "--log", str(log.root)])
    assert behind.value.code == 3
    report = json.loads(capsys.readouterr().out)
    assert report == {"rows": 501, "missing": 1, "surplus": 1, "wrong": 1, "seq": 0, "log_seq": 1}
    command(["follow", "--store", redis_url, "--log", str(log.root), "--table-version", "v1", "--once"])
    assert "windows applied up to 1" in capsys.readouterr().out
    command(["check", table, "--store", redis_url, "--log", str(log.root)])
    assert json.loads(capsys.readouterr().out)["seq"] == 1


@pytest.mark.slow
def test_the_follower_ends_at_sigterm_and_survives_sigkill(forked, redis_url, tmp_path):
    write_table(tmp_path / "table")
    RedisStore.load(redis_url, Table.open(tmp_path / "table"))
    log = open_log(redis_url, "v1", start=0)
    words = [forked["MIM_PYTHON"], "-m", "mim_torchrec.embeddings.stores.main", "follow",
             "--store", redis_url, "--log", redis_url, "--table-version", "v1"]  # fmt: skip
    store = open_store(redis_url, "v1")
    for number in (signal.SIGKILL, signal.SIGTERM):
        follower = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        seq = log.append(f"w{number}", tensor(int(number)), vectors(1))
        while store.seq < seq:
            assert follower.poll() is None
        follower.send_signal(number)
        said, _ = follower.communicate()
        assert follower.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    assert "windows applied up to 2" in said
