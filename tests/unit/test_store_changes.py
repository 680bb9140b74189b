"""What windows of others have changed in Redis: exactly their items, or an answer that nobody can tell."""

import pytest
import torch
from redis.exceptions import NoPermissionError

from mim_torchrec.embeddings.stores import redis_rows
from mim_torchrec.embeddings.stores.redis_rows import APPLY
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.stores.seen import REMEMBERED, Seen
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.windows.compact import compact
from mim_torchrec.embeddings.windows.transport import open_log
from tests.unit.test_stores import window, write_table
from tests.unit.test_windows import tensor, vectors


@pytest.fixture(params=["redis", "cluster"])
def url(request):
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def pair(url, tmp_path):
    """A reader that has read everything, and a writer of the same rows."""
    writer = RedisStore.load(url, write_table(tmp_path / "table"))
    reader = RedisStore.open(url, "v1")
    reader.lookup(tensor(5))
    return reader, writer


def changed(reader: RedisStore) -> set[int] | None:
    """What others have changed since the last lookup, as the next one finds."""
    before = reader.seen.changes
    reader.lookup(tensor(5))
    found = reader.seen.changed_since(before)
    return None if found is None else set(found.tolist())


def test_items_of_windows_of_others_are_known(pair):
    reader, writer = pair
    assert changed(reader) == set()
    writer.apply(window(1, *range(450), removed=(495,)))  # several parts
    assert changed(reader) == {*range(450), 495}
    assert changed(reader) == set()
    writer.apply(window(2, 3, -7))
    writer.apply(window(3))
    writer.apply(window(4, 2**62, removed=(3,)))
    assert changed(reader) == {3, -7, 2**62}


def test_a_reader_that_falls_behind_the_list_knows_nothing(pair, monkeypatch):
    reader, writer = pair
    monkeypatch.setattr(redis_rows, "PARTS", 3)
    for seq in range(1, 4):
        writer.apply(window(seq, 64 * seq))  # of one shard
    assert changed(reader) == {64, 128, 192}
    for seq in range(4, 8):
        writer.apply(window(seq, 64 * seq))
    assert changed(reader) is None
    writer.apply(window(8, 1))
    assert changed(reader) == {1}


def test_a_window_of_a_writer_that_leaves_no_items_is_not_overlooked(pair):
    reader, writer = pair
    writer.apply(window(1, 1))
    writer.apply(window(2, 2))
    for shard in range(writer._base.shards):
        writer._client.rpop(writer._base.changes(shard))
    writer.apply(window(3, 3))
    assert changed(reader) is None


def test_a_part_that_is_written_again_is_listed_once(redis_url, tmp_path):
    writer = RedisStore.load(redis_url, write_table(tmp_path / "table"))
    reader = RedisStore.open(redis_url, "v1")
    reader.lookup(tensor(5))
    large = window(1, *range(450))
    values = [row.view(torch.uint8).numpy().tobytes() for row in large.vectors]
    parts = list(writer._base.commands(large, values, [0]))
    for number in (0, 0, 1, 0, 1):
        writer._client.eval(APPLY, len(parts[number][0]), *parts[number][0], *parts[number][1])
    assert writer._client.llen(writer._base.changes(0)) == 2
    assert changed(reader) == set()  # the watermark has not moved
    assert writer.apply(large)
    assert changed(reader) == set(range(450))


def test_a_newer_base_table_may_change_all_items(redis_url, tmp_path):
    writer = RedisStore.load(redis_url, write_table(tmp_path / "table"))
    reader, log = RedisStore.open(redis_url, "v1"), open_log(tmp_path / "log", "v1", start=0)
    reader.lookup(tensor(5))
    log.append("w1", tensor(5), vectors(1, 1))
    compact(tmp_path / "table", tmp_path / "log", tmp_path / "newer")
    RedisStore.load(redis_url, Table.open(tmp_path / "newer"))
    assert changed(reader) is None
    assert writer.apply(window(2, 4)) and changed(reader) == {4}


def test_where_the_list_cannot_be_read_the_next_lookup_asks_again(redis_url, tmp_path, monkeypatch):
    writer = RedisStore.load(redis_url, write_table(tmp_path / "table"))
    reader = RedisStore.open(redis_url, "v1")
    reader.lookup(tensor(5))
    writer.apply(window(1, 3))
    pipeline, before = reader._client.pipeline, reader.seen.changes

    def away(*args, **words):
        made = pipeline(*args, **words)
        monkeypatch.setattr(made, "lrange", lambda *_: (_ for _ in ()).throw(ConnectionError("away")))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(reader._client, "pipeline", away)
        with pytest.raises(ConnectionError):
            reader.lookup(tensor(5))
    assert reader.seen.changes == before
    assert changed(reader) == {3}


def test_a_user_who_may_not_read_the_list_is_told_so(redis_url, tmp_path, monkeypatch, caplog):
    writer = RedisStore.load(redis_url, write_table(tmp_path / "table"))
    reader = RedisStore.open(redis_url, "v1")
    reader.lookup(tensor(5))
    pipeline = reader._client.pipeline

    def refused(*args, **words):
        made = pipeline(*args, **words)
        monkeypatch.setattr(made, "lrange", lambda *_: (_ for _ in ()).throw(NoPermissionError("LRANGE")))
        return made

    monkeypatch.setattr(reader._client, "pipeline", refused)
    for seq in (1, 2):
        writer.apply(window(seq, 3))
        assert changed(reader) is None
    assert caplog.text.count("may not use LRANGE") == 1


def test_changes_that_are_not_remembered_any_more_are_of_any_item():
    seen = Seen()
    seen.note(0, {0: 0})
    begun = seen.changes
    for seq in range(1, REMEMBERED + 1):
        seen.note(0, {0: seq}, tensor(seq))
    found = seen.changed_since(begun)
    assert found is not None and found.tolist() == list(range(1, REMEMBERED + 1))
    seen.note(0, {0: REMEMBERED + 1}, tensor(9))
    assert seen.changed_since(begun) is None
    last = seen.changed_since(seen.changes - 1)
    assert last is not None and last.tolist() == [9]
