"""Every test process, and every process it starts, computes on one thread: ranks share few cores."""

import gc
import logging
import multiprocessing.context
import os
import sys
import uuid
from contextlib import ExitStack
from multiprocessing import get_context

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process: each of a pool would load torch
os.environ["JDK_JAVA_OPTIONS"] = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # Spark runs for seconds

import pytest  # noqa: E402
import torch  # noqa: E402 (it reads the environment when it loads)

from tests import line_coverage  # noqa: E402

line_coverage.measure()  # what is imported from here on

from mim_torchrec.benchmarks.harness.redis_server import RedisCluster, RedisServer  # noqa: E402
from tests.forked import forked_programs  # noqa: E402
from tests.ranks import start_fork_server  # noqa: E402

torch.set_num_threads(1)

LONG = (
    # those on Slurm, of chaos and of the image wait most of the time
    "test_doc_pages",
    "test_slurm_faults",
    "test_chaos",
    "test_slurm_stages",
    "test_image",
    "test_prepare_demo",
    "test_elastic",
    "test_ctr_benchmarks",
    "test_demo",
    "test_prepare_spark",
    "test_registry",
    "test_ctr_ranks",
    "test_liveness",
    "test_csft_resume",
    "test_stage_resume",
    "test_bench_input",
    "test_extras",
    "test_rim_main",
    "test_pretrain_main",
    "test_doctor",
    "test_faults",
    "test_frozen_traced",
)
"""Files that take longest, in the order in which they begin."""
FORKED = pytest.StashKey[dict[str, str]]()
FOLDERS = ("cluster", "pipeline", "pretended_gpu", "distributed", "unit")


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU; long files come first: no process is left alone with one of them at the end."""

    def rank(item):
        name, folder = item.path.stem, item.path.parent.name
        place = LONG.index(name) if name in LONG else len(LONG)
        return place, FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)

    items.sort(key=rank)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


def pytest_collection_finish():
    """Leave what is loaded out of collections of garbage, which would walk all modules again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Processes that run tests side by side have one fork server of commands: it takes seconds to load."""
    if FORKED not in node.config.stash:
        programs = ExitStack()
        node.config.stash[FORKED] = programs.enter_context(forked_programs())
        node.config.add_cleanup(programs.close)
    node.workerinput["forked"] = node.config.stash[FORKED]


@pytest.fixture(autouse=True)
def not_silenced():
    """A program that has run in this process may have silenced the package, or all loggers."""
    logging.disable(logging.NOTSET)
    package = logging.getLogger("mim_torchrec")
    if package.level > logging.INFO:
        package.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def forked(request):
    """Variables of an environment whose `python`, `mim`, `torchrun` and `torchx` come from a fork server."""
    with ExitStack() as programs:
        if hasattr(request.config, "workerinput"):  # of the processes side by side
            yield request.config.workerinput["forked"]
        else:
            yield programs.enter_context(forked_programs())


@pytest.fixture(scope="module")
def forked_stages(forked):
    """Lets the fork server run what this process starts as `sys.executable`, and the stages of pipelines."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("MIM_PYTHON", "PYTHON_EXEC"):
            patched.setenv(name, forked[name])
        patched.setattr(sys, "executable", forked["MIM_PYTHON"])
        yield


@pytest.fixture(scope="module")
def forked_workers():
    """Lets the fork server of `multiprocessing` make the processes that this one spawns."""
    start_fork_server()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(multiprocessing.context._concrete_contexts, "spawn", get_context("forkserver"))
        yield


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


@pytest.fixture(scope="session")
def object_store_server():
    """A server of the S3 protocol that all tests share."""
    from tests.object_store import ObjectStore

    server = ObjectStore()
    yield server
    server.close()


@pytest.fixture
def object_store(object_store_server, monkeypatch, tmp_path):
    """The server, with credentials in the environment and a local cache of the test's own."""
    for name, value in object_store_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    object_store_server.puts.clear()
    yield object_store_server
    object_store_server.refuse = object_store_server.hide = None
    object_store_server.ignore_conditions = False


@pytest.fixture
def store_url(object_store):
    """A URL in it with a name of its own."""
    return f"s3://shops/{uuid.uuid4().hex}"
