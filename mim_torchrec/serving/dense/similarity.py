r"""The similarity interest of one request from the product of its vectors, block by block.

It is what `ciubm.similarity.similarity_interest` gives. There, every pair is listed with its tier and its
weight. Here the relevance of a block of pairs is one product of matrices that stays in the cache, with a row
for each behavior. How many numbers of a column are of a tier at least is a comparison with the smallest of
that tier, whose results are added as bytes, row by row: no pair is listed, sorted, or counted alone. Spans
that lie in each other are not counted twice: a span adds up the parts of the history between their starts.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.ciubm.similarity import STATISTICS, WHOLE, similarity_interest
from mim_torchrec.serving.dense.blocks import blocks_of
from mim_torchrec.serving.grid import Grid

FOLD = 16  # rows of bytes that are added to as many sums at once, and then those sums
ROWS = FOLD * FOLD - 1  # behaviors of a block: their count is one byte
MOST_TIERS = 100  # with more, a list of pairs costs less than so many comparisons
NARROW = 16  # behaviors of a block that are counted one by one


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
        weights = candidates.new_zeros(len(behaviors), len(spans))
        for span, start in enumerate(starts):
            weights[start:, span] = 1 / ages[start:]
        totals = torch.zeros(len(candidates), len(spans))
        for own in blocks_of(len(candidates), ROWS):
            _fill(out[own], totals[own].numpy(), candidates[own], behaviors, weights.numpy(), starts)
        # the mean is linear in the relevance
        sums = candidates @ (behaviors.T @ weights)
        torch.div(sums, totals.clamp_(min=torch.finfo(torch.float32).tiny), out=out[:, :, tiers + 1])
    return out.flatten(1)


def _fill(
    out: Tensor,
    totals: np.ndarray,
    candidates: Tensor,
    behaviors: Tensor,
    weights: np.ndarray,
    starts: Sequence[int],
) -> None:
    """Tiers and the largest of each span into zeros (num_candidates, num_spans, tiers + STATISTICS).

    Into `totals`, zeros (num_candidates, num_spans), it adds the weights of what has a relevance.
    """
    tiers, width = out.shape[2] - STATISTICS, len(candidates)
    columns = candidates.T
    buffer = candidates.new_empty(min(ROWS, len(behaviors)), width)
    marks = np.zeros((FOLD, FOLD, width), np.uint8)
    counts = np.zeros((len(starts), tiers, width), np.float32)
    largest = np.full((len(starts), width), -np.inf, np.float32)
    summed = 0
    for start, stop in _blocks(starts, len(behaviors)):
        alpha = torch.mm(behaviors[start:stop], columns, out=buffer[: stop - start]).numpy()
        is_nothing = alpha == 0
        few = stop - start <= NARROW
        found = _counts_of_few(alpha, tiers) if few else _counts(alpha, tiers, marks)
        if is_nothing.any():
            found[tiers // 2] -= is_nothing.sum(0)  # the tier of a relevance of 0
            totals += weights[summed:start].sum(0) + ~is_nothing.T @ weights[start:stop]
            alpha[is_nothing], summed = -np.inf, stop
        highest = alpha.max(0)  # of what counts
        for span in (span for span, first in enumerate(starts) if first <= start):
            counts[span] += found
            np.maximum(largest[span], highest, out=largest[span])
    totals += weights[summed:].sum(0)
    largest[largest == -np.inf] = 0
    out[:, :, :tiers] = torch.from_numpy(counts).log1p_().permute(2, 0, 1)
    out[:, :, tiers] = torch.from_numpy(largest).T


def _blocks(starts: Sequence[int], end: int) -> Iterator[tuple[int, int]]:
    """The history from the first start on, in blocks that no start divides.

    >>> list(_blocks([0, 400], 402))
    [(0, 255), (255, 400), (400, 402)]
    """
    edges = sorted({*starts, end})
    for first, last in zip(edges, edges[1:], strict=False):
        for start in range(first, last, ROWS):
            yield start, min(start + ROWS, last)


def _counts_of_few(alpha: np.ndarray, tiers: int) -> np.ndarray:
    """How many numbers of each column are of each tier, (tiers, width), one by one."""
    place = np.searchsorted(_smallest_of_tiers(tiers), alpha, side="right") * alpha.shape[1]
    place += np.arange(alpha.shape[1])
    return np.bincount(place.reshape(-1), minlength=tiers * alpha.shape[1]).reshape(tiers, -1)


def _counts(alpha: np.ndarray, tiers: int, marks: np.ndarray) -> np.ndarray:
    """How many numbers of each column are of each tier, (tiers, width), by comparisons.

    Args:
        alpha: (num_rows, width), ROWS at most.
        tiers: parts of [-1, 1].
        marks: (FOLD, FOLD, width) uint8, which is overwritten.
    """
    rows, width = alpha.shape
    bounds = _smallest_of_tiers(tiers)
    first, last = (int(bounds.searchsorted(end, side="right")) for end in (alpha.min(), alpha.max()))
    flat = marks.reshape(FOLD * FOLD, width)
    flat[rows:] = 0
    own, by_row = flat[:rows].view(bool), marks.reshape(FOLD, -1)
    sums = np.empty((last - first, FOLD * width), np.uint8)
    for number, bound in enumerate(bounds[first:last]):
        np.greater_equal(alpha, bound, out=own)
        np.add.reduce(by_row, axis=0, dtype=np.uint8, out=sums[number])
    at_least = np.zeros((tiers + 1, width), np.float32)
    at_least[: first + 1] = rows
    at_least[first + 1 : last + 1] = np.add.reduce(sums.reshape(-1, FOLD, width), axis=1, dtype=np.uint8)
    return at_least[:-1] - at_least[1:]


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
