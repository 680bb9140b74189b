"""Dynamic batching without added delay, and deadlines that hold whatever a store does.

One thread scores. Whenever it is free, it takes all requests in the queue, up to a number of pairs. A single
request is scored at once, and batches grow with the load. The event loop watches the deadlines: a request is
answered at its deadline also while the thread waits for a store.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.explaining import explain
from mim_torchrec.serving.guarded import StoreFailed
from mim_torchrec.serving.messages import ScoreRequest, Scores
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.statistics import Spent


class QueueFull(Exception):
    """Too many requests wait."""


class DeadlinePassed(Exception):
    """A request has waited too long."""

    def __init__(self) -> None:
        super().__init__("the request was not scored before its deadline")


@dataclass
class _Waiting:
    scorer: Scorer
    requests: Sequence[ScoreRequest]
    until: float
    since: float
    spent: Spent
    answer: "asyncio.Future[list[Scores]]"
    span: Any

    @property
    def num_pairs(self) -> int:
        return sum(request.num_pairs for request in self.requests)


class Batcher:
    """Scores requests of many clients.

    Args:
        limits: of the queue and of batches.
        metrics: are told what happens.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._queue: deque[_Waiting] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._running: asyncio.Task[None] | None = None
        self.reading = 0
        """Requests whose bodies are being read, which will wait as well."""

    def check_room(self) -> None:
        """See that one more request may wait.

        Raises:
            QueueFull: too many do.
        """
        waiting = len(self._queue) + self.reading
        if waiting >= self._limits.max_queue:
            raise QueueFull(f"{waiting} requests wait already")

    async def score(self, scorer: Scorer, request: ScoreRequest, until: float | None = None) -> Scores:
        """Score one user's request, see `score_all`."""
        (found,) = await self.score_all(scorer, [request], until)
        return found

    async def score_all(
        self,
        scorer: Scorer,
        requests: Sequence[ScoreRequest],
        until: float | None = None,
        spent: Spent | None = None,
    ) -> list[Scores]:
        """Score the users of a request with a model.

        Args:
            scorer: of the model.
            requests: to score; they are answered together.
            until: when an answer is not wanted any more, by the clock of the event loop; None waits as long
                as the limits allow.
            spent: is told where the time went.

        Raises:
            QueueFull: too many wait.
            DeadlinePassed: it waited too long.
            BadRequest: see `Scorer.score`.
            StoreFailed: a store gives no rows.
        """
        self.check_room()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.deadline_ms / 1000 if until is None else until
        answer: asyncio.Future[list[Scores]] = loop.create_future()
        span = self._metrics.spans.here()
        self._queue.append(_Waiting(scorer, requests, until, loop.time(), spent or Spent(), answer, span))
        self._metrics.waiting.set(len(self._queue))
        if self._running is None:
            self._running = asyncio.create_task(self._work())
        try:
            async with asyncio.timeout_at(until):
                found = await answer
        except TimeoutError:
            raise DeadlinePassed from None
        if loop.time() > until:  # the event loop was late itself
            raise DeadlinePassed
        return found

    def close(self) -> None:
        """Score nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = self._take(loop.time())
            if not batch:
                continue
            try:
                found: list[Any] = await loop.run_in_executor(self._pool, self._score, batch)
            except BaseException as error:
                found = [error] * len(batch)
            for waiting, result in zip(batch, found, strict=True):
                if waiting.answer.done():  # its deadline has passed, or its client has gone
                    continue
                if isinstance(result, BaseException):
                    waiting.answer.set_exception(result)
                else:
                    waiting.answer.set_result(result)
        self._running = None

    def _take(self, now: float) -> list[_Waiting]:
        """What is scored together: of one model, and not too much."""
        batch: list[_Waiting] = []
        pairs = 0
        while self._queue:
            first = self._queue[0]
            dropped = first.answer.done() or now > first.until
            if not dropped and batch:
                if first.scorer is not batch[0].scorer:
                    break
                if pairs + first.num_pairs > self._limits.batch_pairs:
                    break
            self._queue.popleft()
            if dropped:
                continue  # its own timer answers
            first.spent.parts["queue"] = now - first.since
            first.spent.leads = not batch
            batch.append(first)
            pairs += first.num_pairs
        self._metrics.waiting.set(len(self._queue))
        return batch

    def _score(self, batch: list[_Waiting]) -> list[Any]:
        self._metrics.batch_size.observe(len(batch))
        scorer = batch[0].scorer
        started = time.perf_counter()
        try:
            with self._metrics.spans.together(
                "score",
                [waiting.span for waiting in batch],
                pairs=sum(waiting.num_pairs for waiting in batch),
            ):
                found = self._explained(scorer, batch, self._in_parts(scorer, batch))
        except StoreFailed as error:
            # each of them would fail alike, and wait for the store once more
            return [error] * len(batch)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            # one of them is at fault, and the others are not to suffer; those that are late are not tried
            return [
                DeadlinePassed() if waiting.answer.done() else self._score([waiting])[0] for waiting in batch
            ]
        took = time.perf_counter() - started
        for waiting in batch:
            waiting.spent.parts["compute_infer"] = took
        scores = iter(found)
        return [[next(scores) for _ in waiting.requests] for waiting in batch]

    def _explained(self, scorer: Scorer, batch: list[_Waiting], found: list[Scores]) -> list[Scores]:
        """Scores with the explanations that were asked for and are still waited for."""
        requests = ((waiting, request) for waiting in batch for request in waiting.requests)
        return [
            replace(scores, explanation=explain(scorer, request))
            if request.explain and not waiting.answer.done()
            else scores
            for (waiting, request), scores in zip(requests, found, strict=True)
        ]

    def _in_parts(self, scorer: Scorer, batch: list[_Waiting]) -> list[Scores]:
        """Scores of all users of a batch, of no more pairs at once than the limits say.

        Raises:
            DeadlinePassed: nobody waits for what is left.
        """
        found: list[Scores] = []
        part: list[ScoreRequest] = []
        pairs = 0
        for request in (request for waiting in batch for request in waiting.requests):
            if part and pairs + request.num_pairs > self._limits.batch_pairs:
                found += scorer.score(part)
                part, pairs = [], 0
                if all(waiting.answer.done() for waiting in batch):
                    raise DeadlinePassed
            part.append(request)
            pairs += request.num_pairs
        return found + list(scorer.score(part))
