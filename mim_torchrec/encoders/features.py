"""Features of frozen towers on disk, where every stage that needs them finds them again.

A file is named by a hash of what made it: the version of the decoder of pictures, that of the towers, and the
content they saw.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.data.images import DECODER
from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.progress import Progress
from mim_torchrec.embeddings.tensor_files import read_tensors, write_tensors
from mim_torchrec.encoders.checkpoint import module_version
from mim_torchrec.encoders.pixels import HasTowers, rows_of_rank
from mim_torchrec.training.distributed import DistributedContext

log = logging.getLogger(__name__)


def item_features_file(cache: Path, towers: HasTowers, content: str) -> Path:
    """Where the features of items are: `image` (num_items, image_dim) and `text` (num_items, text_dim).

    Args:
        cache: folder.
        towers: that made them.
        content: `ItemStore.digest` of the items.
    """
    return _file(cache, "items", module_version(towers.vision), module_version(towers.text), content)


def query_features_file(cache: Path, towers: HasTowers, content: str) -> Path:
    """Where the features of images that are no item's are: `image` (num_images, image_dim)."""
    return _file(cache, "queries", module_version(towers.vision), content)


def read_or_compute(
    file: Callable[[], Path], compute: Callable[[], dict[str, Tensor]], context: DistributedContext
) -> dict[str, Tensor]:
    """Read a file, or compute what belongs into it and write it.

    Args:
        file: says which, called on one rank only, as it takes hashing.
        compute: called on every rank if there is no file; the same tensors on all.
        context: the process group.
    """
    path = context.broadcast_object(file() if context.is_main else None)
    if all(context.all_gather_objects(path.is_file())):
        log.info("features of frozen towers read from %s", path)
        return read_tensors(path)
    found = compute()

    def write() -> None:
        if context.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, found)

    on_all_ranks(write)
    return found


@torch.no_grad()
def compute_features(
    encode: Callable[[np.ndarray], Tensor],
    index: np.ndarray,
    batch_size: int,
    what: str,
    context: DistributedContext,
) -> Tensor:
    """Features (len(index), dim) on the CPU, each computed by one rank and given to all.

    Args:
        encode: features of some of the index.
        index: of images or titles.
        batch_size: how many at a time.
        what: is encoded: images or titles.
        context: the process group.
    """
    mine = index[rows_of_rank(len(index), context)]
    parts = []
    with Progress(len(mine), "encode", what, show=context.is_main) as progress:
        for start in range(0, len(mine), batch_size):
            some = mine[start : start + batch_size]
            parts.append(encode(some).float().cpu().numpy())
            progress.update(len(some))
    gathered = [array for part in context.all_gather_objects(parts) for array in part]
    return torch.from_numpy(np.concatenate(gathered)) if gathered else torch.zeros(0, 0)


def _file(cache: Path, *facts: str) -> Path:
    key = hashlib.sha256(" ".join((DECODER, *facts)).encode()).hexdigest()[:16]
    return cache / key / "features.safetensors"
