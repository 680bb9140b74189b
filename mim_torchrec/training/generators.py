"""States of the random generators of a process, which a resumed run continues from."""

import logging
import random
from typing import Any, cast

import numpy as np
import torch

log = logging.getLogger(__name__)


def get_generators() -> dict[str, Any]:
    """States of the generators of Python, numpy and torch in this process, on the CPU and its own GPU."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(
        tuple[str, np.ndarray, int, int, float], np.random.get_state(legacy=True)
    )
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generators(states: dict[str, Any]) -> None:
    """Put the generators into the states that `get_generators` gave.

    A run that goes on on a GPU where it began on a CPU, or the other way, draws other numbers: it warns.
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    on_gpu = torch.cuda.is_available()
    if on_gpu != (states["cuda"] is not None):
        before, now = ("a CPU", "a GPU") if on_gpu else ("a GPU", "a CPU")
        log.warning("the run began on %s and goes on on %s: dropout draws other numbers there", before, now)
    elif on_gpu:
        torch.cuda.set_rng_state(states["cuda"])
