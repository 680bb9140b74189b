"""Dynamic batching: requests are scored together, refused when too many or too late, and told apart."""

import asyncio
import threading

import pytest
import torch

from mim_torchrec.serving.batcher import Batcher, DeadlinePassed, QueueFull
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.guarded import StoreFailed
from mim_torchrec.serving.messages import ScoreRequest
from mim_torchrec.serving.metrics import Metrics


class Slow:
    """A scorer that waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go, self.batches = threading.Event(), threading.Event(), []

    def score(self, requests):
        self.batches.append(len(requests))
        self.begun.set()
        self.go.wait()
        return [request.request_ts for request in requests]


def ask(number: int) -> ScoreRequest:
    return ScoreRequest(ids={"candidate_item_id": torch.ones(10), "behavior_item_id": torch.ones(10)},
                        request_ts=number)  # fmt: skip


def test_what_waits_is_scored_together_and_what_is_too_much_or_too_late_refused():
    async def run() -> None:
        batcher, scorer = Batcher(Limits(max_queue=5, batch_pairs=300), Metrics()), Slow()
        far = asyncio.get_running_loop().time() + 60
        first = asyncio.create_task(batcher.score(scorer, ask(0), far))
        await asyncio.to_thread(scorer.begun.wait)
        late = asyncio.create_task(batcher.score(scorer, ask(9), asyncio.get_running_loop().time()))
        waiting = [asyncio.create_task(batcher.score(scorer, ask(k), far)) for k in (1, 2, 3, 4)]
        # tasks run in the order in which they were made, so that this one comes after those that wait
        await asyncio.create_task(asyncio.to_thread(threading.Event().is_set))
        with pytest.raises(QueueFull, match="5 requests wait"):
            await batcher.score(scorer, ask(5))
        scorer.go.set()
        assert [await task for task in (first, *waiting)] == [0, 1, 2, 3, 4]
        with pytest.raises(DeadlinePassed):
            await late
        assert scorer.batches == [1, 3, 1]
        batcher.close()

    asyncio.run(run())


def test_one_bad_request_of_a_batch_does_not_harm_the_others():
    class Picky:
        def score(self, requests):
            if any(request.request_ts == 2 for request in requests):
                raise ValueError("two")
            return [request.request_ts for request in requests]

    async def run() -> list:
        batcher, scorer = Batcher(Limits(), Metrics()), Picky()
        tasks = [asyncio.create_task(batcher.score(scorer, ask(k))) for k in range(4)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(run())
    assert [found[0], found[1], found[3]] == [0, 1, 3] and isinstance(found[2], ValueError)


def test_a_batch_is_not_split_where_a_store_fails():
    class Gone:
        asked = 0

        def score(self, requests):
            self.asked += 1
            if self.asked > 1:
                raise StoreFailed("gone")
            return [request.request_ts for request in requests]

    async def run() -> list:
        batcher, scorer = Batcher(Limits(), Metrics()), Gone()
        tasks = [asyncio.create_task(batcher.score(scorer, ask(k))) for k in range(4)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        again = [asyncio.create_task(batcher.score(scorer, ask(k))) for k in range(4)]
        found += await asyncio.gather(*again, return_exceptions=True)
        return [*found, scorer.asked]

    *found, asked = asyncio.run(run())
    assert found[:4] == [0, 1, 2, 3] and all(isinstance(error, StoreFailed) for error in found[4:])
    assert asked == 2
