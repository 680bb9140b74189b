"""Tensor fusion of an image and a title (Eq. 3–4, after TFN, Zadeh et al. 2017).

The two sides are normalized by a LayerNorm, not by their length: entries of a unit vector are about
1/sqrt(dim), those of the product about 1/dim, and the appended 1 would drown them.
"""

import torch
from torch import Tensor, nn


class TensorFusion(nn.Module):
    r"""Outer product of two vectors and an MLP.

    .. math:: h^{MM} = \mathrm{MLP}\left(\begin{bmatrix} a \\ 1 \end{bmatrix} \otimes
        \begin{bmatrix} b \\ 1 \end{bmatrix}\right), \quad
        a = \mathrm{LN}(W_a h^{img}), \; b = \mathrm{LN}(W_b h^{txt})

    Args:
        dim: size of both inputs and of the output.
        fusion_dim: size of a and b; the MLP reads (fusion_dim + 1)² products.
        hidden_dim: hidden layer of the MLP.
        dropout: on the hidden layer.
    """

    def __init__(
        self, dim: int, fusion_dim: int = 64, hidden_dim: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(dim, fusion_dim), nn.LayerNorm(fusion_dim))
        self.text = nn.Sequential(nn.Linear(dim, fusion_dim), nn.LayerNorm(fusion_dim))
        self.mlp = nn.Sequential(
            nn.Linear((fusion_dim + 1) ** 2, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Fuse h^img (n, dim) and h^txt (n, dim) into h^MM (n, dim)."""
        one = image.new_ones(len(image), 1)
        a = torch.cat([self.image(image), one], dim=1)
        b = torch.cat([self.text(text), one], dim=1)
        return self.mlp((a[:, :, None] * b[:, None, :]).flatten(1))
