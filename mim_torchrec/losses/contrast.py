"""Softmax contrast of queries with the items of all ranks (Eq. 5, ST-NSG), for losses to be built from.

Items stay on their rank, and so does a queue of earlier ones. Queries are gathered, each rank scores all of
them against its own items tile by tile, and the partial log-sum-exps go back to the rank of the query. The
gradient is the exact one of the global loss when gradients are averaged over ranks, as DDP does. Not here:
which levels there are, how they are weighed, and what is queued.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import Tensor, nn
from torch.nn import functional as F

from mim_torchrec.errors import OptionError
from mim_torchrec.losses.tiled import LeftOut, tiled_logsumexp

MAX_SCALE = 100.0
START_TEMPERATURE = 0.07


class InfoNCE(NamedTuple):
    """Of one query level against one item level."""

    loss: Tensor
    """Mean over this rank's queries; the mean of that over ranks is the global loss."""
    accuracy: Tensor
    """Share of this rank's queries whose positive scores higher than every negative."""
    negatives: Tensor
    """Mean number of items in the denominator besides the positive."""


class Level(NamedTuple):
    """Unit vectors that are contrasted, see `unit`."""

    query: Tensor
    """(N, dim). Levels that share this tensor gather it once."""
    items: Tensor
    """(num_items, dim), the positives of the N queries first."""
    queue: Tensor | None = None
    """(num_queued, dim) of any floating type, further negatives, which get no gradient."""


class ScaledLoss(nn.Module):
    """A loss of cosines that are multiplied by s, the inverse of a temperature.

    Args:
        temperature: 1 / s, fixed; 1 is Eq. 5 as printed. None learns s from 1 / 0.07, at most 100.

    Raises:
        OptionError: the temperature is not positive.
    """

    def __init__(self, temperature: float | None) -> None:
        super().__init__()
        if temperature is not None and temperature <= 0:
            raise OptionError(f"temperature is {temperature}; it must be positive")
        log_scale = torch.tensor(-math.log(START_TEMPERATURE if temperature is None else temperature))
        if temperature is None:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def scale(self) -> Tensor:
        """s, ()."""
        if self.training and isinstance(self.log_scale, nn.Parameter):
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(MAX_SCALE))
        return self.log_scale.exp()


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1, in float32 or float64."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)


def contrast(
    levels: Sequence[Level],
    item_ids: Tensor,
    scale: Tensor,
    *,
    own_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    mask_same_item: bool = True,
    balance_queue: bool = False,
) -> list[InfoNCE]:
    """Eq. 5 with cosine similarity for every level; every rank calls it with as many queries.

    Args:
        levels: vectors of the same queries and items.
        item_ids: (num_items,) int64.
        scale: () factor of the cosines.
        own_ids: (N,) item id of each query, or -1 where it is no item.
        queue_ids: (num_queued,) int64.
        mask_same_item: leave out columns that hold the query's positive item once more, or the query's own
            item. False counts them as negatives, as the paper's formula does.
        balance_queue: give items, as negatives, the gradient that they will not get while they are queued:
            that of this step times (num_items + num_queued) / num_items. Losses are the same.

    Returns:
        One entry a level.

    Raises:
        ValueError: on every rank, where the ranks' batches differ in size or ids do not fit their items.
    """
    count = len(levels[0].query)
    group, rank, world_size = None, 0, 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        group, rank, world_size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    _refuse_unequal(levels[0], item_ids, group)
    # the same tensor for two levels is gathered once
    queries = {id(level.query): level.query for level in levels}
    wanted = [item_ids[:count]] if own_ids is None else [item_ids[:count], own_ids]
    same = torch.stack(wanted, dim=1)
    if group is not None:
        queries = {key: fc.all_gather_single_autograd(query, 0, group) for key, query in queries.items()}
        same = fc.wait_tensor(fc.all_gather_single(same, 0, group))
    mine = torch.arange(count, device=same.device)
    positive = torch.full_like(same[:, 0], -1).index_copy(0, rank * count + mine, mine)
    blocks = [LeftOut(item_ids, same if mask_same_item else None, positive)]
    if queue_ids is not None:
        blocks.append(LeftOut(queue_ids, same if mask_same_item else None))

    partial, hardest = [], []
    for level in levels:
        vectors = [level.items]
        if level.queue is not None:
            share = len(level.queue) / len(level.items)
            vectors = [_more_gradient(level.items, share) if balance_queue else level.items, level.queue]
        parts = [
            tiled_logsumexp(queries[id(level.query)], items, scale.to(level.query.dtype), left_out)
            for items, left_out in zip(vectors, blocks, strict=True)
        ]
        partial.append(torch.stack([part.logsumexp for part in parts], dim=1))
        hardest.append(torch.stack([part.hardest for part in parts], dim=1).amax(1))
    negatives = torch.stack([block.remaining(len(same)) for block in blocks]).sum(0)
    of_others = torch.stack(partial, dim=1)
    facts = torch.stack([*hardest, negatives.to(hardest[0].dtype)], dim=1)
    if group is not None:
        of_others = fc.all_to_all_single_autograd(of_others, None, None, group)
        facts = fc.wait_tensor(fc.all_to_all_single(facts, None, None, group))
    of_others = of_others.view(world_size, count, len(levels), len(blocks))
    facts = facts.view(world_size, count, len(levels) + 1)
    negatives = facts[..., -1].sum(0).mean()

    results = []
    for number, level in enumerate(levels):
        score = scale.to(level.query.dtype) * (level.query * level.items[:count]).sum(1)
        # the positive stands in every denominator, so that no sum is empty and no gradient of one is nan
        terms = of_others[:, :, number].transpose(0, 1).reshape(count, -1)
        loss = torch.logsumexp(torch.cat([score[:, None], terms], dim=1), dim=1) - score
        accuracy = (score.detach() > facts[..., number].amax(0)).to(score.dtype).mean()
        results.append(InfoNCE(loss.mean(), accuracy, negatives))
    return results


def _more_gradient(vectors: Tensor, share: float) -> Tensor:
    """The same vectors, whose gradient counts 1 + share times."""
    return vectors + share * (vectors - vectors.detach())


def _refuse_unequal(level: Level, item_ids: Tensor, group: dist.ProcessGroup | None) -> None:
    """Collectives of unequal sizes hang or mix up rows, so that sizes are compared first, on every rank."""
    sizes = torch.tensor([[len(level.query), len(level.items), len(item_ids), level.query.shape[1]]])
    if group is not None:
        memory = sizes.device in group._device_types  # a GPU would have to be waited for
        sizes = fc.wait_tensor(fc.all_gather_single(sizes if memory else sizes.to(item_ids.device), 0, group))
    rows = sizes.tolist()
    for rank, (queries, items, ids, _) in enumerate(rows):
        if items < queries or items != ids:
            raise ValueError(
                f"rank {rank} has {queries} queries, {items} items and {ids} item ids; every query needs its "
                "positive among the items, and every item its id"
            )
    if any(row != rows[0] for row in rows):
        shown = "; ".join(f"rank {rank}: {row[0]}, {row[1]}, {row[3]}" for rank, row in enumerate(rows))
        raise ValueError(f"the ranks have batches of different sizes (queries, items, dim): {shown}")
