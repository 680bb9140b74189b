r"""Two-stage Interest Network (Chang et al., KDD 2023).

Both stages share one target attention, so that what the first one keeps is what the second one would weigh
most. For each head (Eq. 5–8), with inherent features $K_h$ and cross features $K_c$ of the behaviors:

    α = (K_h W^h)(q W^q)ᵀ / √d_k + (K_c W^c) β      head = softmax(α_top)ᵀ [K_h; K_c]_top W^v

of which the `top_k` largest enter the softmax, head by head; the interest is $[head_1; …] W^o$. Inherent
features, which do not depend on who looks, are the behavior's embedding: projected once a history for all its
candidates. Cross features of user and item are compressed to a bias: here the recency, whose embedding and
projections are a table of 64 rows.

With `top_k` at least the length of the history it is target attention over all of it. Other cross features
(playing time, action) are side information of behaviors (`ciubm/side_information.py`), which is part of K_h.
Left out: the paper's short-term models, and the offline store of projected behaviors.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.ciubm import heads as by_head
from mim_torchrec.ciubm.jagged import Pairs, RequestPairs
from mim_torchrec.ciubm.packed import rows_of_behaviors
from mim_torchrec.ciubm.ubm.interface import (
    NUM_RECENCY_BUCKETS,
    BehaviorContext,
    Interest,
    Need,
    UBMOptions,
    UserBehaviorModel,
    recency_buckets,
    recency_rows,
)
from mim_torchrec.domains import Count
from mim_torchrec.errors import OptionError


class TWIN(UserBehaviorModel):
    """TWIN's consistency-preserved search and attention.

    Args:
        dim: size of candidate and behavior embeddings, and of the interest.
        top_k: behaviors that a head attends to.
        heads: attention heads.
        attention_dim: size of the vectors of all heads together; `dim` by default.
        recency_dim: size of the embedding of a recency.
    """

    def __init__(
        self,
        dim: int,
        top_k: int = 50,
        heads: int = 4,
        attention_dim: int | None = None,
        recency_dim: int = 8,
    ) -> None:
        super().__init__()
        attention_dim = attention_dim or dim
        if top_k < 1 or attention_dim % heads:
            raise OptionError(f"impossible: top_k {top_k}, {heads} heads over {attention_dim} dimensions")
        self.out_dim = dim
        self.top_k = top_k
        self.heads = heads
        self.recency = nn.Embedding(NUM_RECENCY_BUCKETS, recency_dim)
        self.query = nn.Linear(dim, attention_dim, bias=False)
        self.key = nn.Linear(dim, attention_dim, bias=False)
        self.cross = nn.Linear(recency_dim, heads, bias=False)
        self.cross_weight = nn.Parameter(torch.ones(heads))
        self.value = nn.Linear(dim + recency_dim, attention_dim, bias=False)
        self.out = nn.Linear(attention_dim, dim, bias=False)

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None = None,
    ) -> Interest:
        """Attend to the most relevant behaviors of each candidate's history."""
        buckets = recency_buckets(context, "TWIN")
        biases = recency_rows(self.cross(self.recency.weight) * self.cross_weight, buckets)
        queries = self.query(candidates) / math.sqrt(self.key.out_features // self.heads)
        dim = behaviors.shape[1]
        recency_values = F.linear(self.recency.weight, self.value.weight[:, dim:])
        values = F.linear(behaviors, self.value.weight[:, :dim]) + recency_rows(recency_values, buckets)
        if behaviors.is_cuda:
            keys = self.key(behaviors)
            scores = by_head.inner_products(queries, keys, self.heads, pairs) + rows_of_behaviors(
                biases, pairs
            )
            best = None
            if pairs.longest > self.top_k:
                best = by_head.top_k(scores.detach(), self.top_k, pairs)
            weights = by_head.segment_softmax(scores, pairs, best)
            return Interest(self.out(by_head.weighted_sum(values, weights, pairs)))
        of_heads = zip(
            *(x.chunk(self.heads, dim=1) for x in (queries, self.key(behaviors), values, biases)), strict=True
        )
        heads = []
        for query, key, value, bias in of_heads:
            scores = pairs.inner_products(query, key) + bias.squeeze(1).index_select(0, pairs.behavior_index)
            found, weights = self._weights(scores, pairs)
            heads.append(found.weighted_sum(value, weights))
        return Interest(self.out(torch.cat(heads, dim=-1)))

    def _weights(self, scores: Tensor, pairs: RequestPairs) -> tuple[Pairs, Tensor]:
        """A list of pairs and the weight of each in its candidate's interest, from those of all pairs."""
        if pairs.longest <= self.top_k:
            return pairs, pairs.segment_softmax(scores)
        kept = pairs.top_k(scores.detach(), self.top_k)
        if pairs.is_short(self.top_k, uses=1):
            return pairs, pairs.segment_softmax(scores.masked_fill(~kept, -torch.inf))
        found = pairs.select(kept)
        return found, found.segment_softmax(scores[kept])


@dataclass(frozen=True, kw_only=True)
class TWINOptions(UBMOptions):
    """Options of TWIN."""

    name = "twin"

    top_k: Count = 50
    """Behaviors that a head attends to."""
    heads: Count = 4
    """Attention heads; each takes its fraction of the embeddings of an item."""

    @property
    def needs(self) -> frozenset[Need]:
        """See `UBMOptions`."""
        return frozenset({"recency"})

    def build(self, dim: int, *, dropout: float, auxiliary: bool) -> TWIN:
        """See `UBMOptions`."""
        return TWIN(dim, self.top_k, self.heads)
