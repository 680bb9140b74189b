"""TorchRec's pipelines give the losses of a plain loop, with every kind of frozen lookup in the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.train_pipelines import (
    EvalPipelineFusedSparseDist,
    EvalPipelineSparseDist,
    TorchCompileConfig,
    TrainPipelineFusedSparseDist,
    TrainPipelinePT2,
    TrainPipelineSemiSync,
    TrainPipelineSparseDistLite,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from mim_torchrec.ciubm import DIN, CiUBM, RequestInterests
from mim_torchrec.embeddings import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    JoinedEmbeddingBags,
    Table,
    TableWriter,
    frozen_bag_config,
    frozen_config,
    frozen_sharders,
    load_table,
    open_table,
    table_digest,
)
from tests.ranks import run_ranks

DIM, ITEMS, STEPS = 8, 23, 6
CPU = torch.device("cpu")


@dataclass
class Batch(Pipelineable):
    features: KeyedJaggedTensor
    labels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(self.features.to(device, non_blocking), self.labels.to(device))

    def record_stream(self, stream: torch.Stream) -> None:
        self.features.record_stream(stream)
        self.labels.record_stream(stream)


class Model(nn.Module):
    """The loss of logits that a subclass computes from the features."""

    frozen: list[str]
    dense: nn.Module

    def logits(self, features: KeyedJaggedTensor) -> Tensor:
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.dense(self.logits(batch.features)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, loss.detach()


class OnlyFrozen(Model):
    """Unpooled, pooled, and weighted frozen lookups, and nothing that is trained but a linear layer."""

    frozen = ["mm", "pooled", "weighted"]

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingCollection([frozen_config(table, ["candidate"])])
        self.pooled = FrozenEmbeddingBagCollection([frozen_bag_config(table, ["behavior"], "pooled")])
        config = frozen_bag_config(table, ["candidate", "behavior"], "weighted")
        self.weighted = FrozenEmbeddingBagCollection([config], is_weighted=True)
        self.dense = nn.Linear(4 * DIM, 1)

    def logits(self, features: KeyedJaggedTensor) -> Tensor:
        mm, pooled, weighted = self.mm(features), self.pooled(features), self.weighted(features)
        return torch.cat([mm["candidate"].values(), pooled.values(), weighted.values()], dim=1)


class BesideTrained(OnlyFrozen):
    """The same lookups beside a trained one, which may have a pipeline empty the batch once it is sent."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        config = EmbeddingBagConfig(
            name="t", num_embeddings=ITEMS + 4, embedding_dim=DIM, feature_names=["candidate_id"]
        )
        self.trained = EmbeddingBagCollection(tables=[config], device=torch.device("meta"))
        apply_optimizer_in_backward(torch.optim.SGD, self.trained.parameters(), {"lr": 0.5})

    def logits(self, features: KeyedJaggedTensor) -> Tensor:
        return super().logits(features) + self.trained(features).values().sum(1, keepdim=True)


class Joined(Model):
    """Trained and frozen bags in one collection, as in the example of DLRM."""

    frozen = ["mm"]

    def __init__(self, table: Table) -> None:
        super().__init__()
        config = EmbeddingBagConfig(
            name="t", num_embeddings=ITEMS + 4, embedding_dim=DIM, feature_names=["candidate_id"]
        )
        trained = EmbeddingBagCollection(tables=[config], device=torch.device("meta"))
        apply_optimizer_in_backward(torch.optim.SGD, trained.parameters(), {"lr": 0.5})
        mm = FrozenEmbeddingBagCollection([frozen_bag_config(table, ["candidate", "behavior"])])
        self.bags = JoinedEmbeddingBags(trained, mm)
        self.dense = nn.Linear(3 * DIM, 1)

    def logits(self, features: KeyedJaggedTensor) -> Tensor:
        return self.bags(features).values()


class Interested(Model):
    """CiUBM and its pairs as one leaf, between trained and frozen lookups."""

    frozen = ["mm"]

    def __init__(self, table: Table) -> None:
        super().__init__()
        config = EmbeddingConfig(
            name="t",
            num_embeddings=ITEMS + 4,
            embedding_dim=DIM,
            feature_names=["candidate_id", "behavior_id"],
        )
        self.ids = EmbeddingCollection(tables=[config], device=torch.device("meta"))
        apply_optimizer_in_backward(torch.optim.SGD, self.ids.parameters(), {"lr": 0.5})
        self.mm = FrozenEmbeddingCollection([frozen_config(table, ["candidate", "behavior"])])
        self.interests = RequestInterests(CiUBM(DIN(DIM), content=True, fusion=True, pooling="mean"))
        self.dense = nn.Linear(3 * DIM, 1)

    def logits(self, features: KeyedJaggedTensor) -> Tensor:
        ids, mm = self.ids(features), self.mm(features)
        offsets = features["candidate"].offsets(), features["behavior"].offsets()
        vectors = [found.values() for found in (ids["candidate_id"], ids["behavior_id"])]
        vectors += [found.values() for found in (mm["candidate"], mm["behavior"])]
        return self.interests(*offsets, *vectors).concatenate()


MODELS = (OnlyFrozen, Joined, Interested)


def make_batch(step: int) -> Batch:
    """One candidate and up to four behaviors a request; ranks have batches of their own."""
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    requests = 3 + dist.get_rank()
    history = torch.randint(0, 5, (requests,), generator=generator)
    lengths = torch.cat([torch.ones_like(history), history])
    rows = torch.randint(0, ITEMS + 1, (int(lengths.sum()),), generator=generator)
    keys = ["candidate", "behavior", "candidate_id", "behavior_id"]
    weights = torch.rand(2 * rows.numel(), generator=generator)
    features = KeyedJaggedTensor(keys, rows.repeat(2), weights, lengths=lengths.repeat(2))
    return Batch(features, (torch.rand(requests, generator=generator) < 0.5).float())


def shard(model: nn.Module) -> DistributedModelParallel:
    sharders = [EmbeddingCollectionSharder(), EmbeddingBagCollectionSharder(), *frozen_sharders()]
    # updated in the backward pass of the lookup, as early lookups of `TrainPipelineSemiSync` need it
    trained = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints={"t": trained})
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)


Pipeline = Callable[[nn.Module, torch.optim.Optimizer, torch.device], object]


def losses(kind: type[Model], path: Path, pipeline: Pipeline | None, train: bool = True) -> list[float]:
    """The losses of a few steps, by a pipeline or by a plain loop; the rows stay as they are."""
    torch.manual_seed(0)
    table = open_table(path)
    model = shard(kind(table))
    for name in kind.frozen:
        load_table(model, table, name)
    before = [table_digest(model, name) for name in kind.frozen]
    dense = [parameter for _, parameter in in_backward_optimizer_filter(model.named_parameters())]
    optimizer = torch.optim.SGD(dense, lr=0.5)
    model.train(train)
    batches: Iterator[Batch] = (make_batch(step) for step in range(STEPS))
    found = []
    if pipeline is not None:
        with torch.set_grad_enabled(train):
            steps = pipeline(model, optimizer, CPU)
            found = [float(steps.progress(batches)) for _ in range(STEPS)]  # type: ignore[attr-defined]
    else:
        for batch in batches:
            loss, _ = model(batch)
            if train:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            found.append(float(loss.detach()))
    assert [table_digest(model, name) for name in kind.frozen] == before
    assert len(set(found)) == STEPS
    return found


def _pipelines_give_the_losses_of_a_plain_loop(path: Path) -> None:
    for kind in MODELS:
        plain = losses(kind, path, None)
        for pipeline in (TrainPipelineBase, TrainPipelineSparseDist, TrainPipelineSparseDistLite):
            assert losses(kind, path, pipeline) == pytest.approx(plain, rel=1e-5), (kind, pipeline)
        untrained = losses(kind, path, None, train=False)
        assert losses(kind, path, EvalPipelineSparseDist, train=False) == pytest.approx(untrained, rel=1e-5)


def _frozen_lookups_read_no_batch_that_a_pipeline_has_emptied(path: Path) -> None:
    pipeline = partial(TrainPipelineSparseDist, free_features_storage_early=True)
    plain = losses(BesideTrained, path, None)
    assert losses(BesideTrained, path, pipeline) == pytest.approx(plain, rel=1e-5)


def _semi_sync(start_batch: int) -> Pipeline:
    def make(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> object:
        return TrainPipelineSemiSync(model, optimizer, device, start_batch=start_batch)

    return make


@contextmanager
def _without_streams() -> Iterator[None]:
    """On a CPU there are no streams to record and to wait for, which is all that some pipelines lack."""
    with (
        patch.object(torch.cpu, "current_stream", lambda device=None: None),
        patch.object(torch.cuda, "current_stream", lambda device=None: None),
        patch.object(torch.Tensor, "record_stream", lambda self, stream: None),
        patch.object(TrainPipelineFusedSparseDist, "wait_embedding_lookup", lambda self: None),
    ):
        yield


def _fused_pipelines_give_the_losses_of_a_plain_loop(path: Path) -> None:
    with _without_streams():
        for kind in MODELS:
            assert losses(kind, path, TrainPipelineFusedSparseDist) == pytest.approx(
                losses(kind, path, None), rel=1e-5
            ), kind
        evaluated = losses(Joined, path, EvalPipelineFusedSparseDist, train=False)
        assert evaluated == pytest.approx(losses(Joined, path, None, train=False), rel=1e-5)


def _semi_sync_gives_the_losses_of_a_plain_loop(path: Path) -> None:
    with _without_streams():
        for kind in MODELS:
            synchronous = losses(kind, path, _semi_sync(start_batch=STEPS))
            assert synchronous == pytest.approx(losses(kind, path, None), rel=1e-5), kind
            # from batch 2 on trained rows are looked up before their update; frozen ones are what they were
            early = losses(kind, path, _semi_sync(start_batch=2))
            assert early[:3] == pytest.approx(synchronous[:3], rel=1e-5), kind
            assert (early == pytest.approx(synchronous, rel=1e-5)) == (kind is OnlyFrozen), kind


def _compiled(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> object:
    """Everything but the exchanges between ranks is in graphs."""
    config = TorchCompileConfig(backend="aot_eager")
    return TrainPipelinePT2(model, optimizer, device, compile_configs=config)


def _a_compiled_pipeline_gives_the_losses_of_a_plain_loop(path: Path) -> None:
    assert losses(OnlyFrozen, path, _compiled) == pytest.approx(losses(OnlyFrozen, path, None), rel=1e-5)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "table"
    writer = TableWriter(path, table_version="v1", dim=DIM, encoder={}, spare_rows=3)
    writer.write_shard(
        torch.arange(ITEMS), torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(0))
    )
    writer.finish()
    return path


@pytest.mark.parametrize("world_size", [1, 2])
def test_pipelines_give_the_losses_of_a_plain_loop(path, world_size):
    run_ranks(_pipelines_give_the_losses_of_a_plain_loop, world_size, path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_lookups_read_no_batch_that_a_pipeline_has_emptied(path, world_size):
    run_ranks(_frozen_lookups_read_no_batch_that_a_pipeline_has_emptied, world_size, path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_fused_pipelines_give_the_losses_of_a_plain_loop(path, world_size):
    run_ranks(_fused_pipelines_give_the_losses_of_a_plain_loop, world_size, path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_semi_sync_gives_the_losses_of_a_plain_loop(path, world_size):
    run_ranks(_semi_sync_gives_the_losses_of_a_plain_loop, world_size, path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_compiled_pipeline_gives_the_losses_of_a_plain_loop(path, world_size):
    run_ranks(_a_compiled_pipeline_gives_the_losses_of_a_plain_loop, world_size, path)
