"""A trained CTR model as a server computes it: the same function by fewer and larger operations."""

from typing import cast

from mim_torchrec.ctr.model import CTRModel, DeepCTR
from mim_torchrec.serving.dense_ubm import DenseUBM
from mim_torchrec.serving.folding import fold_batch_norms
from mim_torchrec.serving.grid import pairs_of


def make_dense(model: CTRModel) -> None:
    """Change a model in evaluation: no lists of pairs, dense user behavior models, folded towers."""
    model.list_pairs = pairs_of
    model.tower = cast(DeepCTR, fold_batch_norms(model.tower))  # it takes and gives what the tower does
    if model.second_tower is not None:
        model.second_tower = cast(DeepCTR, fold_batch_norms(model.second_tower))
    if model.ciubm.ubm is not None:
        model.ciubm.ubm = DenseUBM(model.ciubm.ubm)
