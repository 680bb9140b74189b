"""torchrec's DLRM trained on random clicks: what `dlrm_frozen.py` starts from.

Run: python -m torch.distributed.run --nproc_per_node 2 examples/dlrm.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

ITEMS, USERS, DIM, REQUESTS = 1000, 500, 16, 64


class Batch:
    """Random requests: a user, an item and the items clicked before."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.dense_features = torch.randn(REQUESTS, 4)
        clicked = torch.randint(0, 6, (REQUESTS,))
        lengths = torch.cat([torch.ones(2 * REQUESTS, dtype=torch.int64), clicked])
        users = torch.randint(USERS, (REQUESTS,))
        items = torch.randint(ITEMS, (REQUESTS + int(clicked.sum()),))
        self.sparse_features = KeyedJaggedTensor(
            ["user", "item", "clicked"], torch.cat([users, items]), lengths=lengths
        )
        self.labels = (torch.rand(REQUESTS) < 0.3).float()


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
    return collection


def main() -> None:
    """Shard the model, train it for some steps, print the loss."""
    dist.init_process_group("gloo")
    sharders = [EmbeddingBagCollectionSharder()]
    model = DLRMTrain(DLRM(embeddings(), 4, [32, DIM], [32, 1], dense_device=torch.device("cpu")))
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology=topology).collective_plan(model, sharders, dist.group.WORLD)
    model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "embedding_bags" not in n])
    for step in range(10):
        loss, _ = model(Batch(seed=100 * step + dist.get_rank()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {dist.get_rank()}: loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
