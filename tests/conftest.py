"""Every test process, and every process it starts, computes on one thread: ranks share few cores."""

import os
import uuid

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402 (it reads the environment when it loads)

from mim_torchrec.benchmarks.harness.redis_server import RedisCluster, RedisServer  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A server that all tests share, under names of their own."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def redis_url(redis_server):
    """A URL with a name of its own."""
    return f"{redis_server.url}#{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory):
    """A cluster of two servers that all tests share, under names of their own."""
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"), size=2)
    yield cluster
    cluster.kill()


@pytest.fixture
def cluster_url(redis_cluster):
    """A URL of the cluster with a name of its own."""
    return f"{redis_cluster.url}#{uuid.uuid4().hex}"
