"""What every protocol of the server does with a request for scores, from its arrival to its outputs."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mim_torchrec.serving.batcher import Batcher, DeadlinePassed, QueueFull
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.guarded import StoreFailed
from mim_torchrec.serving.health import Health
from mim_torchrec.serving.messages import BadRequest, ScoreRequest, Scores
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.protocol import InferRequest
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.service import Served, Service
from mim_torchrec.serving.statistics import Spent

Body = TypeVar("Body")
Read = Callable[[Scorer], tuple[InferRequest, list[ScoreRequest]]]
Write = Callable[[InferRequest, list[Scores], str, str], Body]


class NotServed(LookupError):
    """There is no such model or version."""


class OtherVectors(ValueError):
    """The vectors are of another version than was asked for."""


FAILURES: dict[type[Exception], tuple[int, str]] = {
    BadRequest: (400, "bad_request"), NotServed: (404, "not_found"), OtherVectors: (409, "table_version"),
    QueueFull: (503, "queue_full"), StoreFailed: (503, "store"), DeadlinePassed: (504, "deadline"),
}  # fmt: skip
"""Errors that requests come to: the status of the answer over HTTP, and its cause in the metrics."""


class Inference:
    """Scores requests of clients, whatever they speak.

    Args:
        service: what is served.
        metrics: are told what happens.
        limits: of requests.
        name: of the model.
    """

    def __init__(self, service: Service, metrics: Metrics, limits: Limits, name: str) -> None:
        self.service, self.metrics, self.limits, self.name = service, metrics, limits, name
        self.batcher, self.health = Batcher(limits, metrics), Health(service)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")

    def find(self, model: str, version: str | None) -> Served:
        """What is served, if it is this model and this version of it; None is any version.

        Raises:
            NotServed: it is another.
        """
        served = self.service.current
        if model != self.name:
            raise NotServed(f"there is no model {model!r}; there is {self.name!r}")
        if version not in (None, served.model_version):
            raise NotServed(f"version {version!r} is not served; {served.model_version!r} is")
        return served

    async def infer(
        self,
        served: Served,
        read: Read,
        write: Write[Body],
        *,
        arrived: float,
        patience: float | None = None,
        aside: bool = False,
    ) -> Body:
        """Score a request.

        Args:
            served: the model.
            read: makes the message and the requests of its users.
            write: makes the answer of message, scores, name and version of the model.
            arrived: when the request came, by the clock of the event loop.
            patience: seconds from then that the client waits, as its protocol says; None where it does not.
            aside: read by a thread, so that the event loop answers meanwhile.

        Raises:
            Exception: a key of FAILURES, or what nobody expected.
        """
        loop, version, spent = asyncio.get_running_loop(), served.model_version, Spent()
        until = arrived + min(self.limits.deadline_ms / 1000, float("inf") if patience is None else patience)
        try:
            self.batcher.check_room()
            begun = time.perf_counter()
            with self.metrics.spans.part("read"):
                sent, wanted = await self._aside(read, served.scorer, until) if aside else read(served.scorer)
            spent.parts["compute_input"] = time.perf_counter() - begun
            self._check(sent, served)
            if sent.patience_ms is not None:
                until = min(until, arrived + sent.patience_ms / 1000)
            found = await self.batcher.score_all(served.scorer, wanted, until, spent)
        except Exception:
            self.metrics.statistics.add(version, loop.time() - arrived, None)
            raise
        begun = time.perf_counter()
        for one in found:
            self._count(one)
        body = write(sent, found, self.name, version)
        spent.parts["compute_output"] = time.perf_counter() - begun
        self.metrics.users.observe(len(found))
        self.metrics.statistics.add(version, loop.time() - arrived, spent, [one.was_kept for one in found])
        return body

    def close(self) -> None:
        """Score nothing any more."""
        self.batcher.close()
        self.health.close()
        self._reader.shutdown(wait=False, cancel_futures=True)
        self.service.close()

    def _check(self, sent: InferRequest, served: Served) -> None:
        """See that a message is for what is served."""
        if sent.model_name not in (None, self.name):
            raise BadRequest(f"model_name is {sent.model_name!r}; the address is of {self.name!r}")
        said, has = sent.parameters and sent.parameters.table_version, served.scorer.bundle.table_version
        if said and said != has:
            raise OtherVectors(f"the vectors are of table_version {has}, not {said}")

    def _count(self, found: Scores) -> None:
        if found.was_kept is not None:
            (self.metrics.cache_hits if found.was_kept else self.metrics.cache_misses).inc()
        self.metrics.candidates.inc(len(found.scores))
        for kind, count in found.unknown.items():
            self.metrics.unknown.labels(kind).inc(count)

    async def _aside(
        self, read: Read, scorer: Scorer, until: float
    ) -> tuple[InferRequest, list[ScoreRequest]]:
        self.batcher.reading += 1
        try:
            async with asyncio.timeout_at(until):
                return await asyncio.get_running_loop().run_in_executor(self._reader, read, scorer)
        except TimeoutError:
            raise DeadlinePassed from None
        finally:
            self.batcher.reading -= 1
