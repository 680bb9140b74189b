"""Redis behind sentinels: they do a failover, and servers, followers and logs go on without a restart."""

import pytest
import redis
from fastapi.testclient import TestClient

from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.stores.store import catch_up
from mim_torchrec.embeddings.windows.redis_address import RedisUnavailable, locate
from mim_torchrec.embeddings.windows.redis_connection import connect
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.errors import OptionError
from tests.pipeline.test_serving_failover import expected, load, log, sent  # noqa: F401
from tests.sentinels import Sentinels
from tests.serving import INFER, application, deployment, output
from tests.unit.test_windows import tensor, vectors


@pytest.fixture
def sentinels(tmp_path):
    found = Sentinels(tmp_path / "servers", count=3)
    yield found
    found.kill()


def insist(work):
    """Repeat what cannot be done while a failover lasts."""
    while True:
        try:
            return work()
        except RedisUnavailable:
            continue


def wait_until(server, role: str) -> None:
    """Until a server has a role; sentinels end its connections when they give it one."""
    while True:
        try:
            if server.client().info("replication")["role"] == role:
                return
        except (redis.ConnectionError, redis.TimeoutError):
            continue


def test_a_server_gives_right_scores_after_a_failover_by_sentinels(
    serving_folder, sent, log, expected, sentinels  # noqa: F811
):  # fmt: skip
    others = load(serving_folder, sentinels.url)
    others.apply(log.read(1))
    app, _ = application(deployment(serving_folder, store=sentinels.url, id_store=sentinels.url))
    with TestClient(app) as http:
        assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[1], abs=1e-6)
        primary, replica = sentinels.servers
        primary.client().wait(1, 0)
        primary.kill()
        while (answer := http.post(INFER, json=sent)).status_code != 200:
            assert answer.status_code == 503, answer.text
        assert output(answer.json()) == pytest.approx(expected[1], abs=1e-6)
        wait_until(replica, "master")
        assert insist(lambda: catch_up(others, log)) == 1
        assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[2], abs=1e-6)
        primary.start()  # a replica from now on
        wait_until(primary, "slave")
        assert RedisStore.open(sentinels.url, log.table_version).seq == 2
        assert output(http.post(INFER, json=sent).json()) == pytest.approx(expected[2], abs=1e-6)


def test_a_primary_that_stood_still_and_is_none_any_more_takes_no_window(tmp_path, sentinels):
    windows = open_log(f"{sentinels.url}#shop", "v1", start=0)
    windows.append("w1", tensor(1), vectors(1))
    primary, replica = sentinels.servers
    primary.client().wait(1, 0)
    with primary.paused():
        wait_until(replica, "master")
    wait_until(primary, "slave")
    assert insist(lambda: windows.append("w2", tensor(2), vectors(1))) == 2
    assert open_log(f"{sentinels.url}#shop", "v1").last_seq() == 2
    assert replica.client().keys("*shop*")


def test_servers_and_sentinels_have_passwords_of_their_own(tmp_path, monkeypatch):
    found = Sentinels(tmp_path / "servers", password="opensesame", own="simsim")
    try:
        monkeypatch.setenv("MIM_REDIS_PASSWORD", "opensesame")
        with pytest.raises(RedisUnavailable, match=f":{found.ports[0]}/vectors"):
            open_log(found.url, "v1", start=0).last_seq()
        monkeypatch.setenv("MIM_REDIS_SENTINEL_PASSWORD", "simsim")
        assert open_log(found.url, "v1", start=0).append("w1", tensor(1), vectors(1)) == 1
        monkeypatch.setenv("MIM_REDIS_PASSWORD", "wrong")
        with pytest.raises(RedisUnavailable) as refused:
            open_log(found.url, "v1").last_seq()
        assert "simsim" not in str(refused.value)
    finally:
        found.kill()


def test_a_name_that_sentinels_do_not_know_and_sentinels_that_are_away_are_unavailable(sentinels):
    with pytest.raises(RedisUnavailable, match="No master found for 'another'"):
        connect_to = sentinels.url.replace("/vectors", "/another")
        open_log(connect_to, "v1", start=0).last_seq()
    sentinels.kill()
    with pytest.raises(RedisUnavailable, match="does not answer"):
        open_log(sentinels.url, "v1", start=0).last_seq()
    for server in sentinels.servers:
        server.start()  # to be ended


def test_an_address_of_sentinels_says_which_server_is_meant():
    with pytest.raises(OptionError, match="names no server"):
        locate("redis+sentinel://one:26379,two:26379#shop")
    with pytest.raises(OptionError, match="holds a password"):
        locate("redis+sentinel://rim:word@one,two/vectors")


def test_options_of_the_url_reach_the_server_and_encryption_the_sentinels_as_well(monkeypatch):
    monkeypatch.setenv("MIM_REDIS_PASSWORD", "word")
    at = locate("rediss+sentinel://rim@one,[::1]:7000/vectors/3?ssl_ca_certs=/ca#shop")
    assert (str(at), at.user) == ("rediss+sentinel://one,[::1]:7000/vectors/3#shop", "rim")
    assert at.sentinels == [("one", 26379), ("::1", 7000)]
    pool = connect(at, timeout=1.0).connection_pool
    assert pool.connection_class.__name__ == "SentinelManagedSSLConnection" and pool.service_name == "vectors"
    assert pool.connection_kwargs["db"] == 3 and pool.connection_kwargs["ssl_ca_certs"] == "/ca"
    for one in pool.sentinel_manager.sentinels:
        assert one.connection_pool.connection_class.__name__ == "SSLConnection"
        assert one.connection_pool.connection_kwargs["ssl_ca_certs"] == "/ca"
        assert one.connection_pool.connection_kwargs["socket_timeout"] == 0.5
