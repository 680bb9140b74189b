r"""What is known of behaviors besides their items, such as action, price, dwell time (beyond the paper).

$h_i^{ID} = e_i + W [s_i; x_i]$ for the ID embedding $e_i$ of a behavior's item (and category), embeddings
$s_i$ of its further ids, and its numbers $x_i$, normalized over the behaviors of the batch. This is the
projection $[I, W] [e_i; s_i; x_i]$ of all that is known, whose part of the item is fixed: a behavior stays in
the space of the candidates, which it is compared with and which have no such columns. W starts at 0, so a
model begins as the one without side information. All user behavior models and the fusion interest read
$h_i^{ID}$.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mim_torchrec.training.batch_norm import GlobalBatchNorm1d


class SideInformation(nn.Module):
    """Adds side information to the ID embeddings of behaviors.

    Args:
        dim: size of an ID embedding.
        ids_dim: size of the embeddings of a behavior's further ids together.
        num_numbers: how many numbers a behavior has.
        batch_norm: normalize the numbers over the behaviors of all ranks.
    """

    def __init__(self, dim: int, ids_dim: int, num_numbers: int, batch_norm: bool) -> None:
        super().__init__()
        self.normalize = GlobalBatchNorm1d(num_numbers, affine=False) if batch_norm and num_numbers else None
        self.projection = nn.Linear(ids_dim + num_numbers, dim, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, behaviors: Tensor, ids: Sequence[Tensor], numbers: Tensor | None) -> Tensor:
        """Give behaviors (sum_behaviors, dim) with side information.

        Args:
            behaviors: (sum_behaviors, dim) ID embeddings.
            ids: (sum_behaviors, …) embeddings of further ids, `ids_dim` together.
            numbers: (sum_behaviors, num_numbers) float32, None where there are none.
        """
        parts = list(ids)
        if numbers is not None:
            parts.append(numbers if self.normalize is None else self.normalize(numbers))
        return behaviors + self.projection(torch.cat(parts, dim=-1))
