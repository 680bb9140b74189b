"""Redis that loses rows without an error: failover to an older copy, shards of a cluster; wrong addresses."""

import psutil
import pytest
import torch
from redis.crc import key_slot

from mim_torchrec.benchmarks.harness.redis_server import RedisCluster, RedisServer
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.stores.store import catch_up
from mim_torchrec.embeddings.table.manifest import TableLost
from mim_torchrec.embeddings.windows.redis_address import RedisUnavailable, locate
from mim_torchrec.embeddings.windows.redis_connection import connect
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.errors import OptionError
from tests.unit.test_stores import write_table
from tests.unit.test_windows import tensor, vectors


@pytest.fixture
def log(tmp_path):
    """Windows 1 and 2 of item 5."""
    made = open_log(tmp_path / "log", "v1", start=0)
    for seq in (1, 2):
        made.append(f"w{seq}", tensor(5), vectors(1, seq))
    return made


def newest(log) -> torch.Tensor:
    return log.read(2).vectors[0].float()


def test_a_replica_that_lacks_windows_gives_no_rows_until_they_are_applied_again(tmp_path, log):
    primary, replica = RedisServer(tmp_path / "primary"), RedisServer(tmp_path / "replica")
    try:
        store = RedisStore.load(primary.url, write_table(tmp_path / "table"))
        store.apply(log.read(1))
        replica.copy(primary)
        replica.cut_off()
        store.apply(log.read(2))
        assert torch.equal(store.lookup(tensor(5))[0][0], newest(log))
        replica.take_the_place_of(primary)
        for ask in (lambda: store.lookup(tensor(5)), lambda: store.lookup(tensor(7)), store.check):
            with pytest.raises(
                TableLost, match="lost windows: shard 0 is at 1 and was at 2.*mim store follow"
            ):
                ask()
        assert store.seq == 1  # the truth, from which windows are applied again
        assert catch_up(store, log) == 1
        store.check()
        assert torch.equal(store.lookup(tensor(5))[0][0], newest(log))
    finally:
        primary.kill()
        replica.kill()


def test_a_replica_that_lacks_a_base_table_gives_no_rows_until_it_is_loaded_again(tmp_path):
    primary, replica = RedisServer(tmp_path / "primary"), RedisServer(tmp_path / "replica")
    try:
        store = RedisStore.load(primary.url, write_table(tmp_path / "table"))
        replica.copy(primary)
        replica.cut_off()
        newer = write_table(tmp_path / "newer", seq=3, rows=30)
        RedisStore.load(primary.url, newer)
        assert not store.lookup(tensor(901))[1].any()
        replica.take_the_place_of(primary)
        with pytest.raises(TableLost, match="lost a base table: that of seq 0 is there, and that of 3 was"):
            store.lookup(tensor(901))
        RedisStore.load(replica.url, newer)
        assert not store.lookup(tensor(901))[1].any()
    finally:
        primary.kill()
        replica.kill()


def test_a_newer_base_may_have_fewer_windows_than_the_last(redis_url, tmp_path, log):
    store = RedisStore.load(redis_url, write_table(tmp_path / "table"))
    catch_up(store, log)
    RedisStore.load(redis_url, write_table(tmp_path / "newer", seq=1))
    store.check()
    assert store.lookup(tensor(5))[1].all() and store.seq == 1


def test_a_thread_that_sees_a_newer_base_late_sends_no_other_thread_to_the_old_one(
    redis_url, tmp_path, monkeypatch
):
    store, get = RedisStore.load(redis_url, write_table(tmp_path / "table")), RedisStore._get
    late = store._base
    newer = write_table(tmp_path / "newer", seq=3, rows=30)
    RedisStore.load(redis_url, newer)
    expected, found = store.lookup(newer.row_index().ids)

    def overtaken(self, *words):
        self._base = late  # by readiness, which had read it before
        return get(self, *words)

    monkeypatch.setattr(RedisStore, "_get", overtaken)
    again, there = store.lookup(newer.row_index().ids)
    assert torch.equal(again, expected) and torch.equal(there, found) and found.all()
    store.check()


def lose(url: str, store: RedisStore, shard: int) -> None:
    """Lose all keys of a shard."""
    client = connect(locate(url))
    for key in list(client.scan_iter(match=store._base.mark(shard) + b"*")):
        client.delete(key)


def test_shards_that_a_cluster_has_lost_are_an_error_and_loading_again_brings_them_back(
    cluster_url, tmp_path, log
):
    table = write_table(tmp_path / "table")
    store = RedisStore.load(cluster_url, table)
    catch_up(store, log)
    ids = table.row_index().ids
    expected, found = store.lookup(ids)
    shards = [0, 5, 63]
    for shard in shards:
        lose(cluster_url, store, shard)
    for ask in (store.check, lambda: store.lookup(ids), lambda: store.lookup(ids[:1])):
        with pytest.raises(TableLost, match=r"has lost shards \[0, 5, 63\]"):
            ask()
    RedisStore.load(cluster_url, table)
    # rows of the base are older than what was read before
    with pytest.raises(TableLost, match="shard 0 is at 0 and was at 2"):
        store.lookup(ids)
    catch_up(store, log)
    again, there = store.lookup(ids)
    assert torch.equal(again, expected) and torch.equal(there, found)


def test_changes_of_others_are_seen_by_the_next_lookup(redis_url, tmp_path, log):
    table = write_table(tmp_path / "table")
    store, other = RedisStore.load(redis_url, table), RedisStore.open(redis_url, "v1")
    store.lookup(tensor(5))
    before = store.seen.changes
    store.lookup(tensor(5))
    assert store.seen.changes == before
    catch_up(other, log)
    store.lookup(tensor(7))
    assert store.seen.changes > before
    log.append("w3", tensor(5), vectors(1, 3))
    before = store.seen.changes
    assert catch_up(store, log) == 1  # its own window is no change by others
    store.lookup(tensor(5))
    assert store.seen.changes == before


@pytest.mark.parametrize("read", [lambda store: store.lookup(tensor(5)), RedisStore.check])
def test_a_window_that_is_applied_while_rows_are_read_is_no_loss(redis_url, tmp_path, log, monkeypatch, read):
    store, get, pending = RedisStore.load(redis_url, write_table(tmp_path / "table")), RedisStore._get, [1]

    def overtaken(self, *words):
        found = get(self, *words)
        if pending:
            store.apply(log.read(pending.pop()))  # it is seen at once, and `found` is older
        return found

    monkeypatch.setattr(RedisStore, "_get", overtaken)
    read(store)
    assert store.seq == 1


def test_rows_of_a_slot_that_moves_to_another_server_are_found(redis_cluster, cluster_url, tmp_path, log):
    table = write_table(tmp_path / "table")
    store, ids = RedisStore.load(cluster_url, table), table.row_index().ids
    expected, found = store.lookup(ids)
    redis_cluster.move(key_slot(store._base.mark(5)))
    again, there = store.lookup(ids)
    assert torch.equal(again, expected) and torch.equal(there, found)
    assert catch_up(store, log) == 2


def test_a_cluster_that_cannot_be_made_leaves_no_server(tmp_path, monkeypatch):
    def fail(self, size):
        raise ZeroDivisionError

    monkeypatch.setattr(RedisCluster, "_divide", fail)
    with pytest.raises(ZeroDivisionError):
        RedisCluster(tmp_path / "cluster", 1)
    left = [one for one in psutil.Process().children() if str(tmp_path) in " ".join(one.cmdline())]
    assert not left


def test_an_address_of_the_other_kind_is_refused(redis_server, redis_cluster, cluster_url, tmp_path):
    table = write_table(tmp_path / "table", rows=20)
    with pytest.raises(OptionError, match=r"is no cluster: write redis://"):
        RedisStore.load(redis_server.url.replace("redis:", "redis+cluster:"), table)
    for server in redis_cluster.servers:
        with pytest.raises(OptionError, match=r"is a server of a cluster: write redis\+cluster://"):
            RedisStore.load(server.url, table)
    RedisStore.load(cluster_url, table)
    for server in redis_cluster.servers:  # one of them has what is said of the table, but not all shards
        with pytest.raises(OptionError, match=r"is a server of a cluster: write redis\+cluster://"):
            RedisStore.open(f"{server.url}#{cluster_url.partition('#')[2]}", "v1").lookup(tensor(5))


def test_a_cluster_that_is_away_is_unavailable():
    with pytest.raises(RedisUnavailable, match="does not answer"):
        RedisStore.open("redis+cluster://127.0.0.1:1", "v1", timeout=0.1)
