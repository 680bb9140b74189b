"""Configuration of content-interest-aware fine-tuning; every field is a flag of `mim csft`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.training.checkpoints import CheckpointConfig
from mim_torchrec.training.distributed import Timeouts
from mim_torchrec.training.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class CSFTConfig:
    """Fine-tune the item encoder on pairs of a query image and the item that was bought after it (§3.3).

    One process, or several under torchrun. Writes `encoder/` (a self-contained checkpoint), config.json,
    history.jsonl, metrics.json, retrieval.json and retrieval.png (image search of the held-out pairs) and
    TensorBoard's files into `out`.
    """

    data: Path
    """Dataset directory."""
    out: Path
    """Directory of the results; made if missing."""

    towers: Path | None = None
    """Directory of towers that `mim pretrain` wrote, instead of those that --vision and --text name."""
    vision: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    init: Literal["auto", "pca", "random"] = "auto"
    """How projections start: at the principal components of the towers' features (`pca`, frozen towers only)
    or at random; `auto` is `pca` for frozen towers."""
    freeze_towers: bool = True
    """Train the head only, on features of the towers that are computed once."""
    feature_cache: Path | None = None
    """Folder where features of frozen towers are kept for other runs; by default one inside `out`."""

    loss: Literal["contrastive", "cross_entropy"] = "contrastive"
    """Contrast with all items (Eq. 5–6), or cross-entropy of one item or pair at a time (Table 4)."""
    interest_signal: Literal["purchase", "click", "all", "category"] = "purchase"
    """Which pairs are used (Table 4); `all` also takes files that have no column `signal`. `category` has the
    categories of the items of all pairs told, whatever came of the pairs; for `cross_entropy` only."""
    alpha: float = 0.5
    """Weight of the query against titles (Eq. 6)."""
    beta: float = 0.5
    """Weight of the query against images (Eq. 6)."""
    gamma: float = 0.0
    """Weight of a level beyond the paper: h^MM of the query against h^MM of the item. Needs queries that are
    items."""
    temperature: float | None = None
    """Fixed temperature; 1 is Eq. 5 as printed. By default learned, from 0.07."""
    mask_same_item: bool = True
    """Leave out of the negatives what is the positive item once more, or the query's own item."""
    hard_negatives: bool = True
    """Contrast every query with an item of the positive's category too (ST-NSG)."""
    queue_batches: int = 0
    """Batches before this one whose items are negatives too (k in ST-NSG); 0 for none. Each takes 1.5 KiB a
    pair on its rank, for three levels of vectors of 128."""
    queue_start_step: int = 0
    """Steps before those batches are used; the queue is filled from the first step."""
    balance_queue: bool = True
    """Push items away from queries, in their own batch, as often as they are negatives in all: those that are
    queued have no gradient, and would only ever be pulled. The loss is the same."""

    epochs: int = 8
    """Passes over the pairs; the best by recall@10 of held-out pairs is kept."""
    patience: int | None = None
    """Stop after this many epochs without a better recall@10."""
    batch_size: int = 512
    """Pairs in a step, over all ranks (N x P)."""
    lr: float = 1e-3
    """Highest learning rate of the head (AdamW)."""
    tower_lr: float | None = None
    """Highest learning rate of towers that are not frozen; by default `lr`."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and the temperature have none."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; after them it falls to 0 along a cosine."""
    validation_fraction: float = 0.05
    """Share of the pairs, the last by time, that are held out; with 0 the last epoch is kept."""
    drawn_queries: int = 8
    """Held-out queries of which `retrieval.png` shows what they find."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """`skip` leaves out, and counts, pairs without an item, with an item that is not in the item table or
    with an image that cannot be decoded; such items are not used as hard negatives. It decodes all images."""
    seed: int = 0
    """Seed of the initial weights, of the order of the pairs, of hard negatives and of dropout."""

    parallel: Parallel = "ddp"
    """Weights whole on every rank, or (`fsdp`) those of trained towers divided over the ranks."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which towers compute; heads and losses always take float32."""
    chunk_size: int | None = None
    """Images or titles that a trained tower takes at a time, computed again in the backward pass: the
    gradient of a whole batch in the memory of a chunk (GradCache, Gao et al. 2021)."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    timeout: Timeouts = field(default_factory=Timeouts)

    image_memory_gib: float = 2.0
    """Decoded images are kept in the memory of every rank if they fit into this; else they are decoded again
    in every epoch. Only for towers that are not frozen."""
    encode_batch_size: int = 64
    """Images or titles that a tower takes at a time where no gradient is needed."""
    item_cache: Path | None = None
    """Folder of the item index; by default one inside `out`."""
    log_every: int = 20
    """Steps between two entries of the log."""

    def resume_fingerprint(self) -> dict[str, Any]:
        """The fields that must be equal for a run to resume."""
        free = {"out", "checkpoint", "timeout", "log_every", "drawn_queries", "image_memory_gib",
                "encode_batch_size", "feature_cache", "item_cache"}  # fmt: skip
        return {name: value for name, value in asdict(self).items() if name not in free}

    def encoder(self) -> ItemEncoderConfig:
        """The part that describes the encoder."""
        return ItemEncoderConfig(vision=self.vision, text=self.text, head=self.head)
