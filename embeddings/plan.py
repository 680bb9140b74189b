"""``mim plan``: where tables would go on a cluster, by TorchRec's planner, without a GPU and without a table.

The frozen table and the trainable ones of a model are planned together; what is printed is bytes of rows and
of the optimizer's state on each rank, by kind of memory. A frozen table is priced without a backward pass,
and with all its copies. Tables that fit nowhere are an error with a way out.

Not here: what batches and activations take, beyond the share of HBM that is kept free for them.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, cast

import torch
import tyro
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mim_torchrec.domains import Count, Domain, Fraction, Positive, Weight, check_domains
from mim_torchrec.embeddings.sharded.frozen import DATA_TYPES, FrozenEmbeddingCollection
from mim_torchrec.embeddings.sharded.placement import Copy
from mim_torchrec.embeddings.sharded.pricing import FrozenEnumerator
from mim_torchrec.embeddings.sharded.sharded import CACHE_LOAD_FACTOR
from mim_torchrec.embeddings.sharded.sharder import (
    KERNELS,
    FrozenEmbeddingCollectionSharder,
    frozen_constraint,
)
from mim_torchrec.embeddings.table.quantize import row_bytes
from mim_torchrec.errors import OptionError
from mim_torchrec.program import run

GIB = 2**30
FROZEN = "frozen"


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Say where a frozen table and trainable tables go on a cluster, without a GPU."""

    rows: Count
    """Rows of the frozen table, with its spare rows."""
    dim: Count = 128
    """Length of its vectors."""
    dtype: Literal["float32", "float16", "bfloat16", "int8", "int4"] = "float16"
    """How its vectors are stored."""
    trainable: tuple[str, ...] = ()
    """Trainable float32 tables with row-wise Adagrad, each ROWSxDIM, such as 100000000x64."""
    world_size: Count = 8
    """GPUs."""
    local_world_size: Count = 8
    """GPUs of one machine; they share its host memory."""
    hbm_gb: Positive = 80.0
    """Memory of a GPU, in GiB."""
    ddr_gb: Weight = 1024.0
    """Host memory of a machine, in GiB."""
    reserve: Fraction = 0.15
    """Share of all memory that is kept free for batches, activations and the dense part."""
    memory: Literal["any", "device", "uvm", "uvm_caching"] = "any"
    """Kind of memory of the frozen table; any lets the planner choose."""
    copy: Copy = "world"
    """One copy of the frozen table in the world, one a node (rows stay within nodes), or one a rank."""
    load_factor: Annotated[float, Domain(above=0, most=1)] = CACHE_LOAD_FACTOR
    """Rows of the cache in HBM per row, for uvm_caching."""
    json: bool = False
    """Print the plan as JSON."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one table goes: its kind of memory, and bytes of rows and of optimizer state on each rank.

    ``bytes`` and ``optimizer_bytes`` are those of all ``copies``.
    """

    table: str
    sharding: str
    copies: int
    kernel: str
    bytes: int
    hbm: tuple[int, ...]
    ddr: tuple[int, ...]
    optimizer_bytes: int


def simulate(config: PlanConfig) -> list[Placement]:
    """Plan the tables of a config.

    Returns:
        One placement a table, the frozen one first; ``hbm`` and ``ddr`` are (world_size,) bytes.

    Raises:
        OptionError: a size is impossible, or the tables do not fit.
    """
    shapes = {f"trainable_{k}": _shape(text) for k, text in enumerate(config.trainable)}
    check_domains(config)
    if config.world_size > config.local_world_size and config.world_size % config.local_world_size:
        raise OptionError(f"{config.world_size} GPUs do not make machines of {config.local_world_size}")
    model, constraints = nn.Module(), {}
    model.frozen = FrozenEmbeddingCollection([
        EmbeddingConfig(name=FROZEN, num_embeddings=config.rows, embedding_dim=config.dim,
                        feature_names=[FROZEN], data_type=DATA_TYPES[config.dtype])
    ])  # fmt: skip
    for name, (rows, dim) in shapes.items():
        table = EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name])
        collection = EmbeddingCollection(tables=[table], device=torch.device("meta"))
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.01})
        setattr(model, name, collection)
    constraints[FROZEN] = _constraint(config)
    local = min(config.local_world_size, config.world_size)
    topology = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=config.world_size,
            local_world_size=local,
            hbm_cap_bytes=int(config.hbm_gb * GIB),
            ddr_cap_bytes=int(config.ddr_gb * GIB / local),
        ),
        kernel_config=KernelConfig(compute_device="cuda"),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        enumerator=FrozenEnumerator(topology, constraints=constraints),
        storage_reservation=FixedPercentageStorageReservation(percentage=config.reserve),
    )
    try:
        plan = planner.plan(model, [EmbeddingCollectionSharder(), FrozenEmbeddingCollectionSharder()])
    except PlannerError as error:
        copies = _copies(config)
        need = copies * config.rows * row_bytes(config.dtype, config.dim) / GIB
        fewer = ", --copy world" if copies > 1 else ""
        raise OptionError(
            f"the tables do not fit: the frozen one alone has {need:,.0f} GiB, for {config.world_size} x "
            f"{config.hbm_gb:g} GiB of HBM; take more GPUs, a smaller --dtype{fewer}, or --memory uvm "
            f"({error})"
        ) from None
    return _placements(plan, config, shapes)


def _constraint(config: PlanConfig) -> ParameterConstraints:
    if config.copy == "rank" and config.memory not in ("any", "device"):
        raise OptionError(f"--copy rank is in HBM, not in --memory {config.memory}")
    if config.memory == "any" and config.copy != "rank":
        kernels = [kernel.value for kernel in KERNELS.values()]
        return replace(frozen_constraint(copy=config.copy), compute_kernels=kernels)
    cached = config.load_factor if config.memory == "uvm_caching" else None
    return frozen_constraint("device" if config.memory == "any" else config.memory, cached, config.copy)


def _copies(config: PlanConfig) -> int:
    nodes = -(-config.world_size // config.local_world_size)
    return {"world": 1, "node": nodes, "rank": config.world_size}[config.copy]


def _placements(
    plan: ShardingPlan, config: PlanConfig, shapes: dict[str, tuple[int, int]]
) -> list[Placement]:
    found = []
    for module in [FROZEN, *shapes]:
        (name, how), = cast(EmbeddingModuleShardingPlan, plan.plan[module]).items()  # fmt: skip
        copies = 1
        if name == FROZEN:
            width, state, copies = row_bytes(config.dtype, config.dim), 0, _copies(config)
            rows = _rows_of_copies(config)
        else:
            width, state = 4 * shapes[name][1], 4
            rows = _rows_of_ranks(how, config.world_size)
        kernel = how.compute_kernel
        on_device = kernel in (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value)
        cached = kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value
        factor = how.cache_params.load_factor if cached and how.cache_params else None
        share = 1.0 if on_device else (factor or config.load_factor) if cached else 0.0
        found.append(
            Placement(
                table=name,
                sharding=how.sharding_type,
                copies=copies,
                kernel=kernel,
                bytes=sum(rows) * width,
                hbm=tuple(int(share * own * width) + (own * state if on_device else 0) for own in rows),
                ddr=tuple(0 if on_device else own * (width + state) for own in rows),
                optimizer_bytes=sum(rows) * state,
            )
        )
    return found


def _rows_of_copies(config: PlanConfig) -> list[int]:
    """Rows of the frozen table on each rank."""
    ranks = config.world_size // _copies(config)
    sizes, _ = calculate_shard_sizes_and_offsets(
        torch.empty(config.rows, config.dim, device="meta"), ranks, ranks, ShardingType.ROW_WISE.value
    )
    return [rows for rows, _ in sizes] * _copies(config)


def _rows_of_ranks(how: ParameterSharding, world_size: int) -> list[int]:
    """Rows of a table on each rank; a shard of some columns counts as that share of its rows."""
    shards = cast(EnumerableShardingSpec, how.sharding_spec).shards
    width = max(shard.shard_offsets[1] + shard.shard_sizes[1] for shard in shards)
    rows = [0.0] * world_size
    for shard in shards:
        assert shard.placement is not None and (rank := shard.placement.rank()) is not None
        rows[rank] += shard.shard_sizes[0] * shard.shard_sizes[1] / width
    return [round(own) for own in rows]


def _shape(text: str) -> tuple[int, int]:
    rows, _, dim = text.partition("x")
    if not (rows.isdigit() and dim.isdigit() and int(rows) and int(dim)):
        raise OptionError(f"--trainable {text!r} is not ROWSxDIM, such as 100000000x64")
    return int(rows), int(dim)


def render(placements: Sequence[Placement], config: PlanConfig) -> str:
    """A plan as text: a line a table, and the fullest rank."""
    lines = [
        f"{'table':<14}{'sharding':<14}{'copies':>7} {'memory':<20}{'GiB':>9}{'HBM a rank':>13}"
        f"{'host a rank':>13}{'optimizer':>11}"
    ]
    for p in placements:
        figures = p.bytes / GIB, max(p.hbm) / GIB, max(p.ddr) / GIB, p.optimizer_bytes / GIB
        lines.append(
            f"{p.table:<14}{p.sharding:<14}{p.copies:>7} {p.kernel:<20}{figures[0]:>9,.1f}"
            f"{figures[1]:>13,.1f}{figures[2]:>13,.1f}{figures[3]:>11,.1f}"
        )
    hbm = max(sum(own) for own in zip(*(p.hbm for p in placements), strict=True)) / GIB
    ddr = max(sum(own) for own in zip(*(p.ddr for p in placements), strict=True)) / GIB
    host = config.ddr_gb / min(config.local_world_size, config.world_size)
    lines.append(
        f"fullest of {config.world_size} ranks: {hbm:,.1f} of {config.hbm_gb:g} GiB of HBM, {ddr:,.1f} of "
        f"{host:,.1f} GiB of host memory"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``mim plan``."""
    config = tyro.cli(PlanConfig, args=argv, prog="mim plan", config=(tyro.conf.FlagConversionOff,))
    placements = simulate(config)
    if config.json:
        print(json.dumps([dataclasses.asdict(placement) for placement in placements]))
    else:
        print(render(placements, config))


if __name__ == "__main__":
    run(main)
