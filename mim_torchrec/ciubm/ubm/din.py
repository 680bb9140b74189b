r"""Deep Interest Network (Zhou et al., KDD 2018): attention of the candidate over the behaviors.

The attention unit is an MLP over $[q, s, q - s, q \circ s]$ for a candidate $q$ and a behavior $s$; its
output weights $s$ (MIM, Eq. 1). As in DIN the weights are not normalized by default, so that the size of
the interest keeps the intensity of the behaviors. Left out: DIN's mini-batch aware regularization.

The MLP runs on packed pairs. Its first layer is linear, hence
$W[q, s, q-s, q \circ s] = (W_q + W_d)q + (W_s - W_d)s + W_p(q \circ s)$: the first two terms are computed
once a candidate and once a behavior, and only the last once a pair.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.packed import sum_by_behavior, sum_by_candidate
from mim_torchrec.ciubm.ubm.activation import Activation, blocks, build_activation
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, Interest, UBMOptions, UserBehaviorModel
from mim_torchrec.domains import Count
from mim_torchrec.errors import OptionError


class DIN(UserBehaviorModel):
    """DIN's attention pooling over packed pairs.

    Args:
        dim: size of candidate and behavior embeddings.
        hidden: widths of the attention unit's hidden layers; one at least. DIN has one of 36.
        activation: "prelu" or "dice".
        softmax: normalize the weights of a candidate to sum to 1, which DIN does not.
    """

    keeps_columns = True

    def __init__(
        self,
        dim: int,
        hidden: tuple[int, ...] = (36,),
        activation: Activation = "prelu",
        softmax: bool = False,
    ) -> None:
        super().__init__()
        if not hidden:
            raise OptionError("the attention unit needs a hidden layer")
        self.out_dim = dim
        self.softmax = softmax
        self.first = nn.Linear(4 * dim, hidden[0])
        layers: list[nn.Module] = []
        for width_in, width_out in zip(hidden, hidden[1:], strict=False):
            layers += [build_activation(activation, width_in), nn.Linear(width_in, width_out)]
        self.middle = nn.Sequential(*layers)
        self.activation = build_activation(activation, hidden[-1])
        self.last = nn.Linear(hidden[-1], 1)

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
        first = _FirstLayer.apply(candidates, behaviors, per_candidate, per_behavior, w_product, pairs)
        return self.activation(self.middle(first), self.last.weight.squeeze(0)) + self.last.bias


class _FirstLayer(torch.autograd.Function):
    """The first layer's output for each pair, from what its candidate and its behavior give alone.

    Blocks of pairs stay in the cache, and the products of embeddings are made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        candidates: Tensor,
        behaviors: Tensor,
        per_candidate: Tensor,
        per_behavior: Tensor,
        weight: Tensor,
        pairs: RequestPairs,
    ) -> Tensor:
        ctx.save_for_backward(candidates, behaviors, weight)
        ctx.pairs = pairs
        out = candidates.new_empty(pairs.num_pairs, weight.shape[0])
        for rows in blocks(out):
            c, b = pairs.candidate_index[rows], pairs.behavior_index[rows]
            product = candidates.index_select(0, c).mul_(behaviors.index_select(0, b))
            term = per_candidate.index_select(0, c).add_(per_behavior.index_select(0, b))
            torch.addmm(term, product, weight.t(), out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        candidates, behaviors, weight = ctx.saved_tensors
        pairs = ctx.pairs
        to_candidates = candidates.new_empty(pairs.num_pairs, candidates.shape[1])
        to_behaviors = torch.empty_like(to_candidates)
        grad_weight = torch.zeros_like(weight)
        for rows in blocks(grad):
            q = candidates.index_select(0, pairs.candidate_index[rows])
            s = behaviors.index_select(0, pairs.behavior_index[rows])
            grad_weight.addmm_(grad[rows].t(), q * s)
            grad_product = grad[rows] @ weight
            torch.mul(grad_product, s, out=to_candidates[rows])
            torch.mul(grad_product, q, out=to_behaviors[rows])
        return (
            sum_by_candidate(to_candidates, pairs),
            sum_by_behavior(to_behaviors, pairs),
            sum_by_candidate(grad, pairs),
            sum_by_behavior(grad, pairs),
            grad_weight,
            None,
        )


@dataclass(frozen=True, kw_only=True)
class DINOptions(UBMOptions):
    """Options of DIN."""

    name = "din"

    attention: tuple[Count, ...] = (36,)
    """Hidden layers of the attention unit."""
    attention_activation: Activation = "prelu"
    """Activation of the attention unit."""
    attention_softmax: bool = False
    """Normalize attention weights, which DIN does not."""

    def build(self, dim: int, *, dropout: float, auxiliary: bool) -> DIN:
        """See `UBMOptions`."""
        return DIN(dim, self.attention, self.attention_activation, self.attention_softmax)
