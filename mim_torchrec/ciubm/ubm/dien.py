r"""Deep Interest Evolution Network (Zhou et al., AAAI 2019).

A GRU extracts the interest after each behavior (Eq. 2–5), once a history. A second one evolves it for each
candidate, its update gate scaled by the attention that the candidate pays (AUGRU, Eq. 13–15):
$a_t = \mathrm{softmax}_t(i_t W e_a)$ (Eq. 9). Its last state is the interest. The auxiliary loss (Eq. 7) has
each state tell the next behavior from a sampled one by $\sigma(\langle h_t, e \rangle)$.

Negatives are drawn from the histories of the other requests of the rank. Eq. 7 sums over a history and
averages over histories; here it is the mean over all comparisons, so that its weight does not depend on the
lengths. Left out: AIGRU and AGRU, which the paper found worse, and the paper's own negative logs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.jagged import RequestPairs, nonzero
from mim_torchrec.ciubm.ubm import jagged_recurrence
from mim_torchrec.ciubm.ubm.interface import (
    Auxiliary,
    BehaviorContext,
    Interest,
    UBMOptions,
    UserBehaviorModel,
)
from mim_torchrec.ciubm.ubm.recurrence import AttentionalGRU, TimeOrder, inverse


class DIEN(UserBehaviorModel):
    """DIEN's interest extractor and interest evolution.

    Args:
        dim: size of candidate and behavior embeddings, of the states, and of the interest.
        auxiliary: return the auxiliary task in training mode.
    """

    def __init__(self, dim: int, auxiliary: bool = True) -> None:
        super().__init__()
        self.out_dim = dim
        self.auxiliary = auxiliary
        self.extractor = AttentionalGRU(dim, dim)
        self.attention = nn.Linear(dim, dim, bias=False)
        self.evolution = AttentionalGRU(dim, dim)

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None = None,
    ) -> Interest:
        """Evolve the interests of each history for its candidates; the context is not looked at."""
        if behaviors.is_cuda:
            interests, evolved = self._evolve_at_once(candidates, behaviors, pairs)
        else:
            interests, evolved = self._evolve(candidates, behaviors, pairs)
        auxiliary = None
        if self.training and self.auxiliary:
            auxiliary = self._next_behavior(interests, behaviors, pairs)
        return Interest(evolved, auxiliary)

    def _evolve(self, candidates: Tensor, behaviors: Tensor, pairs: RequestPairs) -> tuple[Tensor, Tensor]:
        """States of the first GRU by behavior, and the last state of the second by candidate."""
        histories = TimeOrder.of(pairs.behavior_offsets)
        by_time = inverse(histories.position)
        interests = self.extractor.states(behaviors.index_select(0, by_time), histories)
        in_log_order = interests.index_select(0, histories.position)
        attention = self._attention(candidates, in_log_order, pairs)
        owner, order = histories.rank[pairs.candidate_request].sort(stable=True)
        rank = inverse(order)
        sequences = TimeOrder.of(pairs.pair_offsets, rank)
        of_pairs = attention.index_select(0, inverse(sequences.position))
        evolved = self.evolution.last_state(interests, of_pairs, sequences, histories, owner)
        return in_log_order, evolved.index_select(0, rank)

    def _evolve_at_once(
        self, candidates: Tensor, behaviors: Tensor, pairs: RequestPairs
    ) -> tuple[Tensor, Tensor]:
        """`_evolve` in few launches."""
        gru, augru = self.extractor, self.evolution
        interests = jagged_recurrence.gru(
            gru.input(behaviors), gru.hidden.weight, gru.hidden.bias, pairs.behavior_offsets
        )
        attention = self._attention(candidates, interests, pairs)
        first = pairs.behavior_offsets.index_select(0, pairs.candidate_request)
        evolved = jagged_recurrence.augru(
            augru.input(interests), attention, augru.hidden.weight, augru.hidden.bias, pairs,
            first - pairs.pair_offsets[:-1],
        )  # fmt: skip
        return interests, evolved

    def _attention(self, candidates: Tensor, interests: Tensor, pairs: RequestPairs) -> Tensor:
        """Eq. 9, (num_pairs,)."""
        return pairs.segment_softmax(pairs.inner_products(self.attention(candidates), interests))

    def _next_behavior(self, states: Tensor, behaviors: Tensor, pairs: RequestPairs) -> Auxiliary:
        """Eq. 7: each state with the behavior that follows, and with one of another request."""
        layout = pairs.layout if behaviors.is_cuda else None
        if layout is None:
            now = (pairs.order > 0).nonzero().squeeze(1)
            is_alone = None
        else:
            now = nonzero(pairs.order > 0, int((layout.behavior_lengths - 1).clamp(min=0).sum()))
            is_alone = int(layout.behavior_lengths.max()) == behaviors.shape[0]
        start = pairs.behavior_offsets[pairs.behavior_request[now]]
        length = pairs.behavior_offsets[pairs.behavior_request[now] + 1] - start
        others = behaviors.shape[0] - length
        if is_alone is None:
            is_alone = now.numel() > 0 and not int(others.min())
        if is_alone:  # one history is all there is
            keep = others > 0
            now, start, length, others = now[keep], start[keep], length[keep], others[keep]
        drawn = (torch.rand(now.numel(), device=now.device, dtype=torch.float64) * others).long()
        drawn += torch.where(drawn >= start, length, 0)
        h = states.index_select(0, now)
        positive = (h * behaviors.index_select(0, now + 1)).sum(-1)
        negative = (h * behaviors.index_select(0, drawn)).sum(-1)
        targets = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).detach()
        return Auxiliary(torch.cat([positive, negative]), targets)


@dataclass(frozen=True, kw_only=True)
class DIENOptions(UBMOptions):
    """DIEN has no options."""

    name = "dien"

    def build(self, dim: int, *, dropout: float, auxiliary: bool) -> DIEN:
        """See `UBMOptions`."""
        return DIEN(dim, auxiliary=auxiliary)
