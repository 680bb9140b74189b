"""Multi-level InfoNCE with space-time negatives (Eq. 5–6, ST-NSG, §3.3 Q3).

Space: the items of all ranks, and a hard negative beside each. Time: those of the last k batches. Not here:
how hard negatives are drawn, which is a matter of the data.
"""

import torch
from torch import Tensor

from mim_torchrec.errors import OptionError
from mim_torchrec.losses.contrast import Level, ScaledLoss, contrast, unit
from mim_torchrec.losses.queue import ItemQueue


class MultiLevelInfoNCE(ScaledLoss):
    r"""Contrasts query images with what items are, look like and say.

    .. math:: L = L(h_q^{img}, h^{MM}) + \alpha L(h_q^{img}, h^{txt}) + \beta L(h_q^{img}, h^{img})
    .. math:: L(q, h) = -\log \frac{\exp(s \cos(q, h_+))}{\sum_j \exp(s \cos(q, h_j))}

    j runs over the positives and the hard negatives of all P ranks, N each, and those of the k batches
    before: 2NP(k + 1) - 1 negatives, less those that are the query's own positive item or the query itself.
    Without hard negatives the items are the N positives.

    In evaluation mode the queue is neither read nor written, so that a loss is one of its batch alone.

    Args:
        alpha: weight of the titles.
        beta: weight of the images.
        gamma: weight of a level beyond the paper, for queries that are items themselves: the query's h^MM
            against the item's h^MM, so that the vectors CiUBM compares with each other are trained for it.
        temperature: 1 / s, fixed; 1 is Eq. 5 as printed. None learns s from 1 / 0.07, at most 100.
        mask_same_item: leave out columns that hold the query's positive item once more, or the query's own
            item. False counts them as negatives, as the paper's formula does.
        queue_batches: k, batches of this rank whose items are negatives of later queries.
        queue_start_step: training steps before the queue is read; it is filled from the first. Early vectors
            change so fast that those of the last steps are poor negatives.
        balance_queue: give items the push away from queries that they would miss, because nothing that is
            queued has a gradient. An item is a negative in its own batch and in k later ones, but is pushed
            in its own only, while its query pulls it with full weight: without the balance all items are
            drawn towards the queries' mean.

    Raises:
        OptionError: the temperature is not positive, or a number of batches or steps is negative.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 0.0,
        temperature: float | None = None,
        mask_same_item: bool = True,
        queue_batches: int = 0,
        queue_start_step: int = 0,
        balance_queue: bool = False,
    ) -> None:
        super().__init__(temperature)
        if queue_batches < 0 or queue_start_step < 0:
            raise OptionError(f"queue_batches is {queue_batches} and queue_start_step {queue_start_step}; "
                             "neither can be negative")  # fmt: skip
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.mask_same_item = mask_same_item
        self.queue_start_step, self.balance_queue = queue_start_step, balance_queue
        self.queue: ItemQueue | None = None
        if queue_batches:
            weights = {"mm": 1.0, "text": alpha, "image": beta}
            self.queue = ItemQueue([name for name, weight in weights.items() if weight], queue_batches)

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
        """Loss of this rank's N pairs; every rank has as many. In training mode each call is a step.

        Args:
            query: (N, d) h_q^img.
            mm: (2N, d) h^MM of the positives and, after them, of the hard negatives; (N, d) without those.
            text: (2N, d) h^txt likewise.
            image: (2N, d) h^img likewise.
            item_ids: (2N,) int64 likewise.
            query_ids: (N,) item id of each query, or -1 where it is no item.
            query_mm: (N, d) h^MM of the queries, for gamma.

        Returns:
            The loss, and `accuracy` and `negatives` of the first level, `scale`, and each level's loss.

        Raises:
            ValueError: there is no query_mm for gamma; the batch does not fit the queue; or, on every rank,
                the ranks' batches differ in size.
        """
        scale = self.scale()
        source = unit(query)
        items = {"mm": unit(mm)}
        if self.alpha:
            items["text"] = unit(text)
        if self.beta:
            items["image"] = unit(image)
        queue = self.queue if self.training else None
        used = queue if queue is not None and 0 < queue.pushed >= self.queue_start_step else None
        if used is not None:
            used.place_on(mm.device)  # before it is read for the first time after loading
        queued = {name: None if used is None else used.vectors(name) for name in items}
        levels = {name: Level(source, items[name], queued[name]) for name in items}
        weights = {"mm": 1.0, "text": self.alpha, "image": self.beta, "item": self.gamma}
        if self.gamma:
            if query_mm is None:
                raise ValueError("gamma needs query_mm: the queries must be items")
            levels["item"] = Level(unit(query_mm), items["mm"], queued["mm"])
        results = contrast(
            list(levels.values()),
            item_ids,
            scale,
            own_ids=query_ids,
            queue_ids=None if used is None else used.ids,
            mask_same_item=self.mask_same_item,
            balance_queue=self.balance_queue,
        )
        if queue is not None:
            # no backward pass reads queued vectors, so they may change before it
            queue.push(list(items.values()), item_ids)
        report = {"scale": scale.detach(), "accuracy": results[0].accuracy, "negatives": results[0].negatives}
        total = torch.zeros_like(results[0].loss)
        for name, result in zip(levels, results, strict=True):
            total = total + weights[name] * result.loss
            report[f"loss_{name}"] = result.loss.detach()
        return total, report
