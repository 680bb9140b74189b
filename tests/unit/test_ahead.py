"""Results computed ahead by threads: their order, their errors, and how far ahead."""

import threading

import pytest

from mim_torchrec.representation.ahead import ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_inputs(threads):
    assert list(ahead(lambda x: x * x, range(20), threads=threads, depth=4)) == [x * x for x in range(20)]


def test_whoever_takes_results_does_not_compute_them():
    names = set(ahead(lambda _: threading.current_thread().name, range(8), threads=2, depth=2))
    assert names and all(name.startswith("ahead") for name in names)


def test_several_are_computed_at_once():
    both = threading.Barrier(2, timeout=60)  # passes only when two are in it
    assert len(list(ahead(lambda _: both.wait(), range(4), threads=2, depth=2))) == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_inputs_are_taken_no_further_ahead_than_asked(threads):
    taken = []

    def inputs():
        for k in range(20):
            taken.append(k)
            yield k

    results = ahead(lambda x: x, inputs(), threads=threads, depth=4)
    for k in range(5):
        assert next(results) == k
        assert len(taken) <= k + 1 + 4


def test_an_error_is_raised_in_its_turn_and_the_rest_is_not_begun():
    begun = []

    def fail(x):
        begun.append(x)
        if x == 3:
            raise ValueError("three")
        return x

    results = ahead(fail, range(100), threads=1, depth=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert max(begun) < 10


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="-1 threads"):
        ahead(abs, [1], threads=-1, depth=1)
    with pytest.raises(ValueError, match="0 results ahead"):
        ahead(abs, [1], threads=1, depth=0)
