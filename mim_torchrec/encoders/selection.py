"""Whether an encoder is better than plain towers: what C-SFT writes beside it, as `selection.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mim_torchrec.data.errors import DataError

FILE = "selection.json"
STANDARD_ERRORS = 2.0
"""A gain of fewer than these is noise."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """An encoder beside the plain towers, on the same held-out pairs.

    Attributes:
        criterion: that both were measured by.
        pairs: how many there are.
        plain: the criterion of the plain towers; higher is better, so `log_rank` has a minus.
        encoder: of the encoder.
        gain: their difference.
        standard_error: of the gain, over pairs; None of a single pair.
        towers_trained: whether the encoder's towers are no longer the plain ones.
    """

    criterion: str
    pairs: int
    plain: float
    encoder: float
    gain: float
    standard_error: float | None
    towers_trained: bool

    @property
    def gained(self) -> bool:
        """Whether the gain is more than noise."""
        return self.standard_error is not None and self.gain > STANDARD_ERRORS * self.standard_error

    def facts(self) -> dict[str, Any]:
        """What metrics.json and the encoder's directory hold."""
        return {**asdict(self), "gained": self.gained}

    def __str__(self) -> str:
        both = f"{self.criterion} {self.encoder:.4f}, of plain towers {self.plain:.4f}"
        error = "unknown" if self.standard_error is None else f"{self.standard_error:.4f}"
        return f"{both}: gain {self.gain:+.4f}, standard error {error}, {self.pairs} pairs"


def read_selection(encoder: Path) -> Selection | None:
    """What C-SFT wrote beside an encoder; None where no pairs were held out.

    Raises:
        DataError: the file is damaged.
    """
    file = encoder / FILE
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text())
        facts.pop("gained")
        return Selection(**facts)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot be read: {error}; run mim csft again", file=file) from None
