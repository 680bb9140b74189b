"""The window log through both transports: the same promises, whoever carries it."""

import os
import random
import signal
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
import torch

from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.embeddings.stores.store import follow
from mim_torchrec.embeddings.table.format import TableError, VersionMismatch
from mim_torchrec.embeddings.windows.progress import name_of, positions_of
from mim_torchrec.embeddings.windows.redis_address import RedisFull, RedisUnavailable, locate
from mim_torchrec.embeddings.windows.redis_connection import connect
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.embeddings.windows.window import MalformedWindow, WindowGap
from mim_torchrec.errors import OptionError
from tests.windows import DIM, tensor, vectors, window


@pytest.fixture(params=["directory", "redis", "cluster"])
def where(request, tmp_path):
    """A place for a log."""
    if request.param == "directory":
        return str(tmp_path / "log")
    return request.getfixturevalue(f"{request.param}_url")


def test_windows_are_numbered_from_the_base_on_and_read_in_order(where):
    log = open_log(where, "v1", start=7)
    assert (log.last_seq(), log.first_seq(), list(log.after(7))) == (7, 8, [])
    assert [log.append(f"w{k}", tensor(k, k + 50), vectors(2, k)) for k in range(40)] == list(range(8, 48))
    read = list(open_log(where, "v1").after(9))
    assert [(w.seq, w.ids[0].item(), w.window_id) for w in read] == [
        (k + 8, k, f"w{k}") for k in range(2, 40)
    ]
    assert torch.equal(read[0].vectors, vectors(2, 2).half())
    assert (log.last_seq(), log.first_seq()) == (47, 8) and log.size() > 40 * 2 * DIM * 2


def test_a_name_is_added_once_even_when_its_window_was_forgotten(where):
    log = open_log(where, "v1", start=0)
    for k in range(5):
        log.append(f"w{k}", tensor(k), vectors(1))
    assert log.forget(3, min_age=3600) == 0
    assert log.forget(3) == 3
    assert (log.first_seq(), log.last_seq()) == (4, 5)
    for other in (log, open_log(where, "v1")):
        assert [other.append(f"w{k}", tensor(k), vectors(1)) for k in range(5)] == [1, 2, 3, 4, 5]
    assert [w.seq for w in log.after(3)] == [4, 5]
    with pytest.raises(WindowGap, match="no window 3: it keeps 4 to 5"):
        list(log.after(2))
    assert log.forget(5) == 2
    assert (log.first_seq(), log.last_seq()) == (6, 5)
    assert log.append("w5", tensor(1), vectors(1)) == 6


def test_a_window_whose_name_was_trimmed_is_not_added_again(where, monkeypatch):
    for module in ("forgotten", "redis_log"):
        monkeypatch.setattr(f"mim_torchrec.embeddings.windows.{module}.MOST_NAMES", 3)
    log, reader = (open_log(where, "v1", start=0) for _ in range(2))

    def name(first: int, second: int) -> str:
        return name_of({"topic/0": str(first), "topic/1": f"{second}-0"})

    for k in range(1, 9):
        log.append(name(k, 10 * k), tensor(k), vectors(1))
        log.append(f"another's {k}", tensor(k), vectors(1))
        if k in (2, 8):
            assert reader.append(name(k, 10 * k), tensor(1), vectors(1)) == 2 * k - 1
    names = log.names()
    for through in (6, 13):
        log.forget(through)
        assert positions_of(log.names()) == positions_of(names) == {"topic/0": "8", "topic/1": "80-0"}
    for one in (log, reader, open_log(where, "v1")):
        assert len([n for n in one.names() if n.startswith("rim:")]) == 2  # the last one's, and the rest
        assert [one.append(name(k, 10 * k), tensor(1), vectors(1)) for k in (1, 3, 7, 8)] == [13, 13, 13, 15]
        assert one.append(f"another's {2}", tensor(1), vectors(1)) == 4
        assert (one.last_seq(), one.first_seq()) == (16, 14)
    assert log.append(name(7, 81), tensor(1), vectors(1)) == 17  # further in one unit
    assert reader.append(name_of({"topic/2": "1"}), tensor(1), vectors(1)) == 18


def test_a_log_that_is_missing_of_another_version_or_behind_its_reader_is_an_error(where):
    with pytest.raises(TableError, match="no window log"):
        open_log(where, "v1")
    log = open_log(where, "v1", start=0)
    with pytest.raises(VersionMismatch, match="v1, expected v2"):
        open_log(where, "v2", start=0)
    with pytest.raises(WindowGap, match="ends at window 0, but 3 windows were applied"):
        list(log.after(3))


def test_waiting_ends_when_a_window_comes(where):
    log = open_log(where, "v1", start=0)
    assert not log.wait(0, timeout=0.01)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(log.wait, 0, 30.0)
        open_log(where, "v1").append("w", tensor(1), vectors(1))
        assert waiting.result()
    assert log.wait(0, timeout=0.01)


def test_many_writers_at_once_leave_every_window_once(where):
    open_log(where, "v1", start=0)

    def write(writer: int) -> None:
        log = open_log(where, "v1")
        for k in range(20):
            log.append(f"w{k}", tensor(k), torch.full((1, DIM), float(k)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = list(open_log(where, "v1").after(0))
    assert [w.seq for w in found] == list(range(1, 21))
    assert sorted(w.window_id for w in found) == sorted(f"w{k}" for k in range(20))
    assert all(w.ids.item() == int(w.window_id[1:]) == w.vectors[0, 0].item() for w in found)


WRITER = """
import sys, torch
from mim_torchrec.embeddings.windows.transport import open_log
log = open_log(sys.argv[1], "v1", start=0)
for k in range(30):
    sys.stdin.readline()  # once for each window, or nothing at the end of the input
    log.append(f"w{k}", torch.tensor([k]), torch.full((1, 8), float(k)))
    print(k, flush=True)
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_again_and_again_adds_every_window_once(where, forked):
    rng, words, environment = random.Random(0), ["python", "-c", WRITER, where], {**os.environ, **forked}
    for _ in range(3):
        writer = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        before = rng.randrange(1, 14)
        writer.stdin.write(b"\n" * (before + 10))  # it cannot end before it is killed
        writer.stdin.flush()
        for _ in range(before):
            writer.stdout.readline()
        writer.kill()
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL
    subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, check=True)
    found = list(open_log(where, "v1").after(0))
    assert [w.window_id for w in found] == [f"w{k}" for k in range(30)]
    assert [w.seq for w in found] == list(range(1, 31))


def test_damaged_and_malformed_entries_of_a_stream_are_named(redis_url):
    log = open_log(redis_url, "v1", start=0)
    at = locate(redis_url)
    stream, client = f"{{{at.name}}}:windows", connect(at)
    client.xadd(stream, {"window": window(1, 3).to_bytes()[:-2]}, id="1-0")
    client.xadd(stream, {"window": window(5, 3).to_bytes()}, id="2-0")
    client.xadd(stream, {"window": window(3, 3, table_version="v9").to_bytes()}, id="3-0")
    client.xadd(stream, {"other": b""}, id="4-0")
    for seq, error, match in (
        (1, MalformedWindow, "entry 1-0"),
        (2, MalformedWindow, "entry 2-0 holds window 5"),
        (3, VersionMismatch, "entry 3-0 is of v9"),
        (4, MalformedWindow, "entry 4-0"),
    ):
        with pytest.raises(error, match=match):
            log.read(seq)


class Applied:
    """A store that remembers what it was given."""

    table_version, dim = "v1", DIM

    def __init__(self) -> None:
        self.seq, self.reached = 0, Event()

    def apply(self, window):
        assert window.seq == self.seq + 1
        self.seq = window.seq
        if self.seq == 4:
            self.reached.set()
        return True


def test_a_follower_waits_for_a_server_that_is_gone_and_goes_on(tmp_path):
    server = RedisServer(tmp_path / "redis")
    try:
        where, store, stop = f"{server.url}#{uuid.uuid4().hex}", Applied(), Event()
        log = open_log(where, "v1", start=0)
        follower = Thread(target=follow, args=(store, open_log(where, "v1"), stop))
        follower.start()
        log.append("w1", tensor(1), vectors(1))
        log.append("w2", tensor(1), vectors(1))
        server.kill()
        with pytest.raises(RedisUnavailable, match="does not answer"):
            log.append("w3", tensor(1), vectors(1))
        server.start()
        assert [log.append(f"w{k}", tensor(1), vectors(1)) for k in (1, 2, 3, 4)] == [1, 2, 3, 4]
        assert store.reached.wait(60)
        stop.set()
        follower.join()
        assert store.seq == 4
    finally:
        server.kill()


def test_a_server_without_memory_refuses_a_window_and_keeps_what_it_has(tmp_path):
    server = RedisServer(tmp_path / "redis", "--maxmemory", "6mb")
    try:
        log = open_log(server.url, "v1", start=0)
        with pytest.raises(RedisFull, match="no memory left"):
            for k in range(100):
                log.append(f"w{k}", torch.arange(2000), torch.zeros(2000, 64))
        last = log.last_seq()
        assert 0 < last < 99
        server.client().config_set("maxmemory", "100mb")
        assert log.append(f"w{last}", tensor(1), vectors(1)) == last + 1
    finally:
        server.kill()


def test_passwords_come_from_a_file_or_the_environment_and_are_not_in_messages(tmp_path, monkeypatch):
    server = RedisServer(
        tmp_path / "redis", "--requirepass", "opensesame", url="redis://:opensesame@127.0.0.1:{port}"
    )
    secret = tmp_path / "secret"
    host = f"127.0.0.1:{server.port}"
    by_file = f"redis://rim@{host}?password_file={secret}#shop"
    try:
        server.client().acl_setuser("rim", enabled=True, passwords=["+word"], commands=["+@all"],
                                    keys=["{shop}*"])  # fmt: skip
        secret.write_text("word\n")
        log = open_log(by_file, "v1", start=0)
        assert log.append("w", tensor(1), vectors(1)) == 1
        # a password that is changed is read again with the next connection
        server.client().acl_setuser("rim", enabled=True, passwords=["+other", "-word"])
        secret.write_text("other")
        server.client().client_kill_filter(_type="normal")
        assert log.append("x", tensor(2), vectors(1)) == 2
        monkeypatch.setenv("MIM_REDIS_PASSWORD", "other")
        assert open_log(f"redis://rim@{host}#shop", "v1").last_seq() == 2
        monkeypatch.setenv("MIM_REDIS_PASSWORD", "opensesame")
        assert open_log(f"redis://{host}#shop", "v1").last_seq() == 2
        (tmp_path / "default").write_text("opensesame")
        monkeypatch.setenv("MIM_REDIS_PASSWORD_FILE", str(tmp_path / "default"))
        monkeypatch.setenv("MIM_REDIS_PASSWORD", "wrong")
        assert open_log(f"redis://{host}#shop", "v1").last_seq() == 2
    finally:
        server.kill()
    with pytest.raises(RedisUnavailable) as gone:
        open_log(by_file, "v1")
    assert "other" not in str(gone.value) and host in str(gone.value)


@pytest.mark.parametrize("where", ["redis://rim:word@here#shop", "rediss://:word@here", "redis://here?password=word",
                                   "redis+cluster://a:word@here:7000"])  # fmt: skip
def test_a_url_with_a_password_is_refused_without_repeating_it(where):
    with pytest.raises(OptionError, match="holds a password") as refused:
        open_log(where, "v1")
    assert "word@" not in str(refused.value) and "MIM_REDIS_PASSWORD" in str(refused.value)


def test_a_user_without_a_password_and_a_file_that_is_not_there_are_named(tmp_path):
    with pytest.raises(OptionError, match="has the user rim and no password"):
        open_log("redis://rim@here", "v1")
    with pytest.raises(OptionError, match="its password cannot be read"):
        open_log(f"redis://here?password_file={tmp_path}/none", "v1")


def test_tls_by_url(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {certificate} -subj /CN=here"
    )
    words = [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(words, check=True, capture_output=True)
    words = f"--port 0 --tls-auth-clients no --tls-cert-file {certificate} --tls-key-file {key}".split()
    server = RedisServer(tmp_path / "redis", *words, tls=True,
                         url=f"rediss://127.0.0.1:{{port}}?ssl_ca_certs={certificate}")  # fmt: skip
    try:
        assert open_log(f"{server.url}#shop", "v1", start=0).append("w", tensor(1), vectors(1)) == 1
    finally:
        server.kill()


@pytest.mark.parametrize("where", ["http://host", "redis://host#{a}"])
def test_what_is_no_url_of_redis_is_refused(where):
    with pytest.raises(ValueError, match="none of|braces"):
        open_log(where, "v1")
