"""CiUBM and the pairs of a batch as one module, for models that something traces (section 3.4).

TorchRec's pipelines trace a model with ``torch.fx`` to find its sharded lookups. Listing pairs reads shapes,
so it cannot be traced. The pipelines do not trace modules without sharded tables. A model that calls this
module lists no pairs in its own ``forward``. Elsewhere, name it as a leaf:
``torchrec.fx.symbolic_trace(model, leaf_modules=["RequestInterests"])``.
"""

from torch import Tensor, nn

from mim_torchrec.ciubm.ciubm import CiUBM, Interests
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.ubm.interface import BehaviorContext


class RequestInterests(nn.Module):
    """Interests of the candidates of each request, from offsets and vectors.

    Args:
        ciubm: the interests to compute.

    Two requests, with two candidates and one, and with histories of three behaviors and none:

    >>> import torch
    >>> from mim_torchrec.ciubm import CiUBM
    >>> interests = RequestInterests(CiUBM(None, content=True, fusion=True))
    >>> candidate_offsets, behavior_offsets = torch.tensor([0, 2, 3]), torch.tensor([0, 3, 3])
    >>> ids, vectors = (torch.randn(3, 4), torch.randn(3, 4)), (torch.randn(3, 8), torch.randn(3, 8))
    >>> interests(candidate_offsets, behavior_offsets, *ids, *vectors).concatenate().shape
    torch.Size([3, 12])
    """

    def __init__(self, ciubm: CiUBM) -> None:
        super().__init__()
        self.ciubm = ciubm

    def forward(
        self,
        candidate_offsets: Tensor,
        behavior_offsets: Tensor,
        candidates: Tensor,
        behaviors: Tensor,
        candidates_mm: Tensor | None = None,
        behaviors_mm: Tensor | None = None,
        context: BehaviorContext | None = None,
    ) -> Interests:
        """Compute the interests that `ciubm` has switched on.

        Args:
            candidate_offsets: (num_requests + 1,) integer offsets of the packed candidates.
            behavior_offsets: (num_requests + 1,) integer offsets of the packed behaviors.
            candidates: (sum_candidates, id_dim) ID embeddings of the targets.
            behaviors: (sum_behaviors, id_dim) ID embeddings of the behaviors.
            candidates_mm: (sum_candidates, mm_dim); needed by all but the ID interest.
            behaviors_mm: (sum_behaviors, mm_dim); needed by all but the ID interest.
            context: recency and categories, for the user behavior models that need them.

        Raises:
            ValueError: the offsets are of different numbers of requests, or multi-modal vectors are missing
                that an interest needs.
        """
        pairs = RequestPairs.build(candidate_offsets, behavior_offsets)
        return self.ciubm(candidates, behaviors, pairs, candidates_mm, behaviors_mm, context)
