"""A trained CTR model as a server computes it: the same function by fewer and larger operations."""

from typing import cast

from mim_torchrec.ctr.dense import DeepCTR, DenseCTR
from mim_torchrec.serving.dense.folding import fold_batch_norms
from mim_torchrec.serving.dense.ubm import DenseUBM


def make_dense(model: DenseCTR) -> None:
    """Change a model in evaluation: dense user behavior models, folded towers."""
    model.tower = cast(DeepCTR, fold_batch_norms(model.tower))  # it takes and gives what the tower does
    if model.second_tower is not None:
        model.second_tower = cast(DeepCTR, fold_batch_norms(model.second_tower))
    if model.ciubm.ubm is not None:
        model.ciubm.ubm = DenseUBM(model.ciubm.ubm)
