"""SIM's and TWIN's interest of one request: what is searched is selected block by block, and read once.

They are what the modules give with the pairs of the request. A score is an entry of a product of matrices.
NumPy partitions rows with vector instructions, some times faster than torch finds the largest of a row. What
is kept is as many behaviors for every candidate, so the attention to it is a batch of small products.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mim_torchrec.ciubm.ubm.interface import BehaviorContext, recency_buckets
from mim_torchrec.ciubm.ubm.sim import SIM
from mim_torchrec.ciubm.ubm.twin import TWIN
from mim_torchrec.serving.dense.blocks import blocks_of

BELOW_ZERO = -(2.0**-149)  # the float32 next to it
BELOW = -60.0  # its exponential is nothing beside that of 0, and that of its negative is far from the largest


def among_largest(scores: Tensor, k: int) -> np.ndarray:
    """Which are the k largest scores of each row; of equal ones the later ones, as in `Pairs.top_k`.

    Args:
        scores: (num_rows, width) with a width above k.
        k: at least 1.

    Returns:
        (num_rows, width) bool, k in each row.
    """
    values = scores.numpy()
    smallest = _smallest_kept(values, k)
    kept = values >= smallest
    if np.count_nonzero(kept) != len(values) * k:
        counts = kept.sum(1)
        more = np.flatnonzero(counts > k)
        equal = values[more] == smallest[more]
        kept[more] &= ~(equal & (equal.cumsum(1) <= (counts[more] - k)[:, None]))
        for row in np.flatnonzero(counts < k):  # NaN, which a sort puts last
            kept[row] = False
            kept[row, np.argsort(values[row], kind="stable")[-k:]] = True
    return kept


def _smallest_kept(values: np.ndarray, k: int) -> np.ndarray:
    """The k-th largest number of each row, (num_rows, 1)."""
    place = values.shape[1] - k
    return np.partition(values, place, axis=1)[:, place, None]


def exponentials_of_largest_(scores: Tensor, k: int) -> Tensor:
    """Overwrite each row by its softmax over `among_largest`, not yet divided by its sum.

    The others are 0, or so small that no sum of float32 tells them from it.

    >>> exponentials_of_largest_(torch.tensor([[1.0, 3.0, 2.0]]), 2).log().round().tolist()
    [[-60.0, 1.0, 0.0]]
    """
    values = scores.numpy()
    ordered = np.partition(values, values.shape[1] - k, axis=1)[:, -k:]
    smallest = ordered[:, :1]
    if np.count_nonzero(values >= smallest) != len(values) * k or ordered.max() - smallest.min() > -BELOW:
        # equal numbers, NaN, or exponentials that float32 may not hold
        scores.masked_fill_(torch.from_numpy(~among_largest(scores, k)), -torch.inf)
        return torch.softmax(scores, 1, out=scores)
    # two numbers have a difference of 0 only if they are equal; a threshold costs less than a mask, and an
    # exponential less of a number than of -inf
    return torch.threshold_(scores.sub_(torch.from_numpy(smallest)), BELOW_ZERO, BELOW).exp_()


def largest(scores: Tensor, k: int) -> Tensor:
    """Where `among_largest` holds.

    Returns:
        (num_rows * k,) int64, columns of the first row ascending, then those of the second, and so on.

    >>> largest(torch.tensor([[1.0, 3.0, 3.0, 3.0], [4.0, 2.0, 3.0, 1.0]]), 2).tolist()
    [2, 3, 0, 2]
    """
    places = np.flatnonzero(among_largest(scores, k)).reshape(-1, k)
    places -= np.arange(0, scores.numel(), scores.shape[1])[:, None]
    return torch.from_numpy(places.reshape(-1))


def sim_interest(
    sim: SIM, candidates: Tensor, behaviors: Tensor, context: BehaviorContext | None
) -> Tensor | None:
    """SIM with a soft search over a history longer than what it keeps; None where that is not so."""
    if sim.search != "soft" or len(behaviors) <= sim.top_k:
        return None
    z = torch.cat([behaviors, sim.recency(recency_buckets(context, "SIM"))], dim=-1)
    seekers, keys = candidates, behaviors
    if sim.auxiliary:
        seekers, keys = sim.search_query(candidates), sim.search_key(behaviors)
    # <W_b z, W_a e> = <z, W_b' W_a e>: so z is read for scores and for what is summed
    by_head = sim.key.weight.view(sim.heads, -1, z.shape[1])
    queries = torch.einsum("chw,hwz->chz", sim.query(candidates).unflatten(1, (sim.heads, -1)), by_head)
    columns, out = keys.T.contiguous(), candidates.new_empty(len(candidates), sim.heads, z.shape[1])
    blocks = list(blocks_of(len(candidates), len(behaviors)))
    # memory that every block overwrites, because new memory is cleared first
    scores = z.new_empty(blocks[0].stop, len(behaviors))
    kept = z.new_empty(blocks[0].stop * sim.top_k, z.shape[1])
    for rows in blocks:
        count = rows.stop - rows.start
        places = largest(torch.mm(seekers[rows], columns, out=scores[:count]), sim.top_k)
        found = torch.index_select(z, 0, places, out=kept[: len(places)]).view(count, -1, z.shape[1])
        weights = torch.bmm(queries[rows], found.transpose(1, 2)).softmax(-1)
        torch.bmm(weights, found, out=out[rows])
    return out.flatten(1)


def twin_interest(
    twin: TWIN, candidates: Tensor, behaviors: Tensor, context: BehaviorContext | None
) -> Tensor | None:
    """TWIN over a history longer than what a head keeps; None where it is not."""
    if len(behaviors) <= twin.top_k:
        return None
    buckets, dim, heads, k = recency_buckets(context, "TWIN"), behaviors.shape[1], twin.heads, twin.top_k
    of_recency = F.linear(twin.recency.weight, twin.value.weight[:, dim:])
    values = F.linear(behaviors, twin.value.weight[:, :dim]) + F.embedding(buckets, of_recency)
    biases = F.embedding(buckets, twin.cross(twin.recency.weight) * twin.cross_weight)
    queries = twin.query(candidates) / math.sqrt(twin.key.out_features // heads)
    # a query of 1 more multiplies the bias
    queries = F.pad(queries.unflatten(1, (heads, -1)), (0, 1), value=1.0)
    keys = torch.cat([twin.key(behaviors).unflatten(1, (heads, -1)), biases[:, :, None]], dim=2)
    columns = keys.permute(1, 2, 0).contiguous()
    # a value of 1 more adds up the weights
    own = F.pad(values.unflatten(1, (heads, -1)).transpose(0, 1), (0, 1), value=1.0)
    read = candidates.new_empty(heads, len(candidates), own.shape[2])
    blocks = list(blocks_of(len(candidates), len(behaviors)))
    scores = queries.new_empty(blocks[0].stop, len(behaviors))
    for rows in blocks:
        for head in range(heads):
            found = torch.mm(queries[rows, head], columns[head], out=scores[: rows.stop - rows.start])
            torch.mm(exponentials_of_largest_(found, k), own[head], out=read[head, rows])
    return twin.out((read[:, :, :-1] / read[:, :, -1:]).transpose(0, 1).flatten(1))
