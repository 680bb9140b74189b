"""The CTR model: CiUBM between sharded embeddings and a deepCTR tower (MIM, section 3.4).

It scores every candidate of a request from the user, the query where there is one, the candidate, and
the interest that the user's behaviors show in it. The embedding collections are injected, as in torchrec's
own models, so one class serves unsharded tests and sharded training.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from mim_torchrec.ciubm.ciubm import CiUBM
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.side_information import SideInformation
from mim_torchrec.ciubm.ubm.activation import PReLU
from mim_torchrec.ciubm.ubm.interface import Auxiliary, BehaviorContext
from mim_torchrec.ctr.config import ModelConfig
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.packed_batch import PackedBatch
from mim_torchrec.errors import OptionError
from mim_torchrec.training.batch_norm import GlobalBatchNorm1d, PartialBatchNorm1d

MICROSECONDS = 1_000_000
ITEM_COLUMNS = ("item_id", "category")


class Prediction(NamedTuple):
    """What the model says of the candidates of a batch.

    Attributes:
        logits: (sum_candidates,) in the order of the batch's candidates.
        auxiliary: in training mode, the auxiliary task of the user behavior model, if it has one.
        conversion_logits: (sum_candidates,) of the second label given a click, if the model has one (`esmm`).
    """

    logits: Tensor
    auxiliary: Auxiliary | None
    conversion_logits: Tensor | None = None


class DeepCTR(nn.Module):
    """Fully connected tower from features to a logit.

    Args:
        in_features: size of the input.
        hidden: widths of the hidden layers (the paper's towers end in 200 and 80).
        batch_norm: normalize the input and every hidden layer over the batch of all ranks.
        dropout: probability of dropping a hidden unit.
        normalized: (in_features,) bool, what of the input is normalized; None is all of it.
    """

    def __init__(
        self,
        in_features: int,
        hidden: tuple[int, ...],
        batch_norm: bool,
        dropout: float,
        normalized: Tensor | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if batch_norm:  # no scale and shift where a linear layer follows, see below
            layers.append(
                GlobalBatchNorm1d(in_features, affine=False)
                if normalized is None
                else PartialBatchNorm1d(normalized)
            )
        width = in_features
        for size in hidden:
            # batch normalization cancels a bias, whose gradient would be rounding noise that Adam scales up,
            # and so would be that of a shift ahead of it: ranks would drift apart
            layers.append(nn.Linear(width, size, bias=not batch_norm))
            if batch_norm:
                layers.append(GlobalBatchNorm1d(size))
            layers.append(PReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_features) to logits (n,)."""
        return self.layers(x).squeeze(-1)


class _Untraced(nn.Module):
    """Calls a function as a module without tables, which a pipeline that traces the model leaves alone."""

    def __init__(self, function: Callable[..., Prediction]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *args: object) -> Prediction:
        return self._function(*args)


class CTRModel(nn.Module):
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

    def __init__(
        self,
        request_embeddings: EmbeddingBagCollection,
        item_embeddings: EmbeddingCollection,
        mm_embeddings: EmbeddingCollection | None,
        config: ModelConfig,
    ) -> None:
        super().__init__()
        if (mm_embeddings is not None) != (config.mim == "on"):
            given = "missing" if mm_embeddings is None else "given"
            raise ValueError(f"mim is {config.mim!r}, but multi-modal embeddings are {given}")
        self.request_embeddings = request_embeddings
        self.item_embeddings = item_embeddings
        self.mm_embeddings = mm_embeddings
        self.dot_product_features = config.dot_product_features
        self.recency = config.recency
        self.shrinks_ids = config.shrinks_ids

        bags = request_embeddings.embedding_bag_configs()
        request_dim = sum(t.embedding_dim * len(t.feature_names) for t in bags)
        tables = item_embeddings.embedding_configs()
        self.item_features = [feature for t in tables for feature in t.feature_names]
        self.item_columns = [t.name for t in tables if t.name in ITEM_COLUMNS]
        item_dim = sum(t.embedding_dim for t in tables if t.name in ITEM_COLUMNS)
        dims = {t.name: t.embedding_dim for t in tables}
        further = config.features()
        self.candidate_columns = [feature.name for feature in further.ids("candidate")]
        self.behavior_columns = [feature.name for feature in further.ids("behavior")]
        more_dim = sum(dims[name] for name in self.candidate_columns) + further.width("request", "candidate")
        mm_dim = mm_embeddings.embedding_configs()[0].embedding_dim if mm_embeddings is not None else 0
        content = mm_embeddings is not None and config.content_interest
        fusion = mm_embeddings is not None and config.fusion_interest
        similarity = mm_embeddings is not None and config.similarity_interest
        of_behaviors = further.of("behavior")
        if of_behaviors and not (config.id_interest or fusion):
            names = ", ".join(feature.name for feature in of_behaviors)
            raise OptionError(
                f"{names}: only ID and fusion interest read what is known of behaviors; switch one of them "
                "on, or leave these features out"
            )
        ubm = None
        if config.id_interest:
            auxiliary = config.aux_weight > 0
            ubm = config.ubm_options.build(item_dim, dropout=config.dropout, auxiliary=auxiliary)
        self.ciubm = CiUBM(
            ubm,
            content=content,
            fusion=fusion,
            pooling=config.content_pooling,
            tiers=config.similarity_tiers if similarity else 0,
            spans=config.similarity_spans if similarity else (),
            temperature=config.content_temperature,
            content_dropout=config.content_dropout,
        )
        content_dim = mm_dim
        self.content_projection: nn.Module = nn.Identity()
        if content and config.content_projection != "none":
            bias = not config.batch_norm  # which would cancel it at the entry of the tower
            self.content_projection = nn.LayerNorm(mm_dim, bias=bias)
            if config.content_projection == "linear":
                content_dim = config.content_dim
                linear = nn.Linear(mm_dim, content_dim, bias=bias)
                self.content_projection = nn.Sequential(self.content_projection, linear)
        id_dim = ubm.out_dim if ubm is not None else 0
        # an ID interest of another size than the target's is brought to it before they are multiplied
        self.id_product: nn.Module = nn.Identity()
        if self.dot_product_features and id_dim not in (0, item_dim):
            self.id_product = nn.Linear(id_dim, item_dim, bias=False)
        parts = [(ubm is not None, id_dim), (content, content_dim), (fusion, item_dim)]
        interest_dim = sum(size for on, size in parts if on) + self.ciubm.similarity_dim
        num_dot_products = sum(on for on, _ in parts) if self.dot_product_features else 0
        width = request_dim + item_dim + more_dim + interest_dim + num_dot_products + 1
        normalized = None
        if not config.normalize_ids:  # by the order of `_score`
            products = [ubm is not None, fusion, content] if self.dot_product_features else []
            columns = [
                (False, request_dim + item_dim + sum(dims[name] for name in self.candidate_columns)),
                (True, further.width("request", "candidate")),
                (False, sum(products[:2])),
                (True, sum(products[2:])),
                (False, id_dim),
                (True, content_dim if content else 0),
                (False, item_dim if fusion else 0),
                (True, self.ciubm.similarity_dim + 1),
            ]
            kinds, sizes = (torch.tensor(part) for part in zip(*columns, strict=True))
            normalized = kinds.repeat_interleave(sizes)
        self.tower = DeepCTR(width, config.tower, config.batch_norm, config.dropout, normalized)
        self.side: SideInformation | None = None
        if of_behaviors:  # after all else, which so starts as it does without it
            ids_dim = sum(dims[name] for name in self.behavior_columns)
            self.side = SideInformation(item_dim, ids_dim, further.width("behavior"), config.batch_norm)
        self.second_tower: DeepCTR | None = None
        if config.second_label is not None:
            self.second_tower = DeepCTR(width, config.tower, config.batch_norm, config.dropout, normalized)
        self.list_pairs: Callable[[Tensor, Tensor], RequestPairs] = RequestPairs.build
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
        pooled = self.request_embeddings(batch.bags if self.shrinks_ids else sparse)
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
        """Multiply the embeddings of items by their factors; those of requests were weighted when pooled."""
        if batch.factors is None:
            raise ValueError("embeddings of ids are shrunk, but the batch does not say by what factors")
        keys, ends = batch.sparse.keys(), batch.sparse.offset_per_key()
        shrunk = {}
        for feature in self.item_features:
            place = keys.index(feature)
            factors = batch.factors[ends[place] : ends[place + 1], None]
            values = item_rows[feature].values() * factors
            shrunk[feature] = JaggedTensor(values, offsets=batch.sparse[feature].offsets())
        return self.score(batch, pooled, shrunk, mm_rows)

    def _score(
        self,
        batch: RequestBatch,
        pooled: KeyedTensor,
        item_rows: Mapping[str, JaggedTensor],
        mm_rows: Mapping[str, JaggedTensor] | None,
    ) -> Prediction:
        """What comes after the lookups."""
        sparse = batch.sparse
        if isinstance(batch, PackedBatch) and batch.layout is not None:
            pairs = RequestPairs.laid_out(batch.layout)
        else:
            offsets = (sparse[f"{role}_item_id"].offsets() for role in ("candidate", "behavior"))
            pairs = self.list_pairs(*offsets)

        def item(role: str) -> Tensor:
            parts = [item_rows[f"{role}_{column}"].values() for column in self.item_columns]
            return torch.cat(parts, dim=-1)

        candidates, behaviors = item("candidate"), item("behavior")
        if self.side is not None:
            of_ids = [item_rows[column].values() for column in self.behavior_columns]
            behaviors = self.side(behaviors, of_ids, batch.behavior_dense)
        candidates_mm = mm_rows["candidate_mm"].values().float() if mm_rows is not None else None
        behaviors_mm = mm_rows["behavior_mm"].values() if mm_rows is not None else None
        context = self._context(batch, pairs)
        interests = self.ciubm(candidates, behaviors, pairs, candidates_mm, behaviors_mm, context)

        features = [pooled.values().index_select(0, pairs.candidate_request), candidates]
        features += [item_rows[column].values() for column in self.candidate_columns]
        if batch.request_dense is not None:
            features.append(batch.request_dense.index_select(0, pairs.candidate_request))
        if batch.candidate_dense is not None:
            features.append(batch.candidate_dense)
        if self.dot_product_features:
            # agreement of each interest with the target, as product-based CTR towers feed it
            id_product = self.id_product(interests.id) if interests.id is not None else None
            for interest in (id_product, interests.fusion):
                if interest is not None:
                    features.append((interest * candidates).sum(-1, keepdim=True))
            if interests.content is not None and candidates_mm is not None:
                target = F.normalize(candidates_mm, dim=-1)
                features.append((interests.content * target).sum(-1, keepdim=True))
        if interests.content is not None:
            interests = replace(interests, content=self.content_projection(interests.content))
        features += [interests.concatenate(), pairs.history_lengths().to(candidates.dtype).log1p()[:, None]]
        given = torch.cat(features, dim=-1)
        conversion = self.second_tower(given) if self.second_tower is not None else None
        return Prediction(self.tower(given), interests.auxiliary, conversion)

    def _context(self, batch: RequestBatch, pairs: RequestPairs) -> BehaviorContext:
        """What the batch knows of behaviors besides ids; what it does not know is None."""
        recency = None
        if self.recency == "order":
            recency = pairs.order
        elif batch.request_ts is not None and batch.behavior_ts is not None:
            recency = (batch.request_ts[pairs.behavior_request] - batch.behavior_ts) / MICROSECONDS
        categories = {}
        if "category" in self.item_columns:
            categories = {
                f"{role}_categories": batch.sparse[f"{role}_category"].values()
                for role in ("candidate", "behavior")
            }
        return BehaviorContext(recency=recency, **categories)
