"""Frozen collections beside TorchRec's trainable ones, and in the models and pipelines of TorchRec."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.benchmarks.parity import torchrec_parity
from mim_torchrec.benchmarks.parity.comparison import Verdict, compare
from mim_torchrec.benchmarks.parity.configurations import draw
from mim_torchrec.benchmarks.parity.differences import DIFFERS, EQUAL
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingBagCollection, FrozenEmbeddingCollection
from mim_torchrec.embeddings.sharded.load import find_frozen
from mim_torchrec.embeddings.sharded.sharder import frozen_sharders
from tests.ranks import run_ranks

CONFIGURATIONS = 500
ROWS, DIM = 6, 4


@pytest.mark.slow
def test_random_configurations_give_or_refuse_what_torchrec_does():
    verdicts = [
        verdict
        for world_size in (2, 1)
        for found in run_ranks(compare, world_size, range(CONFIGURATIONS))
        for verdict in found
    ]
    report = torchrec_parity.report_of(verdicts)
    wrong = {verdict.seed: verdict.detail for verdict in verdicts if verdict.kind == DIFFERS}
    assert not wrong
    assert report["configurations"] == CONFIGURATIONS
    assert report["equal"] > 0.6 * CONFIGURATIONS and report["refused_by_both"] > 0
    assert report["ways"]["sharded on 2"] > 0.4 * CONFIGURATIONS  # each on both ranks


def _compare_a_broken_lookup(seeds: range) -> list[Verdict]:
    forward = FrozenEmbeddingBagCollection.forward

    def broken(self, features):
        found = forward(self, features)
        found.values()[-1:] += 0.01
        return found

    FrozenEmbeddingBagCollection.forward = broken  # type: ignore[method-assign]
    return compare(seeds)


def test_a_lookup_that_gives_something_else_is_found():
    seeds = [seed for seed in range(60) if not draw(seed).fault and draw(seed).ranks == 1][:12]
    assert len({draw(seed).pooled for seed in seeds}) == 2
    [verdicts] = run_ranks(_compare_a_broken_lookup, 1, seeds)
    for verdict in verdicts:
        broken = draw(verdict.seed).pooled and verdict.way == "unsharded"
        assert verdict.kind == DIFFERS if broken else verdict.kind != DIFFERS


def test_the_program_names_the_seeds_that_differ_and_fails(tmp_path, monkeypatch, caplog):
    verdicts = [
        Verdict(seed=seed, way="unsharded", kind=kind, detail="values", theirs="")
        for seed, kind in ((7, EQUAL), (8, DIFFERS))
    ]
    monkeypatch.setattr(torchrec_parity, "compare_on_ranks", lambda seeds: verdicts)
    with pytest.raises(SystemExit) as ended:
        torchrec_parity.main(["--out", str(tmp_path), "--configurations", "2"])
    assert ended.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    counts = {name: report[name] for name in ("configurations", "equal", "refused_by_both", "differs")}
    assert counts == {"configurations": 2, "equal": 1, "refused_by_both": 0, "differs": 1}
    assert report["seeds_that_differ"] == [8] and "seed 8" in caplog.text


def vectors() -> torch.Tensor:
    return torch.arange(ROWS * DIM).view(ROWS, DIM).float()


def shard(model: nn.Module) -> DistributedModelParallel:
    world_size = dist.get_world_size()
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=world_size, compute_device="cpu"))
    plan = planner.collective_plan(model, frozen_sharders(), dist.group.WORLD)
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=plan, sharders=frozen_sharders()
    )
    table = find_frozen(sharded, "mm")[1]
    own = vectors()[table.first_row : table.first_row + table.store.num_rows]
    table.store.write(torch.arange(len(own)), own)
    return sharded


class Processed(nn.Module):
    """A history that is weighted by trained weights of positions."""

    def __init__(self) -> None:
        super().__init__()
        config = EmbeddingBagConfig(
            name="mm", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["history"]
        )
        processors = {"history": PositionWeightedModule(max_feature_length=3)}
        collection = FrozenEmbeddingBagCollection([config], is_weighted=True)
        self.bags = FeatureProcessedEmbeddingBagCollection(collection, processors)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.bags(features)["history"]


def _weights_of_positions_get_the_mean_gradient_of_all_ranks() -> None:
    model = shard(Processed())
    of_ranks = [torch.tensor([1, 2, 5]) - rank for rank in range(dist.get_world_size())]
    rows = of_ranks[dist.get_rank()]
    found = model(KeyedJaggedTensor(["history"], rows, lengths=torch.tensor([1, 2])))
    assert torch.equal(found, torch.stack([vectors()[rows[0]], vectors()[rows[1]] + vectors()[rows[2]]]))
    found.sum().backward()
    by_position = [
        [vectors()[rows[:2]].sum(), vectors()[rows[2]].sum(), torch.tensor(0.0)] for rows in of_ranks
    ]
    expected = torch.tensor(by_position).mean(0)  # over ranks, as of any dense parameter
    [gradient] = [parameter.grad for parameter in model.parameters()]
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_feature_processor_around_a_frozen_collection_is_trained(world_size):
    run_ranks(_weights_of_positions_get_the_mean_gradient_of_all_ranks, world_size)


class History(nn.Module):
    """A history is looked up once for all candidates of a request."""

    def __init__(self) -> None:
        super().__init__()
        config = EmbeddingConfig(
            name="mm", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["item", "history"]
        )
        self.mm = FrozenEmbeddingCollection([config])
        self.dense = nn.Linear(DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        found = self.mm(features)
        history = found["history"]
        loss = self.dense(found["item"].values()).sum()
        return loss, (history.values(), history.lengths())


def _a_pipeline_expands_histories() -> None:
    rank = dist.get_rank()
    batches = []
    for step in range(3):
        # two requests with 2 and 1 + rank candidates
        requests = torch.tensor([0, 0] + [1] * (1 + rank))
        candidates = len(requests)
        values = torch.cat([requests + 1, torch.tensor([3, 4, 5 - step])])
        batches.append(KeyedJaggedTensor(
            ["item", "history"], values, lengths=torch.cat([torch.ones_like(requests), torch.tensor([2, 1])]),
            stride_per_key_per_rank=[[candidates], [2]],
            inverse_indices=(["item", "history"], torch.stack([torch.arange(candidates), requests])),
        ))  # fmt: skip
    model = shard(History())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    steps = iter(batches)
    for step in range(3):
        found, lengths = pipeline.progress(steps)
        rows = [3, 4] * 2 + [5 - step] * (1 + rank)
        assert torch.equal(found, vectors()[rows]) and lengths.tolist() == [2, 2] + [1] * (1 + rank)
    assert len(pipeline._pipelined_modules) == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pipeline_looks_a_history_up_once_for_all_candidates(world_size):
    run_ranks(_a_pipeline_expands_histories, world_size)
