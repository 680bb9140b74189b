"""Builds each configuration with TorchRec's collection and with ours, on every rank, and judges both.

A configuration is built unsharded, and sharded on as many ranks as it says.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

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
    """What came of a configuration that was built in one way; ``theirs`` is TorchRec's error, or ""."""

    seed: int
    way: str
    kind: str
    detail: str
    theirs: str


def compare(seeds: Iterable[int]) -> list[Verdict]:
    """Judge those configurations that are for as many ranks as the default group has.

    Args:
        seeds: of the configurations, the same on every rank.

    Returns:
        What this rank found.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    env = ShardingEnv.from_process_group(cast(dist.ProcessGroup, dist.group.WORLD))
    verdicts = []
    for seed in tqdm(seeds, desc=f"{world_size} ranks", disable=True if rank else None):
        configuration = draw(seed)
        if configuration.ranks != world_size:
            continue
        rows = rows_of(configuration)
        reference = _look_up(configuration, rows, torchrec_collection, None)
        try:
            verdicts.append(_judge(configuration, rows, None, reference))
            verdicts.append(_judge(configuration, rows, env, reference))
        except Exception as error:
            raise RuntimeError(f"rank {rank}, seed {seed}: {configuration}") from error
    return verdicts


def _judge(
    configuration: Configuration, rows: Stored, env: ShardingEnv | None, reference: Outcome
) -> Verdict:
    way = "unsharded" if env is None else f"sharded on {env.world_size}"
    ours = _look_up(configuration, rows, frozen_collection, env)
    if env is not None:
        features = batch(configuration, dist.get_rank(), STEPS - 1)
        reference = expanded(configuration, reference, features)
    if env is None or _crashes(configuration):
        theirs = reference
    else:
        theirs = _look_up(configuration, rows, torchrec_collection, env)
    case = Case(configuration=configuration, way=way, theirs=theirs, ours=ours, reference=reference)
    kind, detail = judge(case)
    return Verdict(
        seed=configuration.seed, way=way, kind=kind, detail=detail, theirs=repr(theirs.error or "")
    )


def _crashes(configuration: Configuration) -> bool:
    """Whether TorchRec's sharded collection may end the process.

    Its ``_vbe_reindex`` has ended with SIGSEGV in fbgemm's ``permute_1D_sparse_data``, once in some thousand
    lookups. Ours is compared with the unsharded collection instead, whose bags are repeated by a loop.
    """
    return configuration.variable_batch and not (configuration.pooled or configuration.fault)


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
