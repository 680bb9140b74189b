"""Multi-level InfoNCE over the items of all ranks (Eq. 5–6, ST-NSG with k = 0).

Items stay on their rank. Queries are gathered, each rank scores all of them against its own items, and the
partial log-sum-exps go back to the rank of the query. The gradient is the exact one of the global loss when
gradients are averaged over ranks, as DDP does. Not here: tiles that avoid the matrix of logits, and queues of
the last k batches.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import Tensor, nn
from torch.nn import functional as F

MAX_SCALE = 100.0


class InfoNCE(NamedTuple):
    """Of one query level against one item level."""

    loss: Tensor
    """Mean over this rank's queries; the mean of that over ranks is the global loss."""
    accuracy: Tensor
    """Share of this rank's queries whose positive scores higher than every negative."""
    negatives: Tensor
    """Mean number of items in the denominator besides the positive."""


class MultiLevelInfoNCE(nn.Module):
    r"""Contrasts query images with what items are, look like and say.

    .. math:: L = L(h_q^{img}, h^{MM}) + \alpha L(h_q^{img}, h^{txt}) + \beta L(h_q^{img}, h^{img})
    .. math:: L(q, h) = -\log \frac{\exp(s \cos(q, h_+))}{\sum_j \exp(s \cos(q, h_j))}

    j runs over the positives and the hard negatives of all P ranks, N each: 2NP - 1 negatives, less those
    that are the query's own positive item or the query itself.

    Args:
        alpha: weight of the titles.
        beta: weight of the images.
        gamma: weight of a level beyond the paper, for queries that are items themselves: the query's h^MM
            against the item's h^MM, so that the vectors CiUBM compares with each other are trained for it.
        temperature: 1 / s, fixed; 1 is Eq. 5 as printed. None learns s from 1 / 0.07, at most 100.
        mask_same_item: leave out columns that hold the query's positive item once more, or the query's own
            item. False counts them as negatives, as the paper's formula does.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 0.0,
        temperature: float | None = None,
        mask_same_item: bool = True,
    ) -> None:
        super().__init__()
        if temperature is not None and temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.mask_same_item = mask_same_item
        log_scale = torch.tensor(math.log(1 / (0.07 if temperature is None else temperature)))
        if temperature is None:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(
        self,
        query: Tensor,
        mm: Tensor,
        text: Tensor,
        image: Tensor,
        item_ids: Tensor,
        query_ids: Tensor | None = None,
        query_mm: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this rank's N pairs; every rank has as many.

        Args:
            query: (N, d) h_q^img.
            mm: (2N, d) h^MM of the positives and, after them, of the hard negatives.
            text: (2N, d) h^txt likewise.
            image: (2N, d) h^img likewise.
            item_ids: (2N,) int64 likewise.
            query_ids: (N,) item id of each query, or -1 where it is no item.
            query_mm: (N, d) h^MM of the queries, for gamma.

        Returns:
            The loss, and `accuracy` and `negatives` of the first level, `scale`, and each level's loss.
        """
        if self.training and isinstance(self.log_scale, nn.Parameter):
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(MAX_SCALE))
        scale = self.log_scale.exp()
        if query_ids is None:
            query_ids = torch.full_like(item_ids[: len(query)], -1)
        levels = [
            ("mm", 1.0, query, mm),
            ("text", self.alpha, query, text),
            ("image", self.beta, query, image),
        ]
        if self.gamma:
            if query_mm is None:
                raise ValueError("gamma needs query_mm: the queries must be items")
            levels.append(("item", self.gamma, query_mm, mm))
        report: dict[str, Tensor] = {"scale": scale.detach()}
        total = query.new_zeros(())
        for name, weight, source, items in levels:
            if not weight:
                continue
            result = info_nce(source, items, item_ids, query_ids, scale, self.mask_same_item)
            total = total + weight * result.loss
            report[f"loss_{name}"] = result.loss.detach()
            if name == "mm":
                report |= {"accuracy": result.accuracy, "negatives": result.negatives}
        return total, report


def info_nce(
    query: Tensor, items: Tensor, item_ids: Tensor, query_ids: Tensor, scale: Tensor, mask_same_item: bool
) -> InfoNCE:
    """Eq. 5 with cosine similarity, over the items of all ranks; arguments as in `MultiLevelInfoNCE`."""
    query, items = F.normalize(query.float(), dim=1), F.normalize(items.float(), dim=1)
    count, rank, world_size = len(query), 0, 1
    all_queries, wanted, own = query, item_ids[:count], query_ids
    if dist.is_initialized() and dist.get_world_size() > 1:
        rank, world_size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
        all_queries = fc.all_gather_single_autograd(query, 0, group)
        both = fc.all_gather_single(torch.stack([wanted, own], dim=1), 0, group)
        wanted, own = both[:, 0], both[:, 1]
    logits = scale * all_queries @ items.T
    mine = torch.arange(count, device=query.device)
    is_positive = torch.zeros_like(logits, dtype=torch.bool)
    is_positive[rank * count + mine, mine] = True
    left_out = torch.zeros_like(is_positive)
    if mask_same_item:
        left_out = (wanted[:, None] == item_ids) | (own[:, None] == item_ids)
    negative = ~(left_out | is_positive)
    logits = logits.masked_fill(~(negative | is_positive), -torch.inf)
    # a rank whose items are all left out has an empty sum, -inf, whose gradient must not become nan
    partial = torch.logsumexp(logits.clamp_min(-1e30), dim=1)
    facts = torch.stack([
        logits.detach().masked_fill(~negative, -torch.inf).amax(1), negative.sum(1).float()
    ])  # fmt: skip
    if world_size > 1:
        back = fc.all_to_all_single_autograd(partial.contiguous(), None, None, group)
        denominator = torch.logsumexp(back.view(world_size, count), dim=0)
        theirs = fc.all_to_all_single(facts.T.contiguous(), None, None, group).view(world_size, count, 2)
        hardest, negatives = theirs[..., 0].amax(0), theirs[..., 1].sum(0)
    else:
        denominator, (hardest, negatives) = partial, facts
    positive = scale * (query * items[:count]).sum(1)
    accuracy = (positive.detach() > hardest).float().mean()
    return InfoNCE((denominator - positive).mean(), accuracy, negatives.mean())
