"""What a request looks up: rows of candidates, behaviors and of the request itself, and multi-modal vectors.

Every table is asked once a batch, for candidates and behaviors together. Ids that a table does not have are
counted.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.dense import LookedUp
from mim_torchrec.data.features import Feature, model_numbers
from mim_torchrec.embeddings.stores.store import ParameterStore
from mim_torchrec.serving.messages import BadRequest, ScoreRequest

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


PairsOf = Callable[[Tensor, Tensor], RequestPairs]
"""The pairs of a batch by the offsets of its candidates and its behaviors."""


class Lookups:
    """What requests look up for one model.

    Args:
        config: of the model.
        tables: stores of ID rows by name.
        unknown: row of an unknown id by table.
        mm: store of the multi-modal vectors; None for Base.
        pairs_of: makes pairs.
    """

    def __init__(
        self,
        config: CTRConfig,
        tables: Mapping[str, ParameterStore],
        unknown: Mapping[str, Tensor],
        mm: ParameterStore | None,
        pairs_of: PairsOf,
    ) -> None:
        self.config, self.features = config, config.features()
        self.tables, self.unknown, self._mm, self._pairs_of = tables, unknown, mm, pairs_of

    @property
    def of_requests(self) -> tuple[str, ...]:
        """Ids that a request has besides behaviors and candidates."""
        own = tuple(name for name in ("user_id", "query_id") if name in self.tables)
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
        return tuple(name for name in ("item_id", "category") if name in self.tables)

    @property
    def counted(self) -> list[str]:
        """Kinds of ids whose unknown ones are counted."""
        names = (*self.of_requests, *(f"candidate_{name}" for name in self.of_items), *self.of_candidates,
                 *self.of_behaviors)  # fmt: skip
        return list(dict.fromkeys(["user", "item", "vector", *map(kind_of, names)]))

    @property
    def needs_times(self) -> bool:
        """Whether the model needs the times of requests and behaviors."""
        config = self.config
        return config.id_interest and config.recency == "time" and "recency" in config.ubm_options.needs

    def check(self, requests: Sequence[ScoreRequest]) -> None:
        """See that requests have the times, and every behavior what the model knows of behaviors.

        Raises:
            BadRequest: one lacks it.
        """
        if self.needs_times and any(r.request_ts is None or r.behavior_ts is None for r in requests):
            raise BadRequest("the model needs the features request_ts and behavior_ts")
        for name in (feature.name for feature in self.features.of("behavior")):
            for request in requests:
                values = request.ids.get(name, request.dense.get(name))
                if values is None:
                    raise BadRequest(f"the model needs the feature {name}")
                if len(values) != (behaviors := len(request.ids["behavior_item_id"])):
                    raise BadRequest(f"{name} has {len(values)} values for {behaviors} behaviors")

    def rows(
        self, requests: Sequence[ScoreRequest], misses: list[dict[str, int]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """ID rows of candidates and behaviors by feature, and which of their ids are known.

        Every table is asked once for both.
        """
        rows, known = {}, {}
        groups = {name: [f"{role}_{name}" for role in ROLES] for name in self.of_items}
        for name in self.of_candidates:
            shared = name.removeprefix("candidate_")
            groups.setdefault(name if name in self.tables else shared, []).append(name)
        groups |= {name: [name] for name in self.of_behaviors}
        for table, features in groups.items():
            flat = [self._flat(feature, requests) for feature in features]
            sizes = [ids.numel() for ids, _ in flat]
            both, found = self.tables[table].lookup(torch.cat([ids for ids, _ in flat]))
            if not found.all():
                both[~found] = self.unknown[table]
            parts = zip(features, flat, both.split(sizes), found.split(sizes), strict=True)
            for feature, (_, lengths), own, is_there in parts:
                rows[feature], known[feature] = own, is_there
                self._count(kind_of(feature), is_there, lengths, misses)
        return rows, known

    def vectors(
        self, requests: Sequence[ScoreRequest], misses: list[dict[str, int]], skip: list[bool]
    ) -> tuple[Tensor, Tensor] | None:
        """Multi-modal vectors; those of histories whose matrix is known are left out, and are zero."""
        if self._mm is None:
            return None
        flat = [self._flat(f"{role}_item_id", requests) for role in ROLES]
        (candidates, candidate_lengths), (behaviors, behavior_lengths) = flat
        wanted = (~torch.tensor(skip)).repeat_interleave(behavior_lengths)
        rows, found = self._mm.lookup(torch.cat([candidates, behaviors[wanted]]))
        put_given(requests, rows, found)
        of_candidates, of_behaviors = rows.split([candidates.numel(), rows.shape[0] - candidates.numel()])
        if not wanted.all():
            of_behaviors = rows.new_zeros(behaviors.numel(), self._mm.dim).index_put_((wanted,), of_behaviors)
        is_there = torch.ones(behaviors.numel(), dtype=torch.bool)
        is_there[wanted] = found[candidates.numel() :]
        self._count("vector", found[: candidates.numel()], candidate_lengths, misses)
        self._count("vector", is_there, behavior_lengths, misses)
        return of_candidates, of_behaviors

    def pooled(self, requests: Sequence[ScoreRequest], misses: list[dict[str, int]]) -> Tensor:
        """Rows of requests, (num_requests, request_dim)."""
        parts = []
        for name in self.of_requests:
            ids, lengths = self._flat(name, requests)
            rows, found = self.tables[name].lookup(ids)
            rows[~found] = self.unknown[name]
            self._count(kind_of(name), found, lengths, misses)
            owner = torch.arange(len(requests)).repeat_interleave(lengths)
            total = rows.new_zeros(len(requests), rows.shape[1]).index_add(0, owner, rows)
            parts.append(total / lengths.clamp(min=1)[:, None] if name in self.features.by_name else total)
        return torch.cat(parts, dim=1)

    def whole(
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
            candidate_categories=categories.get("candidate_categories"),
            behavior_categories=categories.get("behavior_categories"),
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
    def _count(kind: str, found: Tensor, lengths: Tensor, misses: list[dict[str, int]]) -> None:
        parts = [found] if len(misses) == 1 else found.split(lengths.tolist())
        for own, part in zip(misses, parts, strict=True):
            own[kind] += part.numel() - int(np.count_nonzero(part.numpy()))


def put_given(requests: Sequence[ScoreRequest], rows: Tensor, found: Tensor) -> None:
    """Put vectors that requests bring with them into rows, the first of which are those of candidates."""
    first = 0
    for request in requests:
        for place, vector in request.vectors.items():
            rows[first + place], found[first + place] = vector, True
        first += request.num_candidates
