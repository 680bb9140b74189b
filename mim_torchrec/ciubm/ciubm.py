r"""CiUBM: the content-interest-aware user behavior model (MIM, section 3.4, Eq. 9).

$h_B = \mathrm{Concat}(h_B^{ID}, h_B^{MM}, h_B^{Fusion})$. Any user behavior model over ID embeddings can be
the first part; the ablations of the paper's Table 5 are the switches of the constructor.

Content and fusion interest are of the whole history, also where the user behavior model searches a part of it
(SIM, TWIN) or cuts it (BST): the paper does not say, and all of it is what Eq. 7 and 8 sum over.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.content import Pooling, content_relevance, relevant_interest
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.ubm.interface import Auxiliary, BehaviorContext


@dataclass(frozen=True)
class Interests:
    """The parts of a user's interest in each candidate; a part that is switched off is None.

    Attributes:
        id: (sum_candidates, ubm.out_dim), Eq. 1.
        content: (sum_candidates, content_dim), Eq. 7.
        fusion: (sum_candidates, id_dim), Eq. 8.
        auxiliary: the auxiliary task of the user behavior model, in training mode, if it has one.
    """

    id: Tensor | None
    content: Tensor | None
    fusion: Tensor | None
    auxiliary: Auxiliary | None = None

    def concatenate(self) -> Tensor:
        """Eq. 9, (sum_candidates, sum of the sizes of the parts)."""
        return torch.cat([part for part in (self.id, self.content, self.fusion) if part is not None], dim=-1)


class CiUBM(nn.Module):
    """ID, content and fusion interest of each candidate.

    Args:
        ubm: user behavior model over ID embeddings, see `ubm.interface`; None switches the ID interest off.
        content: compute the content interest.
        fusion: compute the fusion interest.
        pooling: "sum" (Eq. 7 and 8) or "mean" over behaviors for content and fusion interest.
    """

    def __init__(
        self, ubm: nn.Module | None, *, content: bool, fusion: bool, pooling: Pooling = "sum"
    ) -> None:
        super().__init__()
        if ubm is None and not content and not fusion:
            raise ValueError("CiUBM needs at least one of the ID, content and fusion interests")
        self.ubm = ubm
        self.content = content
        self.fusion = fusion
        self.pooling: Pooling = pooling

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
            candidates_mm: (sum_candidates, mm_dim); needed by content and fusion interest.
            behaviors_mm: (sum_behaviors, mm_dim); needed by content and fusion interest.
            context: gaps and categories, for the user behavior models that need them.

        Raises:
            ValueError: content or fusion interest is on and multi-modal vectors are missing.
        """
        id_interest = auxiliary = None
        if self.ubm is not None:
            id_interest, auxiliary = self.ubm(candidates, behaviors, pairs, context)
        content = fusion = None
        if self.content or self.fusion:
            if candidates_mm is None or behaviors_mm is None:
                raise ValueError("content and fusion interest need multi-modal vectors")
            relevance = content_relevance(candidates_mm, behaviors_mm, pairs)
            if self.content:
                content = relevant_interest(behaviors_mm.detach().float(), relevance, pairs, self.pooling)
            if self.fusion:
                fusion = relevant_interest(behaviors, relevance, pairs, self.pooling)
        return Interests(id=id_interest, content=content, fusion=fusion, auxiliary=auxiliary)
