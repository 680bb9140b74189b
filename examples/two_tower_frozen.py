"""`two_tower.py` whose item tower also sees a frozen table: the difference between the files is all it takes.

Run: python -m torch.distributed.run --nproc_per_node 2 examples/two_tower_frozen.py <table>
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mlp import MLP
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec import embeddings as frozen

ITEMS, USERS, DIM, REQUESTS = 1000, 500, 16, 64
TABLE = frozen.open_table(sys.argv[1])
INDEX = frozen.ItemIndex.of(TABLE)


class TwoTower(nn.Module):
    """Scores every item of a batch for every user of it; the item that was clicked is on the diagonal."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name="user", num_embeddings=USERS, embedding_dim=DIM, feature_names=["user"]),
            EmbeddingBagConfig(name="item", num_embeddings=ITEMS, embedding_dim=DIM, feature_names=["item"]),
        ]
        self.ids = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        apply_optimizer_in_backward(RowWiseAdagrad, self.ids.parameters(), {"lr": 0.05})
        self.mm = frozen.FrozenEmbeddingBagCollection([frozen.frozen_bag_config(TABLE, ["item_mm"])])
        self.user_tower = MLP(DIM, [32, 16])
        self.item_tower = MLP(DIM + TABLE.manifest.dim, [32, 16])

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """Return the loss over the items of the batch, and what the pipeline gives back of it."""
        found = self.ids(features).to_dict()
        users = self.user_tower(found["user"])
        content = self.mm(features).values()
        items = self.item_tower(torch.cat([found["item"], content], dim=1))
        logits = users @ items.T
        loss = -logits.log_softmax(1).diagonal().mean()
        return loss, loss.detach()


def make_batch(seed: int) -> KeyedJaggedTensor:
    """Random clicks: a user and an item each."""
    torch.manual_seed(seed)
    users, items = torch.randint(USERS, (REQUESTS,)), torch.randint(ITEMS, (REQUESTS,))
    features = {"user": users, "item": items, "item_mm": INDEX.rows(items)}
    values = torch.cat(list(features.values()))
    return KeyedJaggedTensor(list(features), values, lengths=torch.ones_like(values))


def main() -> None:
    """Shard the model, train it in TorchRec's pipeline, print the last loss."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    sharders = [EmbeddingBagCollectionSharder(), *frozen.frozen_sharders()]
    model = TwoTower()
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology=topology).collective_plan(model, sharders, dist.group.WORLD)
    model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    frozen.load_table(model, TABLE)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "tower" in n])
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    batches = (make_batch(seed=100 * step + dist.get_rank()) for step in range(10))
    for _ in range(10):
        loss = pipeline.progress(batches)
    print(f"rank {dist.get_rank()}: loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
