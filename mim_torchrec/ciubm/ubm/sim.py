r"""Search-based Interest Model (Pi et al., CIKM 2020).

A general search unit keeps few behaviors of a long history: `hard`, those of the candidate's category, or
`soft`, those with the largest $r_i = \langle W_b e_i, W_a e_a \rangle$ (Eq. 1). The exact search unit attends
to them with several heads over $z_i = [e_i; e^t_i]$, the embedding with that of its recency (Eq. 4–6):

    att^h = softmax(⟨W_b^h z_i, W_a^h e_a⟩)      head^h = Σ_i att^h_i z_i      interest = [head^1; …; head^q]

The soft search is trained by an auxiliary click prediction from $[\sum_i r_i e_i; e_a]$ over the whole
history (Eq. 2), since choosing has no gradient. Without it the projections would stay as they were drawn, so
the embeddings themselves are compared.

Left out: the short-term model (DIEN) that the paper puts beside it, and an inner-product index: the search is
exact. A hard search keeps the last `top_k` where more than that have the category.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mim_torchrec.ciubm import heads as by_head
from mim_torchrec.ciubm.jagged import Pairs, RequestPairs
from mim_torchrec.ciubm.ubm.activation import PReLU
from mim_torchrec.ciubm.ubm.interface import (
    NUM_RECENCY_BUCKETS,
    Auxiliary,
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

Search = Literal["soft", "hard"]


class SIM(UserBehaviorModel):
    """SIM's two search units.

    Args:
        dim: size of candidate and behavior embeddings.
        search: "soft" or "hard"; the hard one needs categories in the context.
        top_k: behaviors that the general search unit keeps.
        heads: attention heads of the exact search unit.
        attention_dim: size of the compared vectors of all heads together; `dim` by default.
        recency_dim: size of the embedding of a recency.
        auxiliary: train the soft search by an auxiliary click prediction.
        auxiliary_hidden: width of the hidden layer that predicts it.
    """

    def __init__(
        self,
        dim: int,
        search: Search = "soft",
        top_k: int = 50,
        heads: int = 4,
        attention_dim: int | None = None,
        recency_dim: int = 8,
        auxiliary: bool = True,
        auxiliary_hidden: int = 80,
    ) -> None:
        super().__init__()
        attention_dim = attention_dim or dim
        if search not in ("soft", "hard"):
            raise OptionError(f"search is 'soft' or 'hard', not {search!r}")
        if top_k < 1 or attention_dim % heads:
            raise OptionError(f"impossible: top_k {top_k}, {heads} heads over {attention_dim} dimensions")
        self.out_dim = heads * (dim + recency_dim)
        self.search: Search = search
        self.top_k = top_k
        self.heads = heads
        self.recency = nn.Embedding(NUM_RECENCY_BUCKETS, recency_dim)
        self.query = nn.Linear(dim, attention_dim, bias=False)
        self.key = nn.Linear(dim + recency_dim, attention_dim, bias=False)
        self.auxiliary = auxiliary and search == "soft"
        if self.auxiliary:
            self.search_query = nn.Linear(dim, dim, bias=False)
            self.search_key = nn.Linear(dim, dim, bias=False)
            self.click = nn.Sequential(
                nn.Linear(2 * dim, auxiliary_hidden), PReLU(), nn.Linear(auxiliary_hidden, 1)
            )

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None = None,
    ) -> Interest:
        """Search the history of each candidate and attend to what is found."""
        z = torch.cat([behaviors, recency_rows(self.recency.weight, recency_buckets(context, "SIM"))], dim=-1)
        if behaviors.is_cuda:
            kept, auxiliary = self._mask(candidates, behaviors, pairs, context)
            scores = by_head.inner_products(self.query(candidates), self.key(z), self.heads, pairs)
            weights = by_head.segment_softmax(scores, pairs, kept)
            return Interest(by_head.weighted_sum(z, weights, pairs, shared=True), auxiliary)
        found, kept, auxiliary = self._search(candidates, behaviors, pairs, context)
        queries = self.query(candidates).chunk(self.heads, dim=1)
        keys = self.key(z).chunk(self.heads, dim=1)
        heads = []
        for query, key in zip(queries, keys, strict=True):
            scores = found.inner_products(query, key)
            if kept is not None:
                scores = scores.masked_fill(~kept, -torch.inf)
            heads.append(found.weighted_sum(z, found.segment_softmax(scores)))
        return Interest(torch.cat(heads, dim=-1), auxiliary)

    def _search(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None,
    ) -> tuple[Pairs, Tensor | None, Auxiliary | None]:
        """The general search unit: a list of pairs, which of them are kept (None is all), and its task."""
        if self.search == "hard":
            same = pairs.select(_same_category(pairs, context))
            if same.longest > self.top_k:
                same = same.select(same.top_k(same.behavior_index.double(), self.top_k))
            return same, None, None
        relevance, auxiliary = self._relevance(candidates, behaviors, pairs)
        if pairs.longest <= self.top_k or relevance is None:
            return pairs, None, auxiliary
        kept = pairs.top_k(relevance, self.top_k)
        if pairs.is_short(self.top_k, uses=self.heads):
            return pairs, kept, auxiliary
        return pairs.select(kept), None, auxiliary

    def _mask(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None,
    ) -> tuple[Tensor | None, Auxiliary | None]:
        """The same search as a mask (num_pairs, 1); None keeps all pairs."""
        if self.search == "hard":
            kept = _same_category(pairs, context)[:, None]
            if pairs.longest > self.top_k:
                last = torch.where(kept, pairs.behavior_index.float()[:, None], -torch.inf)
                kept &= by_head.top_k(last, self.top_k, pairs)
            return kept, None
        relevance, auxiliary = self._relevance(candidates, behaviors, pairs)
        if pairs.longest <= self.top_k or relevance is None:
            return None, auxiliary
        return by_head.top_k(relevance.detach()[:, None], self.top_k, pairs), auxiliary

    def _relevance(
        self, candidates: Tensor, behaviors: Tensor, pairs: RequestPairs
    ) -> tuple[Tensor | None, Auxiliary | None]:
        """Of the soft search, (num_pairs,), where it or its task needs it, and the task in training."""
        training = self.training and self.auxiliary
        if pairs.longest <= self.top_k and not training:
            return None, None
        queries, keys = candidates, behaviors
        if self.auxiliary:
            queries, keys = self.search_query(candidates), self.search_key(behaviors)
        relevance = pairs.inner_products(queries, keys)
        if not training:
            return relevance, None
        pooled = torch.cat([pairs.weighted_sum(behaviors, relevance), candidates], dim=-1)
        return relevance, Auxiliary(self.click(pooled).squeeze(-1), None)


def _same_category(pairs: RequestPairs, context: BehaviorContext | None) -> Tensor:
    if context is None or context.candidate_categories is None or context.behavior_categories is None:
        raise OptionError("hard search needs the categories of candidates and behaviors; take --search soft")
    wanted = context.candidate_categories[pairs.candidate_index]
    return (wanted == context.behavior_categories[pairs.behavior_index]) & (wanted != 0)


@dataclass(frozen=True, kw_only=True)
class SIMOptions(UBMOptions):
    """Options of SIM."""

    name = "sim"

    search: Search = "soft"
    """General search: by relevance, or among the behaviors of the candidate's category."""
    top_k: Count = 50
    """Behaviors that the general search keeps."""
    heads: Count = 4
    """Attention heads; each takes its fraction of the embeddings of an item."""

    @property
    def needs(self) -> frozenset[Need]:
        """See `UBMOptions`."""
        return frozenset({"recency", "categories"} if self.search == "hard" else {"recency"})

    def build(self, dim: int, *, dropout: float, auxiliary: bool) -> SIM:
        """See `UBMOptions`."""
        return SIM(dim, self.search, self.top_k, self.heads, auxiliary=auxiliary)
