"""Places of ids by ranges against a search, for ids of every kind of spread."""

import numpy as np
import pytest
import torch

from mim_torchrec.data.id_buckets import IdBuckets
from mim_torchrec.data.vocabulary import Vocabulary

LOWEST, HIGHEST = -(2**63), 2**63 - 1
KINDS = {
    "one": lambda rng: np.array([5]),
    "numbered": lambda rng: np.arange(1000, 4000),
    "with gaps": lambda rng: np.unique(rng.integers(0, 9000, 3000)),
    "hashes": lambda rng: np.unique(rng.integers(LOWEST, HIGHEST, 5000)),
    "the ends": lambda rng: np.array([LOWEST, -1, 0, HIGHEST]),
    "two kinds": lambda rng: np.concatenate([np.arange(20), 2**62 + np.arange(20)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_those_of_a_search(kind):
    rng = np.random.default_rng(0)
    ids = KINDS[kind](rng).astype(np.int64)
    near = [ids + step for step in (-1, 0, 1)]
    wanted = rng.permutation(np.concatenate([*near, rng.integers(LOWEST, HIGHEST, 3000)]))
    place = {int(one): k for k, one in enumerate(ids)}
    buckets = IdBuckets(ids)
    assert buckets.pays
    assert buckets.places(wanted).tolist() == [place.get(int(one), -1) for one in wanted]


def test_ids_in_few_narrow_ranges_are_left_to_a_search():
    ids = np.concatenate([np.arange(5000), 2**60 + np.arange(5000)])
    assert not IdBuckets(ids).pays
    rows = Vocabulary.build(ids).rows(torch.from_numpy(np.array([2**60 + 7, 4999, 5000])))
    assert rows.tolist() == [5008, 5000, 0]


def test_no_ids_have_no_places():
    buckets = IdBuckets(np.arange(10))
    assert buckets.places(np.zeros(0, np.int64)).tolist() == []
