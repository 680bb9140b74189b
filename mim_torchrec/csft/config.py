"""Configuration of content-interest-aware fine-tuning; every field is a flag of `mim csft`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import tyro

from mim_torchrec.domains import Count, Fraction, Natural, Positive, Share, Temperature, Weight
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoderConfig
from mim_torchrec.encoders.text import TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.training.config import CheckpointConfig, Timeouts
from mim_torchrec.training.parallel import Parallel
from mim_torchrec.training.presets import Preset, chosen, replaced

Criterion = Literal["log_rank", "mrr", "recall_at_10"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "default": {},
    "paper": {  # §3.3, §4.1.3
        "vision.name": "eva02", "text.name": "bge_base", "head.fusion": "tfn", "head.principal_dim": 0,
        "init": "random", "freeze_towers": False, "loss": "contrastive", "interest_signal": "purchase",
        "alpha": 0.5, "beta": 0.5, "gamma": 0.0, "temperature": 1.0, "mask_same_item": False,
        "hard_negatives": True, "hard_negatives_from": "items", "queue_batches": 10, "queue_start_step": 0,
        "balance_queue": False, "batch_size_per_rank": 1024, "lr": 5e-3, "tower_lr": None,
        "weight_decay": 0.0, "clip_norm": None,
    },
    "recommended": {},
}  # fmt: skip
"""Fields of `CSFTConfig` by preset; other fields have their defaults, which are what we recommend."""
SETTLES = {"batch_size": ("batch_size_per_rank",), "towers": ("vision.name", "text.name")}


@dataclass(frozen=True, kw_only=True)
class CSFTConfig:
    """Fine-tune the item encoder on pairs of a query image and the item that was bought after it (§3.3).

    One process, or several under torchrun. Writes `encoder/` (a self-contained checkpoint), config.json,
    history.jsonl, metrics.json, retrieval.json and retrieval.png (image search of the held-out pairs) and
    TensorBoard's files into `out`.
    """

    data: Place
    """Dataset directory."""
    out: Place
    """Directory of the results; made if missing."""
    preset: Preset = "default"
    """Defaults of all other flags. `paper` is the paper to the letter: large towers that are trained.
    `recommended` are the defaults."""

    towers: Place | None = None
    """Directory of towers that `mim pretrain` wrote, instead of those that --vision and --text name."""
    vision: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    init: Literal["auto", "pca", "random"] = "auto"
    """How projections start: at the principal components of the towers' features (`pca`, frozen towers only)
    or at random; `auto` is `pca` for frozen towers."""
    freeze_towers: bool = True
    """Train the head only, on features of the towers that are computed once."""
    feature_cache: LocalPath | None = None
    """Folder where features of frozen towers are kept for other runs; by default one inside `out`."""

    loss: Literal["contrastive", "cross_entropy"] = "contrastive"
    """Contrast with all items (Eq. 5–6), or cross-entropy of one item or pair at a time (Table 4)."""
    interest_signal: Literal["purchase", "click", "all", "category"] = "purchase"
    """Pairs that are trained on (Table 4): those that ended in a purchase, those that ended in a click, or
    all, also of files without a column `signal`. `category` takes all pairs and trains the encoder to tell
    the category of an item; it needs --loss cross_entropy."""
    alpha: Weight = 0.5
    """Weight of the query against titles (Eq. 6)."""
    beta: Weight = 0.5
    """Weight of the query against images (Eq. 6)."""
    gamma: Weight = 0.0
    """Weight of a level beyond the paper: h^MM of the query against h^MM of the item. The queries must be
    items."""
    temperature: Temperature | None = None
    """Fixed temperature; 1 is Eq. 5 as printed. By default learned, from 0.07."""
    mask_same_item: bool = True
    """Exclude from the negatives the query's own item, and the positive item where it occurs again."""
    hard_negatives: bool = True
    """Give every query an item of the positive's category as a further negative (ST-NSG)."""
    hard_negatives_from: Literal["pairs", "items"] = "pairs"
    """Where hard negatives are drawn from that the pairs do not name: the items of other pairs of the
    category, or all items of the category, as the paper does. Most of these are items that nobody bought."""
    queue_batches: Natural = 0
    """Number of earlier batches whose items are negatives too (k in ST-NSG); 0 is none. Each takes 1.5 KiB
    per pair on its rank, for three levels of vectors of 128."""
    queue_start_step: Natural = 0
    """Steps before the queue is used; it is filled from the first step."""
    balance_queue: bool = True
    """Push an item away from the other queries of its own batch k + 1 times as strongly. Queued items have no
    gradient: without this, an item is pulled by its query in full and pushed away in one of k + 1 batches.
    The value of the loss is the same."""

    augment_queries: Share = 0.0
    """Beyond the paper: how strongly the query images of training are changed, as photos differ from
    renderings (perspective, crop, light, blur), up to 1. Held-out queries are not changed."""
    augment_views: Count = 4
    """Changed views of a query that frozen towers compute; an epoch takes one of them, or the query as it is.
    Trained towers see another one in every epoch."""

    epochs: Count = 8
    """Passes over the pairs; the best by `select` is kept."""
    select: Criterion = "log_rank"
    """How epochs are compared, and the best one with the plain towers, on held-out pairs against all items:
    mean logarithm of the bought item's rank, mean reciprocal rank, or recall@10. `encoder/selection.json`
    says whether the gain over plain towers is more than noise; `mim export --if-no-gain` reads it."""
    patience: Count | None = None
    """Stop after this many epochs that are no better by `select`."""
    batch_size: Count = 512
    """Pairs in a step, over all ranks (N x P)."""
    batch_size_per_rank: Count | None = None
    """Pairs in a step of each rank (N), in the place of `batch_size`: more ranks then take larger steps."""
    lr: Weight = 1e-3
    """Highest learning rate of the head (AdamW)."""
    tower_lr: Weight | None = None
    """Highest learning rate of towers that are not frozen; by default `lr`."""
    weight_decay: Weight = 0.01
    """Weight decay of matrices; biases, norms and the temperature have none."""
    clip_norm: Positive | None = None
    """Longest gradient of all parameters that a step is taken with; a longer one is shortened to it."""
    warmup: Share = 0.1
    """Fraction of the steps in which the learning rate rises; after them it falls to 0 along a cosine."""
    validation_fraction: Fraction = 0.05
    """Fraction of the pairs, the last by time, that are held out; with 0 the last epoch is kept."""
    drawn_queries: Natural = 8
    """Held-out queries that `retrieval.png` shows with the items that they find."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Stop at a bad pair, or leave it out and count it (`skip`): a pair without an item, with an item that is
    not in the item table, or with an image that cannot be decoded. Such items are not used as hard negatives
    either. `skip` decodes all images first."""
    seed: Natural = 0
    """Seed of the initial weights, of the order of the pairs, of hard negatives and of dropout."""

    parallel: Parallel = "ddp"
    """`ddp`: every rank holds all weights. `fsdp`: the weights of trained towers are divided over the
    ranks."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which towers compute; heads and losses always use float32."""
    chunk_size: Count | None = None
    """Images or titles that a trained tower processes at a time. They are computed again in the backward
    pass, so that a whole batch takes the memory of one chunk (GradCache, Gao et al. 2021)."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    timeout: Timeouts = field(default_factory=Timeouts)

    image_memory_gib: Weight = 2.0
    """Memory of every rank for decoded images. If they do not fit, they are decoded again in every epoch.
    Only for towers that are not frozen."""
    encode_batch_size: Count = 64
    """Images or titles that a tower processes at a time where no gradient is needed."""
    item_cache: LocalPath | None = None
    """Folder of the item index; by default one inside `out`."""
    log_every: Count = 20
    """Steps between two entries of the log."""

    def resume_fingerprint(self) -> dict[str, Any]:
        """The fields that must be equal for a run to resume."""
        free = {"out", "preset", "checkpoint", "timeout", "log_every", "drawn_queries", "image_memory_gib",
                "encode_batch_size", "feature_cache", "item_cache"}  # fmt: skip
        return {name: value for name, value in asdict(self).items() if name not in free}

    def pairs_per_step(self, world_size: int) -> int:
        """Pairs in a step, over all ranks."""
        size = self.batch_size_per_rank
        return self.batch_size if size is None else size * world_size

    def encoder(self) -> ItemEncoderConfig:
        """The part that describes the encoder."""
        return ItemEncoderConfig(vision=self.vision, text=self.text, head=self.head)


def parse(argv: Sequence[str] | None, **words: Any) -> CSFTConfig:
    """A configuration from flags, whose defaults are those of the preset that the flags name.

    Args:
        argv: the flags; None takes those of the process.
        words: what `tyro.cli` takes as well.
    """
    preset, values = chosen(argv, "mim csft", PRESETS, SETTLES)
    default = CSFTConfig(data=tyro.MISSING, out=tyro.MISSING, preset=preset)
    return tyro.cli(CSFTConfig, args=argv, default=replaced(default, values), **words)
