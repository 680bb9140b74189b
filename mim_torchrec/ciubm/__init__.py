"""Content-interest-aware user behavior models (section 3.4).

What a model of one's own needs; `examples/content_interest.py` is one. Each name is imported when it is
first used.

One request with two candidates and a history of three behaviors, ID embeddings of size 4, multi-modal vectors
of size 8:

>>> import torch
>>> from mim_torchrec.ciubm import DIN, CiUBM, RequestPairs
>>> interest = CiUBM(DIN(4), content=True, fusion=True, pooling="mean")
>>> pairs = RequestPairs.build(torch.tensor([0, 2]), torch.tensor([0, 3]))
>>> found = interest(torch.randn(2, 4), torch.randn(3, 4), pairs, torch.randn(2, 8), torch.randn(3, 8))
>>> found.content.shape, found.concatenate().shape
(torch.Size([2, 8]), torch.Size([2, 16]))
"""

from typing import TYPE_CHECKING

from mim_torchrec.lazy import lazy_names

if TYPE_CHECKING:
    from mim_torchrec.ciubm.ciubm import CiUBM, Interests
    from mim_torchrec.ciubm.content import content_relevance, relevant_interest
    from mim_torchrec.ciubm.jagged import Pairs, RequestPairs
    from mim_torchrec.ciubm.leaf import RequestInterests
    from mim_torchrec.ciubm.similarity import similarity_interest
    from mim_torchrec.ciubm.ubm.avg_pooling import AvgPooling
    from mim_torchrec.ciubm.ubm.bst import BST
    from mim_torchrec.ciubm.ubm.dien import DIEN
    from mim_torchrec.ciubm.ubm.din import DIN
    from mim_torchrec.ciubm.ubm.interface import BehaviorContext, UserBehaviorModel
    from mim_torchrec.ciubm.ubm.sim import SIM
    from mim_torchrec.ciubm.ubm.twin import TWIN

_NAMES = {
    "AvgPooling": "mim_torchrec.ciubm.ubm.avg_pooling",
    "BST": "mim_torchrec.ciubm.ubm.bst",
    "BehaviorContext": "mim_torchrec.ciubm.ubm.interface",
    "CiUBM": "mim_torchrec.ciubm.ciubm",
    "DIEN": "mim_torchrec.ciubm.ubm.dien",
    "DIN": "mim_torchrec.ciubm.ubm.din",
    "Interests": "mim_torchrec.ciubm.ciubm",
    "Pairs": "mim_torchrec.ciubm.jagged",
    "RequestInterests": "mim_torchrec.ciubm.leaf",
    "RequestPairs": "mim_torchrec.ciubm.jagged",
    "SIM": "mim_torchrec.ciubm.ubm.sim",
    "TWIN": "mim_torchrec.ciubm.ubm.twin",
    "UserBehaviorModel": "mim_torchrec.ciubm.ubm.interface",
    "content_relevance": "mim_torchrec.ciubm.content",
    "relevant_interest": "mim_torchrec.ciubm.content",
    "similarity_interest": "mim_torchrec.ciubm.similarity",
}

__all__ = [
    "AvgPooling",
    "BST",
    "BehaviorContext",
    "CiUBM",
    "DIEN",
    "DIN",
    "Interests",
    "Pairs",
    "RequestInterests",
    "RequestPairs",
    "SIM",
    "TWIN",
    "UserBehaviorModel",
    "content_relevance",
    "relevant_interest",
    "similarity_interest",
]

__getattr__, __dir__ = lazy_names(__name__, _NAMES)
