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
from mim_torchrec.serving.blocks import blocks_of


def among_largest(scores: Tensor, k: int) -> np.ndarray:
    """Which are the k largest scores of each row; of equal ones the later ones, as in `Pairs.top_k`.

    Args:
        scores: (num_rows, width) with a width above k.
        k: at least 1.

    Returns:
        (num_rows, width) bool, k in each row.
    """
    values = scores.numpy()
    width = values.shape[1]
    smallest = np.partition(values, width - k, axis=1)[:, width - k, None]
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


def largest(scores: Tensor, k: int) -> Tensor:
    """Where `among_largest` holds.

    Returns:
        (num_rows * k,) int64, columns of the first row ascending, then those of the second, and so on.

    >>> largest(torch.tensor([[1.0, 3.0, 3.0, 3.0], [4.0, 2.0, 3.0, 1.0]]), 2).tolist()
    [2, 3, 0, 2]
    """
    return torch.from_numpy(np.flatnonzero(among_largest(scores, k)) % scores.shape[1])


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
    for rows in blocks_of(len(candidates), len(behaviors)):
        found = z.index_select(0, largest(seekers[rows] @ columns, sim.top_k))
        found = found.view(-1, sim.top_k, z.shape[1])
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
    # a value of 1 more gives the sum of the weights
    own = F.pad(values.unflatten(1, (heads, -1)).transpose(0, 1), (0, 1), value=1.0)
    read = candidates.new_empty(len(candidates), heads, own.shape[2] - 1)
    for rows in blocks_of(len(candidates), len(behaviors)):
        for head in range(heads):
            scores = queries[rows, head] @ columns[head]
            left_out = torch.from_numpy(~among_largest(scores, k))
            weights = scores.sub_(scores.amax(1, keepdim=True)).exp_().masked_fill_(left_out, 0.0)
            found = weights @ own[head]
            torch.div(found[:, :-1], found[:, -1:], out=read[rows, head])
    return twin.out(read.flatten(1))
