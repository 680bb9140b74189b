"""Average pooling, the simplest user behavior model of the paper's Table 2.

The interest is the mean ID embedding of the behaviors: it does not look at the candidate, so it is
computed once a request and shared by all its candidates.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, Interest, UBMOptions, UserBehaviorModel


class AvgPooling(UserBehaviorModel):
    r"""Mean of the behaviors: Eq. 1 with $\alpha_{t,i} = 1/l$.

    Args:
        dim: size of a behavior embedding, which is also the size of the interest.
    """

    keeps_columns = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None = None,
    ) -> Interest:
        """Pool the behaviors of each candidate's request; neither candidates nor context are looked at."""
        if behaviors.shape[0] == 0:
            # stay in the graph, so that every rank computes the same set of gradients
            return Interest(behaviors.new_zeros(pairs.num_candidates, self.out_dim) + behaviors.sum())
        everyone = torch.arange(behaviors.shape[0], device=behaviors.device)
        means = F.embedding_bag(
            everyone, behaviors, pairs.behavior_offsets, mode="mean", include_last_offset=True
        )
        return Interest(means.index_select(0, pairs.candidate_request))


@dataclass(frozen=True, kw_only=True)
class AvgPoolingOptions(UBMOptions):
    """Average pooling has no options."""

    name = "avg_pooling"

    def build(self, dim: int, *, dropout: float, auxiliary: bool) -> AvgPooling:
        """See `UBMOptions`."""
        return AvgPooling(dim)
