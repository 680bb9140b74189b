"""A ranking model of one's own with MIM's interests: `ciubm` between TorchRec's collections and a tower.

Nothing here needs our data format, stages or training loop: TorchRec's pipeline trains the model. A request
has several candidates and one history; users click what looks like what they clicked before.

Run: python -m torch.distributed.run --nproc_per_node 2 examples/content_interest.py <table>
"""

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mlp import MLP
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from mim_torchrec import embeddings as frozen
from mim_torchrec.ciubm import DIN, CiUBM, RequestInterests

DIM, REQUESTS, CANDIDATES = 16, 64, 5
TABLE = frozen.open_table(sys.argv[1])
INDEX = frozen.ItemIndex.of(TABLE)
ITEMS = TABLE.row_index().ids
VECTORS = TABLE.read_float(ITEMS)


@dataclass
class Batch(Pipelineable):
    """Requests, and whether each of their candidates was clicked, (sum_candidates,)."""

    features: KeyedJaggedTensor
    clicks: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(
            self.features.to(device, non_blocking), self.clicks.to(device, non_blocking=non_blocking)
        )

    def record_stream(self, stream: torch.Stream) -> None:
        self.features.record_stream(stream)
        self.clicks.record_stream(stream)


class Ranker(nn.Module):
    """The loss over the candidates of each request, and what the pipeline gives back of it."""

    def __init__(self) -> None:
        super().__init__()
        items = EmbeddingConfig(
            name="item",
            num_embeddings=INDEX.num_embeddings,
            embedding_dim=DIM,
            feature_names=["candidate", "behavior"],
        )
        self.ids = EmbeddingCollection(tables=[items], device=torch.device("meta"))
        apply_optimizer_in_backward(RowWiseAdagrad, self.ids.parameters(), {"lr": 0.05})
        config = frozen.frozen_config(TABLE, ["candidate_mm", "behavior_mm"])
        self.mm = frozen.FrozenEmbeddingCollection([config])
        self.interest = RequestInterests(CiUBM(DIN(DIM), content=True, fusion=True, pooling="mean"))
        self.tower = MLP(DIM + DIM + TABLE.manifest.dim + DIM + 1, [32, 16])
        self.logit = nn.Linear(16, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features = batch.features
        ids, mm = self.ids(features), self.mm(features)
        candidates, behaviors = ids["candidate"].values(), ids["behavior"].values()
        candidates_mm, behaviors_mm = mm["candidate_mm"].values(), mm["behavior_mm"].values()
        offsets = features["candidate"].offsets(), features["behavior"].offsets()
        interests = self.interest(*offsets, candidates, behaviors, candidates_mm, behaviors_mm)
        agreement = (interests.content * candidates_mm).sum(1, keepdim=True)
        inputs = torch.cat([candidates, interests.concatenate(), agreement], dim=1)
        logits = self.logit(self.tower(inputs)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.clicks)
        return loss, loss.detach()


def make_batch(seed: int) -> Batch:
    """Requests of users who click what is like the mean of their history, and their clicks."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (REQUESTS,), generator=random)
    behaviors = torch.randint(len(ITEMS), (int(lengths.sum()),), generator=random)
    candidates = torch.randint(len(ITEMS), (REQUESTS, CANDIDATES), generator=random)
    history = torch.segment_reduce(VECTORS[behaviors], "mean", lengths=lengths)
    clicks = (torch.einsum("rcd,rd->rc", VECTORS[candidates], history) > 0).float()
    rows = INDEX.rows(ITEMS[torch.cat([candidates.flatten(), behaviors])])
    keys = ["candidate", "behavior", "candidate_mm", "behavior_mm"]  # items have the same rows in both tables
    lengths = torch.cat([torch.full((REQUESTS,), CANDIDATES), lengths]).repeat(2)
    return Batch(KeyedJaggedTensor(keys, rows.repeat(2), lengths=lengths), clicks.flatten())


def main() -> None:
    """Shard the model, train it in TorchRec's pipeline, print the last loss."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    sharders = [EmbeddingCollectionSharder(), *frozen.frozen_sharders()]
    model = Ranker()
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology=topology).collective_plan(model, sharders, dist.group.WORLD)
    model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    frozen.load_table(model, TABLE)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "ids." not in n], lr=0.01)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    batches = (make_batch(seed=1000 * step + dist.get_rank()) for step in range(100))
    for _ in range(100):
        loss = pipeline.progress(batches)
    print(f"rank {dist.get_rank()}: loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
