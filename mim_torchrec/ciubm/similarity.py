r"""Similarity interest: how the relevance of a history is distributed (beyond the paper).

Eq. 7 and 8 sum behaviors over all $\alpha_{t,i}$ and no longer tell one near-duplicate from many faint
likenesses. Here the cosines themselves become features of the target: counts by tier, as SimTier does (Sheng
et al., arXiv 2407.19467), and their maximum and mean, over the last few behaviors and over all. Without
parameters, and without gradient: counts have none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.errors import OptionError

STATISTICS = 2
WHOLE = 0


def similarity_dim(tiers: int, spans: Sequence[int]) -> int:
    """Size of the similarity interest."""
    return len(spans) * (tiers + STATISTICS)


@torch.no_grad()
def similarity_interest(relevance: Tensor, pairs: RequestPairs, tiers: int, spans: Sequence[int]) -> Tensor:
    r"""Distribution of the relevance of each candidate's history.

    Of every span: $\log(1 + n_k)$ of the number $n_k$ of behaviors in each of `tiers` equal parts of
    [-1, 1], their largest $\alpha$, and their mean $\alpha$ weighted by $1 / (1 + j)$, where j behaviors of
    the history came later. A relevance of exactly 0 is that of an item without a vector and counts nowhere.

    Args:
        relevance: (num_pairs,) cosines from `content.content_relevance`.
        pairs: the pairs.
        tiers: parts of [-1, 1].
        spans: most recent behaviors that are looked at; 0 is the whole history.

    Returns:
        (sum_candidates, `similarity_dim`), span by span: tiers from -1 upwards, maximum, mean. Zeros
        where a span holds no item with a vector.

    Raises:
        OptionError: fewer than one tier, no span, or a negative one.
    """
    if tiers < 1 or not spans or min(spans) < 0:
        raise OptionError(f"{tiers} tiers over spans {tuple(spans)}: at least one of each, none negative")
    order = pairs.order[pairs.behavior_index]
    parts = []
    for span in spans:
        seen = relevance != 0
        if span != WHOLE:
            seen &= order < span
        alpha, index, later = relevance[seen], pairs.candidate_index[seen], order[seen]
        tier = ((alpha + 1) * (tiers / 2)).long().clamp(0, tiers - 1)
        counts = torch.bincount(index * tiers + tier, minlength=pairs.num_candidates * tiers)
        weight = 1 / (1 + later.to(alpha.dtype))
        empty = alpha.new_zeros(pairs.num_candidates)
        total = empty.index_add(0, index, weight)
        mean = empty.index_add(0, index, weight * alpha) / total.clamp(min=torch.finfo(alpha.dtype).tiny)
        largest = empty.scatter_reduce(0, index, alpha, "amax", include_self=False)
        histogram = counts.view(-1, tiers).to(alpha.dtype).log1p()
        parts.append(torch.cat([histogram, largest[:, None], mean[:, None]], dim=1))
    return torch.cat(parts, dim=1)
