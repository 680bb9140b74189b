"""A small CTR model whose content table is frozen in four ways, and what its steps cost in time and memory.

`frozen` is ours, `trainable` is trained with row-wise Adagrad, `lr0` is the same with a learning rate of 0,
and `unsharded` is an `nn.Embedding` with `requires_grad=False` on every rank.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ModuleSharder, ModuleShardingPlan, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from mim_torchrec.benchmarks.measures.memory import peak_private_bytes, private_bytes
from mim_torchrec.benchmarks.measures.turns import seconds_by_name
from mim_torchrec.embeddings.sharded.frozen import DATA_TYPES, FrozenEmbeddingCollection
from mim_torchrec.embeddings.sharded.load import find_frozen
from mim_torchrec.embeddings.sharded.sharder import FrozenEmbeddingCollectionSharder
from mim_torchrec.embeddings.table.quantize import encode
from mim_torchrec.training.distributed import distributed

VARIANTS = ("frozen", "trainable", "lr0", "unsharded")
FEATURES = ["candidate", "behavior"]
TABLE = "content"
CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a table and of the batches that look it up."""

    rows: int
    """Rows of the content table."""
    dim: int
    """Length of a vector."""
    requests: int
    """Requests in a batch of each rank, one candidate each."""
    behaviors: int
    """Behaviors of a request, on average; from none to twice as many."""
    rounds: int
    """Turns of which the median is taken."""


class UnshardedCollection(nn.Module):
    """`nn.Embedding` on every rank, with the interface of an `EmbeddingCollection` of one table."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, dim)
        self.table.weight.requires_grad_(False)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Vectors (num_ids, dim) of each feature."""
        return {
            key: JaggedTensor(self.table(features[key].values()), lengths=features[key].lengths())
            for key in FEATURES
        }


class Scorer(nn.Module):
    """A candidate and the mean of the behaviors, their product, and a tower.

    Args:
        content: the table, an unpooled collection with the features `candidate` and `behavior`.
        dim: length of its vectors.
    """

    def __init__(self, content: nn.Module, dim: int) -> None:
        super().__init__()
        self.content = content
        self.tower = nn.Sequential(nn.Linear(3 * dim, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Logits (num_requests,)."""
        vectors = self.content(features)
        target, behaviors = vectors["candidate"].values(), vectors["behavior"]
        interest = torch.segment_reduce(
            behaviors.values(), "mean", lengths=behaviors.lengths().long(), initial=0.0
        )
        return self.tower(torch.cat([target, interest, target * interest], dim=1)).squeeze(1)


class Lookup(nn.Module):
    """Nothing but the lookup."""

    def __init__(self, content: nn.Module) -> None:
        super().__init__()
        self.content = content

    def forward(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Vectors (num_ids, dim) of each feature."""
        vectors = self.content(features)
        return [vectors[key].values() for key in FEATURES]


def make_batch(sizes: Sizes, seed: int) -> KeyedJaggedTensor:
    """Rows of a Zipf distribution of exponent 1 (the logarithm of the rank is uniform)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 2 * sizes.behaviors + 1, (sizes.requests,), generator=generator)
    uniform = torch.rand(sizes.requests + int(lengths.sum()), generator=generator, dtype=torch.float64)
    rank = (sizes.rows - 1) ** uniform
    rows = 1 + rank.long() * 1_000_003 % (sizes.rows - 1)  # popular rows are not neighbors
    ones = torch.ones(sizes.requests, dtype=torch.int64)
    return KeyedJaggedTensor(keys=FEATURES, values=rows, lengths=torch.cat([ones, lengths]))


def content_config(sizes: Sizes, dtype: str = "float32") -> EmbeddingConfig:
    """Config of the content table."""
    return EmbeddingConfig(
        name=TABLE, num_embeddings=sizes.rows, embedding_dim=sizes.dim, feature_names=FEATURES,
        data_type=DATA_TYPES[dtype],
    )  # fmt: skip


def wrap(model: nn.Module) -> DistributedModelParallel:
    """Shard the content of a model row-wise over all ranks."""
    sharders = [EmbeddingCollectionSharder(), FrozenEmbeddingCollectionSharder()]
    content = model.get_submodule("content")
    plan: dict[str, ModuleShardingPlan] = {}
    for sharder in sharders:
        if type(content) is sharder.module_type:
            plan["content"] = construct_module_sharding_plan(
                content,
                {TABLE: row_wise(compute_kernel=EmbeddingComputeKernel.FUSED.value)},
                sharder=sharder,
                local_size=dist.get_world_size(),
                device_type="cpu",
            )
    return DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=ShardingPlan(plan),
        sharders=cast(list[ModuleSharder[nn.Module]], sharders),  # list is invariant
    )


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give a frozen table random rows, this rank's own."""
    frozen = find_frozen(model, TABLE)[1]
    for start in range(0, frozen.store.num_rows, CHUNK):
        rows = torch.arange(start, min(start + CHUNK, frozen.store.num_rows))
        frozen.store.write(rows, encode(torch.randn(len(rows), frozen.store.dim), frozen.dtype))


def build(variant: str, sizes: Sizes) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """One sharded model and its optimizer."""
    torch.manual_seed(0)
    content: nn.Module
    if variant == "unsharded":
        content = UnshardedCollection(sizes.rows, sizes.dim)
    elif variant == "frozen":
        content = FrozenEmbeddingCollection([content_config(sizes)])
    else:
        content = EmbeddingCollection(tables=[content_config(sizes)], device=torch.device("meta"))
        options = {"lr": 0.0 if variant == "lr0" else 0.02}
        apply_optimizer_in_backward(RowWiseAdagrad, content.parameters(), options)
    model = wrap(Scorer(content, sizes.dim))
    if variant == "frozen":
        fill(model)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam([p for p in parameters if p.requires_grad]),
    )
    return model, CombinedOptimizer([("sparse", model.fused_optimizer), ("dense", dense)])


def train_step(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, batch: KeyedJaggedTensor, labels: Tensor
) -> None:
    """Forward, backward and step."""
    loss = F.binary_cross_entropy_with_logits(model(batch), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def take_turns(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each run; they take turns, and ranks begin together.

    Args:
        runs: by name.
        rounds: turns of each, after one that warms up.
        before: what is done before each run and not timed.
        clock: what tells the seconds.
    """

    def prepare() -> None:
        before()
        if dist.get_world_size() > 1:
            dist.barrier()

    seconds = seconds_by_name(runs, rounds, before=prepare, clock=clock)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_steps(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Seconds of a training step of each variant, and of its exchange alone; run on every rank."""
    torch.set_num_threads(1)
    with distributed(0) as ranks:
        batch, labels = make_batch(sizes, seed=ranks.rank), labels_of(sizes)
        runs: dict[str, Callable[[], Any]] = {}
        for variant in VARIANTS:
            model, optimizer = build(variant, sizes)
            runs[variant] = partial(train_step, model, optimizer, batch, labels)
        if ranks.world_size > 1:
            runs["exchange"] = bare_exchange(batch.values(), sizes, ranks.world_size)
        return {name: {"seconds": seconds} for name, seconds in take_turns(runs, sizes.rounds).items()}


def labels_of(sizes: Sizes) -> Tensor:
    """A label for each request."""
    return (torch.arange(sizes.requests) % 4 == 0).float()


def bare_exchange(rows: Tensor, sizes: Sizes, world_size: int) -> Callable[[], Any]:
    """What a frozen lookup exchanges, by plain collectives: distinct rows there, float32 vectors back."""
    block = -(-sizes.rows // world_size)
    distinct = rows.unique()
    sent = torch.bincount(distinct // block, minlength=world_size)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    back = torch.empty(int(received.sum()), sizes.dim)

    def run() -> None:
        asked = torch.empty(int(received.sum()), dtype=torch.int64)
        dist.all_to_all_single(asked, distinct, received.tolist(), sent.tolist())
        found = torch.empty(len(distinct), sizes.dim)
        dist.all_to_all_single(found, back, sent.tolist(), received.tolist())

    return run


def measure_memory(sizes: Sizes, variant: str) -> dict[str, int]:
    """Bytes that training with one variant takes on this rank at the most, and what of them is training's."""
    torch.set_num_threads(1)
    with distributed(0) as ranks:
        batch, labels = make_batch(sizes, seed=ranks.rank), labels_of(sizes)
        before = private_bytes()
        with peak_private_bytes() as peak:
            model, optimizer = build(variant, sizes)
            for _ in range(3):
                train_step(model, optimizer, batch, labels)
            grown = peak() - before
        states = optimizer.state_dict()["state"]
        of_table = [state for name, state in states.items() if TABLE in name.split(".")]
        gradients = [p.grad for name, p in model.named_parameters() if "tower" not in name]
        return {
            "bytes": grown,
            "optimizer_bytes": sum(_bytes(value) for state in of_table for value in state.values()),
            "gradient_bytes": sum(_bytes(gradient) for gradient in gradients),
        }


def _bytes(value: Any) -> int:
    if isinstance(value, ShardedTensor):
        return sum(_bytes(shard.tensor) for shard in value.local_shards())
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
