"""Which epoch of C-SFT is the best, and whether it is better than the towers were before it.

Held-out queries search all items. The criterion is a mean over queries, so it has a standard error. The rank
of the bought item says something of every query; recall@10 only of the few that find it, which among many
items is noise. Plain towers have no common space of images and items: their queries are compared with the
images of items, as `mim retrieve` does.
"""

import math

import numpy as np
import torch
from torch import Tensor

from mim_torchrec.csft.config import Criterion
from mim_torchrec.csft.image_search import find
from mim_torchrec.csft.inputs import FeatureInputs, Inputs, SearchContent
from mim_torchrec.encoders.features import compute_features
from mim_torchrec.encoders.item_encoder import ItemEncoder
from mim_torchrec.encoders.selection import Selection
from mim_torchrec.training.distributed import DistributedContext


def scores(rank: Tensor, criterion: Criterion) -> Tensor:
    """What each query adds to the criterion, (num_queries,) float64; more is better.

    Args:
        rank: (num_queries,) of the bought item, from 1.
        criterion: by name.
    """
    rank = rank.double()
    by_name = {"log_rank": -rank.log(), "mrr": 1 / rank, "recall_at_10": (rank <= 10).double()}
    return by_name[criterion]


def mean(values: Tensor) -> tuple[float, float | None]:
    """A mean over queries and its standard error, None of a single query."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error


def epoch_metrics(rank: Tensor, criterion: Criterion) -> dict[str, float]:
    """Validation metrics of an epoch.

    Returns:
        `recall_at_10`, `mrr` and `log_rank` (mean natural logarithm of the rank, lower is better) with the
        standard errors of the last two, `mrr_se` and `log_rank_se` (not of a single query), and `score`,
        which is maximized.
    """
    return {
        "recall_at_10": float(scores(rank, "recall_at_10").mean()),
        **_with_error("mrr", *mean(scores(rank, "mrr"))),
        **_with_error("log_rank", *mean(-scores(rank, "log_rank"))),
        "score": float(scores(rank, criterion).mean()),
    }


def _with_error(name: str, value: float, error: float | None) -> dict[str, float]:
    return {name: value} | ({} if error is None else {f"{name}_se": error})


def plain_ranks(
    encoder: ItemEncoder,
    inputs: Inputs,
    held_out: np.ndarray,
    catalog: SearchContent,
    batch_size: int,
    context: DistributedContext,
) -> Tensor:
    """Rank of the bought item of held-out queries, by the vision tower before C-SFT; (num_held_out,).

    Args:
        encoder: whose vision tower has not been trained yet.
        inputs: features of it, or pixels.
        held_out: (num_held_out,) indexes of pairs.
        catalog: images of items and queries.
        batch_size: images at a time.
        context: the process group; every rank calls it.
    """
    queries = catalog.query_image_row[held_out]
    if isinstance(inputs, FeatureInputs):
        of_queries, of_items = inputs.image[torch.from_numpy(queries)], inputs.image[: catalog.num_items]
    else:
        training = encoder.training
        encoder.eval()
        of_queries, of_items = (
            compute_features(lambda i: encoder.vision(inputs.images(i)), rows, batch_size, "plain", context)
            for rows in (queries, np.arange(catalog.num_items))
        )
        encoder.train(training)
    return find(of_queries, of_items, held_out, catalog, context.device).rank


def compare(plain: Tensor, encoder: Tensor, criterion: Criterion, towers_trained: bool) -> Selection:
    """The selection by ranks (num_pairs,) of the same pairs."""
    differences = scores(encoder, criterion) - scores(plain, criterion)
    gain, error = mean(differences)
    means = (float(scores(rank, criterion).mean()) for rank in (plain, encoder))
    return Selection(criterion=criterion, pairs=len(plain), plain=next(means), encoder=next(means), gain=gain,
                     standard_error=error, towers_trained=towers_trained)  # fmt: skip
