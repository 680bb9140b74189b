r"""Content interest and fusion interest (MIM, section 3.4, Eq. 7 and 8).

Both weight a user's behaviors by one relevance, the cosine of multi-modal vectors
$\alpha_{t,i} = \cos(h_t^{MM}, h_i^{MM})$, and differ in what they weight: multi-modal vectors (Eq. 7) or ID
embeddings (Eq. 8). $\alpha$ is computed once for both. It has a gradient if the vectors have one: those of a
frozen table have none.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.errors import OptionError

Pooling = Literal["sum", "mean"]


def content_relevance(candidates: Tensor, behaviors: Tensor, pairs: RequestPairs) -> Tensor:
    r"""Relevance $\alpha_{t,i}$ of each behavior to the target, Eq. 7 left.

    Args:
        candidates: (sum_candidates, dim) multi-modal vectors of the targets.
        behaviors: (sum_behaviors, dim) multi-modal vectors of the behaviors.
        pairs: the pairs to compare.

    Returns:
        (num_pairs,) cosines; 0 where either vector is zero, as the vector of an unknown item is.
    """
    candidates, behaviors = F.normalize(candidates.float(), dim=-1), F.normalize(behaviors.float(), dim=-1)
    return pairs.inner_products(candidates, behaviors)


def relevant_interest(
    behaviors: Tensor, relevance: Tensor, pairs: RequestPairs, pooling: Pooling = "sum"
) -> Tensor:
    r"""Behaviors weighted by relevance, $\sum_i \alpha_{t,i} h_i$.

    With multi-modal behavior vectors it is the content interest $h_B^{MM}$ (Eq. 7), with ID embeddings
    the fusion interest $h_B^{Fusion}$ (Eq. 8).

    Args:
        behaviors: (sum_behaviors, dim), multi-modal vectors or ID embeddings.
        relevance: (num_pairs,) from `content_relevance`.
        pairs: the pairs.
        pooling: "sum" is the paper's equation; "mean" divides it by the number of behaviors, so that the
            size of the interest does not grow with the history.

    Returns:
        (sum_candidates, dim); zeros without behaviors.
    """
    if pooling == "mean":
        relevance = averaged(relevance, pairs)
    elif pooling != "sum":
        raise OptionError(f"pooling is 'sum' or 'mean', not {pooling!r}")
    return pairs.weighted_sum(behaviors, relevance)


def averaged(relevance: Tensor, pairs: RequestPairs) -> Tensor:
    """Relevance (num_pairs,) divided by the number of behaviors of its candidate: sums become means."""
    return relevance / pairs.history_lengths()[pairs.candidate_index]


def sharpened(relevance: Tensor, temperature: Tensor, pairs: RequestPairs) -> Tensor:
    r"""Relevance as attention: $\mathrm{softmax}_i(\alpha_{t,i} / \tau)$ (beyond the paper).

    Args:
        relevance: (num_pairs,) from `content_relevance`.
        temperature: $\tau$, a scalar above 0; it gets a gradient.
        pairs: the pairs.

    Returns:
        (num_pairs,) weights that sum to one over the history of a candidate, or to zero where nothing in it
        has a vector.
    """
    scores = torch.where(relevance == 0, torch.finfo(relevance.dtype).min, relevance / temperature)
    return torch.where(relevance == 0, 0.0, pairs.segment_softmax(scores))
