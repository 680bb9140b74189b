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
        layout = pairs.layout if behaviors.is_cuda else None
        if layout is None:
            histories = TimeOrder.of(pairs.behavior_offsets)
        else:
            histories = TimeOrder.laid_out(
                layout.behavior_offsets.diff(), layout.behavior_request, layout.place, layout.behavior_lengths
            )
        by_time = inverse(histories.position)
        interests = self.extractor.states(behaviors.index_select(0, by_time), histories)
        in_log_order = interests.index_select(0, histories.position)

        scores = pairs.inner_products(self.attention(candidates), in_log_order)
        attention = pairs.segment_softmax(scores)
        owner, order = histories.rank[pairs.candidate_request].sort(stable=True)
        rank = inverse(order)
        if layout is None:
            sequences = TimeOrder.of(pairs.pair_offsets, rank)
            of_pairs = attention.index_select(0, inverse(sequences.position))
            evolved = self.evolution.last_state(interests, of_pairs, sequences, histories, owner)
        else:
            lengths = torch.repeat_interleave(layout.behavior_lengths, layout.candidate_lengths)
            times = layout.place.index_select(0, pairs.behavior_index)
            sequences = TimeOrder.laid_out(layout.of_candidate, pairs.candidate_index, times, lengths, rank)
            by_time = inverse(sequences.position)
            source = histories.position.index_select(0, pairs.behavior_index).index_select(0, by_time)
            evolved = self.evolution.last_state_of_own(
                interests, attention.index_select(0, by_time), sequences, source
            )
        auxiliary = None
        if self.training and self.auxiliary:
            auxiliary = self._next_behavior(in_log_order, behaviors, pairs)
        return Interest(evolved.index_select(0, rank), auxiliary)

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
