"""`dlrm.py` with a frozen table of item vectors: the difference between the two files is all that it takes.

Run: python -m torch.distributed.run --nproc_per_node 2 examples/dlrm_frozen.py <table>
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec import embeddings as frozen

ITEMS, USERS, DIM, REQUESTS = 1000, 500, 16, 64
TABLE = frozen.open_table(sys.argv[1])
INDEX = frozen.ItemIndex.of(TABLE)


def make_batch(seed: int) -> Batch:
    """Random requests: a user, an item and the items clicked before."""
    torch.manual_seed(seed)
    dense = torch.randn(REQUESTS, 4)
    clicked = torch.randint(0, 6, (REQUESTS,))
    lengths = torch.cat([torch.ones(2 * REQUESTS, dtype=torch.int64), clicked])
    users = torch.randint(USERS, (REQUESTS,))
    items = torch.randint(ITEMS, (REQUESTS + int(clicked.sum()),))
    labels = (torch.rand(REQUESTS) < 0.3).float()
    keys, values = ["user", "item", "clicked", "item_mm"], [users, items, INDEX.rows(items[:REQUESTS])]
    lengths = torch.cat([lengths, lengths[:REQUESTS]])
    return Batch(dense, KeyedJaggedTensor(keys, torch.cat(values), lengths=lengths), labels)


def embeddings() -> nn.Module:
    """The embedding tables of the model."""
    tables = [
        EmbeddingBagConfig(name="user", num_embeddings=USERS, embedding_dim=DIM, feature_names=["user"]),
        EmbeddingBagConfig(
            name="item", num_embeddings=ITEMS, embedding_dim=DIM, feature_names=["item", "clicked"]
        ),
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.05})
    mm = frozen.FrozenEmbeddingBagCollection([frozen.frozen_bag_config(TABLE, ["item_mm"])])
    return frozen.JoinedEmbeddingBags(collection, mm)


def main() -> None:
    """Shard the model, train it in the pipeline of DLRM's own program, print the last loss."""
    dist.init_process_group("gloo")
    sharders = [EmbeddingBagCollectionSharder(), *frozen.frozen_sharders()]
    model = DLRMTrain(DLRM(embeddings(), 4, [32, DIM], [32, 1], dense_device=torch.device("cpu")))
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology=topology).collective_plan(model, sharders, dist.group.WORLD)
    model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    frozen.load_table(model, TABLE)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = CombinedOptimizer(
        [model.fused_optimizer, KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adam(parameters))]
    )
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"), execute_all_batches=True)
    batches = (make_batch(seed=100 * step + dist.get_rank()) for step in range(10))
    while True:
        try:
            loss, _, _ = pipeline.progress(batches)
        except StopIteration:
            break
    print(f"rank {dist.get_rank()}: loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
