"""The dense part of the CTR model: what comes after the lookups (MIM, section 3.4).

It takes rows and no ids, as plain tensors, whoever has looked them up: sharded collections in training
(`model.py`), parameter stores in a server. It needs torch alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.ciubm.ciubm import CiUBM
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.side_information import SideInformation
from mim_torchrec.ciubm.ubm.activation import PReLU
from mim_torchrec.ciubm.ubm.interface import Auxiliary, BehaviorContext
from mim_torchrec.ctr.config import ModelConfig
from mim_torchrec.ctr.parameters import FROZEN, ID_TABLES
from mim_torchrec.ctr.shrunk_rows import Factors, shrunk_items, shrunk_requests
from mim_torchrec.errors import OptionError
from mim_torchrec.training.batch_norm import GlobalBatchNorm1d, PartialBatchNorm1d, ScaledBatchNorm1d

MICROSECONDS = 1_000_000
ITEM_COLUMNS = ("item_id", "category")
ROLES = ("candidate", "behavior")
REQUEST = "request"
"""Stands for all tables of features of requests, whose names the dense part does not know."""


@dataclass(frozen=True, kw_only=True)
class LookedUp:
    """What the dense part reads of a batch of requests.

    Args:
        pairs: of candidates and behaviors.
        pooled: gives (num_requests, request_dim), the rows of features of requests, side by side. It is
            called after the interests are computed, because an exchange between ranks may bring them.
        rows: by feature (sum_candidates, dim) or (sum_behaviors, dim).
        vectors: (sum_candidates, mm_dim) and (sum_behaviors, mm_dim); None for Base.
        candidate_categories: (sum_candidates,) int64, None where there are none.
        behavior_categories: (sum_behaviors,) int64 likewise.
        request_ts: (num_requests,) int64, microseconds since 1970, None where not logged.
        behavior_ts: (sum_behaviors,) int64 likewise.
        request_dense: (num_requests, num_features) float32, None where there are none.
        candidate_dense: (sum_candidates, num_features) float32 likewise.
        behavior_dense: (sum_behaviors, num_features) float32 likewise.
        factors: by which rows of items, and those of requests, are still to be multiplied; None is by none.
    """

    pairs: RequestPairs
    pooled: Callable[[], Tensor]
    rows: Mapping[str, Tensor]
    vectors: tuple[Tensor, Tensor] | None
    candidate_categories: Tensor | None = None
    behavior_categories: Tensor | None = None
    request_ts: Tensor | None = None
    behavior_ts: Tensor | None = None
    request_dense: Tensor | None = None
    candidate_dense: Tensor | None = None
    behavior_dense: Tensor | None = None
    factors: Factors | None = None


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


class Columns(NamedTuple):
    """Neighboring columns of the tower's input.

    Attributes:
        width: how many.
        tables: on whose embeddings they depend, in equal parts; none, if on those of no ids.
        degree: in embeddings: 2 of products of two.
    """

    width: int
    tables: tuple[str, ...] = ()
    degree: int = 1


class DeepCTR(nn.Module):
    """Fully connected tower from features to a logit.

    Args:
        in_features: size of the input.
        hidden: widths of the hidden layers (the paper's towers end in 200 and 80).
        batch_norm: normalize the input and every hidden layer over the batch of all ranks.
        dropout: probability of dropping a hidden unit.
        normalized: (in_features,) bool, what of the input is normalized; None is all of it.
        scaled: multiply what the normalization of the input gives by constants (`ScaledBatchNorm1d`).
    """

    def __init__(
        self,
        in_features: int,
        hidden: tuple[int, ...],
        batch_norm: bool,
        dropout: float,
        normalized: Tensor | None = None,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if batch_norm:  # nothing to learn where a linear layer follows, see below
            if scaled:
                layers.append(ScaledBatchNorm1d(in_features))
            elif normalized is None:
                layers.append(GlobalBatchNorm1d(in_features, affine=False))
            else:
                layers.append(PartialBatchNorm1d(normalized))
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


class DenseCTR(nn.Module):
    """Click logits of candidates from the rows of a batch.

    Args:
        request_dim: width of the pooled rows of a request.
        item_dims: width of the rows of each unpooled table, in their order.
        mm_dim: width of the multi-modal vectors; None is the Base model, which knows ids only.
        config: interests, tower and their sizes.

    Raises:
        ValueError: `config.mim` and `mm_dim` do not agree.
        OptionError: behaviors have features, and no interest reads them.
    """

    def __init__(
        self, request_dim: int, item_dims: Mapping[str, int], mm_dim: int | None, config: ModelConfig
    ) -> None:
        super().__init__()
        if (mm_dim is not None) != (config.mim == "on"):
            given = "missing" if mm_dim is None else "given"
            raise ValueError(f"mim is {config.mim!r}, but multi-modal embeddings are {given}")
        for name in (*ID_TABLES, FROZEN):  # a model with tables has them ahead of its other parameters
            self.register_module(name, None)
        self.dot_product_features = config.dot_product_features
        self.recency = config.recency
        self.item_columns = [name for name in item_dims if name in ITEM_COLUMNS]
        item_dim = sum(item_dims[name] for name in self.item_columns)
        further = config.features()
        self.candidate_columns = [feature.name for feature in further.ids("candidate")]
        self.behavior_columns = [feature.name for feature in further.ids("behavior")]
        more_dim = sum(item_dims[name] for name in self.candidate_columns)
        more_dim += further.width("request", "candidate")
        content = mm_dim is not None and config.content_interest
        fusion = mm_dim is not None and config.fusion_interest
        similarity = mm_dim is not None and config.similarity_interest
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
        content_dim = vector_dim = mm_dim or 0
        self.content_projection: nn.Module = nn.Identity()
        if content and config.content_projection != "none":
            bias = not config.batch_norm  # which would cancel it at the entry of the tower
            self.content_projection = nn.LayerNorm(vector_dim, bias=bias)
            if config.content_projection == "linear":
                content_dim = config.content_dim
                linear = nn.Linear(vector_dim, content_dim, bias=bias)
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
        if config.keep_shrinkage and not config.undoes_shrinkage:
            raise OptionError(
                "--keep-shrinkage keeps what --id-shrinkage does and the batch normalization of ids undoes: "
                "it needs --id-shrinkage, and neither --batch-norm False nor --normalize-ids False"
            )
        if not (config.normalize_ids or config.batch_norm):
            raise OptionError(
                "--normalize-ids False leaves ids out of the batch normalization, and --batch-norm False "
                "leaves all of it out: leave one of the two flags out"
            )
        products = [ubm is not None, fusion, content] if self.dot_product_features else []
        of_items = [Columns(item_dims[name], (name,)) for name in self.item_columns]
        mixed = Columns(id_dim, tuple(self.item_columns))
        keeps = ubm is not None and ubm.keeps_columns and id_dim == item_dim
        self.columns = [  # in the order of `predict`
            Columns(request_dim, (REQUEST,)),
            *of_items,
            *(Columns(item_dims[name], (name,)) for name in self.candidate_columns),
            Columns(further.width("request", "candidate")),
            Columns(sum(products[:2]), tuple(self.item_columns), 2),
            Columns(sum(products[2:])),
            *(of_items if keeps else [mixed]),
            Columns(content_dim if content else 0),
            *(of_items if fusion else []),
            Columns(self.ciubm.similarity_dim + 1),
        ]
        normalized = None
        if not config.normalize_ids:
            is_number = torch.tensor([not one.tables for one in self.columns])
            normalized = is_number.repeat_interleave(torch.tensor([one.width for one in self.columns]))
        tower = partial(
            DeepCTR, width, config.tower, config.batch_norm, config.dropout, normalized, config.keep_shrinkage
        )
        self.tower = tower()
        self.side: SideInformation | None = None
        if of_behaviors:  # after all else, which so starts as it does without it
            ids_dim = sum(item_dims[name] for name in self.behavior_columns)
            self.side = SideInformation(item_dim, ids_dim, further.width("behavior"), config.batch_norm)
        self.second_tower: DeepCTR | None = None
        if config.second_label is not None:
            self.second_tower = tower()

    def predict(self, found: LookedUp) -> Prediction:
        """Score the candidates.

        Args:
            found: the rows of a batch.

        Raises:
            ValueError: the user behavior model needs times or categories that the batch does not have.
        """
        pairs, rows = found.pairs, found.rows

        candidates, behaviors = self._items(rows, found.factors)
        if self.side is not None:
            of_ids = [rows[column] for column in self.behavior_columns]
            behaviors = self.side(behaviors, of_ids, found.behavior_dense)
        candidates_mm = behaviors_mm = None
        if found.vectors is not None:
            candidates_mm, behaviors_mm = found.vectors[0].float(), found.vectors[1]
        context = self._context(found)
        interests = self.ciubm(candidates, behaviors, pairs, candidates_mm, behaviors_mm, context)

        if found.factors is None or found.factors.requests is None:
            of_requests = found.pooled().index_select(0, pairs.candidate_request)
        else:
            of_requests = shrunk_requests(found.pooled(), found.factors.requests, pairs)
        features = [of_requests, candidates]
        features += [rows[column] for column in self.candidate_columns]
        if found.request_dense is not None:
            features.append(found.request_dense.index_select(0, pairs.candidate_request))
        if found.candidate_dense is not None:
            features.append(found.candidate_dense)
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
        given, auxiliary = torch.cat(features, dim=-1), interests.auxiliary
        del features, interests  # copies of them are given to the towers
        conversion = self.second_tower(given) if self.second_tower is not None else None
        return Prediction(self.tower(given), auxiliary, conversion)

    def _items(self, rows: Mapping[str, Tensor], factors: Factors | None) -> tuple[Tensor, Tensor]:
        """ID embeddings of candidates and of behaviors, the tables of an item side by side."""
        of_roles = [[rows[f"{role}_{column}"] for column in self.item_columns] for role in ROLES]
        if factors is not None:
            return shrunk_items(of_roles[0], of_roles[1], factors.items)
        candidates, behaviors = (torch.cat(parts, dim=-1) for parts in of_roles)
        return candidates, behaviors

    def _context(self, found: LookedUp) -> BehaviorContext:
        """What the batch knows of behaviors besides ids; what it does not know is None."""
        recency = None
        if self.recency == "order":
            recency = found.pairs.order
        elif found.request_ts is not None and found.behavior_ts is not None:
            recency = (found.request_ts[found.pairs.behavior_request] - found.behavior_ts) / MICROSECONDS
        return BehaviorContext(recency, found.candidate_categories, found.behavior_categories)
