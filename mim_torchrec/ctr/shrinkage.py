"""What the normalization at the entry of the tower would undo of `--id-shrinkage`: `--keep-shrinkage`.

A normalized column has variance 1 however small its embeddings were made. It is multiplied by the root mean
square of the factors of its table, over training impressions, so that rare ids are as small in the tower as
they are in their table. Where a column depends on several tables, squares are averaged.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mim_torchrec.ctr.dense import REQUEST, DeepCTR, DenseCTR
from mim_torchrec.ctr.model import CTRModel
from mim_torchrec.data.vocabulary import Vocabulary
from mim_torchrec.training.batch_norm import ScaledBatchNorm1d


def input_scale(model: CTRModel, vocabularies: Mapping[str, Vocabulary]) -> Tensor:
    """By what each column of the tower's normalized input is multiplied, (in_features,) float32.

    Args:
        model: not sharded, whose tables have the names of vocabularies.
        vocabularies: with impressions where they have a shrinkage.
    """
    means = {name: found.mean_factor() for name, found in vocabularies.items()}
    parts = []
    for width, tables, degree in model.columns:
        if tables == (REQUEST,):
            for table in model.request_embeddings.embedding_bag_configs():
                count = table.embedding_dim * len(table.feature_names)
                parts.append(torch.full((count,), means[table.name], dtype=torch.float64))
        else:
            squares = [means[name] ** (2 * degree) for name in tables] or [1.0]
            parts.append(torch.full((width,), sum(squares) / len(squares), dtype=torch.float64).sqrt())
    return torch.cat(parts).float()


def scale_of(model: DenseCTR) -> Tensor:
    """What `set_scale` has set."""
    return _entries(model)[0].scale


@torch.no_grad()
def set_scale(model: DenseCTR, scale: Tensor) -> None:
    """Have the towers multiply their normalized input (in_features,) by constants."""
    for norm in _entries(model):
        norm.scale.copy_(scale)


@torch.no_grad()
def change_scale(model: DenseCTR, scale: Tensor) -> None:
    """`set_scale` of a trained model, which stays the same function: the layers behind make up for it."""
    for tower, norm in zip(_towers(model), _entries(model), strict=True):
        scale = scale.to(norm.scale)
        linear = tower.layers[1]
        assert isinstance(linear, nn.Linear)
        linear.weight *= torch.where(scale > 0, norm.scale / scale, 1.0)
        norm.scale.copy_(scale)


def _towers(model: DenseCTR) -> list[DeepCTR]:
    return [tower for tower in (model.tower, model.second_tower) if tower is not None]


def _entries(model: DenseCTR) -> list[ScaledBatchNorm1d]:
    found = []
    for tower in _towers(model):
        norm = tower.layers[0]
        assert isinstance(norm, ScaledBatchNorm1d), "the model was built without keep_shrinkage"
        found.append(norm)
    return found
