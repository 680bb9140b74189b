"""Principal components of features: scikit-learn's exact ones, whose signs are the same every time."""

from typing import NamedTuple

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from mim_torchrec.errors import OptionError


class Principal(NamedTuple):
    """x -> (x - mean) components."""

    mean: Tensor
    """(feature_dim,)"""
    components: Tensor
    """(feature_dim, dim), orthonormal columns, that of the largest variance first."""
    scale: Tensor
    """Standard deviation of the first component, a scalar."""


def principal_components(features: Tensor, dim: int) -> Principal:
    """The `dim` leading principal components of features (n, feature_dim).

    Raises:
        OptionError: fewer items or features than `dim`.
    """
    if min(features.shape) < dim:
        raise OptionError(f"{features.shape[0]} items of {features.shape[1]} features have no {dim} "
                         "principal components; lower the dimension")  # fmt: skip
    pca = PCA(dim, svd_solver="covariance_eigh").fit(features.double().numpy())
    return Principal(
        torch.from_numpy(pca.mean_).float(),
        torch.from_numpy(pca.components_.T.copy()).float(),
        torch.tensor(pca.explained_variance_[0]).sqrt().float(),
    )
