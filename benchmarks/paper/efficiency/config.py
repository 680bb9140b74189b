"""Configuration of Table 6: which models and sizes the rows of Table 6 have."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from mim_torchrec.benchmarks.measures.training_steps import StepSizes
from mim_torchrec.benchmarks.paper.efficiency.models import Sizes

Preset = Literal["table6", "small"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "table6": {},
    "small": {
        "vision": "eva02_tiny_patch14_224", "image_size": 112, "text": "bert-tiny", "id_rows": 10_000
    },
}  # fmt: skip
"""Fields that differ from those of `table6`."""


@dataclass(frozen=True, kw_only=True)
class EfficiencyConfig:
    """Measure the four rows of Table 6 and write a report."""

    out: Path = Path("runs/table6")
    """Directory of the report."""
    preset: Preset = "table6"
    """Where the defaults of all other flags come from: `table6`, inferred from the paper's figures, or
    `small`, models that can be trained on a CPU."""
    vision: str = "eva02"
    """Foundation model of images, a name of timm; its weights are random."""
    image_size: int | None = None
    """Side of the images in pixels; by default the model's own."""
    text: str = "bge_base"
    """Foundation model of titles, as `mim csft --text.name`; its weights are random."""
    title_tokens: int = 10
    """Tokens of a title."""
    items_per_sample: int = 5
    """Items that are encoded for each sample: distinct items of a step over its samples."""
    samples: int = 24
    """Candidates in a step of the table."""
    dim: int = 64
    """Size of an ID embedding; an item is two, of its id and of its category."""
    mm_dim: int = 128
    """Size of a multi-modal vector."""
    id_rows: int = 3_850_000
    """Rows of the table of item ids. With these a training step of Base at `batch_size` takes the paper's
    1.1 GB."""
    batch_size: int = 1024
    """Candidates in a step where Base and MIM alone are compared, as in `make bench-ctr-throughput`."""
    time_vision: str = "eva02_tiny_patch14_224"
    """Foundation model of images where steps are timed and estimates are compared with an allocator."""
    time_image_size: int = 112
    """Side of its images."""
    time_text: str = "bert-tiny"
    """Foundation model of titles there."""
    time_samples: int = 32
    """Candidates in a step there."""
    rounds: int = 5
    """Timed rounds; in each, every row takes one step."""

    @property
    def table(self) -> Sizes:
        """Of the rows of the table."""
        ctr = self._ctr(self.samples, 1 + self.items_per_sample * self.samples)
        return Sizes(
            ctr=ctr, dim=self.dim, id_rows=self.id_rows, vision=self.vision, image_size=self.image_size,
            text=self.text, tokens=self.title_tokens,
        )  # fmt: skip

    @property
    def timed(self) -> Sizes:
        """Of the rows that are timed and compared with an allocator."""
        ctr = self._ctr(self.time_samples, 1 + self.items_per_sample * self.time_samples)
        return Sizes(
            ctr=ctr, dim=self.dim, id_rows=StepSizes.items, vision=self.time_vision,
            image_size=self.time_image_size, text=self.time_text, tokens=self.title_tokens,
        )  # fmt: skip

    def fixed(self, id_rows: int) -> Sizes:
        """Of Base and MIM alone, as `make bench-ctr-throughput` has them, with so many rows of item ids."""
        ctr = self._ctr(self.batch_size, min(StepSizes.items, id_rows))
        return dataclasses.replace(self.table, ctr=ctr, id_rows=id_rows)

    def _ctr(self, samples: int, items: int) -> StepSizes:
        folder = self.out / f"items-{items}x{self.mm_dim}"
        return StepSizes(out=folder, batch_size=samples, items=items, mm_dim=self.mm_dim)


def parse(argv: Sequence[str] | None, **words: Any) -> EfficiencyConfig:
    """A configuration from flags, whose defaults are those of the preset that the flags name.

    Args:
        argv: the flags; None takes those of the process.
        words: what `tyro.cli` takes as well.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=get_args(Preset), default="table6")
    preset = parser.parse_known_args(argv)[0].preset
    default = EfficiencyConfig(preset=preset, **PRESETS[preset])
    return tyro.cli(EfficiencyConfig, args=argv, default=default, **words)
