"""Dynamic batching without added delay.

One thread scores. Whenever it is free, it takes all requests in the queue, up to a number of pairs. A single
request is scored at once, and batches grow with the load.
"""

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.scorer import Scorer, ScoreRequest, Scores


class QueueFull(Exception):
    """Too many requests wait."""


class DeadlinePassed(Exception):
    """A request has waited too long."""


@dataclass
class _Waiting:
    scorer: Scorer
    request: ScoreRequest
    until: float
    answer: "asyncio.Future[Scores]"


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

    async def score(self, scorer: Scorer, request: ScoreRequest, timeout_ms: float | None) -> Scores:
        """Score a request with a model.

        Raises:
            QueueFull: too many wait.
            DeadlinePassed: it waited too long.
            BadRequest: see `Scorer.score`.
            RedisUnavailable: likewise.
        """
        if len(self._queue) >= self._limits.max_queue:
            raise QueueFull(f"{len(self._queue)} requests wait already")
        patience = min(timeout_ms or self._limits.deadline_ms, self._limits.deadline_ms) / 1000
        answer: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(scorer, request, time.monotonic() + patience, answer))
        self._metrics.waiting.set(len(self._queue))
        if self._running is None:
            self._running = asyncio.create_task(self._work())
        return await answer

    def close(self) -> None:
        """Score nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = self._take()
            if not batch:
                continue
            try:
                found: list[Any] = await loop.run_in_executor(self._pool, self._score, batch)
            except BaseException as error:
                found = [error] * len(batch)
            for waiting, result in zip(batch, found, strict=True):
                if waiting.answer.done():  # its client has gone
                    continue
                if isinstance(result, BaseException):
                    waiting.answer.set_exception(result)
                else:
                    waiting.answer.set_result(result)
        self._running = None

    def _take(self) -> list[_Waiting]:
        """What is scored together: of one model, and not too much."""
        batch: list[_Waiting] = []
        pairs = 0
        while self._queue:
            first = self._queue[0]
            late = time.monotonic() > first.until
            if not late and batch:
                if first.scorer is not batch[0].scorer:
                    break
                if pairs + first.request.num_pairs > self._limits.batch_pairs:
                    break
            self._queue.popleft()
            if first.answer.done():
                continue
            if late:
                first.answer.set_exception(DeadlinePassed("the request has waited too long"))
                continue
            batch.append(first)
            pairs += first.request.num_pairs
        self._metrics.waiting.set(len(self._queue))
        return batch

    def _score(self, batch: list[_Waiting]) -> list[Any]:
        self._metrics.batch_size.observe(len(batch))
        scorer = batch[0].scorer
        try:
            return scorer.score([waiting.request for waiting in batch])
        except Exception as error:
            if len(batch) == 1:
                return [error]
            # one of them is at fault, and the others are not to suffer
            return [result for waiting in batch for result in self._score([waiting])]
