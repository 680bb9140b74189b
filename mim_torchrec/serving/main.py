"""Answer requests for scores over HTTP, by the Open Inference Protocol v2 (§3.5, CMD).

    python -m mim_torchrec.serving.main --bundle DIR --store TABLE --windows LOG --data DIR

The server is one process or several (`workers.py`); a load balancer can distribute requests over any number
of servers. On SIGTERM it completes the requests that have begun. On SIGHUP it reads tokens and the current
release at once.
"""

import ctypes
import gc
import logging
import math
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, nullcontext
from functools import partial
from importlib.abc import MetaPathFinder
from pathlib import Path

import pyarrow as pa
import torch
import tyro
import uvicorn
from prometheus_client.multiprocess import mark_process_dead

from mim_torchrec import program
from mim_torchrec.domains import check_domains
from mim_torchrec.errors import OptionError, SetupError, Status
from mim_torchrec.hosts import is_loopback
from mim_torchrec.serving.app import make_app
from mim_torchrec.serving.config import ServeConfig
from mim_torchrec.serving.inference import Inference
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.patience import PatientProtocol
from mim_torchrec.serving.release_follower import ReleaseFollower, deployment_of
from mim_torchrec.serving.releases import ReleaseError, Releases
from mim_torchrec.serving.service import Deployment, Service
from mim_torchrec.serving.sockets import BACKLOG, address, bound, reserved
from mim_torchrec.serving.tokens import TokenFile
from mim_torchrec.serving.workers import Ready, Workers

log = logging.getLogger("mim_torchrec.serving.main")  # also where it runs as __main__

KEEP_ALIVE = 75  # seconds between two requests of a connection; load balancers keep theirs for 60
LAST = 1.0  # seconds from the last answer to the end of the process
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def first_deployment(config: ServeConfig) -> Deployment:
    """What to serve first.

    Raises:
        OptionError: it is said in two ways or in none, or there is no current release.
    """
    if (config.release is None) == (config.bundle is None):
        raise OptionError("say what to serve: --release DIR, or --bundle DIR with --store")
    if config.release is None:
        assert config.bundle is not None
        return Deployment(bundle=config.bundle, store=config.store, id_store=config.id_store,
                          windows=config.windows)  # fmt: skip
    releases = Releases(config.release)
    name, _ = releases.current()
    if name is None:
        raise ReleaseError(f"{config.release} has no current release: stage one and promote it")
    return deployment_of(releases, name)


def open_tokens(config: ServeConfig, metrics: Metrics) -> TokenFile | None:
    """Tokens that requests must carry one of; None lets all requests in.

    Raises:
        OptionError: the address is beyond loopback and there are none.
    """
    if config.token_file is not None:
        return TokenFile(config.token_file, metrics.tokens_read.set_to_current_time)
    if not is_loopback(config.host):
        raise OptionError(f"--host {config.host} can be reached by others: give --token-file")
    return None


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of what is freed: large results would otherwise be new pages each time.

    With another C library nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


class _NoPandas(MetaPathFinder):
    """Finds no pandas, nor lets others find it."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is not wanted here", name=fullname)


def without_pandas() -> None:
    """Let pyarrow find no pandas, which it asks for once to see whether values are of its types.

    It would import pandas during the first request. Others can still import it.
    """
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0]).to_numpy(zero_copy_only=False)
    finally:
        sys.meta_path.remove(finder)


def end_soon() -> None:
    """End the process in LAST seconds: Python waits for threads, and one may wait for a store for ever."""
    last = threading.Timer(LAST, os._exit, (Status.OK,))
    last.daemon = True
    last.start()


def serve(config: ServeConfig) -> None:
    """Run the server until SIGTERM."""
    check_domains(config)
    limits = config.limits
    if limits.store_timeout_ms >= limits.deadline_ms:
        raise OptionError(
            f"--limits.store-timeout-ms is {limits.store_timeout_ms:g}; it must be below "
            f"--limits.deadline-ms, which is {limits.deadline_ms:g}"
        )
    if config.encoder is not None and config.data is None:
        raise OptionError("--encoder is for the page at /, which needs --data")
    keep_freed_memory()
    without_pandas()
    with ExitStack() as held:
        http = held.enter_context(bound(config.host, config.port))
        grpc = (
            None if config.grpc_port is None else held.enter_context(reserved(config.host, config.grpc_port))
        )
        if config.workers == 1:
            work(config, http, grpc, partial(print, flush=True))
        else:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
            one = partial(work, config, http, grpc, shared=folder)
            workers = Workers(config.workers, one, "mim serve", partial(mark_process_dead, path=str(folder)))
            gc.collect()
            gc.freeze()  # a collection in a worker would copy the pages that they share
            workers.run(partial(print, flush=True))
            return
    end_soon()


def work(
    config: ServeConfig, http: socket.socket, grpc: int | None, ready: Ready, shared: Path | None = None
) -> None:
    """Serve in this process until SIGTERM.

    Args:
        config: of the server.
        http: a bound socket.
        grpc: port for gRPC; None for HTTP alone.
        ready: is told the addresses once they can be connected to.
        shared: folder of the metrics of all workers; None where there is one.
    """
    limits = config.limits
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // config.workers))
    metrics = Metrics(shared)
    tokens = open_tokens(config, metrics)
    deployment = first_deployment(config)
    service = Service(deployment, config.cache, metrics, limits.store_timeout_ms / 1000)
    on_hangup = [] if tokens is None else [tokens.reread]
    # what has begun is answered by its deadline; nothing is waited for after that
    grace = math.ceil(limits.deadline_ms / 1000)

    @asynccontextmanager
    async def beside(inference: Inference) -> AsyncIterator[None]:
        async with nullcontext() if grpc is None else _grpc(inference, tokens, config.host, grpc, grace):
            said = f"serving {config.name} {service.current.model_version}"
            by_grpc = "" if grpc is None else f" and by gRPC on {address(config.host, grpc)},"
            where = address(config.host, http.getsockname()[1])
            ready(f"{said}{by_grpc} on http://{where}")
            yield

    with tempfile.TemporaryDirectory() as folder:
        page = None
        if config.data is not None:
            from mim_torchrec.serving.page.new_item import ItemEncoder  # which decodes pictures
            from mim_torchrec.serving.page.page import Page

            version = service.current.scorer.bundle.table_version
            encoder = None if config.encoder is None else ItemEncoder(config.encoder, version)
            page = Page(config.data, Path(folder), service, limits.explain_pairs, encoder)
        inference = Inference(service, metrics, limits, config.name)
        app = make_app(inference, tokens=tokens, page=page, beside=beside)
        if config.release is not None and deployment.release is not None:
            follower = ReleaseFollower(Releases(config.release), deployment.release, service, metrics)
            on_hangup.append(follower.wake)
            threading.Thread(target=follower.run, daemon=True).start()
        signal.signal(signal.SIGHUP, lambda *_: [act() for act in on_hangup])
        http.listen(BACKLOG)  # whoever reads the address can connect to it
        settings = uvicorn.Config(app, http=PatientProtocol, ws="none", log_level="warning",
                                  access_log=False, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE,
                                  timeout_graceful_shutdown=grace)  # fmt: skip
        server = uvicorn.Server(settings)

        def end(*_: object) -> None:
            server.should_exit = True

        # before uvicorn takes the signals, and after: it raises them again when it has ended
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        # what is loaded stays: a collection that looked through all of it would hold up a request
        gc.collect()
        gc.freeze()
        server.run(sockets=[http])
        if not server.started:
            raise SetupError("the server did not start; its messages are above")


def _grpc(
    inference: Inference, tokens: TokenFile | None, host: str, port: int, grace: float
) -> AbstractAsyncContextManager[None]:
    from mim_torchrec.serving.rpc import listening  # gRPC takes memory, and threads that no fork survives

    return listening(inference, tokens, address(host, port), grace)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``mim serve``."""
    config = tyro.cli(ServeConfig, args=argv, description=__doc__)
    serve(config)


if __name__ == "__main__":
    program.run(main)
