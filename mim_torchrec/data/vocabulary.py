"""Ids to rows of embedding tables, on the rank and at the start of a step.

Readers hand out ids as they are in the log; what is unknown is decided here, so it can change while they run.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.data.batch import REQUEST_IDS, FeatureIds, MappedIds, RequestBatch, keyed
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.id_buckets import AT_ONCE, IdBuckets
from mim_torchrec.embeddings.files import atomic_file
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.table.format import RowIndex
from mim_torchrec.errors import OptionError

log = logging.getLogger(__name__)

ALARM_IDS = 100_000
ROLES = ("candidate", "behavior")
OF_TABLE = tuple(f"{role}_mm" for role in ROLES)
"""Features that are rows of the multi-modal table."""
FORMAT_VERSION = 2
"""Of a vocabulary on the disk: 2 has impressions; 1, which does not say its version, has none."""


class Vocabulary:
    """Maps ids to rows 1, 2, … in ascending order of id, and every other id to row 0.

    Args:
        ids: (n,) int64, strictly ascending.
        num_embeddings: rows of the table, at least n + 1; more is spare rows for ids to come.
        impressions: (n + 1,) int64 by row, in how many training impressions the id was shown, as a candidate
            or with one; of row 0, those of ids without a row of their own. None where nobody has counted.
        shrinkage: k of `factors`; 0 shrinks no embedding.
        occurrences: (n,) float64, how often each id has occurred in training, what is long ago counting less;
            None where nobody has counted.

    Raises:
        ValueError: the sizes do not fit.
        OptionError: there are no impressions to shrink by.

    >>> vocabulary = Vocabulary.build(np.array([30, 10, 10]))
    >>> vocabulary.rows(torch.tensor([10, 30, 99])).tolist(), vocabulary.num_embeddings
    ([1, 2, 0], 3)
    """

    def __init__(
        self,
        ids: Tensor,
        num_embeddings: int,
        impressions: Tensor | None = None,
        shrinkage: float = 0.0,
        occurrences: Tensor | None = None,
    ) -> None:
        if num_embeddings < ids.numel() + 1:
            raise ValueError(f"{ids.numel()} ids need {ids.numel() + 1} rows, not {num_embeddings}")
        if impressions is not None and impressions.numel() != ids.numel() + 1:
            raise ValueError(f"{ids.numel()} ids and row 0 have {impressions.numel()} numbers of impressions")
        if occurrences is not None and occurrences.shape != ids.shape:
            raise ValueError(f"{ids.numel()} ids have {occurrences.numel()} numbers of occurrences")
        if shrinkage and impressions is None:
            raise OptionError(
                "--id-shrinkage needs to know in how many training impressions each id was shown, which "
                "vocabularies of earlier releases do not hold: train without --warm-start, or train the "
                "earlier run again, or give --id-shrinkage 0"
            )
        self._index = RowIndex(ids)
        self.num_embeddings = num_embeddings
        self.impressions, self.shrinkage = impressions, shrinkage
        self.occurrences = occurrences
        self.seen = 0
        self.unknown = 0

    @classmethod
    def build(
        cls,
        ids: np.ndarray,
        spare_rows: float = 0.0,
        impressions: np.ndarray | None = None,
        shrinkage: float = 0.0,
        occurrences: np.ndarray | None = None,
    ) -> "Vocabulary":
        """Vocabulary of ids (any order, repeated or not), with `spare_rows` times as many spare rows.

        Args:
            ids: int64.
            spare_rows: as a fraction of the ids.
            impressions: by row of the distinct ids, ascending, row 0 first.
            shrinkage: as of the class.
            occurrences: of the distinct ids, ascending.
        """
        ids = np.asarray(ids, np.int64)
        is_ascending = bool((ids[1:] > ids[:-1]).all())
        unique = torch.from_numpy(ids.copy() if is_ascending else np.unique(ids))
        shown, occurred = (None if n is None else torch.from_numpy(n) for n in (impressions, occurrences))
        rows = 1 + math.ceil(unique.numel() * (1.0 + spare_rows))
        return cls(unique, rows, shown, shrinkage, occurred)

    @cached_property
    def _buckets(self) -> IdBuckets | None:
        """What finds ids without a search; None where it would be slower."""
        buckets = IdBuckets(self.ids.numpy()) if self.ids.numel() else None
        return buckets if buckets is not None and buckets.pays else None

    @property
    def ids(self) -> Tensor:
        """(n,) int64, ascending; the id at position k has row k + 1."""
        return self._index.ids

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of ids, in their shape; counts ids in `seen` and those without a row in `unknown`."""
        return self.count(self.look_up(ids))

    def look_up(self, ids: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        """Rows of ids, in their shape, without counting them."""
        if self._buckets is not None and ids.dtype == torch.int64 and ids.device.type == "cpu":
            found = torch.empty(ids.shape, dtype=dtype)
            rows = self._buckets.places(ids.reshape(-1).numpy(), found.view(-1).numpy())
            rows += 1
            return found
        return in_slices(self._index.rows, ids, dtype)

    def count(self, rows: Tensor) -> Tensor:
        """Count rows as those of ids seen; returns them."""
        self.seen += rows.numel()
        self.unknown += rows.numel() - int(np.count_nonzero(rows.numpy()))
        return rows

    def factors(self, rows: Tensor) -> Tensor:
        r"""By what embeddings are multiplied: $c / (c + k)$, $c$ impressions of a row, $k$ the shrinkage.

        It is the weight of the data in a posterior mean, where the prior mean is 0 and the prior is worth $k$
        impressions.

        Args:
            rows: (num_ids,) of the table.

        Returns:
            (num_ids,) float32; ones without shrinkage.
        """
        if not self.shrinkage or self.impressions is None:
            return torch.ones(rows.shape)
        counts = self.impressions[rows].double()
        return (counts / (counts + self.shrinkage)).float()

    def mean_factor(self) -> float:
        """Root mean square of the factors over training impressions; 1 without shrinkage.

        >>> shown = torch.tensor([0, 5, 15])
        >>> round(Vocabulary(torch.tensor([7, 9]), 3, shown, shrinkage=5.0).mean_factor(), 4)
        0.696
        """
        if not self.shrinkage or self.impressions is None:
            return 1.0
        counts = self.impressions.double()
        squares = (counts / (counts + self.shrinkage)).square()
        return (counts @ squares / counts.sum().clamp(min=1)).sqrt().item()

    def save(self, path: str | Path) -> None:
        """Write an .npz file."""
        counted: dict[str, Any] = {}
        if self.impressions is not None:
            counted["impressions"] = self.impressions.numpy()
        if self.occurrences is not None:
            counted["occurrences"] = self.occurrences.numpy()
        with atomic_file(path) as file:
            np.savez(
                file,
                format_version=np.int64(FORMAT_VERSION),
                ids=self.ids.numpy(),
                num_embeddings=np.int64(self.num_embeddings),
                shrinkage=np.float64(self.shrinkage),
                **counted,
            )

    @classmethod
    def load(cls, path: str | Path, counts: bool = False) -> "Vocabulary":
        """Read what :meth:`save` wrote.

        Args:
            path: of the file.
            counts: read occurrences, and impressions although there is no shrinkage; 8 bytes per id each.

        Raises:
            DataError: a later release has written it.
        """
        with np.load(path) as stored:
            version = int(stored["format_version"]) if "format_version" in stored else 1
            if version > FORMAT_VERSION:
                problem = f"format_version {version}, this release reads up to {FORMAT_VERSION}; update it"
                raise DataError(problem, file=Path(path))
            shrinkage = float(stored["shrinkage"]) if version > 1 else 0.0
            wanted = {"impressions": counts or shrinkage, "occurrences": counts}
            found = {
                name: torch.from_numpy(stored[name]) if asked and name in stored else None
                for name, asked in wanted.items()
            }
            ids, rows = torch.from_numpy(stored["ids"]), int(stored["num_embeddings"])
        return cls(ids, rows, shrinkage=shrinkage, **found)


class IdMapper:
    """Replaces a batch's ids by embedding rows.

    `candidate_x` and `behavior_x` share the vocabulary `x`, unless they have one of their own. Where there is
    a multi-modal table, the batch gets the features `candidate_mm` and `behavior_mm`: rows of that table,
    which knows more items than the training part does. Where a vocabulary has a shrinkage, the batch gets
    `factors`, and `bags` where requests have lists of ids.

    Args:
        vocabularies: by "user_id", "query_id", "item_id", "category", as far as the batches have them, and by
            the names of further features.
        mm: index of the multi-modal table, or None for none.
        max_unknown: share of unknown ids, over 100,000 ids of one kind, above which a warning is logged.
    """

    def __init__(
        self, vocabularies: Mapping[str, Vocabulary], mm: ItemIndex | None, max_unknown: float
    ) -> None:
        self.vocabularies = dict(vocabularies)
        self.max_unknown = max_unknown
        self._mm = mm
        self._shrinks = any(vocabulary.shrinkage for vocabulary in self.vocabularies.values())
        self._checked: dict[str, tuple[int, int]] = {}

    def __call__(self, batch: RequestBatch) -> RequestBatch:
        """The batch with rows for ids; the batch given is left as it is.

        Raises:
            DataError: the batch has a feature that the vocabularies lack.
        """
        sparse = batch.sparse
        own = torch.split(sparse.values(), sparse.length_per_key())
        ids = dict(zip(sparse.keys(), own, strict=True))
        lengths = dict(zip(sparse.keys(), sparse.lengths().view(-1, sparse.stride()), strict=True))
        features = [FeatureIds(key, self.look_up(key, ids[key]), lengths[key]) for key in ids]
        if self.has_mm:
            features += [
                FeatureIds(f"{role}_mm", self.look_up_mm(ids[f"{role}_item_id"]), lengths[f"{role}_item_id"])
                for role in ROLES
            ]
        (mapped,) = self.batches(features, np.array([0, sparse.stride()]))
        return replace(batch, **mapped._asdict())

    @property
    def has_mm(self) -> bool:
        """Whether there is a multi-modal table."""
        return self._mm is not None

    def look_up(self, key: str, ids: Tensor) -> Tensor:
        """Rows of ids of a feature, int32 where that suffices; they are counted when batches are made.

        Raises:
            DataError: the vocabularies lack the feature.
        """
        vocabulary = self.vocabularies[self._name(key)]
        return vocabulary.look_up(ids, _row_type(vocabulary.num_embeddings))

    def look_up_mm(self, ids: Tensor) -> Tensor:
        """Rows of items in the multi-modal table likewise."""
        if self._mm is None:
            raise ValueError("there is no multi-modal table")
        return in_slices(self._mm.look_up, ids, _row_type(self._mm.num_embeddings))

    def batches(self, features: Sequence[FeatureIds], bounds: np.ndarray) -> Iterator[MappedIds]:
        """What batches hold, of rows that were looked up, which are counted.

        Args:
            features: rows of the requests of all batches, in the order of the keys of a batch.
            bounds: (num_batches + 1,) where each batch begins and ends among the requests.
        """
        rows = [one.values() for one in features]
        names = [self._name(one.key) for one in features if one.key not in OF_TABLE]
        for name, own in zip(names, rows, strict=False):
            self.vocabularies[name].count(own)
        for name in dict.fromkeys(names):
            self._check(name, self.vocabularies[name])
        if self._mm is not None:
            for own in rows[len(names) :]:
                self._mm.count(own)
            self._check("mm", self._mm)
        sparse = keyed(features, rows, bounds)
        if not self._shrinks:
            return map(MappedIds, sparse)
        of_ids = features[: len(names)]
        factors = [self.vocabularies[name].factors(own) for name, own in zip(names, rows, strict=False)]
        factored = (one.values() for one in keyed(of_ids, factors, bounds))
        if not any(_is_list(one.key) for one in of_ids):
            return map(MappedIds, sparse, factored)
        return map(MappedIds, sparse, factored, _weighted_bags(of_ids, rows, factors, bounds))

    def unknown_factor(self, name: str) -> float:
        """The factor of an unknown id of a vocabulary."""
        return self.vocabularies[name].factors(torch.zeros(1, dtype=torch.int64)).item()

    def unknown_fractions(self) -> dict[str, float]:
        """Share of unknown ids so far, by vocabulary ("mm" is the multi-modal table)."""
        named = self.vocabularies | ({} if self._mm is None else {"mm": self._mm})
        return {name: v.unknown / v.seen for name, v in named.items() if v.seen}

    def _name(self, key: str) -> str:
        """Name of the vocabulary of a feature."""
        shared = key.removeprefix("candidate_").removeprefix("behavior_")
        name = key if key in self.vocabularies else shared
        if name not in self.vocabularies:
            problem = "the requests have it, those of training did not; leave it out, or train with it"
            raise DataError(problem, column=key)
        return name

    def _check(self, name: str, vocabulary: Vocabulary | ItemIndex) -> None:
        """Warn where too many of the ids that were counted since the last check are unknown."""
        seen, unknown = self._checked.get(name, (0, 0))
        if vocabulary.seen - seen >= ALARM_IDS:
            share = (vocabulary.unknown - unknown) / (vocabulary.seen - seen)
            if share > self.max_unknown:
                log.warning("%.0f%% of the last %d ids of %s are unknown (limit %.0f%%)", 100 * share,
                            vocabulary.seen - seen, name, 100 * self.max_unknown)  # fmt: skip
            self._checked[name] = (vocabulary.seen, vocabulary.unknown)


def in_slices(look_up: Callable[[Tensor], Tensor], ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of ids, in their shape, looked up by the thread that asks alone: few at a time.

    Torch divides larger tensors among threads, which readers of other ranks and the model wait for.
    """
    found = torch.empty(ids.shape, dtype=dtype)
    for part, own in zip(ids.reshape(-1).split(AT_ONCE), found.view(-1).split(AT_ONCE), strict=True):
        own.copy_(look_up(part))
    return found


def _row_type(num_embeddings: int) -> torch.dtype:
    return torch.int32 if num_embeddings < 2**31 else torch.int64


def _of_request(key: str) -> bool:
    return not key.startswith(("candidate_", "behavior_"))


def _is_list(key: str) -> bool:
    """Whether requests may have several ids of a feature, whose embeddings are averaged."""
    return _of_request(key) and key not in REQUEST_IDS


def _weighted_bags(
    features: Sequence[FeatureIds], rows: Sequence[Tensor], factors: Sequence[Tensor], bounds: np.ndarray
) -> Iterator[KeyedJaggedTensor]:
    """Rows of what a request has, weighted so that their sum is the mean of the shrunk embeddings.

    Args:
        features: of the requests of all batches.
        rows: of each feature (num_ids,).
        factors: of each feature (num_ids,).
        bounds: (num_batches + 1,) where each batch begins and ends among the requests.
    """
    places = [k for k, one in enumerate(features) if _of_request(one.key)]
    own = [features[k] for k in places]
    means = [factors[k] / features[k].lengths.repeat_interleave(features[k].lengths) for k in places]
    weights = keyed(own, means, bounds)
    for ids, weight in zip(keyed(own, [rows[k] for k in places], bounds), weights, strict=True):
        yield KeyedJaggedTensor(
            keys=ids.keys(), values=ids.values(), weights=weight.values(), lengths=ids.lengths()
        )
