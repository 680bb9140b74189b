"""What a thread makes ahead: the same items in order, no more than asked for, its errors, its end."""

import threading
from collections.abc import Iterator

import pytest

from mim_torchrec.data.prefetch import prefetched
from mim_torchrec.errors import OptionError


class Source:
    """Counts to a number, and remembers who asked and how it ended."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.made, self.threads, self.closed = 0, set(), False
        self.more = threading.Condition()

    def __iter__(self) -> Iterator[int]:
        try:
            for k in range(self.count):
                if k == self.fails_at:
                    raise ValueError(f"item {k} is bad")
                with self.more:
                    self.made += 1
                    self.more.notify_all()
                self.threads.add(threading.get_ident())
                yield k
        finally:
            self.closed = True

    def wait_for(self, made: int) -> None:
        with self.more:
            assert self.more.wait_for(lambda: self.made >= made, timeout=60)


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_items_come_once_and_in_order(depth, count):
    source = Source(count)
    assert list(prefetched(iter(source), depth)) == list(range(count))
    assert source.closed


def test_another_thread_is_as_far_ahead_as_asked_for():
    source = Source(20)
    items = prefetched(iter(source), 3)
    source.wait_for(3)  # nobody has asked for one
    assert next(items) == 0
    source.wait_for(4)
    assert source.made == 4  # the one taken, and three that wait
    assert source.threads and threading.get_ident() not in source.threads
    items.close()


def test_without_depth_nothing_is_ahead():
    source = Source(20)
    items = prefetched(iter(source), 0)
    assert next(items) == 0
    assert source.made == 1 and source.threads == {threading.get_ident()}


@pytest.mark.parametrize("depth", [0, 2, 9])
def test_an_error_is_raised_in_its_turn(depth):
    items = prefetched(iter(Source(20, fails_at=4)), depth)
    assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="item 4 is bad"):
        next(items)


def test_a_consumer_that_stops_ends_the_thread_and_closes_the_source():
    before, source = threading.active_count(), Source(20)
    items = prefetched(iter(source), 3)
    next(items)
    items.close()
    assert source.closed and threading.active_count() == before


def test_a_negative_depth_is_refused():
    with pytest.raises(OptionError, match="-1 batches cannot be prefetched"):
        prefetched(iter(Source(3)), -1)
