"""Which GPU a rank takes, by what it sees; no GPU is needed to know."""

import pytest

from mim_torchrec.errors import SetupError
from mim_torchrec.training.distributed import device_number, refuse_shared_device


@pytest.mark.parametrize(("local_rank", "visible", "number"), [(0, 1, 0), (1, 1, 0), (0, 8, 0), (5, 8, 5)])
def test_a_rank_takes_its_own_or_the_only_one(monkeypatch, local_rank, visible, number):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert device_number(visible) == number


def test_a_rank_without_one_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SetupError, match="local rank 2 has no GPU, the machine has 2"):
        device_number(2)


def test_ranks_that_share_one_are_refused():
    places = ["a gpu-1", "a gpu-2", "b gpu-1", "a gpu-1"]
    for rank in (1, 2):
        refuse_shared_device(places, rank)
    with pytest.raises(SetupError, match=r"ranks \[0, 3\] on a have one GPU together"):
        refuse_shared_device(places, 3)
