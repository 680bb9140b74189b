r"""The similarity interest of one request from the product of its vectors, block by block.

It is what `ciubm.similarity.similarity_interest` gives. There, every pair is listed with its tier and its
weight. Here the relevance of a block of candidates is one product of matrices that stays in the cache. Tiers
are bytes. How many of them are at least k is a comparison whose results are added eight at once, as the bytes
of 64-bit words: no pair is listed, sorted, or counted alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.ciubm.similarity import STATISTICS, WHOLE, similarity_interest
from mim_torchrec.serving.dense.blocks import blocks_of
from mim_torchrec.serving.grid import Grid

BYTES = 8  # of a word
MOST_WORDS = 255  # that can be added before a byte overflows
MOST_TIERS = 100  # which a signed byte holds
NARROW = 16  # behaviors that are counted one by one


def similarity_of_request(candidates: Tensor, behaviors: Tensor, tiers: int, spans: Sequence[int]) -> Tensor:
    """`similarity_interest` of one request.

    Args:
        candidates: (num_candidates, mm_dim) normalized vectors; zero where there is none.
        behaviors: (num_behaviors, mm_dim) likewise, the oldest first.
        tiers: parts of [-1, 1].
        spans: most recent behaviors that are looked at; 0 is the whole history.

    Returns:
        (num_candidates, `similarity_dim`).
    """
    if tiers > MOST_TIERS:
        pairs = Grid(len(candidates), len(behaviors))
        return similarity_interest(pairs.inner_products(candidates, behaviors), pairs, tiers, spans)
    weights = 1 / torch.arange(len(behaviors), 0, -1, dtype=torch.float32)
    has_vector = behaviors.any(1)
    if not has_vector.all():  # what has no vector counts nowhere
        places = has_vector.nonzero().squeeze(1)
        recent = [len(behaviors) if span == WHOLE else span for span in spans]
        counts = [int(has_vector[len(behaviors) - min(span, len(behaviors)) :].sum()) for span in recent]
        behaviors, weights = behaviors.index_select(0, places), weights.index_select(0, places)
    else:
        counts = [len(behaviors) if span == WHOLE else min(span, len(behaviors)) for span in spans]
    starts = [len(behaviors) - count for count in counts]
    parts = [_of_behaviors(candidates, behaviors[start:], weights[start:], tiers) for start in starts]
    return torch.cat(parts, dim=1)


def _of_behaviors(candidates: Tensor, behaviors: Tensor, weights: Tensor, tiers: int) -> Tensor:
    """Of one span, (num_candidates, tiers + STATISTICS)."""
    width = len(behaviors)
    out = candidates.new_zeros(len(candidates), tiers + STATISTICS)
    if not width or not len(candidates):
        return out
    columns, all_weights = behaviors.T.contiguous(), float(weights.sum())
    weighted = columns @ weights  # the mean is linear in the relevance
    for rows in blocks_of(len(candidates), width):
        alpha = candidates[rows] @ columns
        largest, mean = alpha.amax(1), (candidates[rows] @ weighted).div_(all_weights)
        is_nothing = alpha.numpy() == 0
        unseen = is_nothing.sum(1) if is_nothing.any() else None
        if unseen is not None:
            nothing = torch.from_numpy(is_nothing)
            largest = alpha.masked_fill(nothing, -torch.inf).amax(1)
            largest.masked_fill_(torch.from_numpy(unseen == width), 0.0)
            total = (~nothing).float() @ weights
            mean = mean.mul_(all_weights).div_(total.clamp_(min=torch.finfo(torch.float32).tiny))
        tier = alpha.add_(1).mul_(tiers / 2).to(torch.int8).numpy()
        counts = _counts(tier, tiers)
        if unseen is not None:
            counts[:, tiers // 2] -= unseen  # the tier of a relevance of 0
        torch.log1p(torch.from_numpy(counts).float(), out=out[rows, :tiers])
        out[rows, tiers], out[rows, tiers + 1] = largest, mean
    return out


def _counts(tier: np.ndarray, tiers: int) -> np.ndarray:
    """How many numbers of each row are of each tier, (rows, tiers) int64; above is of the last one."""
    rows, width = tier.shape
    if width <= NARROW:
        places = torch.from_numpy(tier).long().clamp_(0, tiers - 1)
        return (
            torch.zeros(rows, tiers, dtype=torch.int64)
            .scatter_add_(1, places, torch.ones_like(places))
            .numpy()
        )
    words = -(-width // BYTES)
    marks = np.zeros((rows, words * BYTES), bool)
    own, as_words = marks[:, :width], marks.view(np.uint64)
    first, last = max(int(tier.min()), 0), min(int(tier.max()), tiers - 1)
    parts = range(0, words, MOST_WORDS)
    sums = np.empty((last - first, len(parts), rows), np.uint64)
    for number, bound in enumerate(range(first + 1, last + 1)):
        np.greater_equal(tier, bound, out=own)
        for part, start in enumerate(parts):
            np.add.reduce(as_words[:, start : start + MOST_WORDS], axis=1, out=sums[number, part])
    above = sums.view(np.uint8).reshape(last - first, len(parts), rows, BYTES).sum((1, 3), dtype=np.int64)
    at_least = np.zeros((tiers + 1, rows), np.int64)
    at_least[: first + 1], at_least[first + 1 : last + 1] = width, above
    return (at_least[:-1] - at_least[1:]).T.copy()
