"""Frozen vectors of another dim in TorchRec's DLRM, projected after pooling; on 1 and on 2 ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingBagCollection, frozen_bag_config
from mim_torchrec.embeddings.sharded.joined import JoinedEmbeddingBags
from mim_torchrec.embeddings.sharded.load import load_table, table_digest
from mim_torchrec.embeddings.sharded.projected import ProjectedEmbeddingBags
from mim_torchrec.embeddings.sharded.sharder import frozen_sharders
from mim_torchrec.embeddings.table.format import Table, TableWriter
from tests.ranks import run_ranks

FROZEN, DIM, ROWS = 12, 8, 20
KEYS = ["user", "item", "history"]


def write_table(path: Path, dim: int = FROZEN) -> Table:
    writer = TableWriter(path, table_version="v", dim=dim, dtype="float32", encoder={})
    writer.write_shard(
        torch.arange(ROWS - 1), torch.randn(ROWS - 1, dim, generator=torch.Generator().manual_seed(3))
    )
    writer.finish()
    return Table.open(path)


class Loss(nn.Module):
    def __init__(self, table: Table) -> None:
        super().__init__()
        meta = torch.device("meta")
        torch.manual_seed(0)
        trained = EmbeddingBagCollection(
            [EmbeddingBagConfig(name="user", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["user"])],
            device=meta,
        )
        frozen = FrozenEmbeddingBagCollection([frozen_bag_config(table, ["item", "history"])])
        bags = JoinedEmbeddingBags(trained, ProjectedEmbeddingBags(frozen, DIM, device="cpu"))
        self.dlrm = DLRM(bags, 4, [16, DIM], [16, 1])

    def forward(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        loss = self.dlrm(batch.dense, batch.sparse).tanh().sum()
        return loss, loss.detach()


class Batch(Pipelineable):
    def __init__(self, dense: Tensor, sparse: KeyedJaggedTensor) -> None:
        self.dense, self.sparse = dense, sparse

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(self.dense.to(device), self.sparse.to(device))

    def record_stream(self, stream: torch.Stream) -> None:
        pass


def batch(step: int) -> Batch:
    """This rank's part of 4 requests, with bags of 1, 1 and 3 ids."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(step)
    values = [torch.randint(0, ROWS, (4 * count,), generator=generator).chunk(world_size)[rank]
              for count in (1, 1, 3)]  # fmt: skip
    requests = 4 // world_size
    lengths = torch.tensor([1, 1, 3]).repeat_interleave(requests)
    dense = torch.randn(4, 4, generator=generator).chunk(world_size)[rank]
    return Batch(dense, KeyedJaggedTensor(KEYS, torch.cat(values), lengths=lengths))


def train(path: Path, pipelined: bool) -> tuple[list[float], Tensor]:
    table = Table.open(path)
    model = Loss(table)
    joined = model.dlrm.sparse_arch.embedding_bag_collection
    assert [config.embedding_dim for config in joined.embedding_bag_configs()] == [DIM, DIM]
    _apply_optimizer_in_backward(torch.optim.SGD, joined[0].parameters(), {"lr": 0.05})
    sharders = [EmbeddingBagCollectionSharder(), *frozen_sharders()]
    prefix = "dlrm.sparse_arch.embedding_bag_collection"
    plan = {
        f"{prefix}.{name}": construct_module_sharding_plan(
            module, {table_name: how}, sharder=sharder, local_size=dist.get_world_size(), device_type="cpu"
        )
        for name, module, table_name, how, sharder in (
            ("0", joined[0], "user", table_wise(rank=0, compute_kernel="fused"), sharders[0]),
            ("1.collection", joined[1].collection, "mm", row_wise(compute_kernel="fused"), sharders[2]),
        )
    }
    model = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan(plan), sharders=sharders
    )
    rows = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(4))
    model.load_state_dict({f"{prefix}.0.embedding_bags.user.weight": rows}, strict=False)
    load_table(model, table)
    digest = table_digest(model)
    name = f"{prefix}.1.projections.mm.weight"
    before = dict(model.named_parameters())[name].detach().clone()
    dense = [each for key, each in model.named_parameters() if ".0.embedding_bags" not in key]
    optimizer = torch.optim.SGD(dense, lr=0.05)
    losses = []
    if pipelined:
        pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
        batches = iter([batch(step) for step in range(6)])
        for _ in range(6):
            losses.append(float(pipeline.progress(batches)))
        assert len(pipeline._pipelined_modules) == 2
    else:
        for step in range(6):
            optimizer.zero_grad()
            loss, _ = model(batch(step))
            (loss * dist.get_world_size() / 2).backward()
            optimizer.step()
            losses.append(float(loss))
    after = dict(model.named_parameters())[name].detach()
    assert not torch.equal(after, before) and table_digest(model) == digest
    return losses, after


def test_dlrm_learns_the_projection_and_two_ranks_equal_one(tmp_path):
    write_table(tmp_path / "t")
    ((losses, weight),) = run_ranks(train, 1, tmp_path / "t", False)
    two = run_ranks(train, 2, tmp_path / "t", False)
    both = [first + second for first, second in zip(*(each[0] for each in two), strict=True)]
    torch.testing.assert_close(torch.tensor(both), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    for _, found in two:
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-5)


def test_projected_bags_are_pipelined(tmp_path):
    write_table(tmp_path / "t")
    run_ranks(train, 2, tmp_path / "t", True)


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_projecting_a_pooled_vector_is_pooling_projected_ones(tmp_path, pooling):
    table = write_table(tmp_path / "t")
    frozen = FrozenEmbeddingBagCollection(
        [frozen_bag_config(table, ["item", "history"], pooling=pooling)], device="cpu"
    )
    load_table(frozen, table)
    module = ProjectedEmbeddingBags(frozen, DIM)
    rows, lengths = torch.tensor([1, 2, 2, 0, 19]), [2, 0, 1, 2]
    found = module(KeyedJaggedTensor(["item", "history"], rows, lengths=torch.tensor(lengths)))
    weight = module.projections["mm"].weight
    vectors = table.rows_for(0, ROWS) @ weight.T
    reduce = torch.sum if pooling is PoolingType.SUM else torch.mean
    bags = [reduce(vectors[own], 0) if own.numel() else torch.zeros(DIM) for own in rows.split(lengths)]
    torch.testing.assert_close(found["item"], torch.stack(bags[:2]))
    torch.testing.assert_close(found["history"], torch.stack(bags[2:]))
    assert found.keys() == ["item", "history"] and found.length_per_key() == [DIM, DIM]


def test_only_tables_of_another_dim_are_projected(tmp_path):
    tables = [write_table(tmp_path / "a"), write_table(tmp_path / "b", dim=DIM)]
    configs = [frozen_bag_config(table, [name], name) for table, name in zip(tables, "ab", strict=True)]
    frozen = FrozenEmbeddingBagCollection(configs, device="cpu", output_dtype=torch.bfloat16)
    for table, name in zip(tables, "ab", strict=True):
        load_table(frozen, table, name)
    module = ProjectedEmbeddingBags(frozen, DIM)
    features = KeyedJaggedTensor(["a", "b"], torch.tensor([3, 4]), lengths=torch.tensor([1, 1]))
    assert list(module.projections) == ["a"]
    assert torch.equal(module(features)["b"].bfloat16(), frozen(features)["b"])
