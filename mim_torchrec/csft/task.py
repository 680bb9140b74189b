"""C-SFT as a task of the shared loop: pairs with hard negatives, the loss, recall of what was bought."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mim_torchrec.csft.config import CSFTConfig
from mim_torchrec.csft.image_search import encode, find
from mim_torchrec.csft.inputs import Inputs, SearchContent, Tokens
from mim_torchrec.csft.loss_variant import VariantLoss, make_variant_loss
from mim_torchrec.csft.queries import Queries
from mim_torchrec.csft.selection import epoch_metrics
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.pairs import PairDataset
from mim_torchrec.data.prefetch import prefetched
from mim_torchrec.data.uploads import Upload
from mim_torchrec.encoders.checkpoint import save_encoder
from mim_torchrec.encoders.item_encoder import ItemEncoder, ItemHead
from mim_torchrec.encoders.tower import compute_in
from mim_torchrec.errors import OptionError
from mim_torchrec.losses.cross_entropy import CategoryCrossEntropy, PairCrossEntropy
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.parallel import parallelize, synchronize_buffers, whole_state
from mim_torchrec.training.state import TrainingState


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
    pair: np.ndarray
    """(N,) indexes of the pairs."""
    item_category: Tensor | None = None


class Contrast(nn.Module):
    """The trained part and the loss in one module, so that DDP averages every gradient.

    Each tower is called once a step, for queries and items together.

    Args:
        encoder: the whole encoder, which takes pixels and tokens, or its head, which takes features.
        loss: the loss.
        bf16: whether towers compute in bfloat16.
        chunk_size: what a tower takes at a time; None for all of a batch.
    """

    def __init__(
        self,
        encoder: ItemEncoder | ItemHead,
        loss: VariantLoss,
        bf16: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss
        self._bf16, self._chunk_size = bf16, chunk_size

    def forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch and scalars about it."""
        head, query, query_text, image, text = self._features(batch)
        items = head.encode_items(image, text)
        if isinstance(self.loss, CategoryCrossEntropy):
            return self.loss(items.mm, items.text, items.image, batch.item_category)
        query_mm = None
        if query_text is not None:
            query_mm, h_query, _ = head.encode_items(query, query_text)
        else:
            h_query = head.encode_query(query)
        if isinstance(self.loss, PairCrossEntropy):
            return self.loss(h_query, items.mm, items.text, items.image)
        return self.loss(
            h_query, items.mm, items.text, items.image, batch.item_row, batch.query_row, query_mm
        )

    def _features(self, batch: PairBatch) -> tuple[ItemHead, Tensor, Any, Tensor, Any]:
        """The head, and what it takes: features of queries, of their titles, of items and of theirs."""
        if isinstance(self.encoder, ItemHead):
            return self.encoder, batch.query, batch.query_text, batch.image, batch.text
        image = self._encode(self.encoder.vision, torch.cat([batch.query, batch.image]))
        titles = cast(Tokens, batch.text)
        if batch.query_text is not None:
            titles = join_tokens(cast(Tokens, batch.query_text), titles)
        text = self._encode(self.encoder.text, titles)
        queries = len(batch.query)
        query_text = None if batch.query_text is None else text[: len(text) - len(image) + queries]
        text = text if query_text is None else text[len(query_text) :]
        return self.encoder.head, image[:queries], query_text, image[queries:], text

    def _encode(self, tower: nn.Module, inputs: Tensor | Tokens) -> Tensor:
        whole = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
        with torch.autocast(whole.device.type, torch.bfloat16, enabled=self._bf16):
            if self._chunk_size is None or not self.training or len(whole) <= self._chunk_size:
                return tower(inputs).float()
            parts = [
                inputs[start : start + self._chunk_size] if isinstance(inputs, Tensor)
                else {name: value[start : start + self._chunk_size] for name, value in inputs.items()}
                for start in range(0, len(whole), self._chunk_size)
            ]  # fmt: skip
            return torch.cat([checkpoint(tower, part, use_reentrant=False).float() for part in parts])


def join_tokens(first: Tokens, second: Tokens) -> Tokens:
    """Titles of both, padded to the longest; what is padded is masked."""
    width = max(first["input_ids"].shape[1], second["input_ids"].shape[1])
    return {
        name: torch.cat([F.pad(part[name], (0, width - part[name].shape[1])) for part in (first, second)])
        for name in first
    }


class CSFTTask:
    """What `training.loop.fit` needs to fine-tune an encoder.

    Args:
        config: the stage's configuration.
        encoder: towers and head; saved as a whole.
        inputs: features for the head if towers are frozen, else pixels and tokens.
        items: the items.
        pairs: all pairs.
        catalog: images and titles of both.
        train: indexes of the pairs to train on.
        held_out: indexes of the pairs to validate on.
        context: the process group.
        queries: query images of training.

    Raises:
        OptionError: the sizes do not fit: no whole batch, or gamma with queries that are no items.
    """

    def __init__(
        self,
        config: CSFTConfig,
        encoder: ItemEncoder,
        inputs: Inputs,
        items: ItemStore,
        pairs: PairDataset,
        catalog: SearchContent,
        train: np.ndarray,
        held_out: np.ndarray,
        context: DistributedContext,
        queries: Queries,
    ) -> None:
        self._batch_size = config.pairs_per_step(context.world_size)
        if len(train) < self._batch_size:
            few = f"{len(train)} pairs are fewer than the {self._batch_size} of a step"
            raise OptionError(f"{few}; lower --batch-size or --batch-size-per-rank")
        if config.gamma and (catalog.query_row < 0).any():
            raise OptionError(
                f"--gamma {config.gamma} needs queries that are items; "
                f"{int((catalog.query_row < 0).sum())} of {len(pairs)} are images of their own"
            )
        self._config, self._encoder, self._inputs = config, encoder, inputs
        self._queries = queries
        self._items, self._pairs, self._catalog = items, pairs, catalog
        self._train, self._held_out, self._context = train, held_out, context
        self._per_rank = self._batch_size // context.world_size
        self._category: np.ndarray | None = None
        num_categories = 0
        if config.interest_signal == "category":
            names = np.asarray(items.categories(np.arange(len(items))), dtype=object).astype(str)
            known, self._category = np.unique(names, return_inverse=True)
            num_categories = len(known)
        loss = make_variant_loss(config, num_categories)
        trained = encoder.head if config.freeze_towers else encoder
        towers = [] if config.freeze_towers else [encoder.vision, encoder.text]
        if config.chunk_size is not None:
            check_chunks(config, towers)
        self._plain: ItemEncoder | None = None
        if config.parallel == "fsdp" and context.is_main:
            self._plain = copy.deepcopy(encoder).cpu()  # takes the whole weights, to be saved
        self._contrast = Contrast(trained, loss, config.precision == "bf16", config.chunk_size)
        bf16 = config.precision == "bf16"
        if config.parallel == "fsdp":  # their weights are gathered so, also where they are evaluated
            compute_in(config.precision, *towers)
        self.model = parallelize(
            self._contrast.to(context.device), config.parallel, towers, context, bf16=bf16
        )
        self.optimizer = make_optimizer(self._contrast, config, context.device)
        steps = self.num_batches(0) * config.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, warmup_cosine(math.ceil(config.warmup * steps), steps)
        )
        self.optimizer.register_step_post_hook(lambda *_: schedule.step())
        self.state = TrainingState(self.model, self.optimizer, schedule)

    def num_batches(self, epoch: int) -> int:
        """Whole batches of an epoch; the rest of the pairs waits for the next order."""
        return len(self._train) // self._batch_size

    def batches(self, epoch: int, first: int = 0) -> Iterator[PairBatch]:
        """This rank's part of every batch from `first` on, in an order of (seed, epoch)."""
        self._pairs.set_epoch(epoch)
        order = np.random.default_rng((self._config.seed, epoch)).permutation(self._train)
        starts = range(first * self._batch_size, self.num_batches(epoch) * self._batch_size, self._batch_size)
        mine = (start + self._context.rank * self._per_rank for start in starts)
        made = (self._batch(order[start : start + self._per_rank], epoch) for start in mine)
        return prefetched(made, self._inputs.ahead)

    def num_samples(self, batch: PairBatch) -> int:
        """Pairs in a batch."""
        return len(batch.query_row)

    def batch_ids(self, batch: PairBatch) -> dict[str, list[int]]:
        """Item ids of a batch's items, and the ids of its queries."""
        items = self._items.item_ids[batch.item_row.cpu().numpy()]
        return {"item_ids": items.tolist(), "query_ids": self._pairs.query_ids[batch.pair].tolist()}

    def training_forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Multi-level InfoNCE of a batch."""
        return self.model(batch)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Rank of the bought item among all items: h_q^img of held-out queries against h^MM.

        Returns:
            `selection.epoch_metrics`; the item that is the query itself is left out. {} if no pairs are held
            out.
        """
        if not len(self._held_out):
            return {}
        synchronize_buffers(self.model)
        encoder = self._contrast.encoder.eval()
        size = self._config.encode_batch_size
        vectors = encode(encoder, self._inputs, self._held_out, self._catalog, size, self._context)
        rank = find(*vectors, self._held_out, self._catalog, self._context.device).rank
        return epoch_metrics(rank, self._config.select)

    def save(self, path: Path) -> None:
        """Write the encoder's checkpoint, towers included."""
        if self._config.parallel == "fsdp":
            weights = whole_state(self._encoder)
            if self._plain is not None:
                self._plain.load_state_dict(weights)
                save_encoder(self._plain, path)
        elif self._context.is_main:
            save_encoder(self._encoder, path)

    def _batch(self, index: np.ndarray, epoch: int) -> PairBatch:
        """Pairs on the device, sent in one copy."""
        upload = Upload(self._context.device)
        rows = self._catalog.item_row[index]
        if self._config.hard_negatives and self._category is None:
            negatives = [self._pairs.hard_negative(int(i)) for i in index]
            rows = np.concatenate([rows, self._items.rows_of(np.array(negatives))])
        query_row = self._catalog.query_row[index]
        query = self._queries.send(self._catalog.query_image_row[index], epoch, upload)
        query_text = self._inputs.send_texts(query_row, upload) if self._config.gamma else None
        image, text = self._inputs.send_images(rows, upload), self._inputs.send_texts(rows, upload)
        item_row, own_row = (upload.add(torch.from_numpy(each)) for each in (rows, query_row))
        category = None if self._category is None else upload.add(torch.from_numpy(self._category[rows]))
        upload.send()
        return PairBatch(
            query=query(),
            query_text=None if query_text is None else query_text(),
            image=image(),
            text=text(),
            item_row=item_row(),
            query_row=own_row(),
            pair=index,
            item_category=None if category is None else category(),
        )


def check_chunks(config: CSFTConfig, towers: Sequence[nn.Module]) -> None:
    """Raise OptionError where a batch in chunks is not the batch in one, or there is nothing to cut."""
    if not towers:
        raise OptionError("--chunk-size is for towers that are trained; leave it out with frozen ones")
    if config.chunk_size is not None and config.chunk_size < 1:
        raise OptionError(f"--chunk-size is {config.chunk_size}; it must be positive")
    if config.parallel == "fsdp":
        raise OptionError("--chunk-size needs --parallel ddp; with fsdp take activation checkpointing")
    if any(isinstance(module, _BatchNorm) for tower in towers for module in tower.modules()):
        raise OptionError(
            f"--chunk-size: {config.vision.name} has batch normalization, whose statistics would be those of "
            "chunks; choose a tower without, or a smaller batch"
        )


def make_optimizer(model: Contrast, config: CSFTConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW: decay on matrices only, a learning rate of their own for towers; one kernel on a GPU."""
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
    ], fused=device.type == "cuda" or None)  # fmt: skip


def warmup_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """Factor of the learning rate by step: up to 1 in `warmup` steps, then along a cosine to 0 at `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return factor
