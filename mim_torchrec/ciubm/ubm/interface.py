"""What the user behavior models have in common: their inputs beyond embeddings, and their result.

Each is a module `forward(candidates, behaviors, pairs, context) -> Interest` with the size of its interest as
`out_dim`. One history serves the candidates of a request; what depends on the history alone is computed once.
A `UBMOptions` describes a model to all programs: name, flags, what it needs of the data, how it is built.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.errors import OptionError

NUM_RECENCY_BUCKETS = 64
Need = Literal["recency", "categories"]


@dataclass(frozen=True)
class BehaviorContext:
    """What a model may know of candidates and behaviors besides their embeddings.

    Attributes:
        recency: (sum_behaviors,) how far each behavior lies before its request, not negative: seconds, or the
            number of behaviors in between.
        candidate_categories: (sum_candidates,) int64; 0 is an unknown category, which equals no other.
        behavior_categories: (sum_behaviors,) int64 likewise.
    """

    recency: Tensor | None = None
    candidate_categories: Tensor | None = None
    behavior_categories: Tensor | None = None


class Auxiliary(NamedTuple):
    """An auxiliary task of binary choices, whose loss is their mean cross entropy.

    Attributes:
        logits: (n,).
        targets: (n,) 0 or 1; None stands for the labels of the candidates, in their order.
    """

    logits: Tensor
    targets: Tensor | None


class Interest(NamedTuple):
    """The interest that a history shows in each candidate.

    Attributes:
        value: (sum_candidates, out_dim); zeros where the history is empty.
        auxiliary: in training mode, the model's auxiliary task if it has one.
    """

    value: Tensor
    auxiliary: Auxiliary | None = None


class UserBehaviorModel(nn.Module):
    """Base class of the models.

    Attributes:
        out_dim: size of the interest.
        keeps_columns: whether each column of the interest is a weighted sum of that column of the behaviors.
    """

    out_dim: int
    keeps_columns: bool = False

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None = None,
    ) -> Interest:
        """Interest of each candidate's history in it.

        Args:
            candidates: (sum_candidates, dim) ID embeddings.
            behaviors: (sum_behaviors, dim) ID embeddings, the oldest of a request first.
            pairs: the pairs of the batch.
            context: recency and categories, for the models that need them.

        Raises:
            ValueError: the context lacks what the model needs.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class UBMOptions:
    """A user behavior model as `mim ctr --ubm` knows it; subclasses are frozen, keyword-only dataclasses.

    Fields are options: each is a flag of `mim ctr --ubm <name>`, its docstring the help, and is kept in
    config.json. A model outside this folder has no `name`; it is chosen by `--ubm package.module:ClassName`.

    Attributes:
        name: of a model in this folder, unique.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[Need]:
        """What the model reads of its `BehaviorContext`; the data has to have it."""
        return frozenset()

    def build(self, dim: int, *, dropout: float, auxiliary: bool) -> UserBehaviorModel:
        """Make the model.

        Args:
            dim: size of candidate and behavior embeddings.
            dropout: probability of dropping a hidden unit, for models that have such a thing.
            auxiliary: whether an auxiliary loss will be used if the model has one.
        """
        raise NotImplementedError


def recency_buckets(context: BehaviorContext | None, model: str) -> Tensor:
    """Recency in half octaves, `floor(2 log2(1 + recency))`, at most 63; 63 is 96 years of seconds.

    Returns:
        (sum_behaviors,) int64.

    Raises:
        OptionError: the recency is missing.

    >>> import torch
    >>> recency_buckets(BehaviorContext(recency=torch.tensor([0.0, 1.0, 60.0, 86400.0])), "SIM").tolist()
    [0, 2, 11, 32]
    """
    if context is None or context.recency is None:
        raise OptionError(
            f"{model} needs to know how far behaviors lie back: the times of requests and behaviors, or "
            "their order (--recency order)"
        )
    return (context.recency.double() + 1).log2().mul(2).long().clamp(0, NUM_RECENCY_BUCKETS - 1)


def recency_rows(table: Tensor, buckets: Tensor) -> Tensor:
    """The row of a small table (64, dim) of each bucket (n,), (n, dim).

    On a CPU the gradient of `index_select` costs less than that of `F.embedding`.
    """
    return F.embedding(buckets, table) if table.is_cuda else table.index_select(0, buckets)
