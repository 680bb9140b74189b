r"""The similarity interest of one request from the product of its vectors, block by block.

It is what `ciubm.similarity.similarity_interest` gives. There, every pair is listed with its tier and its
weight. Here the relevance of a block of candidates is one product of matrices that stays in the cache. How
many numbers of a row are of a tier at least is a comparison with the smallest number of that tier, whose
results are added eight at once, as the bytes of 64-bit words: no pair is listed, sorted, or counted alone.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.ciubm.similarity import STATISTICS, WHOLE, similarity_interest
from mim_torchrec.serving.dense.blocks import blocks_of
from mim_torchrec.serving.grid import Grid

BYTES = 8  # of a word
MOST_WORDS = 255  # that can be added before a byte overflows
EVEN_BYTES, EVERY_SECOND = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0001000100010001)
MOST_TIERS = 100  # with more, a list of pairs costs less than so many comparisons
NARROW = 16  # behaviors of a span that are counted one by one


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
    ages = torch.arange(len(behaviors), 0, -1)
    has_vector = behaviors.abs().amax(1) != 0
    if not has_vector.all():  # what has no vector counts nowhere
        places = has_vector.nonzero().squeeze(1)
        behaviors, ages = behaviors.index_select(0, places), ages.index_select(0, places)
    out = candidates.new_zeros(len(candidates), len(spans), tiers + STATISTICS)
    if len(candidates) and len(behaviors):
        starts = [0 if span == WHOLE else int((ages > span).sum()) for span in spans]
        _fill(out, candidates, behaviors, ages, starts)
    return out.flatten(1)


def _fill(out: Tensor, candidates: Tensor, behaviors: Tensor, ages: Tensor, starts: Sequence[int]) -> None:
    """Statistics of the behaviors from each start on, into (num_candidates, num_spans, ...) zeros."""
    width, tiers = len(behaviors), out.shape[2] - STATISTICS
    columns, bounds, inverse = behaviors.T.contiguous(), _smallest_of_tiers(tiers), 1 / ages.float()
    weights = columns.new_zeros(width, len(starts))
    for span, start in enumerate(starts):
        weights[start:, span] = inverse[start:]
    totals = weights.sum(0).repeat(len(candidates), 1)
    wide = [(span, start) for span, start in enumerate(starts) if width - start > NARROW]
    at_least = np.zeros((len(starts), tiers + 1, len(candidates)), np.int64)
    for rows in blocks_of(len(candidates), width):
        alpha = candidates[rows] @ columns
        is_nothing = alpha.numpy() == 0
        has_nothing = is_nothing.any()
        if has_nothing:
            torch.mm(torch.from_numpy(~is_nothing).float(), weights, out=totals[rows])
        for span, start in wide:
            own, largest = alpha[:, start:], out[rows, span, tiers]
            torch.amax(own, 1, out=largest)
            _count(own.numpy(), bounds, largest.max().item(), at_least[span, :, rows])
            if has_nothing:
                unseen = is_nothing[:, start:].sum(1)
                at_least[span, : tiers // 2 + 1, rows] -= unseen  # the tier of a relevance of 0
                nothing = torch.from_numpy(is_nothing[:, start:])
                largest.copy_(own.masked_fill(nothing, -torch.inf).amax(1))
                largest.masked_fill_(torch.from_numpy(unseen == width - start), 0.0)
    for span, start in enumerate(starts):
        if (span, start) in wide:
            counts = at_least[span, :-1] - at_least[span, 1:]
            out[:, span, :tiers] = torch.from_numpy(counts.T)
        elif start < width:
            _count_few(candidates @ columns[:, start:], out[:, span], bounds)
    out[:, :, :tiers].log1p_()
    # the mean is linear in the relevance
    sums = candidates @ (columns @ weights)
    torch.div(sums, totals.clamp_(min=torch.finfo(torch.float32).tiny), out=out[:, :, tiers + 1])


def _count_few(alpha: Tensor, out: Tensor, bounds: np.ndarray) -> None:
    """Counts and the largest of each row (num_rows, width) into (num_rows, tiers + STATISTICS) zeros."""
    seen = alpha != 0
    tier = torch.from_numpy(np.searchsorted(bounds, alpha.numpy(), side="right"))
    out.scatter_add_(1, tier, seen.float())
    largest = alpha.masked_fill(~seen, -torch.inf).amax(1)
    out[:, len(bounds) + 1] = largest.masked_fill_(~seen.any(1), 0.0)


@cache
def _smallest_of_tiers(tiers: int) -> np.ndarray:
    """The smallest float32 of each tier but the first, (tiers - 1,), by the arithmetic of training.

    >>> _smallest_of_tiers(4).round(6).tolist()
    [-0.5, -0.0, 0.5]
    """
    wanted: np.ndarray = np.arange(1, tiers, dtype=np.float32)
    end = int(np.float32(2).view(np.int32))
    low, high = np.full(tiers - 1, -end), np.full(tiers - 1, end)
    while (high - low > 1).any():
        middle = (low + high) // 2
        is_there = (_number(middle) + np.float32(1)) * np.float32(tiers / 2) >= wanted
        low, high = np.where(is_there, low, middle), np.where(is_there, middle, high)
    return _number(high)


def _number(order: np.ndarray) -> np.ndarray:
    """Float32 numbers by their order: 0 is the zero, 1 the smallest above it."""
    return np.copysign(np.abs(order).astype(np.int32).view(np.float32), order).astype(np.float32)


def _count(alpha: np.ndarray, bounds: np.ndarray, largest: float, out: np.ndarray) -> None:
    """How many numbers of each row are of each tier at least, into (tiers + 1, rows) int64 zeros."""
    rows, width = alpha.shape
    words = -(-width // BYTES)
    marks = np.zeros((rows, words * BYTES), bool)
    own, as_words = marks[:, :width], marks.view(np.uint64)
    first, last = (int(bounds.searchsorted(np.float32(end), side="right")) for end in (alpha.min(), largest))
    parts = range(0, words, MOST_WORDS)
    sums = np.empty((last - first, len(parts), rows), np.uint64)
    for number, bound in enumerate(bounds[first:last]):
        np.greater_equal(alpha, bound, out=own)
        for part, start in enumerate(parts):
            np.add.reduce(as_words[:, start : start + MOST_WORDS], axis=1, out=sums[number, part])
    pairs = (sums & EVEN_BYTES) + ((sums >> np.uint64(8)) & EVEN_BYTES)
    out[: first + 1], out[first + 1 : last + 1] = width, ((pairs * EVERY_SECOND) >> np.uint64(48)).sum(1)
