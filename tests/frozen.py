"""Frozen tables for tests that run on several ranks: small tables, and models that look their rows up."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.sharder import frozen_sharders
from mim_torchrec.embeddings.table.format import DTYPES, Table, TableWriter

DIM, ITEMS, FEATURES = 8, 23, ["candidate", "behavior"]
IDS = torch.arange(ITEMS) * 7 - 20


def write_table(path: Path, dtype: str = "float16", version: str = "v1", spare_rows: int = 3) -> Path:
    """Three shards of ascending ids: a rank's rows begin and end within them."""
    generator = torch.Generator().manual_seed(0)
    writer = TableWriter(path, table_version=version, dim=DIM, dtype=dtype, encoder={}, spare_rows=spare_rows)
    for part in IDS.split(9):
        writer.write_shard(part, torch.randn(part.numel(), DIM, generator=generator))
    writer.finish()
    return path


def write_tables(folder: Path) -> Path:
    """A table of every storage type, named after it, and v2 with the same vectors as another version."""
    for dtype in DTYPES:
        write_table(folder / dtype, dtype)
    write_table(folder / "v2", version="v2")
    return folder


def whole(table: Table) -> Tensor:
    """All rows as float32 vectors (1 + capacity, dim)."""
    vectors = torch.zeros(1 + table.manifest.capacity, table.manifest.dim)
    vectors[1 : 1 + table.manifest.rows] = table.read_float(table.row_index().ids)
    return vectors


def shard(model: nn.Module) -> DistributedModelParallel:
    sharders, plan = frozen_sharders(), {}
    for name, module in model.named_children():
        for sharder in sharders:
            if type(module) is sharder.module_type:
                plan[name] = construct_module_sharding_plan(
                    module, {table: row_wise(compute_kernel="fused") for table in module.frozen_tables()},
                    sharder=sharder, local_size=dist.get_world_size(), device_type="cpu",
                )  # fmt: skip
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan(plan), sharders=sharders
    )


class Unpooled(nn.Module):
    def __init__(self, table: Table, **options) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingCollection([frozen_config(table, FEATURES)], **options)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        found = self.mm(features)
        return {key: found[key].values() for key in FEATURES}


def batch(step: int, rows: int) -> KeyedJaggedTensor:
    """Ragged bags, as many as the rank says, with repeated rows; in step 2 the last rank asks for none."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(100 * step + rank)
    requests = 3 + 2 * rank
    lengths = torch.randint(0, 6, (2 * requests,), generator=generator)
    lengths[1] = 0
    if step == 2 and rank == world_size - 1:
        lengths.zero_()
    values = torch.randint(0, rows, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(FEATURES, values, lengths=lengths)
