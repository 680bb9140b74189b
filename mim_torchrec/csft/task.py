"""C-SFT as a task of the shared loop: pairs with hard negatives, the loss, recall of what was bought."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mim_torchrec.csft.config import CSFTConfig
from mim_torchrec.csft.image_search import encode, find
from mim_torchrec.csft.inputs import Catalog, Inputs, Tokens
from mim_torchrec.csft.objective import Objective, make_objective
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.encoders.checkpoint import save_encoder
from mim_torchrec.encoders.item_encoder import ItemEncoder, ItemHead
from mim_torchrec.losses.cross_entropy import CategoryCrossEntropy, PairCrossEntropy
from mim_torchrec.training.distributed import Ranks

RECALL_AT = 10


@dataclass
class PairBatch:
    """N pairs of a rank: queries, and items, the N positives first and after them the N hard negatives.

    Hard negatives may be left out as a whole; `item_category` is there for the loss that classifies.
    """

    query: Tensor
    query_text: Tensor | Tokens | None
    image: Tensor
    text: Tensor | Tokens
    item_row: Tensor
    query_row: Tensor
    item_category: Tensor | None = None


class Contrast(nn.Module):
    """The trained part and the loss in one module, so that DDP averages every gradient.

    Args:
        encoder: the whole encoder, which takes pixels and tokens, or its head, which takes features.
        loss: the loss.
    """

    def __init__(self, encoder: ItemEncoder | ItemHead, loss: Objective) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss

    def forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch and scalars about it."""
        items = self.encoder.encode_items(batch.image, batch.text)
        if isinstance(self.loss, CategoryCrossEntropy):
            return self.loss(items.mm, items.text, items.image, batch.item_category)
        query_mm = None
        if batch.query_text is not None:
            query_mm, query, _ = self.encoder.encode_items(batch.query, batch.query_text)
        else:
            query = self.encoder.encode_query(batch.query)
        if isinstance(self.loss, PairCrossEntropy):
            return self.loss(query, items.mm, items.text, items.image)
        return self.loss(
            query, items.mm, items.text, items.image, batch.item_row, batch.query_row, query_mm
        )


class CSFTTask:
    """What `training.loop.fit` needs to fine-tune an encoder.

    Args:
        config: the stage's configuration.
        encoder: towers and head; saved as a whole.
        inputs: features for the head if towers are frozen, else pixels and tokens.
        items: the items.
        pairs: all pairs.
        catalog: pictures and titles of both.
        train: indexes of the pairs to train on.
        held_out: indexes of the pairs to validate on.
        ranks: the process group.

    Raises:
        ValueError: the sizes do not fit: no whole batch, or gamma with queries that are no items.
    """

    def __init__(
        self,
        config: CSFTConfig,
        encoder: ItemEncoder,
        inputs: Inputs,
        items: ItemStore,
        pairs: PairDataset,
        catalog: Catalog,
        train: np.ndarray,
        held_out: np.ndarray,
        ranks: Ranks,
    ) -> None:
        if len(train) < config.batch_size:
            raise ValueError(f"{len(train)} pairs are fewer than --batch-size {config.batch_size}; lower it")
        if config.gamma and (catalog.query_row < 0).any():
            raise ValueError(
                f"--gamma {config.gamma} needs queries that are items; "
                f"{int((catalog.query_row < 0).sum())} of {len(pairs)} are images of their own"
            )
        self._config, self._encoder, self._inputs = config, encoder, inputs
        self._items, self._pairs, self._catalog = items, pairs, catalog
        self._train, self._held_out, self._ranks = train, held_out, ranks
        self._per_rank = config.batch_size // ranks.world_size
        self._category: np.ndarray | None = None
        num_categories = 0
        if config.interest_signal == "category":
            names = np.asarray(items.categories(np.arange(len(items))), dtype=object).astype(str)
            known, self._category = np.unique(names, return_inverse=True)
            num_categories = len(known)
        loss = make_objective(config, num_categories)
        trained = encoder.head if config.freeze_towers else encoder
        self._contrast = Contrast(trained, loss).to(ranks.device)
        self.model: nn.Module = self._contrast
        if ranks.world_size > 1:
            self.model = nn.parallel.DistributedDataParallel(self._contrast)
        self.optimizer = make_optimizer(self._contrast, config)
        steps = self.num_batches(0) * config.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, warmup_cosine(math.ceil(config.warmup * steps), steps)
        )
        self.optimizer.register_step_post_hook(lambda *_: schedule.step())

    def num_batches(self, epoch: int) -> int:
        """Whole batches of an epoch; the rest of the pairs waits for the next order."""
        return len(self._train) // self._config.batch_size

    def batches(self, epoch: int) -> Iterator[PairBatch]:
        """This rank's part of every batch, in an order of (seed, epoch)."""
        self._pairs.set_epoch(epoch)
        order = np.random.default_rng((self._config.seed, epoch)).permutation(self._train)
        for step in range(self.num_batches(epoch)):
            start = step * self._config.batch_size + self._ranks.rank * self._per_rank
            yield self._batch(order[start : start + self._per_rank])

    def num_samples(self, batch: PairBatch) -> int:
        """Pairs in a batch."""
        return len(batch.query_row)

    def training_forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Multi-level InfoNCE of a batch."""
        return self.model(batch)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Recall of the bought item among all items: h_q^img of held-out queries against h^MM.

        Returns:
            `recall_at_10` and `mrr` (mean reciprocal rank); the item that is the query itself is left out.
            {} if no pairs are held out.
        """
        if not len(self._held_out):
            return {}
        encoder = self._contrast.encoder.eval()
        size = self._config.encode_batch_size
        vectors = encode(encoder, self._inputs, self._held_out, self._catalog, size, self._ranks)
        place = find(*vectors, self._held_out, self._catalog).place.double()
        return {
            f"recall_at_{RECALL_AT}": float((place <= RECALL_AT).double().mean()),
            "mrr": float((1 / place).mean()),
        }

    def save(self, path: Path) -> None:
        """Write the encoder's checkpoint, towers included."""
        if self._ranks.is_main:
            save_encoder(self._encoder, path)

    def _batch(self, index: np.ndarray) -> PairBatch:
        rows = self._catalog.item_row[index]
        if self._config.hard_negatives and self._category is None:
            negatives = [self._pairs.hard_negative(int(i)) for i in index]
            rows = np.concatenate([rows, self._items.rows_of(np.array(negatives))])
        query_row = self._catalog.query_row[index]
        return PairBatch(
            query=self._inputs.pictures(self._catalog.query_picture[index]),
            query_text=self._inputs.texts(query_row) if self._config.gamma else None,
            image=self._inputs.pictures(rows),
            text=self._inputs.texts(rows),
            item_row=torch.from_numpy(rows).to(self._ranks.device),
            query_row=torch.from_numpy(query_row).to(self._ranks.device),
            item_category=None if self._category is None
            else torch.from_numpy(self._category[rows]).to(self._ranks.device),
        )


def make_optimizer(model: Contrast, config: CSFTConfig) -> torch.optim.AdamW:
    """AdamW: decay on matrices only, a learning rate of their own for towers."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = name.startswith(("encoder.vision.", "encoder.text.")) and not config.freeze_towers
            groups.setdefault((tower, parameter.ndim > 1), []).append(parameter)
    tower_lr = config.lr if config.tower_lr is None else config.tower_lr
    return torch.optim.AdamW([
        {"params": parameters, "lr": tower_lr if tower else config.lr,
         "weight_decay": config.weight_decay if matrix else 0.0}
        for (tower, matrix), parameters in groups.items()
    ])  # fmt: skip


def warmup_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """Factor of the learning rate by step: up to 1 in `warmup` steps, then along a cosine to 0 at `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return factor
