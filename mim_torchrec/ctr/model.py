"""The CTR model: CiUBM between sharded embeddings and a deepCTR tower (MIM, section 3.4).

It scores every candidate of a request from the user, the query where there is one, the candidate, and
the interest that the user's behaviors show in it. The embedding collections are injected, as in torchrec's
own models, so one class serves unsharded tests and sharded training.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ctr.config import ModelConfig
from mim_torchrec.ctr.dense import ROLES, DenseCTR, LookedUp, Prediction
from mim_torchrec.ctr.shrunk_rows import Factors
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.packed_batch import PackedBatch


class _Untraced(nn.Module):
    """Calls a function as a module without tables, which a pipeline that traces the model leaves alone."""

    def __init__(self, function: Callable[..., Prediction]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *args: object) -> Prediction:
        return self._function(*args)


class CTRModel(DenseCTR):
    """Click logits of the candidates of each request.

    Args:
        request_embeddings: pooled features of a request: `user_id`, where the data has it `query_id`, and
            further ones.
        item_embeddings: unpooled; tables `item_id` and, where the data has categories, `category`, each with
            two features: `candidate_item_id` and `behavior_item_id`, `candidate_category` and so on; and
            tables of candidates or of behaviors only, each with the feature of its name.
        mm_embeddings: unpooled frozen multi-modal vectors with the features `candidate_mm` and
            `behavior_mm`; None is the Base model, which knows ids only.
        config: interests, tower and their sizes.

    Raises:
        ValueError: `config.mim` and `mm_embeddings` do not agree.
        OptionError: behaviors have features, and no interest reads them.
    """

    mm_embeddings: EmbeddingCollection | None

    def __init__(
        self,
        request_embeddings: EmbeddingBagCollection,
        item_embeddings: EmbeddingCollection,
        mm_embeddings: EmbeddingCollection | None,
        config: ModelConfig,
    ) -> None:
        bags = request_embeddings.embedding_bag_configs()
        tables = item_embeddings.embedding_configs()
        super().__init__(
            sum(t.embedding_dim * len(t.feature_names) for t in bags),
            {t.name: t.embedding_dim for t in tables},
            mm_embeddings.embedding_configs()[0].embedding_dim if mm_embeddings is not None else None,
            config,
        )
        self.request_embeddings = request_embeddings
        self.item_embeddings = item_embeddings
        self.mm_embeddings = mm_embeddings
        self.item_features = [feature for t in tables for feature in t.feature_names]
        self.request_features = [feature for t in bags for feature in t.feature_names]
        self.shrinks_ids = config.shrinks_ids
        self.weighs_bags = request_embeddings.is_weighted()
        self.score = _Untraced(self._score)
        self.shrink_and_score = _Untraced(self._shrink_and_score)

    def forward(self, batch: RequestBatch) -> Prediction:
        """Score the candidates.

        Args:
            batch: requests whose ids are embedding rows already.

        Raises:
            ValueError: the user behavior model needs times or categories that the batch does not have, or
                embeddings are shrunk and it has no factors.
        """
        sparse = batch.sparse
        # start every exchange between ranks before waiting for the first
        pooled = self.request_embeddings(batch.bags if self.weighs_bags else sparse)
        item_rows = self.item_embeddings(sparse)
        mm_rows = self.mm_embeddings(sparse) if self.mm_embeddings is not None else None
        score = self.shrink_and_score if self.shrinks_ids else self.score
        return score(batch, pooled, item_rows, mm_rows)

    def _shrink_and_score(
        self,
        batch: RequestBatch,
        pooled: KeyedTensor,
        item_rows: Mapping[str, JaggedTensor],
        mm_rows: Mapping[str, JaggedTensor] | None,
    ) -> Prediction:
        """Say by what embeddings are multiplied; bags of lists of ids were weighted by it."""
        if batch.factors is None:
            raise ValueError("embeddings of ids are shrunk, but the batch does not say by what factors")
        rows = {feature: item_rows[feature].values() for feature in self.item_features}
        for feature in (*self.candidate_columns, *self.behavior_columns):
            rows[feature] = rows[feature] * _factors(batch, [feature])[:, None]
        of_items = _factors(batch, [f"{role}_{name}" for name in self.item_columns for role in ROLES])
        factors = Factors(
            items=of_items.view(len(self.item_columns), -1),
            requests=None
            if self.weighs_bags
            else _factors(batch, self.request_features).view(len(self.request_features), -1),
        )
        return self._predicted(batch, _pairs(batch), pooled, rows, mm_rows, factors)

    def _score(
        self,
        batch: RequestBatch,
        pooled: KeyedTensor,
        item_rows: Mapping[str, JaggedTensor],
        mm_rows: Mapping[str, JaggedTensor] | None,
    ) -> Prediction:
        """What comes after the lookups."""
        pairs = _pairs(batch)  # before the exchange between ranks is waited for
        rows = {feature: item_rows[feature].values() for feature in self.item_features}
        return self._predicted(batch, pairs, pooled, rows, mm_rows)

    def _predicted(
        self,
        batch: RequestBatch,
        pairs: RequestPairs,
        pooled: KeyedTensor,
        rows: Mapping[str, Tensor],
        mm_rows: Mapping[str, JaggedTensor] | None,
        factors: Factors | None = None,
    ) -> Prediction:
        vectors = None
        if mm_rows is not None:
            vectors = (mm_rows["candidate_mm"].values(), mm_rows["behavior_mm"].values())
        categories = {}
        if "category" in self.item_columns:
            categories = {f"{role}_categories": batch.sparse[f"{role}_category"].values() for role in ROLES}
        found = LookedUp(
            pairs=pairs,
            pooled=lambda: _side_by_side(pooled, self.request_features),
            rows=rows,
            vectors=vectors,
            request_ts=batch.request_ts,
            behavior_ts=batch.behavior_ts,
            request_dense=batch.request_dense,
            candidate_dense=batch.candidate_dense,
            behavior_dense=batch.behavior_dense,
            factors=factors,
            **categories,
        )
        return self.predict(found)


def _side_by_side(pooled: KeyedTensor, features: Sequence[str]) -> Tensor:
    """Rows of features of requests in the order of the tables.

    A sharded collection returns them in the order of the ranks that hold their tables, which differs between
    numbers of ranks. The tower, and a server, know one order.
    """
    if pooled.keys() == list(features):
        return pooled.values()
    return torch.cat([pooled[feature] for feature in features], dim=1)


def _factors(batch: RequestBatch, features: Sequence[str]) -> Tensor:
    """Factors of features, one after the other: a view where they are neighbors in the batch."""
    assert batch.factors is not None
    keys, ends = batch.sparse.keys(), batch.sparse.offset_per_key()
    places = [keys.index(feature) for feature in features]
    if places == list(range(places[0], places[0] + len(places))):
        return batch.factors[ends[places[0]] : ends[places[-1] + 1]]
    return torch.cat([batch.factors[ends[place] : ends[place + 1]] for place in places])


def _pairs(batch: RequestBatch) -> RequestPairs:
    if isinstance(batch, PackedBatch) and batch.layout is not None:
        return RequestPairs.laid_out(batch.layout)
    candidates, behaviors = (batch.sparse[f"{role}_item_id"].offsets() for role in ROLES)
    return RequestPairs.build(candidates, behaviors)
