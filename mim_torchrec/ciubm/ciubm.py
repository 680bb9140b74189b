r"""CiUBM: the content-interest-aware user behavior model (MIM, section 3.4, Eq. 9).

$h_B = \mathrm{Concat}(h_B^{ID}, h_B^{MM}, h_B^{Fusion})$. Any user behavior model over ID embeddings can be
the first part; the ablations of the paper's Table 5 are the switches of the constructor.

Beyond the paper, each off by default: a fourth part, the distribution of the relevance (`similarity.py`), a
learnable temperature that sharpens the relevance, and content dropout.

Content and fusion interest are of the whole history, also where the user behavior model searches a part of it
(SIM, TWIN) or cuts it (BST): the paper does not say, and all of it is what Eq. 7 and 8 sum over.

Multi-modal vectors get a gradient if they ask for one, as those of an encoder that is trained with the model
do; those of a frozen table do not, and nothing is kept or computed for one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.content import Pooling, averaged, content_relevance, relevant_interest, sharpened
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.similarity import similarity_dim, similarity_interest
from mim_torchrec.ciubm.ubm.interface import Auxiliary, BehaviorContext
from mim_torchrec.errors import OptionError


@dataclass(frozen=True)
class Interests:
    """The parts of a user's interest in each candidate; a part that is switched off is None.

    Attributes:
        id: (sum_candidates, ubm.out_dim), Eq. 1.
        content: (sum_candidates, content_dim), Eq. 7.
        fusion: (sum_candidates, id_dim), Eq. 8.
        similarity: (sum_candidates, `similarity_dim`), the distribution of the relevance.
        auxiliary: the auxiliary task of the user behavior model, in training mode, if it has one.
    """

    id: Tensor | None
    content: Tensor | None
    fusion: Tensor | None
    similarity: Tensor | None = None
    auxiliary: Auxiliary | None = None

    def concatenate(self) -> Tensor:
        """Eq. 9, (sum_candidates, sum of the sizes of the parts)."""
        parts = (self.id, self.content, self.fusion, self.similarity)
        return torch.cat([part for part in parts if part is not None], dim=-1)


class CiUBM(nn.Module):
    """ID, content and fusion interest of each candidate.

    Args:
        ubm: user behavior model over ID embeddings, see `ubm.interface`; None switches the ID interest off.
        content: compute the content interest.
        fusion: compute the fusion interest.
        pooling: "sum" (Eq. 7 and 8) or "mean" over behaviors for content and fusion interest.
        tiers: parts of [-1, 1] in the similarity interest; 0 switches it off.
        spans: its spans of most recent behaviors; 0 is the whole history.
        temperature: where a learnable temperature starts, by which content and fusion interest weigh
            behaviors (`content.sharpened`); None weighs them by the relevance itself, as the paper does.
        content_dropout: in training, the probability that a candidate is scored as if it had no vector.

    Raises:
        OptionError: all interests are off, or a number is impossible.
    """

    def __init__(
        self,
        ubm: nn.Module | None,
        *,
        content: bool,
        fusion: bool,
        pooling: Pooling = "sum",
        tiers: int = 0,
        spans: Sequence[int] = (),
        temperature: float | None = None,
        content_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if ubm is None and not content and not fusion and not tiers:
            raise OptionError("CiUBM needs at least one of the ID, content, fusion and similarity interests")
        if temperature is not None and temperature <= 0:
            raise OptionError(f"the temperature starts at {temperature}; it has to be above 0")
        if not 0 <= content_dropout < 1:
            raise OptionError(f"content dropout is {content_dropout}; it has to be at least 0 and below 1")
        self.ubm = ubm
        self.content = content
        self.fusion = fusion
        self.pooling: Pooling = pooling
        self.tiers, self.spans = tiers, tuple(spans)
        self.similarity_dim = similarity_dim(tiers, spans) if tiers else 0
        self.log_temperature: nn.Parameter | None = None
        if temperature is not None and (content or fusion):
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.content_dropout = content_dropout

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        candidates_mm: Tensor | None = None,
        behaviors_mm: Tensor | None = None,
        context: BehaviorContext | None = None,
    ) -> Interests:
        """Compute the interests that are switched on.

        Args:
            candidates: (sum_candidates, id_dim) ID embeddings of the targets.
            behaviors: (sum_behaviors, id_dim) ID embeddings of the behaviors.
            pairs: the pairs of the batch.
            candidates_mm: (sum_candidates, mm_dim); needed by all but the ID interest.
            behaviors_mm: (sum_behaviors, mm_dim); needed by all but the ID interest.
            context: recency and categories, for the user behavior models that need them.

        Raises:
            ValueError: multi-modal vectors are missing that an interest needs.
        """
        # before the ID interest: backward, the gradient that fusion gives to behaviors then comes last, and
        # does not lie, as large as they are, beside what the ID interest needs
        content = fusion = similarity = None
        if self.content or self.fusion or self.tiers:
            if candidates_mm is None or behaviors_mm is None:
                raise ValueError("content, fusion and similarity interest need multi-modal vectors")
            if self.content:
                behaviors_mm = behaviors_mm.float()
            relevance = content_relevance(candidates_mm, behaviors_mm, pairs)
            if self.training and self.content_dropout:
                kept = torch.rand(pairs.num_candidates, device=relevance.device) >= self.content_dropout
                relevance = relevance * kept[pairs.candidate_index]
            if self.tiers:
                similarity = similarity_interest(relevance, pairs, self.tiers, self.spans)
            if self.log_temperature is not None:
                relevance = sharpened(relevance, self.log_temperature.exp(), pairs)
            if self.pooling == "mean":
                relevance = averaged(relevance, pairs)
            if self.content:
                content = relevant_interest(behaviors_mm, relevance, pairs)
            behaviors_mm = None  # a float copy of what is stored shorter would lie beside the ID interest
            if self.fusion:
                fusion = relevant_interest(behaviors, relevance, pairs)
        id_interest = auxiliary = None
        if self.ubm is not None:
            id_interest, auxiliary = self.ubm(candidates, behaviors, pairs, context)
        return Interests(id_interest, content, fusion, similarity, auxiliary)
