"""What a collection makes of a batch, TorchRec's or ours, in a form that can be compared.

TorchRec's collections are trainable ones, with the same vectors as parameters; ours hold the rows as stored.
Both are built three ways: not sharded, sharded on one rank, and sharded on all ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import BoundsCheckMode, LazyAwaitable, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import SGD
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from mim_torchrec.benchmarks.parity.configurations import Configuration, Stored, TableOf
from mim_torchrec.embeddings.sharded.frozen import (
    DATA_TYPES,
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    FrozenModule,
)
from mim_torchrec.embeddings.sharded.sharder import (
    FrozenEmbeddingBagCollectionSharder,
    FrozenEmbeddingCollectionSharder,
)
from mim_torchrec.embeddings.table.quantize import decode

CPU = torch.device("cpu")
Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one batch: what was found, by name, or the error; and the gradient of its weights."""

    found: Found | None = None
    error: Exception | None = None
    gradient: Tensor | None = None


def torchrec_collection(
    configuration: Configuration, rows: Stored
) -> EmbeddingBagCollection | EmbeddingCollection:
    """Return TorchRec's trainable collection with the vectors of the rows as weights."""
    made: EmbeddingBagCollection | EmbeddingCollection
    if configuration.pooled:
        made = EmbeddingBagCollection(_bag_configs(configuration), configuration.is_weighted, CPU)
    else:
        made = EmbeddingCollection(_configs(configuration), CPU, configuration.need_indices)
    made.load_state_dict(weights(configuration, rows))
    return made


def frozen_collection(
    configuration: Configuration, rows: Stored
) -> FrozenEmbeddingBagCollection | FrozenEmbeddingCollection:
    """Return our frozen collection with the rows as they are stored."""
    made: FrozenEmbeddingBagCollection | FrozenEmbeddingCollection
    if configuration.pooled:
        made = FrozenEmbeddingBagCollection(
            _bag_configs(configuration, True), configuration.is_weighted, "cpu"
        )
    else:
        made = FrozenEmbeddingCollection(_configs(configuration, True), "cpu", configuration.need_indices)
    for name, table in made.frozen_tables().items():
        table.store.write(torch.arange(table.store.num_rows), rows[name])
    return made


def weights(configuration: Configuration, rows: Stored) -> dict[str, Tensor]:
    """Return the rows as float32 vectors, by the names that they have in TorchRec's state dict."""
    prefix = "embedding_bags" if configuration.pooled else "embeddings"
    return {f"{prefix}.{t.name}.weight": decode(rows[t.name], t.dtype) for t in configuration.tables}


def shard(module: nn.Module, configuration: Configuration, rows: Stored, env: ShardingEnv) -> nn.Module:
    """Return the sharded module: ours row-wise, TorchRec's as the configuration says."""
    sharder: Any
    ours = isinstance(module, FrozenModule)
    if ours:
        sharder = (FrozenEmbeddingBagCollectionSharder if configuration.pooled
                   else FrozenEmbeddingCollectionSharder)()  # fmt: skip
    else:
        apply_optimizer_in_backward(SGD, module.parameters(), {"lr": 0.0})
        sharder = EmbeddingBagCollectionSharder() if configuration.pooled else EmbeddingCollectionSharder()
    by_row = ours or configuration.sharding == "row_wise"
    how = {
        table.name: row_wise(compute_kernel="fused") if by_row
        else table_wise(rank=n % env.world_size, compute_kernel="fused")
        for n, table in enumerate(configuration.tables)
    }  # fmt: skip
    plan = construct_module_sharding_plan(
        module, how, sharder=sharder, local_size=env.world_size, world_size=env.world_size, device_type="cpu"
    )
    if ours and configuration.row_0_instead:
        for each in plan.values():
            each.bounds_check_mode = BoundsCheckMode.WARNING
    sharded = sharder.shard(module, cast(dict[str, ParameterSharding], plan), env, CPU)
    if not ours:
        sharded.load_state_dict(weights(configuration, rows), strict=False)
    return sharded


def outcome_of(make: Callable[[], nn.Module], batches: Sequence[KeyedJaggedTensor | TensorDict]) -> Outcome:
    """Build a collection and look batches up; returns what the last one gave, or the first error."""
    try:
        module = make()
        for features in batches:
            found = module(features)
            if isinstance(found, LazyAwaitable):
                found = found.wait()
        if not isinstance(found, KeyedTensor):
            return Outcome(found=_of_vectors(found))
        return Outcome(found=_of_bags(found), gradient=_gradient(found, batches[-1]))
    except Exception as error:  # whatever it is: both must raise, or neither
        return Outcome(error=error)


def _gradient(found: KeyedTensor, features: KeyedJaggedTensor | TensorDict) -> Tensor | None:
    """Return the gradient of some sum of pooled vectors in the weights, if they need one."""
    weights = features.weights_or_none() if isinstance(features, KeyedJaggedTensor) else None
    if weights is None or not weights.requires_grad or not found.values().requires_grad:
        return None
    pooled = found.to_dict()
    total = sum((pooled[key] * torch.arange(1.0, 1 + pooled[key].numel()).view_as(pooled[key])).sum()
                for key in sorted(pooled))  # fmt: skip
    return torch.autograd.grad(cast(Tensor, total), weights, allow_unused=True)[0]


def difference(expected: Found, found: Found) -> str:
    """Return where two findings differ, or ""."""
    if list(expected) != list(found):
        return f"names {list(found)}, expected {list(expected)}"
    for name, one in expected.items():
        other = found[name]
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if one != other:
                return f"{name}: {other}, expected {one}"
        elif one.dtype != other.dtype or one.shape != other.shape:
            return f"{name}: {other.dtype} {tuple(other.shape)}, expected {one.dtype} {tuple(one.shape)}"
        elif not torch.allclose(one, other, rtol=2e-5, atol=1e-6):
            return f"{name}: {other.tolist()}, expected {one.tolist()}"
    return ""


def expanded(
    configuration: Configuration, outcome: Outcome, features: KeyedJaggedTensor | TensorDict
) -> Outcome:
    """Return what an unsharded collection gave with the bags of all examples, by a loop over them.

    TorchRec's unsharded ``EmbeddingCollection`` leaves that to its sharded one.
    """
    if not isinstance(features, KeyedJaggedTensor):
        return outcome
    found, inverse = outcome.found, features.inverse_indices_or_none()
    if found is None or inverse is None or configuration.pooled or set(inverse[0]) != set(features.keys()):
        return outcome
    made = dict(found)
    for name in (key for key in found if f"{key} lengths" in found):
        which = inverse[1][inverse[0].index(name.split("@")[0])].tolist()
        lengths, offsets = found[f"{name} lengths"], found[f"{name} offsets"].tolist()
        ids = [at for bag in which for at in range(offsets[bag], offsets[bag + 1])]
        made[name] = found[name][ids]
        made[f"{name} lengths"] = lengths[which]
        made[f"{name} offsets"] = torch.cat([lengths.new_zeros(1), lengths[which].cumsum(0)]).to(
            lengths.dtype
        )
        if configuration.need_indices:
            made[f"{name} weights"] = found[f"{name} weights"][ids]
    return Outcome(found=made, gradient=outcome.gradient)


def _of_bags(found: KeyedTensor) -> Found:
    keys = sorted(found.keys())
    pooled = found.to_dict()
    named: Found = {key: pooled[key].detach() for key in keys}
    groups = [group for group in (keys[::2], keys[1::2]) if group]
    regrouped = {f"group {n}": each.detach() for n, each in enumerate(KeyedTensor.regroup([found], groups))}
    lengths = sorted(zip(found.keys(), found.length_per_key(), strict=True))
    return {"lengths": lengths, "values": tuple(found.values().shape), **named, **regrouped}


def _of_vectors(found: dict[str, JaggedTensor]) -> Found:
    named: Found = {}
    for key in sorted(found):
        each = found[key]
        named[key] = each.values().detach()
        named[f"{key} lengths"] = each.lengths()
        named[f"{key} offsets"] = each.offsets()
        named[f"{key} weights"] = each.weights_or_none()
    return named


def _configs(configuration: Configuration, stored: bool = False) -> list[EmbeddingConfig]:
    return [EmbeddingConfig(**_options(table, stored)) for table in configuration.tables]


def _bag_configs(configuration: Configuration, stored: bool = False) -> list[EmbeddingBagConfig]:
    return [EmbeddingBagConfig(**_options(t, stored), pooling=t.pooling) for t in configuration.tables]


def _options(table: TableOf, stored: bool) -> dict[str, Any]:
    return {
        "name": table.name,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.dim,
        "feature_names": list(table.features),
        "data_type": DATA_TYPES[table.dtype] if stored else DataType.FP32,
    }
