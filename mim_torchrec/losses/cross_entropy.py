"""Cross-entropy instead of contrast, for the variants v1 to v3 of Table 4.

The paper names the loss and the signal of each variant and nothing more. What we take it to be:

- signal `category` (v1): every level of the items is classified into the items' categories by a linear layer
  of its own. The query takes no part; its image tower is the items'.
- signals `click` and `purchase` (v2, v3): every pair of query and item is classified into followed by the
  signal or not. Yes is the positive, no its hard negative; the logit is s * cos + b, with a learned b.

Levels are weighed as in Eq. 6. Not here: contrast with all items, which is v4 and v5 (`info_nce.py`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim_torchrec.errors import OptionError
from mim_torchrec.losses.contrast import ScaledLoss, unit


class CategoryCrossEntropy(nn.Module):
    r"""Classifies h^MM, h^txt and h^img of items into categories.

    .. math:: L = CE(h^{MM}) + \alpha CE(h^{txt}) + \beta CE(h^{img})

    Args:
        dim: size of the vectors.
        num_categories: number of categories, at least 2.
        alpha: weight of the titles.
        beta: weight of the images.

    Raises:
        OptionError: there is nothing to tell apart.
    """

    def __init__(self, dim: int, num_categories: int, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__()
        if num_categories < 2:
            raise OptionError(f"{num_categories} categories: there is nothing to classify")
        self.alpha, self.beta = alpha, beta
        weights = {"mm": 1.0, "text": alpha, "image": beta}
        self.classifiers = nn.ModuleDict({
            name: nn.Linear(dim, num_categories) for name, weight in weights.items() if weight
        })  # fmt: skip

    def forward(
        self, mm: Tensor, text: Tensor, image: Tensor, categories: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over this rank's n items; with as many on every rank, the mean over ranks is that of all.

        Args:
            mm: (n, dim) h^MM.
            text: (n, dim) h^txt.
            image: (n, dim) h^img.
            categories: (n,) int64, from 0.

        Returns:
            The loss, and `accuracy` of the first level and each level's loss.
        """
        vectors = {"mm": mm, "text": text, "image": image}
        weights = {"mm": 1.0, "text": self.alpha, "image": self.beta}
        total, report = mm.new_zeros((), dtype=torch.promote_types(mm.dtype, torch.float32)), {}
        for name, classifier in self.classifiers.items():
            logits = classifier(vectors[name])
            loss = F.cross_entropy(logits.to(total.dtype), categories)
            total = total + weights[name] * loss
            report[f"loss_{name}"] = loss.detach()
            if name == "mm":
                report["accuracy"] = (logits.detach().argmax(1) == categories).float().mean()
        return total, report


class PairCrossEntropy(ScaledLoss):
    r"""Tells items that followed a query from hard negatives, one pair at a time.

    .. math:: L(q, h) = -\tfrac{1}{2} (\log \sigma(z_+) + \log \sigma(-z_-)), \quad z = s \cos(q, h) + b

    for h^MM, and weighed by alpha and beta for h^txt and h^img.

    Args:
        alpha: weight of the titles.
        beta: weight of the images.
        temperature: 1 / s, fixed; None learns s from 1 / 0.07, at most 100.

    Raises:
        OptionError: the temperature is not positive.
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5, temperature: float | None = None) -> None:
        super().__init__(temperature)
        self.alpha, self.beta = alpha, beta
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(
        self, query: Tensor, mm: Tensor, text: Tensor, image: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over this rank's 2N pairs; with as many on every rank, the mean over ranks is that of all.

        Args:
            query: (N, dim) h_q^img.
            mm: (2N, dim) h^MM of the positives and, after them, of the hard negatives.
            text: (2N, dim) h^txt likewise.
            image: (2N, dim) h^img likewise.

        Returns:
            The loss, and `scale`, `bias`, `accuracy` (share of positives above their hard negative, first
            level) and each level's loss.

        Raises:
            ValueError: there is not one hard negative for every query.
        """
        if len(mm) != 2 * len(query):
            raise ValueError(
                f"{len(query)} queries have {len(mm)} items; each needs a positive and a hard negative"
            )
        source, scale = unit(query), self.scale()
        labels = torch.cat([source.new_ones(len(query)), source.new_zeros(len(query))])
        total, report = source.new_zeros(()), {"scale": scale.detach(), "bias": self.bias.detach().clone()}
        for name, weight, items in (("mm", 1.0, mm), ("text", self.alpha, text), ("image", self.beta, image)):
            if not weight:
                continue
            logits = scale * (source.repeat(2, 1) * unit(items)).sum(1) + self.bias
            loss = F.binary_cross_entropy_with_logits(logits, labels)
            total = total + weight * loss
            report[f"loss_{name}"] = loss.detach()
            if name == "mm":
                positive, negative = logits.detach().view(2, -1)
                report["accuracy"] = (positive > negative).float().mean()
        return total, report
