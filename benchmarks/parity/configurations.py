"""Random configurations of collections and batches, each from its seed.

A configuration says which tables a collection has, how they are sharded, and what is unusual about its
batches: one fault at the most, so that a refusal has one reason. ``rows_of`` draws the rows and ``batch`` the
features of a rank; both depend on nothing but the seed.

Where a collection is sharded on two ranks, nothing is drawn that makes TorchRec fail on one of them, for the
other would wait: no table with fewer rows than ranks, no batch without examples, no negative rows, and where
batch sizes vary by feature neither two poolings nor rows outside. Nor is a mean drawn where batch sizes vary
and TorchRec divides rows over ranks: it then divides by the length of another bag, which need not exist.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.table.quantize import DTYPES, encode

FAULTS = {
    "duplicate key": 2,
    "missing feature": 2,
    "float values": 1,
    "row outside": 2,
    "negative row": 1,
    "weights missing": 2,
    "inverse indices missing": 3,
    "inverse indices of other features": 1,
    "weighted mean": 1,
    "other pooling": 1,
}
SHARDINGS = ("row_wise", "table_wise")
FORMS = ("lengths", "offsets", "tensor dict")
Stored = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TableOf:
    """One table: its rows are as long as ``dim`` and stored as ``dtype``."""

    name: str
    num_embeddings: int
    dim: int
    dtype: str
    features: tuple[str, ...]
    pooling: PoolingType


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One collection and what its batches are like.

    Args:
        seed: of the rows and the batches.
        tables: of the collection.
        pooled: an embedding bag collection.
        is_weighted: of a pooled collection.
        has_weights: whether batches have weights.
        need_indices: of an unpooled collection.
        keys: features of a batch in their order; some may be in no table.
        variable_batch: whether each feature has a batch size of its own.
        inverse_indices: whether batches say which of its rows each example has.
        ids: type of the ids.
        lengths: type of the lengths.
        form: of a batch, one of ``FORMS``.
        ranks: how many ranks it is sharded on, 1 or 2.
        same_size: whether batches of all ranks have as many examples.
        sharding: how TorchRec's collection is sharded.
        row_0_instead: whether ours, where it is sharded, looks up row 0 for rows outside, as TorchRec's does.
        fault: what is wrong with it, a key of ``FAULTS``, or "".
    """

    seed: int
    tables: tuple[TableOf, ...]
    pooled: bool
    is_weighted: bool
    has_weights: bool
    need_indices: bool
    keys: tuple[str, ...]
    variable_batch: bool
    inverse_indices: bool
    ids: torch.dtype
    lengths: torch.dtype
    form: str
    ranks: int
    same_size: bool
    sharding: str
    row_0_instead: bool
    fault: str = ""

    @property
    def features(self) -> list[str]:
        """Features of all tables, each once, in their order."""
        return list(dict.fromkeys(name for table in self.tables for name in table.features))


def draw(seed: int) -> Configuration:
    """Return the configuration of a seed."""
    rng = np.random.default_rng(seed)
    pooled = bool(rng.random() < 0.5)
    fault = str(rng.choice(list(FAULTS), p=np.array(list(FAULTS.values())) / sum(FAULTS.values())))
    fault = fault if rng.random() < 0.15 else ""
    if fault in ("weights missing", "weighted mean", "other pooling"):
        pooled = True
    is_weighted = pooled and (fault in ("weights missing", "weighted mean") or bool(rng.random() < 0.3))
    variable = "inverse" in fault or bool(rng.random() < 0.35)
    if variable and not pooled and "inverse" not in fault:
        fault = ""  # TorchRec's sharded lookup may end the process here, so it is not asked what it refuses
    alone = fault == "negative row" or (fault == "row outside" and variable)
    ranks = 1 + int(rng.random() < 0.35 and not alone)
    poolings = [PoolingType.SUM] if is_weighted else [PoolingType.SUM, PoolingType.MEAN]
    if ranks == 2 and variable:
        poolings = [poolings[int(rng.integers(len(poolings)))]]
    found = _tables(rng, pooled, poolings, fault, fewest_rows=ranks)
    keys = list(dict.fromkeys(name for table in found for name in table.features))
    if rng.random() < 0.3:
        keys += [f"other_{n}" for n in range(rng.integers(1, 3))]
    if rng.random() < 0.6:
        rng.shuffle(keys)
    if fault == "duplicate key":
        keys.insert(int(rng.integers(len(keys) + 1)), found[0].features[0])
    elif fault == "missing feature":
        keys.remove(found[-1].features[-1])
        keys = keys or ["other_0"]
    has_weights = fault != "weights missing" and (is_weighted or bool(rng.random() < 0.15))
    sharding = str(rng.choice(SHARDINGS))
    if variable and PoolingType.MEAN in [table.pooling for table in found]:
        sharding = "table_wise"
    # where TorchRec fails for another reason, nothing says which row it would look up
    fails = variable and len({table.pooling for table in found}) > 1
    may_be_0 = fault == "row outside" and sharding == "table_wise" and not fails
    forms = FORMS[:1] if variable else FORMS[:2] if has_weights or fault else FORMS
    return Configuration(
        seed=seed,
        tables=found,
        pooled=pooled,
        is_weighted=is_weighted,
        has_weights=has_weights,
        # on one rank TorchRec writes the row that it looks up instead over the ids of the batch
        need_indices=not pooled and bool(rng.random() < 0.4) and fault != "row outside",
        keys=tuple(keys),
        variable_batch=variable,
        inverse_indices=variable and fault != "inverse indices missing",
        ids=[torch.int64, torch.int32][int(rng.random() < 0.3)],
        lengths=[torch.int64, torch.int32][int(rng.random() < 0.4)],
        form=str(rng.choice(forms)),
        ranks=ranks,
        same_size=bool(rng.random() < 0.85),
        sharding=sharding,
        row_0_instead=may_be_0 and bool(rng.random() < 0.5),
        fault=fault,
    )


def rows_of(configuration: Configuration) -> Stored:
    """Return the rows of each table as they are stored: small integers where the type holds them exactly."""
    generator = torch.Generator().manual_seed(configuration.seed)
    found = {}
    for table in configuration.tables:
        rows = torch.randn(table.num_embeddings, table.dim, generator=generator)
        found[table.name] = encode((4 * rows).round() / 4, table.dtype)
    return found


def batch(configuration: Configuration, rank: int, step: int) -> KeyedJaggedTensor | TensorDict:
    """Return the features of a rank in a step; ranks and steps have batches of their own."""
    rng = np.random.default_rng((configuration.seed, rank, step))
    keys = list(configuration.keys)
    of_size = np.random.default_rng((configuration.seed, step)) if configuration.same_size else rng
    examples = int(of_size.choice([1, 2, 3, 5, 0], p=[0.2, 0.3, 0.3, 0.17, 0.03]))
    if configuration.ranks > 1 or configuration.fault:
        examples = max(examples, 1)
    strides = [examples] * len(keys)
    if configuration.variable_batch:
        strides = [int(rng.integers(min(examples, 1), examples + 1)) for _ in keys]
    longest = int(rng.choice([0, 1, 3, 6], p=[0.1, 0.2, 0.5, 0.2]))
    lengths = [rng.integers(0, longest + 1, size=stride) for stride in strides]
    if configuration.fault in ("row outside", "negative row"):
        lengths[keys.index(configuration.features[0])] += 1
    values = [_values(rng, configuration, key, int(each.sum()))
              for key, each in zip(keys, lengths, strict=True)]  # fmt: skip
    ids = torch.from_numpy(np.concatenate(values)).to(configuration.ids)
    if configuration.fault == "float values":
        ids = ids.float()
    flat = torch.from_numpy(np.concatenate(lengths)).to(configuration.lengths)
    weights = None
    if configuration.has_weights:
        weights = torch.from_numpy(rng.random(ids.numel(), dtype=np.float32))
        weights.requires_grad_(configuration.is_weighted)
    if configuration.variable_batch:
        return KeyedJaggedTensor(
            keys, ids, weights, lengths=flat, stride_per_key_per_rank=[[stride] for stride in strides],
            inverse_indices=_inverse_indices(rng, configuration, strides, examples),
        )  # fmt: skip
    if configuration.form == "lengths" or not examples:
        return KeyedJaggedTensor(keys, ids, weights, lengths=flat, stride=examples)
    if configuration.form == "offsets":
        return KeyedJaggedTensor(keys, ids, weights, offsets=_offsets(flat), stride=examples)
    parts = zip(keys, ids.split([int(each.sum()) for each in lengths]), flat.split(examples), strict=True)
    nested = {key: torch.nested.nested_tensor_from_jagged(own, _offsets(each)) for key, own, each in parts}
    return TensorDict(nested, batch_size=[examples])


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


def _inverse_indices(
    rng: np.random.Generator, configuration: Configuration, strides: list[int], examples: int
) -> tuple[list[str], Tensor] | None:
    if not configuration.inverse_indices:
        return None
    by_key = dict(zip(configuration.keys, strides, strict=True))
    names = list(by_key)
    if configuration.fault == "inverse indices of other features":
        names[names.index(configuration.features[0])] = "nobody"
    index = [rng.integers(0, by_key.get(name, 1), size=examples) for name in names]
    return names, torch.from_numpy(np.stack(index)).long()


def _tables(
    rng: np.random.Generator, pooled: bool, poolings: list[PoolingType], fault: str, fewest_rows: int
) -> tuple[TableOf, ...]:
    count = int(rng.integers(1, 4))
    parts = [[f"feature_{n}_{k}" for k in range(rng.integers(1, 3))] for n in range(count)]
    if rng.random() < 0.3:  # a table that looks up a feature of another one, too
        parts[-1].append(parts[0][0])
        parts[-1] = list(dict.fromkeys(parts[-1]))
    if fault in ("weighted mean", "other pooling"):
        poolings = [PoolingType.MEAN if fault == "weighted mean" else PoolingType.NONE]
    dim = int(rng.choice([4, 8, 16]))
    return tuple(
        TableOf(
            name=f"table_{n}",
            num_embeddings=int(rng.integers(fewest_rows, 12)),
            dim=int(rng.choice([4, 8, 12])) if pooled else dim,
            dtype=str(rng.choice(list(DTYPES), p=[0.4, 0.15, 0.15, 0.15, 0.15])),
            features=tuple(part),
            pooling=poolings[int(rng.integers(len(poolings)))],
        )
        for n, part in enumerate(parts)
    )


def _values(rng: np.random.Generator, configuration: Configuration, key: str, count: int) -> np.ndarray:
    sizes = [table.num_embeddings for table in configuration.tables if key in table.features]
    values = rng.integers(0, min(sizes, default=3), size=count)
    if key == configuration.features[0] and count:
        if configuration.fault == "row outside":
            values[-1] = max(sizes) + int(rng.integers(3))
        elif configuration.fault == "negative row":
            values[0] = -1 - int(rng.integers(3))
    return values
