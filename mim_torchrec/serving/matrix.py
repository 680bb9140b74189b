r"""Content and fusion interest without a pass over the history per candidate (Eq. 7 and 8 at serving).

The relevance is a cosine, so the interests are linear in the normalized vector of the target,

    \sum_i \cos(h_t, h_i) h_i = (\sum_i h_i \hat h_i^T) \hat h_t,

with a d x d matrix that depends on the history alone (id_dim x d for the fusion interest) and is stored
transposed. It is computed once per request, or once per user if it is cached. The cost per candidate does not
depend on the length of the history. With a temperature the weights are not linear, and the similarity
interest needs the cosines themselves. Both are computed over the history, as in training.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.ciubm import CiUBM, Interests
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.ubm.interface import BehaviorContext
from mim_torchrec.serving.dense.similarity import similarity_of_request
from mim_torchrec.serving.dense.ubm import requests_of

TINIEST = 1e-12  # length of a vector from which on `F.normalize` divides by it


def is_linear(ciubm: CiUBM) -> bool:
    """Whether content and fusion interest are linear in the relevance, and one of them is there."""
    return ciubm.log_temperature is None and (ciubm.content or ciubm.fusion)


def interest_matrix(behaviors_mm: Tensor, behaviors: Tensor) -> Tensor:
    """The matrix of a history, (mm_dim, mm_dim + id_dim): a normalized target times it is both interests.

    Args:
        behaviors_mm: (num_behaviors, mm_dim).
        behaviors: (num_behaviors, id_dim) ID embeddings.
    """
    behaviors_mm = behaviors_mm.float()
    return _matrix(normalized(behaviors_mm), behaviors_mm, behaviors)


def normalized(vectors: Tensor) -> Tensor:
    """What `F.normalize` makes of rows (num_rows, dim), to the digit, by fewer operations.

    >>> normalized(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_(min=TINIEST)


def _matrix(normal: Tensor, behaviors_mm: Tensor, behaviors: Tensor) -> Tensor:
    columns, dim = normal.T, behaviors_mm.shape[1]
    matrix = normal.new_empty(dim, dim + behaviors.shape[1])
    # two products: to put the rows side by side would copy all of them
    torch.mm(columns, behaviors_mm, out=matrix[:, :dim])
    torch.mm(columns, behaviors, out=matrix[:, dim:])
    return matrix


class MatrixCiUBM(nn.Module):
    """`CiUBM` in evaluation, its content and fusion interest by matrices.

    Args:
        ciubm: trained, with a relevance that enters linearly.

    Attributes:
        given: matrices of the next batch's requests that are known already, None for those that are not; it
            is used up by the next call, after which `made` has all of them.

    Raises:
        ValueError: the interests are not linear in the relevance.
    """

    def __init__(self, ciubm: CiUBM) -> None:
        super().__init__()
        if not is_linear(ciubm):
            raise ValueError("content and fusion interest are not linear in the relevance")
        self.inner = ciubm
        self.given: list[Tensor | None] | None = None
        self.made: list[Tensor] = []

    @property
    def similarity_dim(self) -> int:
        return self.inner.similarity_dim

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        candidates_mm: Tensor,
        behaviors_mm: Tensor,
        context: BehaviorContext | None = None,
    ) -> Interests:
        """See `CiUBM.forward`; where all matrices are given, `behaviors_mm` is not read."""
        inner = self.inner
        of_ids = None
        if inner.ubm is not None:
            of_ids = inner.ubm(candidates, behaviors, pairs, context).value
        requests = requests_of(pairs)
        given = self.given or [None] * len(requests)
        self.given, self.made = None, []
        targets = normalized(candidates_mm.float())
        parts, similarities = [], []
        for (own_candidates, own_behaviors), matrix in zip(requests, given, strict=True):
            own, own_mm = targets[own_candidates], behaviors_mm[own_behaviors].float()
            normal = normalized(own_mm) if matrix is None or inner.tiers else own_mm
            if inner.tiers:
                similarities.append(similarity_of_request(own, normal, inner.tiers, inner.spans))
            if matrix is None:
                matrix = _matrix(normal, own_mm, behaviors[own_behaviors])
            self.made.append(matrix)
            part = own @ matrix
            parts.append(part.div_(max(len(own_mm), 1)) if inner.pooling == "mean" else part)
        both = parts[0] if len(parts) == 1 else torch.cat(parts)
        dim = candidates_mm.shape[1]
        return Interests(
            of_ids,
            both[:, :dim] if inner.content else None,
            both[:, dim:] if inner.fusion else None,
            torch.cat(similarities) if inner.tiers else None,
        )


class MatrixCache:
    """Matrices of histories, the least recently used ones dropped.

    A matrix is of the rows that a store had when it was made. What a window changes is dropped, and a matrix
    whose rows were read before a window that came in between is not kept.

    Args:
        capacity: matrices; 0 keeps none.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()
        self.generation = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Tensor | None:
        """The matrix of a history, None if it is not there."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[1]

    def put(self, key: Hashable, items: Tensor, matrix: Tensor, generation: int) -> None:
        """Keep a matrix.

        Args:
            key: of the history.
            items: (num_behaviors,) int64 of the history.
            matrix: from `interest_matrix`.
            generation: the cache's when the rows were asked for.
        """
        with self._lock:
            if generation != self.generation or not self._capacity:
                return
            self._kept[key] = (items, matrix)
            self._kept.move_to_end(key)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget all matrices: nobody knows which items changed."""
        with self._lock:
            self.generation += 1
            self._kept.clear()

    def drop(self, changed: Tensor) -> None:
        """Forget matrices of histories with items that changed, (num_changed,) int64.

        All histories are searched at once: a call for each would take a request's time.
        """
        with self._lock:
            self.generation += 1
            keys = list(self._kept)
            if not keys or not changed.numel():
                return
            histories = [self._kept[key][0] for key in keys]
            owners = torch.arange(len(keys)).repeat_interleave(torch.tensor([len(own) for own in histories]))
            items, ordered = torch.cat(histories), changed.unique()
            places = torch.searchsorted(ordered, items).clamp_(max=len(ordered) - 1)
            for owner in owners[ordered[places] == items].unique().tolist():
                del self._kept[keys[owner]]
