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
    if relevance.is_cuda:
        return by_masks(relevance, order, pairs, tiers, spans)
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


@torch.no_grad()
def by_masks(
    relevance: Tensor, order: Tensor, pairs: RequestPairs, tiers: int, spans: Sequence[int]
) -> Tensor:
    """`similarity_interest` of all spans at once, without lists whose sizes a GPU has to tell the host.

    Args:
        relevance: (num_pairs,).
        order: (num_pairs,) how many behaviors of the history came later.
        pairs: the pairs.
        tiers: as there.
        spans: likewise.
    """
    count, index = pairs.num_candidates, pairs.candidate_index
    seen = relevance != 0
    masks = torch.stack([seen if span == WHOLE else seen & (order < span) for span in spans], dim=1)
    counted = masks.to(relevance.dtype)
    tier = ((relevance + 1) * (tiers / 2)).long().clamp_(0, tiers - 1)
    place = torch.add(tier, index, alpha=tiers)
    counts = relevance.new_zeros(len(spans), count * tiers).index_add_(1, place, counted.t())
    weight = counted / (order + 1.0)[:, None]  # of whole numbers, which a float makes floats
    sums = torch.cat([weight, weight * relevance[:, None]], dim=1)
    total, weighted = _reduced(sums, "sum", pairs, 0.0).chunk(2, dim=1)
    mean = weighted / total.clamp(min=torch.finfo(relevance.dtype).tiny)
    largest = _reduced(torch.where(masks, relevance[:, None], -torch.inf), "max", pairs, -torch.inf)
    largest.nan_to_num_(nan=torch.nan, neginf=0.0)  # of nothing seen; what is NaN stays
    histogram = counts.view(len(spans), count, tiers).transpose(0, 1).log1p_()
    return torch.cat([histogram, largest[:, :, None], mean[:, :, None]], dim=2).flatten(1)


def _reduced(rows: Tensor, how: str, pairs: RequestPairs, initial: float) -> Tensor:
    """Rows (num_pairs, n) of the pairs of each candidate as one, (sum_candidates, n)."""
    return torch.segment_reduce(rows, how, offsets=pairs.pair_offsets, unsafe=True, initial=initial)
