"""Multi-level InfoNCE over the items of all ranks (Eq. 5–6)."""

import torch
from torch import Tensor

from mim_torchrec.losses.contrast import InfoNCE, Level, ScaledLoss, contrast, unit


class MultiLevelInfoNCE(ScaledLoss):
    r"""Contrasts query images with what items are, look like and say.

    .. math:: L = L(h_q^{img}, h^{MM}) + \alpha L(h_q^{img}, h^{txt}) + \beta L(h_q^{img}, h^{img})
    .. math:: L(q, h) = -\log \frac{\exp(s \cos(q, h_+))}{\sum_j \exp(s \cos(q, h_j))}

    j runs over the positives and the hard negatives of all P ranks, N each: 2NP - 1 negatives, less those
    that are the query's own positive item or the query itself.

    Args:
        alpha: weight of the titles.
        beta: weight of the images.
        gamma: weight of a level beyond the paper, for queries that are items themselves: the query's h^MM
            against the item's h^MM, so that the vectors CiUBM compares with each other are trained for it.
        temperature: 1 / s, fixed; 1 is Eq. 5 as printed. None learns s from 1 / 0.07, at most 100.
        mask_same_item: leave out columns that hold the query's positive item once more, or the query's own
            item. False counts them as negatives, as the paper's formula does.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 0.0,
        temperature: float | None = None,
        mask_same_item: bool = True,
    ) -> None:
        super().__init__(temperature)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.mask_same_item = mask_same_item

    def forward(
        self,
        query: Tensor,
        mm: Tensor,
        text: Tensor,
        image: Tensor,
        item_ids: Tensor,
        query_ids: Tensor | None = None,
        query_mm: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this rank's N pairs; every rank has as many.

        Args:
            query: (N, d) h_q^img.
            mm: (2N, d) h^MM of the positives and, after them, of the hard negatives.
            text: (2N, d) h^txt likewise.
            image: (2N, d) h^img likewise.
            item_ids: (2N,) int64 likewise.
            query_ids: (N,) item id of each query, or -1 where it is no item.
            query_mm: (N, d) h^MM of the queries, for gamma.

        Returns:
            The loss, and `accuracy` and `negatives` of the first level, `scale`, and each level's loss.
        """
        scale = self.scale()
        source = unit(query)
        levels = {"mm": (1.0, Level(source, unit(mm)))}
        if self.alpha:
            levels["text"] = (self.alpha, Level(source, unit(text)))
        if self.beta:
            levels["image"] = (self.beta, Level(source, unit(image)))
        if self.gamma:
            if query_mm is None:
                raise ValueError("gamma needs query_mm: the queries must be items")
            levels["item"] = (self.gamma, Level(unit(query_mm), levels["mm"][1].items))
        results = contrast(
            [level for _, level in levels.values()],
            item_ids,
            scale,
            own_ids=query_ids,
            mask_same_item=self.mask_same_item,
        )
        report = {"scale": scale.detach(), "accuracy": results[0].accuracy, "negatives": results[0].negatives}
        total = torch.zeros_like(results[0].loss)
        for (name, (weight, _)), result in zip(levels.items(), results, strict=True):
            total = total + weight * result.loss
            report[f"loss_{name}"] = result.loss.detach()
        return total, report


def info_nce(
    query: Tensor, items: Tensor, item_ids: Tensor, query_ids: Tensor, scale: Tensor, mask_same_item: bool
) -> InfoNCE:
    """One level without a queue; arguments as in `MultiLevelInfoNCE`, of vectors of any length."""
    level = Level(unit(query), unit(items))
    return contrast([level], item_ids, scale, own_ids=query_ids, mask_same_item=mask_same_item)[0]
