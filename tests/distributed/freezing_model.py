"""A model of pooled and unpooled tables for the tests of freezing, its batches and its training."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.sharder import frozen_sharders

DIM, ROWS, USERS = 8, 37, 13
CPU = torch.device("cpu")
KEYS = ["user", "item", "both", "seen", "place"]
KINDS = {
    "data_parallel": lambda: data_parallel(),
    "row_wise": lambda: row_wise(compute_kernel="fused"),
    "table_wise": lambda: table_wise(rank=dist.get_world_size() - 1, compute_kernel="fused"),
    "column_wise": lambda: column_wise(ranks=list(range(dist.get_world_size())), compute_kernel="fused"),
}


class Sparse(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(name="user", num_embeddings=USERS, embedding_dim=DIM,
                                   feature_names=["user", "both"]),
                EmbeddingBagConfig(name="item", num_embeddings=ROWS, embedding_dim=DIM,
                                   feature_names=["item", "both"]),
                EmbeddingBagConfig(name="place", num_embeddings=USERS, embedding_dim=2 * DIM,
                                   feature_names=["place"], pooling=PoolingType.MEAN),
            ],
            device=device,
        )  # fmt: skip
        self.ec = EmbeddingCollection(
            [
                EmbeddingConfig(name="seen", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["seen"]),
                EmbeddingConfig(
                    name="other", num_embeddings=USERS, embedding_dim=DIM, feature_names=["user"]
                ),
            ],
            device=device,
        )
        self.alone = EmbeddingCollection(
            [EmbeddingConfig(name="alone", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["seen"])],
            device=device,
        )


class Model(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.sparse = Sparse(device)
        self.dense = nn.Linear(6 * DIM, 1)
        self.each = nn.Linear(DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        pooled, ec, alone = self.sparse.ebc(features), self.sparse.ec(features), self.sparse.alone(features)
        each = [ec["seen"].values(), ec["user"].values(), alone["seen"].values()]
        loss = self.dense(pooled.values()).tanh().sum()
        for vectors in each:
            loss = loss + self.each(vectors).tanh().sum()
        return loss, loss.detach()


def batch(step: int, bag: int = 1, rank: int = 0, world_size: int = 1) -> KeyedJaggedTensor:
    """A rank's part of 8 requests, whose bags have ``bag`` ids each."""
    generator = torch.Generator().manual_seed(step)
    limits = [USERS, ROWS, USERS, ROWS, USERS]
    values = [
        torch.randint(0, limit, (8 * bag,), generator=generator).chunk(world_size)[rank] for limit in limits
    ]
    return KeyedJaggedTensor(KEYS, torch.cat(values), lengths=torch.full((8 // world_size * len(KEYS),), bag))


def weights_of_step_zero(model: nn.Module) -> None:
    """The same rows for every sharding."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, (rows, dim) in {
        "ebc.embedding_bags.user": (USERS, DIM), "ebc.embedding_bags.item": (ROWS, DIM),
        "ebc.embedding_bags.place": (USERS, 2 * DIM), "ec.embeddings.seen": (ROWS, DIM),
        "ec.embeddings.other": (USERS, DIM), "alone.embeddings.alone": (ROWS, DIM),
    }.items():  # fmt: skip
        state[f"sparse.{name}.weight"] = torch.randn(rows, dim, generator=generator)
    model.load_state_dict(state, strict=False)


def build(kinds: dict[str, str], lr: dict[str, float] | None = None) -> DistributedModelParallel:
    """The model sharded: ``kinds`` says how by table (row-wise where it does not), ``lr`` likewise (0.1).

    "place" is table-wise: where a row-wise table has a mean, TorchRec divides all sums by 1.000001.
    """
    kinds = {"place": "table_wise", **kinds}
    torch.manual_seed(0)
    model = Model(torch.device("meta"))
    for name, parameter in model.sparse.named_parameters():
        table = name.split(".")[-2]
        kwargs = {"lr": (lr or {}).get(table, 0.1)}
        _apply_optimizer_in_backward(RowWiseAdagrad, [parameter], kwargs)
    sharders = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder(), *frozen_sharders()]
    plan = {
        f"sparse.{name}": construct_module_sharding_plan(
            module,
            {config.name: KINDS[kinds.get(config.name, "row_wise")]() for config in configs},
            sharder=sharder, local_size=dist.get_world_size(), device_type="cpu",
        )
        for name, module, configs, sharder in (
            ("ebc", model.sparse.ebc, model.sparse.ebc.embedding_bag_configs(), sharders[0]),
            ("ec", model.sparse.ec, model.sparse.ec.embedding_configs(), sharders[1]),
            ("alone", model.sparse.alone, model.sparse.alone.embedding_configs(), sharders[1]),
        )
    }  # fmt: skip
    made = DistributedModelParallel(model, device=CPU, plan=ShardingPlan(plan), sharders=sharders)
    weights_of_step_zero(made)
    return made


def optimizer_of(model: DistributedModelParallel) -> CombinedOptimizer:
    dense = {name: each for name, each in model.named_parameters() if "sparse" not in name}
    wrapped = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    return CombinedOptimizer([model.fused_optimizer, wrapped])


def train(model: DistributedModelParallel, optimizer: CombinedOptimizer, steps: Sequence[int]) -> list[float]:
    """Two ranks average the gradients of their halves; one rank takes half of the gradient of both."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss, _ = model(batch(step, 1, rank, world_size))
        (loss * world_size / 2).backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def look_up(model: nn.Module, bag: int = 1) -> tuple[Tensor, list[str], list[Tensor]]:
    """Pooled vectors of a batch, their keys, and the vectors of the unpooled features."""
    sparse = model.module.sparse if isinstance(model, DistributedModelParallel) else model.sparse
    features = batch(999, bag)
    with torch.no_grad():
        pooled, ec, alone = sparse.ebc(features), sparse.ec(features), sparse.alone(features)
        each = [ec["seen"].values(), ec["user"].values(), alone["seen"].values()]
        return pooled.values(), list(pooled.keys()), each
