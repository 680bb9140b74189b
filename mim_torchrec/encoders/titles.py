"""Titles by their towers, each distinct one once, those of like length together: padding costs time, too."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.encoders.text import TextEncoder


def distinct(titles: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Distinct titles, the shortest first, and the place of each title among them.

    >>> found, places = distinct(["red lamp", "vase", "red lamp"])
    >>> found, places.tolist()
    (['vase', 'red lamp'], [1, 0, 1])
    """
    found = sorted(set(titles), key=lambda title: (len(title), title))
    place = {title: k for k, title in enumerate(found)}
    return found, np.array([place[title] for title in titles], np.int64)


def encode_titles(text: TextEncoder, titles: Sequence[str], batch_size: int, device: torch.device) -> Tensor:
    """Features of titles (len(titles), text.feature_dim), on the device.

    Args:
        text: the tower, in evaluation mode.
        titles: in any order.
        batch_size: distinct titles at a time.
        device: of the tower.
    """
    found, places = distinct(titles)
    parts = [
        text({name: value.to(device) for name, value in text.tokenize(found[k : k + batch_size]).items()})
        for k in range(0, len(found), batch_size)
    ]
    return torch.cat(parts)[torch.from_numpy(places).to(device)]
