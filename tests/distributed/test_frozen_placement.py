"""Where frozen tables go: TorchRec's ways to shard, one exchange a collection, copies a node and a rank."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.model_parallel import DMPCollection, DistributedModelParallel
from torchrec.distributed.shard import shard, shard_modules
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    frozen_bag_config,
    frozen_config,
)
from mim_torchrec.embeddings.sharded.live import ItemIndex, update_items
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.placement import node_replicated
from mim_torchrec.embeddings.sharded.sharder import (
    FrozenEmbeddingBagCollectionSharder,
    FrozenEmbeddingCollectionSharder,
    frozen_sharders,
)
from mim_torchrec.embeddings.table.format import TableError
from tests.distributed.test_frozen_exchange import (
    FEATURES,
    IDS,
    ITEMS,
    Unpooled,
    batch,
    naive_pool,
    whole,
    write_table,
)
from tests.ranks import run_ranks
