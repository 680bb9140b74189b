"""From a CTR model to its sharded, trainable form: tables, plan, optimizers, initial values.

Items and categories are one unpooled collection, so that candidates and behaviors share one exchange; users
and queries are pooled; the planner divides both over the ranks. Multi-modal vectors are frozen and divided by
rows. Initial values depend on the seed alone, not on the number of ranks.
"""

import logging
import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.model_parallel import DataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import (
    CacheParams,
    CommOp,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.model import CTRModel
from mim_torchrec.ctr.parameters import id_tables, trainable_state
from mim_torchrec.ctr.tables import id_tables_of
from mim_torchrec.data.features import ROLES
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection
from mim_torchrec.embeddings.sharded.sharder import KERNELS, FrozenEmbeddingCollectionSharder, Memory
from mim_torchrec.embeddings.sharded.trained import fused_kernels
from mim_torchrec.errors import OptionError
from mim_torchrec.extras import needs
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.precision import linear_layers_in_bfloat16

with needs("train"):
    import psutil

log = logging.getLogger(__name__)

_SPARSE_OPTIMIZERS = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
# the model makes floats of vectors where it computes with them, and holds the shorter form until then
_LEFT_AS_STORED = {DataType.FP16: torch.float16, DataType.BF16: torch.bfloat16}
_EXCHANGED = (
    CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL,
    CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
    CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL,
)
_INIT_CHUNK = 65536
WARMUP = "__warmup"


def build_model(
    config: CTRConfig,
    num_embeddings: dict[str, int],
    mm_config: EmbeddingConfig | None,
    device: torch.device,
) -> CTRModel:
    """The model with its embedding collections, not sharded yet.

    Args:
        config: the stage's configuration.
        num_embeddings: rows of the tables `user_id` and `item_id`, where the data has them of `query_id`
            and `category`, and of the sparse features.
        mm_config: table of the frozen multi-modal vectors; None for Base.
        device: where the embeddings live: `meta` before sharding.
    """
    dim = config.embedding_dim
    tables = id_tables_of(config, num_embeddings)
    lists = [feature.name for feature in config.features().ids("request")]
    is_weighted = config.shrinks_ids and bool(lists)  # the weights of bags hold their lengths
    request = [
        EmbeddingBagConfig(
            name=name,
            embedding_dim=dim,
            num_embeddings=num_embeddings[name],
            feature_names=feature_names,
            pooling=PoolingType.MEAN if name in lists and not is_weighted else PoolingType.SUM,
        )
        for name, feature_names in tables.requests.items()
    ]
    items = [
        EmbeddingConfig(
            name=name,
            embedding_dim=dim,
            num_embeddings=num_embeddings[name],
            feature_names=feature_names,
        )
        for name, feature_names in tables.items.items()
    ]
    # the dense part must not depend on how many random numbers the tables have drawn
    request_embeddings = EmbeddingBagCollection(tables=request, device=device, is_weighted=is_weighted)
    item_embeddings = EmbeddingCollection(tables=items, device=device)
    mm_embeddings = None
    if mm_config is not None:
        mm_embeddings = FrozenEmbeddingCollection(
            [mm_config], device=device, output_dtype=_LEFT_AS_STORED.get(mm_config.data_type, torch.float32)
        )
    torch.manual_seed(config.seed)
    model = CTRModel(request_embeddings, item_embeddings, mm_embeddings, config.model())
    if config.precision == "bf16":
        linear_layers_in_bfloat16(model)
    return model


def check_model(config: CTRConfig, context: DistributedContext) -> None:
    """Build and plan the model with tiny tables, which holds options that contradict each other.

    What it finds would otherwise end a run after all data was read.

    Raises:
        OptionError: no model can be made of the configuration.
    """
    names = ["user_id", "query_id", "item_id", "category"]
    names += [feature.name for role in ROLES for feature in config.features().ids(role)]
    if unknown := sorted(config.id_shrinkage_of.keys() - names):
        there = ", ".join(names)
        raise OptionError(f"--id-shrinkage-of {', '.join(unknown)}: no table of ids; there are {there}")
    mm = None
    if config.mim == "on":
        mm = EmbeddingConfig(
            name="mm", embedding_dim=4, num_embeddings=8, feature_names=["candidate_mm", "behavior_mm"]
        )
    model = build_model(config, dict.fromkeys(names, 8), mm, torch.device("meta"))
    _constraints(model, config, context)
    _index_dedup(config, context)


def shard(
    model: CTRModel, config: CTRConfig, context: DistributedContext
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Plan and shard the model over the ranks, and make its optimizer.

    Embedding tables are updated in the backward pass by a fused optimizer, the dense part by AdamW.

    Args:
        model: from `build_model` on the meta device.
        config: the stage's configuration.
        context: the process group.

    Returns:
        The sharded model with seeded initial values, and the optimizer of everything trainable.
    """
    options: dict[str, float] = {"lr": config.sparse_lr}
    if config.sparse_optimizer == "rowwise_adagrad":
        options["eps"] = 1e-8
    if config.sparse_weight_decay:
        options["weight_decay"] = config.sparse_weight_decay
    trainable = (model.request_embeddings, model.item_embeddings)
    for collection in trainable:
        apply_optimizer_in_backward(
            _SPARSE_OPTIMIZERS[config.sparse_optimizer], collection.parameters(), options
        )

    constraints = _constraints(model, config, context)
    codecs = _codecs(config, context)
    sharders: list[Any] = [
        EmbeddingBagCollectionSharder(qcomm_codecs_registry=codecs),
        EmbeddingCollectionSharder(
            use_index_dedup=_index_dedup(config, context), qcomm_codecs_registry=codecs
        ),
        FrozenEmbeddingCollectionSharder(),
    ]
    topology = _topology(context)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
    )
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    if context.is_main:
        log.info("sharding plan:\n%s", plan)
    on_gpu = context.device.type == "cuda"
    sharded = DistributedModelParallel(
        model, device=context.device, plan=plan, sharders=sharders,
        data_parallel_wrapper=_Alone() if context.world_size == 1 else None,
    )  # fmt: skip
    initialize_tables(sharded, config.seed, config.embedding_init_std)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda params: torch.optim.AdamW(
            params, lr=config.lr, weight_decay=config.weight_decay, fused=on_gpu or None
        ),
    )
    parts = [("sparse", sharded.fused_optimizer, config.sparse_lr), ("dense", dense, config.lr)]
    return sharded, CombinedOptimizer(
        [(name, _warmed_up(optimizer, lr, config.warmup_steps)) for name, optimizer, lr in parts]
    )


class _Alone(DataParallelWrapper):
    """One rank has no gradients to average, and saves what DDP would copy for that."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        dmp._dmp_wrapped_module.to(device)


def _index_dedup(config: CTRConfig, context: DistributedContext) -> bool:
    on_gpu = context.device.type == "cuda"
    if config.index_dedup == "on" and not on_gpu:
        raise OptionError("--index-dedup on needs a GPU: fbgemm's jagged_unique_indices has no CPU kernel")
    if config.index_dedup == "auto":  # it spares an exchange between ranks, and has the host wait
        return on_gpu and context.world_size > 1
    return config.index_dedup == "on"


def _codecs(config: CTRConfig, context: DistributedContext) -> dict[str, QuantizedCommCodecs] | None:
    """How embeddings and their gradients are encoded for the exchange; None leaves them as they are.

    TorchRec's own registry takes fp16 for bf16 on a CPU, whose gloo exchanges both; gradients below 6e-8
    would be lost in it.
    """
    if config.exchange_precision == "fp32" or context.world_size == 1:  # which would round for nothing
        return None
    forward = CommType(config.exchange_precision)
    codecs = get_qcomm_codecs(QCommsConfig(forward_precision=forward, backward_precision=CommType.BF16))
    return {operation.name: codecs for operation in _EXCHANGED}


def _warmed_up(optimizer: KeyedOptimizer, lr: float, steps: int) -> KeyedOptimizer:
    if not steps:
        return optimizer
    stage = WarmupStage(WarmupPolicy.LINEAR, max_iters=steps, value=1 / (steps + 1))
    warm = WarmupOptimizer(optimizer, [stage], lr=lr, param_name=WARMUP)
    state = cast(dict[Any, Any], warm.state)
    state[warm.params[WARMUP]] = {"warmup": torch.zeros(2, dtype=torch.long)}  # for checkpoints to fill
    return warm


def _constraints(
    model: CTRModel, config: CTRConfig, context: DistributedContext
) -> dict[str, ParameterConstraints]:
    """What the planner may choose from, by table."""
    if not config.sharding:
        raise OptionError("--sharding names no way to divide a table over the ranks")
    if "column_wise" in config.sharding and config.sparse_optimizer == "rowwise_adagrad":
        raise OptionError(
            "row-wise Adagrad keeps a number for each row, which dividing columns changes: leave column_wise "
            "out of --sharding, or take --sparse-optimizer adagrad"
        )
    on_gpu = context.device.type == "cuda"
    if config.sparse_optimizer == "adam" and not on_gpu:
        raise OptionError("--sparse-optimizer adam is fused on GPUs only; on a CPU take rowwise_adagrad")
    for flag, memory in (("sparse", config.sparse_memory), ("table", config.table_memory)):
        if memory != "device" and not on_gpu:
            raise OptionError(f"--{flag}-memory {memory} needs a GPU; on a CPU all tables are in its memory")
    if not 0 < config.load_factor <= 1:
        raise OptionError(f"--load-factor is {config.load_factor}; it must be above 0 and at most 1")
    # on one rank rows would be put into buckets for nothing
    allowed: list[str] = list(config.sharding) if context.world_size > 1 else [ShardingType.TABLE_WISE.value]
    pooled = [kind for kind in allowed if on_gpu or kind != ShardingType.ROW_WISE.value]
    of_tables = {
        **{t.name: pooled or [ShardingType.TABLE_WISE.value]
           for t in model.request_embeddings.embedding_bag_configs()},
        **{t.name: allowed for t in model.item_embeddings.embedding_configs()},
    }  # fmt: skip
    memories: dict[str, Memory] = dict.fromkeys(of_tables, config.sparse_memory)
    if model.mm_embeddings is not None:
        for table in model.mm_embeddings.embedding_configs():
            of_tables[table.name] = [ShardingType.ROW_WISE.value]
            memories[table.name] = config.table_memory
    # as many parts as ranks where columns are divided; fused kernels take multiples of 4
    columns = min(4 * math.ceil(config.embedding_dim / context.world_size / 4), config.embedding_dim)
    return {
        name: ParameterConstraints(
            sharding_types=kinds,
            compute_kernels=[KERNELS[memories[name]].value],
            cache_params=CacheParams(load_factor=config.load_factor)
            if memories[name] == "uvm_caching"
            else None,
            min_partition=columns,
        )
        for name, kinds in of_tables.items()
    }


def _topology(context: DistributedContext) -> Topology:
    """The memory that each rank really has; the planner's defaults describe another machine."""
    local_ranks = get_local_size(context.world_size)
    on_gpu = context.device.type == "cuda"
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=context.world_size,
            local_world_size=local_ranks,
            ddr_cap_bytes=psutil.virtual_memory().total // local_ranks,
            hbm_cap_bytes=torch.cuda.mem_get_info(context.device)[1] if on_gpu else None,
        ),
        kernel_config=KernelConfig(compute_device=context.device.type),
    )


def sparse_iterations(model: DistributedModelParallel) -> int:
    """Lookups of the embedding tables so far, by which fused Adam corrects its averages."""
    return max((int(table.iter.item()) for table in _tables(model)), default=0)


def set_sparse_iterations(model: DistributedModelParallel, iterations: int) -> None:
    """Take what `sparse_iterations` gave; the state of the tables' optimizers does not hold it."""
    for table in _tables(model):
        table.iter.fill_(iterations)
        table.iter_cpu.fill_(iterations)  # the copy that updates read


def _tables(model: DistributedModelParallel) -> list[Any]:
    """What fbgemm makes of the trainable tables on this rank."""
    collections = (model.module.request_embeddings, model.module.item_embeddings)
    return [kernel.emb_module for one in collections for kernel in fused_kernels(one)]


@torch.no_grad()
def initialize_tables(model: nn.Module, seed: int, std: float | None) -> None:
    """Give every trainable table the values that the seed says, whichever rank holds which rows.

    Args:
        model: sharded model.
        seed: seed of the run; each table has its own stream, named by its place in sorted order.
        std: standard deviation of normal values; None is uniform within $1/\\sqrt{rows}$.
    """
    state = trainable_state(model)
    for place, name in enumerate(sorted(id_tables(state).values())):
        table = state[name]
        rows, dim = table.size()
        generator = torch.Generator().manual_seed(seed * 1000 + place)
        bound = 1 / math.sqrt(rows)
        for start in range(0, rows, _INIT_CHUNK):
            count = min(_INIT_CHUNK, rows - start)
            if std is None:
                values = torch.rand(count, dim, generator=generator) * (2 * bound) - bound
            else:
                values = torch.randn(count, dim, generator=generator) * std
            for piece in table.local_shards():
                first, columns = piece.metadata.shard_offsets[0], piece.metadata.shard_offsets[1]
                low, high = max(start, first), min(start + count, first + piece.tensor.shape[0])
                if low < high:
                    width = piece.tensor.shape[1]
                    piece.tensor[low - first : high - first].copy_(
                        values[low - start : high - start, columns : columns + width]
                    )
