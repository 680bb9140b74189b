"""Configuration of pre-training; every field is a flag of `mim pretrain`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import tyro

from mim_torchrec.domains import Count, Domain, Fraction, Natural, Positive, Share, Temperature, Weight
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.encoders.text import TextEncoderConfig
from mim_torchrec.encoders.vision import VisionEncoderConfig
from mim_torchrec.training.config import CheckpointConfig, Timeouts
from mim_torchrec.training.precision import Precision
from mim_torchrec.training.presets import Preset, chosen, replaced

Phase = Literal["dda-vision", "dda-text", "dma"]
_PHASES = ("dda_vision", "dda_text", "dma")
PRESETS: dict[Preset, dict[str, Any]] = {
    "default": {},
    "paper": {  # §3.2, §4.1.3; DMA follows CLIP, whose temperature is learned from 0.07
        "phases": ("dda-vision", "dda-text", "dma"), "vision.name": "eva02", "text.name": "bge_base",
        **{f"{phase}.batch_size_per_rank": 1024 for phase in _PHASES},
        **{f"{phase}.{rate}": 5e-3 for phase in _PHASES for rate in ("lr", "head_lr")},
        "dma.temperature": None, "dma.mask_same_item": False, "weight_decay": 0.0, "clip_norm": None,
    },
    "recommended": {},
}  # fmt: skip
"""Fields of `PretrainConfig` by preset; other fields have their defaults, which are what we recommend."""
SETTLES = {f"{phase}.batch_size": (f"{phase}.batch_size_per_rank",) for phase in _PHASES} | {
    "towers": ("vision.name", "text.name")
}


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """What every phase has of its own."""

    epochs: Count = 1
    """Passes over the items; the best by the loss of held-out items is kept."""
    batch_size: Count = 256
    """Items in a step, over all ranks."""
    batch_size_per_rank: Count | None = None
    """Items in a step of each rank, in the place of `batch_size`: more ranks then take larger steps."""
    lr: Weight = 1e-4
    """Highest learning rate of the towers (AdamW)."""
    head_lr: Weight = 1e-3
    """Highest learning rate of the layers above the towers. They start at random and are not saved."""

    def items_per_step(self, world_size: int) -> int:
        """Items in a step, over all ranks."""
        size = self.batch_size_per_rank
        return self.batch_size if size is None else size * world_size


@dataclass(frozen=True, kw_only=True)
class ImageAdaptionConfig(PhaseConfig):
    """Masked image modelling."""

    mask_size: Count = 32
    """Side of the square patches that are masked, in pixels."""
    mask_ratio: Annotated[float, Domain(above=0, below=1)] = 0.6
    """Fraction of the patches that are masked."""


@dataclass(frozen=True, kw_only=True)
class TextAdaptionConfig(PhaseConfig):
    """Masked or causal language modelling."""

    objective: Literal["auto", "mlm", "causal"] = "auto"
    """`mlm`: predict masked tokens. `causal`: predict the next token. `auto`: what the model was made for."""
    mask_ratio: Annotated[float, Domain(above=0, below=1)] = 0.15
    """Fraction of the tokens that are masked (`mlm` only)."""


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(PhaseConfig):
    """Contrast of images with titles."""

    dim: Count = 128
    """Size of the projections that are compared."""
    temperature: Temperature | None = None
    """Fixed temperature. By default learned, from 0.07."""
    mask_same_item: bool = True
    """Exclude the same item from the negatives."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Adapt the towers to the shop's items (DDA) and align them with each other (DMA) (§3.2).

    One process, or several under torchrun. Every phase writes `<phase>/towers/`, which C-SFT, the export and
    this stage take by `--towers`, with its history.jsonl, metrics.json and TensorBoard's files; `towers/` is
    that of the last phase.
    """

    data: Place
    """Dataset directory; only its items are read."""
    out: Place
    """Directory of the results; made if missing."""
    preset: Preset = "default"
    """Defaults of all other flags. `paper` is the paper to the letter: large towers. `recommended` are the
    defaults."""
    phases: tuple[Phase, ...] = ("dda-vision", "dda-text", "dma")
    """What to do, in this order: adapt the vision tower, adapt the text tower, align both."""

    towers: Place | None = None
    """Directory of towers that this stage wrote, from which it continues, instead of those that --vision and
    --text name."""
    vision: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    dda_vision: ImageAdaptionConfig = field(default_factory=ImageAdaptionConfig)
    dda_text: TextAdaptionConfig = field(default_factory=TextAdaptionConfig)
    dma: AlignmentConfig = field(default_factory=AlignmentConfig)

    weight_decay: Weight = 0.01
    """Weight decay of matrices; biases, norms and the temperature have none."""
    precision: Precision = "fp32"
    """How towers compute: `tf32` for matrix products, on GPUs; `bf16` for their layers. What stands on the
    towers, losses, weights and gradients stay float32."""
    clip_norm: Positive | None = None
    """Longest gradient of all parameters that a step is taken with; a longer one is shortened to it."""
    warmup: Share = 0.1
    """Fraction of the steps in which the learning rate rises; after them it falls to 0 along a cosine."""
    fix_batch_norm: bool | None = None
    """Keep the pretrained statistics of batch normalization. Statistics of masked images differ from those of
    whole ones, and every rank would compute its own. By default they are kept, unless the vision tower starts
    with random weights."""
    patience: Count | None = None
    """Stop a phase after this many epochs without a lower loss of held-out items."""
    validation_fraction: Fraction = 0.05
    """Fraction of the items that are held out, the same in every phase."""
    seed: Natural = 0
    """Seed of the initial weights, of the order of the items, of masks and of dropout."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    timeout: Timeouts = field(default_factory=Timeouts)

    image_memory_gib: Weight = 2.0
    """Memory of every rank for decoded images. If they do not fit, they are decoded again in every epoch."""
    item_cache: LocalPath | None = None
    """Folder of the item index; by default one inside `out`."""
    log_every: Count = 20
    """Steps between two entries of the log."""

    def resume_fingerprint(self) -> dict[str, Any]:
        """The fields that must be equal for a run to resume."""
        free = {"out", "preset", "checkpoint", "timeout", "log_every", "image_memory_gib", "item_cache"}
        return {name: value for name, value in asdict(self).items() if name not in free}


def parse(argv: Sequence[str] | None, **words: Any) -> PretrainConfig:
    """A configuration from flags, whose defaults are those of the preset that the flags name.

    Args:
        argv: the flags; None takes those of the process.
        words: what `tyro.cli` takes as well.
    """
    preset, values = chosen(argv, "mim pretrain", PRESETS, SETTLES)
    default = PretrainConfig(data=tyro.MISSING, out=tyro.MISSING, preset=preset)
    return tyro.cli(PretrainConfig, args=argv, default=replaced(default, values), **words)
