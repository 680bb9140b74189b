"""How alike two items are, in words: the cosine of their vectors beside that of other pairs of items.

A cosine alone says little, because every encoder spreads its vectors in its own way. .6 may be the closest
pair of one table and an ordinary one of another.
"""

import numpy as np
import torch
from torch import Tensor, nn

from mim_torchrec.embeddings.stores.store import ParameterStore

ROUNDING = 1e-6
SAMPLE = 400
"""Items whose pairs are compared with."""
WORDS = ((0.999, "nearly the same"), (0.99, "very similar"), (0.9, "similar"), (0.6, "somewhat similar"))
"""Fraction of pairs that are less alike, and what is said from there on."""
NOT_SIMILAR = "not similar"


class Likeness:
    """Says cosines in words.

    Args:
        store: of the vectors.
        items: (n,) ids that pairs are drawn from, evenly.
    """

    def __init__(self, store: ParameterStore, items: np.ndarray) -> None:
        places = np.linspace(0, len(items) - 1, min(SAMPLE, len(items))).astype(np.int64)
        rows, found = store.lookup(torch.from_numpy(items[np.unique(places)].astype(np.int64)))
        unit = nn.functional.normalize(rows[found].float(), dim=1)
        above = torch.ones(len(unit), len(unit), dtype=torch.bool).triu(1)
        self._cosines: Tensor = (unit @ unit.T)[above].sort().values

    def said(self, cosine: float) -> dict[str, float | str | None]:
        """A cosine with its meaning.

        Returns:
            `cosine`; `closer_than`, the fraction of pairs of items that are less alike; and `words`. The last
            two are None where the store has less than two of the items.
        """
        if not len(self._cosines):
            return {"cosine": cosine, "closer_than": None, "words": None}
        less = torch.searchsorted(self._cosines, torch.tensor(cosine - ROUNDING))
        fraction = float(less) / len(self._cosines)
        words = next((words for least, words in WORDS if fraction >= least), NOT_SIMILAR)
        return {"cosine": cosine, "closer_than": fraction, "words": words}
