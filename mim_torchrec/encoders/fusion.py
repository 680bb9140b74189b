"""Fusion of an image and a title: by tensors (Eq. 3–4, after TFN, Zadeh et al. 2017), and two others.

`LowRankFusion` (LMF, Liu et al. 2018) is the tensor product with factors instead of its first matrix,
`ConcatFusion` has no products; the paper's Table 5 calls that "w/o TFN".

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

    def __init__(self, dim: int, fusion_dim: int = 64, hidden_dim: int = 256, dropout: float = 0.0) -> None:
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


class LowRankFusion(nn.Module):
    r"""Outer product of two vectors under a weight tensor of low rank, without the product.

    .. math:: h^{MM} = W_o \, \mathrm{ReLU}\left(b + \sum_{r=1}^R w_r \left(U_r
        \begin{bmatrix} a \\ 1 \end{bmatrix}\right) \circ \left(V_r \begin{bmatrix} b \\ 1 \end{bmatrix}
        \right)\right) + b_o, \quad a = \mathrm{LN}(W_a h^{img}), \; b = \mathrm{LN}(W_b h^{txt})

    Args:
        dim: size of both inputs and of the output.
        fusion_dim: size of a and b.
        hidden_dim: size of the sum, which TFN's hidden layer has.
        rank: R, the number of factors.
        dropout: on the hidden layer.
    """

    def __init__(
        self, dim: int, fusion_dim: int = 64, hidden_dim: int = 256, rank: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(dim, fusion_dim), nn.LayerNorm(fusion_dim))
        self.text = nn.Sequential(nn.Linear(dim, fusion_dim), nn.LayerNorm(fusion_dim))
        self.rank = rank
        # a linear layer with a bias is one on the vector with a 1 appended
        self.image_factors = nn.Linear(fusion_dim, rank * hidden_dim)
        self.text_factors = nn.Linear(fusion_dim, rank * hidden_dim)
        self.weights = nn.Parameter(torch.full((rank,), rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(hidden_dim))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Fuse h^img (n, dim) and h^txt (n, dim) into h^MM (n, dim)."""
        a = self.image_factors(self.image(image)).unflatten(1, (self.rank, -1))
        b = self.text_factors(self.text(text)).unflatten(1, (self.rank, -1))
        hidden = torch.einsum("r,nrh,nrh->nh", self.weights, a, b) + self.bias
        return self.out(self.dropout(torch.relu(hidden)))


class ConcatFusion(nn.Module):
    """An MLP of both vectors, one after the other.

    Args:
        dim: size of both inputs and of the output.
        hidden_dim: hidden layer.
        dropout: on the hidden layer.
    """

    def __init__(self, dim: int, hidden_dim: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, dim)
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Fuse h^img (n, dim) and h^txt (n, dim) into h^MM (n, dim)."""
        return self.mlp(torch.cat([image, text], dim=1))
