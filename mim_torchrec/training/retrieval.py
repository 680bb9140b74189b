"""Image search as a test of an encoder: the rank of the bought item among all items."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mim_torchrec.errors import Diverged

RECALL_AT = (1, 10, 50, 100)
CHUNK = 256


class Found(NamedTuple):
    """What queries find among all items."""

    rank: Tensor
    """(num_queries,) int64, rank of the bought item, 1 the first. Of items that score the same the bought
    one is the last, so that vectors that are all the same find nothing."""
    top: Tensor
    """(num_queries, k) int64, rows of the items that score highest, the highest first."""


def search(
    query: Tensor, items: Tensor, bought: Tensor, own: Tensor, allowed: Tensor, top: int = 10
) -> Found:
    """Rank all items by cosine similarity to each query.

    Args:
        query: (num_queries, dim).
        items: (num_items, dim), by item row.
        bought: (num_queries,) row of the bought item.
        own: (num_queries,) row of the query where it is an item, which is left out; else -1.
        allowed: (num_items,) bool, items that can be found.
        top: how many of the best are returned.

    Raises:
        Diverged: a vector is not finite. It compares with nothing, so what was bought would be found first.
    """
    if not (torch.isfinite(query).all() and torch.isfinite(items).all(1)[allowed].all()):
        raise Diverged(
            "the encoder gives vectors that are not finite: its training has diverged, or its weights are "
            "damaged; try a lower learning rate"
        )
    query, items = F.normalize(query.float(), dim=1), F.normalize(items.float(), dim=1)
    ranks, best = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, top, dtype=torch.int64)]
    for start in range(0, len(query), CHUNK):
        part = slice(start, start + CHUNK)
        scores = (query[part] @ items.T).masked_fill(~allowed, -torch.inf)
        of_items = torch.nonzero(own[part] >= 0).flatten()
        scores[of_items, own[part][of_items]] = -torch.inf
        ranks.append((scores >= scores.gather(1, bought[part, None])).sum(1).cpu())
        best.append(scores.topk(min(top, len(items)), dim=1).indices.cpu())
    return Found(torch.cat(ranks), torch.cat([b for b in best if len(b)]) if len(query) else best[0])


def summarize(rank: Tensor, num_items: int) -> dict[str, float | int]:
    """Recall, mean and median rank, mean reciprocal rank, and mean logarithm of the rank.

    Args:
        rank: (num_queries,) as in `Found`, not empty.
        num_items: of how many.

    Returns:
        `n`, `recall_at_<k>`, `mean_rank`, `median_rank`, `mrr`, `log_rank`, and `chance_at_10`, the recall
        at 10 of a random order.
    """
    values = rank.double()
    return {
        "n": len(rank),
        **{f"recall_at_{k}": float((values <= k).double().mean()) for k in RECALL_AT},
        "mean_rank": float(values.mean()),
        "median_rank": float(values.median()),
        "mrr": float((1 / values).mean()),
        "log_rank": float(values.log().mean()),
        "chance_at_10": min(1.0, 10 / num_items),
    }


def by_group(rank: Tensor, groups: np.ndarray, names: Sequence[str], num_items: int) -> dict[str, Any]:
    """`summarize` of the queries of each group that has any.

    Args:
        rank: (num_queries,).
        groups: (num_queries,) int, position in `names`.
        names: of the groups.
        num_items: of how many.
    """
    return {
        name: summarize(rank[torch.from_numpy(groups == k)], num_items)
        for k, name in enumerate(names)
        if (groups == k).any()
    }
