r"""Deep Interest Network (Zhou et al., KDD 2018): attention of the candidate over the behaviors.

The attention unit is an MLP over $[q, s, q - s, q \circ s]$ for a candidate $q$ and a behavior $s$; its
output weights $s$ (MIM, Eq. 1). As in DIN the weights are not normalized by default, so that the size of
the interest keeps the intensity of the behaviors. Left out: DIN's mini-batch aware regularization.

The MLP runs on packed pairs. Its first layer is linear, hence
$W[q, s, q-s, q \circ s] = (W_q + W_d)q + (W_s - W_d)s + W_p(q \circ s)$: the first two terms are computed
once a candidate and once a behavior, and only the last once a pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.packed import rows_of_behaviors, rows_of_candidates
from mim_torchrec.ciubm.ubm.activation import Activation, build_activation
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, Interest, UserBehaviorModel


class DIN(UserBehaviorModel):
    """DIN's attention pooling over packed pairs.

    Args:
        dim: size of candidate and behavior embeddings.
        hidden: widths of the attention unit's hidden layers; one at least. DIN has one of 36.
        activation: "prelu" or "dice".
        softmax: normalize the weights of a candidate to sum to 1, which DIN does not.
    """

    def __init__(
        self,
        dim: int,
        hidden: tuple[int, ...] = (36,),
        activation: Activation = "prelu",
        softmax: bool = False,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("the attention unit needs a hidden layer")
        self.out_dim = dim
        self.softmax = softmax
        self.first = nn.Linear(4 * dim, hidden[0])
        layers: list[nn.Module] = [build_activation(activation, hidden[0])]
        for width_in, width_out in zip(hidden, hidden[1:], strict=False):
            layers += [nn.Linear(width_in, width_out), build_activation(activation, width_out)]
        self.rest = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None = None,
    ) -> Interest:
        """Pool the behaviors of each candidate by attention; the context is not looked at."""
        scores = self.scores(candidates, behaviors, pairs)
        weights = pairs.segment_softmax(scores) if self.softmax else scores
        return Interest(pairs.weighted_sum(behaviors, weights))

    def scores(self, candidates: Tensor, behaviors: Tensor, pairs: RequestPairs) -> Tensor:
        """The attention unit's output for each pair, (num_pairs,)."""
        w_candidate, w_behavior, w_difference, w_product = self.first.weight.chunk(4, dim=1)
        per_candidate = F.linear(candidates, w_candidate + w_difference, self.first.bias)
        per_behavior = F.linear(behaviors, w_behavior - w_difference)
        product = rows_of_candidates(candidates, pairs) * rows_of_behaviors(behaviors, pairs)
        per_pair = rows_of_candidates(per_candidate, pairs) + rows_of_behaviors(per_behavior, pairs)
        hidden = torch.addmm(per_pair, product, w_product.t())
        return self.rest(hidden).squeeze(-1)
