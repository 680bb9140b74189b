"""Answer requests for scores over HTTP, by the Open Inference Protocol v2 (§3.5, CMD).

    python -m mim_torchrec.serving.main --bundle DIR --store TABLE --windows LOG --data DIR

The server is one process; a load balancer can distribute requests over any number of them. On SIGTERM the
server completes the requests that have begun. On SIGHUP it reads the current release at once.
"""

import ctypes
import gc
import logging
import os
import platform
import signal
import socket
import tempfile
import threading
from pathlib import Path

import torch
import tyro
import uvicorn

from mim_torchrec import program
from mim_torchrec.domains import check_domains
from mim_torchrec.errors import OptionError
from mim_torchrec.hosts import is_loopback
from mim_torchrec.serving.app import make_app
from mim_torchrec.serving.config import ServeConfig
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.page import Page
from mim_torchrec.serving.releases import ReleaseError, Releases
from mim_torchrec.serving.service import Deployment, Service

log = logging.getLogger("mim_torchrec.serving.main")  # also where it runs as __main__

LOOK_EVERY = 1.0  # seconds between two looks at the current release
BACKLOG = 2048
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def first_deployment(config: ServeConfig) -> tuple[Deployment, str | None]:
    """What to serve first, and the name of its release if it is one.

    Raises:
        OptionError: it is said in two ways or in none, or there is no current release.
    """
    if (config.release is None) == (config.bundle is None):
        raise OptionError("say what to serve: --release DIR, or --bundle DIR with --store")
    if config.release is None:
        assert config.bundle is not None
        return Deployment(bundle=config.bundle, store=config.store, id_store=config.id_store,
                    windows=config.windows), None  # fmt: skip
    releases = Releases(config.release)
    name, _ = releases.current()
    if name is None:
        raise ReleaseError(f"{config.release} has no current release: stage one and promote it")
    return releases.read(name).deployment(), name


def follow_release(root: Path, name: str, service: Service, wake: threading.Event) -> None:
    """Swap the deployment whenever another release becomes current."""
    releases, refused = Releases(root), None
    while True:
        wake.wait(LOOK_EVERY)
        wake.clear()
        try:
            current, _ = releases.current()
            if current in (None, name, refused):
                continue
            service.swap(releases.read(current).deployment())
            name, refused = current, None
        except Exception:
            refused = current
            log.exception("release %s cannot be served; %s still is", current, name)


def read_tokens(config: ServeConfig) -> frozenset[str]:
    """Tokens that requests must carry one of.

    Raises:
        OptionError: the address is beyond loopback and there are none.
    """
    tokens: frozenset[str] = frozenset()
    if config.token_file is not None:
        lines = config.token_file.read_text(encoding="utf-8").split("\n")
        tokens = frozenset(line.strip() for line in lines if line.strip())
        if not tokens:
            raise OptionError(f"{config.token_file} has no token")
    if not tokens and not is_loopback(config.host):
        raise OptionError(f"--host {config.host} can be reached by others: give --token-file")
    return tokens


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of what is freed: large results would otherwise be new pages each time.

    With another C library nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def serve(config: ServeConfig) -> None:
    """Run the server until SIGTERM."""
    check_domains(config)
    keep_freed_memory()
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    tokens = read_tokens(config)
    deployment, name = first_deployment(config)
    metrics = Metrics()
    service = Service(deployment, config.cache, metrics)
    with tempfile.TemporaryDirectory() as folder:
        page = None if config.data is None else Page(config.data, Path(folder), service)
        app = make_app(service, metrics, config.limits, name=config.name, tokens=tokens, page=page)
        if name is not None:
            wake = threading.Event()
            signal.signal(signal.SIGHUP, lambda *_: wake.set())
            follower = threading.Thread(
                target=follow_release, args=(config.release, name, service, wake), daemon=True
            )
            follower.start()
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        # asyncio sends without delay only what it knows to be TCP
        with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((config.host, config.port))
            listening.listen(BACKLOG)  # whoever reads the address below can connect to it
            port = listening.getsockname()[1]
            settings = uvicorn.Config(app, log_level="warning", access_log=False, backlog=BACKLOG,
                                      timeout_graceful_shutdown=10)  # fmt: skip
            server = uvicorn.Server(settings)

            def end(*_: object) -> None:
                server.should_exit = True

            # before uvicorn takes the signals, and after: it raises them again when it has ended
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, end)
            print(f"serving {config.name} {service.current.model_version} on http://{config.host}:{port}",
                  flush=True)  # fmt: skip
            # what is loaded stays: a collection that looked through all of it would hold up a request
            gc.collect()
            gc.freeze()
            server.run(sockets=[listening])


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``mim serve``."""
    config = tyro.cli(ServeConfig, args=argv, description=__doc__)
    program.log_to_stderr()
    serve(config)


if __name__ == "__main__":
    program.run(main)
