"""From requests to scores: rows from stores, interests by matrices where they are linear, the dense model.

A scorer is one model with the stores of its versions. Another scorer replaces it to serve another deployment.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.ciubm import CiUBM
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ctr.dense import LookedUp
from mim_torchrec.ctr.esmm import second_scores
from mim_torchrec.data.features import Feature, model_numbers
from mim_torchrec.embeddings.stores.store import ParameterStore, SharedStore, open_store
from mim_torchrec.embeddings.table.manifest import VersionMismatch
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.dense.model import make_dense
from mim_torchrec.serving.grid import pairs_of
from mim_torchrec.serving.matrix import MatrixCache, MatrixCiUBM, is_linear
from mim_torchrec.serving.messages import BadRequest, ScoreRequest, Scores

ROLES = ("candidate", "behavior")
_KINDS = {"user_id": "user", "query_id": "query"} | {
    f"{role}_{name}": kind for role in ROLES for name, kind in (("item_id", "item"), ("category", "category"))
}


def kind_of(feature: str) -> str:
    """What unknown ids of a feature are counted as: a further feature by its own name.

    >>> kind_of("behavior_category"), kind_of("candidate_brand")
    ('category', 'candidate_brand')
    """
    return _KINDS.get(feature, feature)


Opener = Callable[[str, str | Path, str], ParameterStore]
"""Opens a store: what it holds, for messages; where it is; the version of its table."""


class Scorer:
    """Scores requests with one model and one version of vectors.

    Args:
        bundle: of the model.
        store: directory of the multi-modal table, or URL of the store with it; None for Base.
        id_store: URL of the store with the bundle's ID tables; None reads them from the bundle.
        cache: matrices of histories to keep.
        plain: compute pairs and interests as training does, for comparison.
        opener: opens the stores; by default `open_store`.

    Raises:
        VersionMismatch: the vectors are not those that the model was trained on.
        OptionError: there is no store and the model needs one.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: str | Path | None,
        id_store: str | None = None,
        cache: int = 0,
        plain: bool = False,
        opener: Opener = lambda name, where, version: open_store(where, version),
    ) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.features = bundle.config.features()
        self._model, self._unknown = bundle.load()
        self._pairs_of = RequestPairs.build if plain else pairs_of
        if not plain:
            make_dense(self._model)
        self.mm: ParameterStore | None = None
        if bundle.table_version is not None:
            if store is None:
                raise OptionError(
                    f"{bundle.path} has content interest: say where its vectors are with --store"
                )
            self.mm = opener("vectors", store, bundle.table_version)
            if (dim := self.mm.dim) != bundle.mm_dim:
                raise VersionMismatch(f"{store} has vectors of {dim}, the model needs {bundle.mm_dim}")
        self._ids: dict[str, ParameterStore] = {}
        for name in bundle.tables:
            where = id_store or bundle.path / "tables" / name
            self._ids[name] = opener(name, where, bundle.version_of(name))
        self.cache = MatrixCache(cache)
        self._matrices: MatrixCiUBM | None = None
        if self.mm is not None and is_linear(self._model.ciubm) and not plain:
            self._matrices = MatrixCiUBM(self._model.ciubm)
            self._model.ciubm = cast(CiUBM, self._matrices)  # it takes and gives what CiUBM does
        # the similarity interest reads the vectors of a history, whatever else is known of it
        self._changes = 0
        self._keeps = cache > 0 and self._matrices is not None and not self._matrices.inner.tiers

    @property
    def stores(self) -> list[ParameterStore]:
        """All stores that scores need."""
        return [*self._ids.values(), *([] if self.mm is None else [self.mm])]

    @property
    def of_requests(self) -> tuple[str, ...]:
        """Ids that a request has besides behaviors and candidates."""
        own = tuple(name for name in ("user_id", "query_id") if name in self._ids)
        return own + tuple(feature.name for feature in self.features.ids("request"))

    @property
    def of_candidates(self) -> tuple[str, ...]:
        """Further ids of candidates."""
        return tuple(feature.name for feature in self.features.ids("candidate"))

    @property
    def of_behaviors(self) -> tuple[str, ...]:
        """Further ids of behaviors."""
        return tuple(feature.name for feature in self.features.ids("behavior"))

    @property
    def of_items(self) -> tuple[str, ...]:
        """Ids that candidates and behaviors have alike."""
        return tuple(name for name in ("item_id", "category") if name in self._ids)

    @property
    def _counted(self) -> list[str]:
        """Kinds of ids whose unknown ones are counted."""
        names = (*self.of_requests, *(f"candidate_{name}" for name in self.of_items), *self.of_candidates,
                 *self.of_behaviors)  # fmt: skip
        return list(dict.fromkeys(["user", "item", "vector", *map(kind_of, names)]))

    @property
    def needs_times(self) -> bool:
        """Whether the model needs the times of requests and behaviors."""
        config = self.config
        return config.id_interest and config.recency == "time" and "recency" in config.ubm_options.needs

    def apply(self, window: Window) -> bool:
        """Apply a window to the vectors, and forget what was made of the old ones."""
        assert self.mm is not None  # Base follows no windows
        applied = self.mm.apply(window)
        self.cache.drop(torch.cat([window.ids, window.removed]))
        return applied

    @property
    def interests(self) -> tuple[str, ...]:
        """The interests that the model has, by their names in `Interests`."""
        ciubm = self._model.ciubm if self._matrices is None else self._matrices.inner
        there = {"id": ciubm.ubm is not None, "content": ciubm.content, "fusion": ciubm.fusion,
                 "similarity": ciubm.tiers > 0}  # fmt: skip
        return tuple(name for name, is_on in there.items() if is_on)

    @contextmanager
    def calling(self, wrapped: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
        """Score with a module around CiUBM, for as long as a block lasts."""
        whole = self._model.ciubm
        self._model.ciubm = cast(CiUBM, wrapped(whole))
        try:
            yield
        finally:
            self._model.ciubm = whole

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], keep: bool = True) -> list[Scores]:
        """Score requests together.

        Args:
            requests: what is scored; explanations are not given here, see `explaining.py`.
            keep: whether matrices of histories are looked for in the cache and put there.

        Raises:
            BadRequest: a feature that the model needs is missing.
            RedisUnavailable: a store cannot be reached; or what else the stores raise.
        """
        requests = [self.recent(request) for request in requests]
        if self.needs_times and any(r.request_ts is None or r.behavior_ts is None for r in requests):
            raise BadRequest("the model needs the features request_ts and behavior_ts")
        self._check_behaviors(requests)
        counts = [request.num_candidates for request in requests]
        while True:
            lookups = [dict.fromkeys(self._counted, 0) for _ in requests]
            generation = self.cache.generation
            given, keys = self._known_matrices(requests, keep and self._keeps)
            rows, known = self._rows(requests, lookups)
            vectors = self._vectors(requests, lookups, skip=[matrix is not None for matrix in given])
            if not self._others_changed_rows() or all(matrix is None for matrix in given):
                break  # else matrices are of older rows than the vectors
        pooled = self._pooled(requests, lookups)
        looked_up = self._looked_up(requests, rows, known, vectors, pooled)
        if self._matrices is not None:
            self._matrices.given = given
        found = self._model.predict(looked_up)
        of_clicks = found.logits.float()
        scores = torch.sigmoid(of_clicks)
        second: list[tuple[Tensor, Tensor]] | None = None
        if found.conversion_logits is not None:
            parts = (part.split(counts) for part in second_scores(found.logits, found.conversion_logits))
            second = list(zip(*parts, strict=True))
        if self._matrices is not None:
            made = self._matrices.made
            for request, key, matrix in zip(requests, keys, made, strict=True):
                if key is not None:
                    self.cache.put(key, request.ids["behavior_item_id"], matrix, generation)
        without = None
        if vectors is not None and any(request.contribution for request in requests):
            if self._matrices is not None:
                self._matrices.given = [*made]
            nothing = torch.zeros_like(vectors[0])
            logits = self._model.predict(replace(looked_up, vectors=(nothing, vectors[1]))).logits
            without = torch.sigmoid(logits.float()).split(counts)
        return [
            Scores(part, part - without[k] if without and requests[k].contribution else None, lookups[k],
                   given[k] is not None if self._keeps else None, second[k] if second else None, own)
            for k, (part, own) in enumerate(zip(scores.split(counts), of_clicks.split(counts), strict=True))
        ]  # fmt: skip

    def relevance(self, request: ScoreRequest) -> Tensor:
        """Cosines of the vectors (num_candidates, num_behaviors), α of Eq. 7; 0 where there is no vector."""
        assert self.mm is not None  # Base has nothing to compare
        both, found = self.mm.lookup(torch.cat([request.ids[f"{role}_item_id"] for role in ROLES]))
        _put_given([request], both, found)
        sizes = [request.num_candidates, request.num_behaviors]
        one, other = nn.functional.normalize(both.float(), dim=1).split(sizes)
        return one @ other.T

    def _check_behaviors(self, requests: Sequence[ScoreRequest]) -> None:
        """See that every behavior has what the model knows of behaviors."""
        for name in (feature.name for feature in self.features.of("behavior")):
            for request in requests:
                values = request.ids.get(name, request.dense.get(name))
                if values is None:
                    raise BadRequest(f"the model needs the feature {name}")
                if len(values) != (behaviors := len(request.ids["behavior_item_id"])):
                    raise BadRequest(f"{name} has {len(values)} values for {behaviors} behaviors")

    def recent(self, request: ScoreRequest) -> ScoreRequest:
        """The request with as many behaviors as the model was trained with, the last ones."""
        last = self.config.max_behaviors

        def recent(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: v[-last:] if name.startswith("behavior_") else v for name, v in values.items()}

        times = request.behavior_ts
        return replace(request, ids=recent(request.ids), dense=recent(request.dense),
                       behavior_ts=None if times is None else times[-last:])  # fmt: skip

    def _others_changed_rows(self) -> bool:
        """Whether vectors have changed otherwise than by `apply` since the last call."""
        changes = self.mm.seen.changes if isinstance(self.mm, SharedStore) else 0
        if changes == self._changes:
            return False
        self._changes = changes
        self.cache.clear()
        return True

    def _known_matrices(
        self, requests: Sequence[ScoreRequest], keeps: bool
    ) -> tuple[list[Tensor | None], list[bytes | None]]:
        """Matrices that the cache has, and the keys under which others are to be kept."""
        given: list[Tensor | None] = []
        keys: list[bytes | None] = []
        for request in requests:
            key = matrix = None
            if keeps:
                digest = hashlib.blake2b(digest_size=16)
                for name in (*(f"behavior_{name}" for name in self.of_items), *self.of_behaviors):
                    digest.update(request.ids[name].numpy().tobytes())
                for feature in self.features.numbers("behavior"):
                    digest.update(request.dense[feature.name].numpy().tobytes())
                key = digest.digest()
                matrix = self.cache.get(key)
            given.append(matrix)
            keys.append(key if matrix is None else None)
        return given, keys

    def _rows(
        self, requests: Sequence[ScoreRequest], lookups: list[dict[str, int]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """ID rows of candidates and behaviors by feature, and which of their ids are known.

        Every table is asked once for both.
        """
        rows, known = {}, {}
        groups = {name: [f"{role}_{name}" for role in ROLES] for name in self.of_items}
        for name in self.of_candidates:
            shared = name.removeprefix("candidate_")
            groups.setdefault(name if name in self._ids else shared, []).append(name)
        groups |= {name: [name] for name in self.of_behaviors}
        for table, features in groups.items():
            flat = [self._flat(feature, requests) for feature in features]
            sizes = [ids.numel() for ids, _ in flat]
            both, found = self._ids[table].lookup(torch.cat([ids for ids, _ in flat]))
            if not found.all():
                both[~found] = self._unknown[table]
            parts = zip(features, flat, both.split(sizes), found.split(sizes), strict=True)
            for feature, (_, lengths), own, is_there in parts:
                rows[feature], known[feature] = own, is_there
                self._count(kind_of(feature), is_there, lengths, lookups)
        return rows, known

    def _vectors(
        self, requests: Sequence[ScoreRequest], lookups: list[dict[str, int]], skip: list[bool]
    ) -> tuple[Tensor, Tensor] | None:
        """Multi-modal vectors; those of histories whose matrix is known are left out, and are zero."""
        if self.mm is None:
            return None
        flat = [self._flat(f"{role}_item_id", requests) for role in ROLES]
        (candidates, candidate_lengths), (behaviors, behavior_lengths) = flat
        wanted = (~torch.tensor(skip)).repeat_interleave(behavior_lengths)
        rows, found = self.mm.lookup(torch.cat([candidates, behaviors[wanted]]))
        _put_given(requests, rows, found)
        of_candidates, of_behaviors = rows.split([candidates.numel(), rows.shape[0] - candidates.numel()])
        if not wanted.all():
            of_behaviors = rows.new_zeros(behaviors.numel(), self.mm.dim).index_put_((wanted,), of_behaviors)
        is_there = torch.ones(behaviors.numel(), dtype=torch.bool)
        is_there[wanted] = found[candidates.numel() :]
        self._count("vector", found[: candidates.numel()], candidate_lengths, lookups)
        self._count("vector", is_there, behavior_lengths, lookups)
        return of_candidates, of_behaviors

    def _pooled(self, requests: Sequence[ScoreRequest], lookups: list[dict[str, int]]) -> Tensor:
        """Rows of requests, (num_requests, request_dim)."""
        parts = []
        for name in self.of_requests:
            ids, lengths = self._flat(name, requests)
            rows, found = self._ids[name].lookup(ids)
            rows[~found] = self._unknown[name]
            self._count(kind_of(name), found, lengths, lookups)
            owner = torch.arange(len(requests)).repeat_interleave(lengths)
            total = rows.new_zeros(len(requests), rows.shape[1]).index_add(0, owner, rows)
            parts.append(total / lengths.clamp(min=1)[:, None] if name in self.features.by_name else total)
        return torch.cat(parts, dim=1)

    def _looked_up(
        self,
        requests: Sequence[ScoreRequest],
        rows: dict[str, Tensor],
        known: dict[str, Tensor],
        vectors: tuple[Tensor, Tensor] | None,
        pooled: Tensor,
    ) -> LookedUp:
        """Rows, and what the model reads besides them: pairs, categories, times, numbers."""
        ends = (self._flat(f"{role}_item_id", requests)[1].cumsum(0) for role in ROLES)
        categories = {}
        if "category" in self.of_items:  # compared with each other, and 0 is an unknown one
            for role in ROLES:
                ids, _ = self._flat(f"{role}_category", requests)
                categories[f"{role}_categories"] = torch.where(known[f"{role}_category"], ids + 1, 0)
        times = [request.behavior_ts for request in requests if request.behavior_ts is not None]
        moments = [request.request_ts for request in requests if request.request_ts is not None]
        has_times = len(times) == len(moments) == len(requests)
        return LookedUp(
            pairs=self._pairs_of(*(nn.functional.pad(own, (1, 0)) for own in ends)),
            pooled=lambda: pooled,
            rows=rows,
            vectors=vectors,
            request_ts=torch.tensor(moments) if has_times else None,
            behavior_ts=torch.cat(times) if has_times else None,
            request_dense=self._numbers(self.features.numbers("request"), requests),
            candidate_dense=self._numbers(self.features.numbers("candidate"), requests),
            behavior_dense=self._numbers(self.features.numbers("behavior"), requests),
            **categories,
        )

    def _numbers(self, features: Sequence[Feature], requests: Sequence[ScoreRequest]) -> Tensor | None:
        names = [feature.name for feature in features]
        missing = [name for name in names for request in requests if name not in request.dense]
        if missing:
            raise BadRequest(f"the model needs the feature {missing[0]}")
        values = {name: torch.cat([request.dense[name] for request in requests]) for name in names}
        return model_numbers(features, values)

    def _flat(self, name: str, requests: Sequence[ScoreRequest]) -> tuple[Tensor, Tensor]:
        if any(name not in request.ids for request in requests):
            raise BadRequest(f"the model needs the feature {name}")
        parts = [request.ids[name] for request in requests]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole, torch.tensor([part.numel() for part in parts])

    @staticmethod
    def _count(kind: str, found: Tensor, lengths: Tensor, lookups: list[dict[str, int]]) -> None:
        parts = [found] if len(lookups) == 1 else found.split(lengths.tolist())
        for own, part in zip(lookups, parts, strict=True):
            own[kind] += part.numel() - int(np.count_nonzero(part.numpy()))


def _put_given(requests: Sequence[ScoreRequest], rows: Tensor, found: Tensor) -> None:
    """Put vectors that requests bring with them into rows, the first of which are those of candidates."""
    first = 0
    for request in requests:
        for place, vector in request.vectors.items():
            rows[first + place], found[first + place] = vector, True
        first += request.num_candidates
