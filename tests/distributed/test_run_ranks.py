"""The harness of the distributed tests."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def rank_and_sum(value: int) -> tuple[int, int]:
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 has no data")
    dist.barrier()


def test_every_rank_returns_its_result():
    assert run_ranks(rank_and_sum, 2, 10) == [(0, 21), (1, 21)]


def test_an_error_of_one_rank_ends_all_and_is_shown():
    with pytest.raises(RankError, match="(?s)^rank 1:.*rank 1 has no data"):
        run_ranks(fail_on_rank_1, 2)
