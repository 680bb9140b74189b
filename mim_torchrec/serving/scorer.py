"""From requests to scores: what they look up, interests by matrices where they are linear, the dense model.

A scorer is one model with the stores of its versions. Another scorer replaces it to serve another deployment.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.ciubm import CiUBM
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ctr.esmm import second_scores
from mim_torchrec.embeddings.stores.store import ParameterStore, SharedStore, open_store
from mim_torchrec.embeddings.table.manifest import VersionMismatch
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.dense.model import make_dense
from mim_torchrec.serving.grid import pairs_of
from mim_torchrec.serving.lookups import ROLES, Lookups, put_given
from mim_torchrec.serving.matrix import MatrixCache, MatrixCiUBM, is_linear
from mim_torchrec.serving.messages import ScoreRequest, Scores

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
        self._model, unknown = bundle.load()
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
        tables: dict[str, ParameterStore] = {}
        for name in bundle.tables:
            where = id_store or bundle.path / "tables" / name
            tables[name] = opener(name, where, bundle.version_of(name))
        made_by = RequestPairs.build if plain else pairs_of
        self.lookups = Lookups(self.config, tables, unknown, self.mm, made_by)
        self.cache = MatrixCache(cache)
        self._matrices: MatrixCiUBM | None = None
        if self.mm is not None and is_linear(self._model.ciubm) and not plain:
            self._matrices = MatrixCiUBM(self._model.ciubm)
            self._model.ciubm = cast(CiUBM, self._matrices)  # it takes and gives what CiUBM does
        # asked once, because to compare an object with a protocol is to look for all of its names
        self._shared = self.mm if isinstance(self.mm, SharedStore) else None
        self._changes = 0
        # the similarity interest reads the vectors of a history, whatever else is known of it
        self._keeps = cache > 0 and self._matrices is not None and not self._matrices.inner.tiers

    @property
    def stores(self) -> list[ParameterStore]:
        """All stores that scores need."""
        return [*self.lookups.tables.values(), *([] if self.mm is None else [self.mm])]

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
        self.lookups.check(requests)
        counts = [request.num_candidates for request in requests]
        while True:
            misses = [dict.fromkeys(self.lookups.counted, 0) for _ in requests]
            generation = self.cache.generation
            given, keys = self._known_matrices(requests, keep and self._keeps)
            rows, known = self.lookups.rows(requests, misses)
            vectors = self.lookups.vectors(requests, misses, skip=[matrix is not None for matrix in given])
            if not self._others_changed_rows() or all(matrix is None for matrix in given):
                break  # else matrices are of older rows than the vectors
        pooled = self.lookups.pooled(requests, misses)
        looked_up = self.lookups.whole(requests, rows, known, vectors, pooled)
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
            Scores(part, part - without[k] if without and requests[k].contribution else None, misses[k],
                   given[k] is not None if self._keeps else None, second[k] if second else None, own)
            for k, (part, own) in enumerate(zip(scores.split(counts), of_clicks.split(counts), strict=True))
        ]  # fmt: skip

    def relevance(self, request: ScoreRequest) -> Tensor:
        """Cosines of the vectors (num_candidates, num_behaviors), α of Eq. 7; 0 where there is no vector."""
        assert self.mm is not None  # Base has nothing to compare
        both, found = self.mm.lookup(torch.cat([request.ids[f"{role}_item_id"] for role in ROLES]))
        put_given([request], both, found)
        sizes = [request.num_candidates, request.num_behaviors]
        one, other = nn.functional.normalize(both.float(), dim=1).split(sizes)
        return one @ other.T

    def recent(self, request: ScoreRequest) -> ScoreRequest:
        """The request with as many behaviors as the model was trained with, the last ones."""
        last = self.config.max_behaviors

        def recent(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: v[-last:] if name.startswith("behavior_") else v for name, v in values.items()}

        times = request.behavior_ts
        return replace(request, ids=recent(request.ids), dense=recent(request.dense),
                       behavior_ts=None if times is None else times[-last:])  # fmt: skip

    def _others_changed_rows(self) -> bool:
        """Whether vectors have changed otherwise than by `apply` since the last call.

        Matrices of histories with items that may have changed are forgotten.
        """
        if self._shared is None or (changes := self._shared.seen.changes) == self._changes:
            return False
        changed = self._shared.seen.changed_since(self._changes)
        self._changes = changes  # read before: what comes in between is dropped twice
        if changed is None:
            self.cache.clear()
        else:
            self.cache.drop(changed)
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
                for name in (*(f"behavior_{n}" for n in self.lookups.of_items), *self.lookups.of_behaviors):
                    digest.update(request.ids[name].numpy().tobytes())
                for feature in self.features.numbers("behavior"):
                    digest.update(request.dense[feature.name].numpy().tobytes())
                key = digest.digest()
                matrix = self.cache.get(key)
            given.append(matrix)
            keys.append(key if matrix is None else None)
        return given, keys
