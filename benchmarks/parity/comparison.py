"""Builds each configuration with TorchRec's collection and with ours, on every rank, and judges both.

A configuration is built unsharded, and sharded on one rank or on all ranks, by turns. What needs one process
is divided over the ranks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torchrec.distributed.types import ShardingEnv
from tqdm import tqdm

from mim_torchrec.benchmarks.parity.configurations import Configuration, Stored, batch, draw, rows_of
from mim_torchrec.benchmarks.parity.differences import Case, judge
from mim_torchrec.benchmarks.parity.outcomes import (
    Outcome,
    expanded,
    frozen_collection,
    outcome_of,
    shard,
    torchrec_collection,
)

STEPS = 2  # the first batch decides what TorchRec's sharded collections remember


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a configuration that was built in one way."""

    seed: int
    way: str
    kind: str
    detail: str


def compare(seeds: Iterable[int]) -> list[Verdict]:
    """Judge configurations on this rank, together with all ranks of the default group.

    Args:
        seeds: of the configurations, the same on every rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([each]) for each in range(world_size)][rank]
    one = ShardingEnv(world_size=1, rank=0, pg=alone)
    everyone = ShardingEnv.from_process_group(dist.group.WORLD)
    verdicts = []
    for seed in tqdm(seeds, desc="configurations", disable=True if rank else None):
        configuration = draw(seed)
        together = configuration.ranks > 1 and world_size > 1
        if not together and seed % world_size != rank:
            continue
        rows = rows_of(configuration)
        reference = _look_up(configuration, rows, torchrec_collection, None)
        ways = {"unsharded": None, "all ranks" if together else "one rank": everyone if together else one}
        for way, env in ways.items():
            verdicts.append(_judge(configuration, rows, way, env, reference))
    return verdicts


def _judge(
    configuration: Configuration, rows: Stored, way: str, env: ShardingEnv | None, reference: Outcome
) -> Verdict:
    theirs = reference if env is None else _look_up(configuration, rows, torchrec_collection, env)
    ours = _look_up(configuration, rows, frozen_collection, env)
    if env is not None:
        features = batch(configuration, dist.get_rank(), STEPS - 1)
        reference = expanded(configuration, reference, features)
    case = Case(configuration=configuration, way=way, theirs=theirs, ours=ours, reference=reference)
    kind, detail = judge(case)
    return Verdict(seed=configuration.seed, way=way, kind=kind, detail=detail)


def _look_up(
    configuration: Configuration,
    rows: Stored,
    build: Callable[[Configuration, Stored], nn.Module],
    env: ShardingEnv | None,
) -> Outcome:
    def make() -> nn.Module:
        module = build(configuration, rows)
        return module if env is None else shard(module, configuration, rows, env)

    batches = [batch(configuration, dist.get_rank(), step) for step in range(STEPS)]
    found = outcome_of(make, batches)
    if env is not None and env.world_size > 1:
        dist.barrier()  # where it fails, one rank raised and the others wait for it
    return found
