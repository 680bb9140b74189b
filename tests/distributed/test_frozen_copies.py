"""Several copies of a frozen table: on nodes, and in the sharding groups of two-dimensional parallelism."""

import inspect
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.remote_device import _remote_device
from torchrec.distributed import model_parallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import (
    TableState,
)
from mim_torchrec.embeddings.sharded.item_index import ItemIndex
from mim_torchrec.embeddings.sharded.live import restore_index, update_items
from mim_torchrec.embeddings.sharded.load import find_frozen, load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.placement import node_replicated
from mim_torchrec.embeddings.sharded.sharder import (
    FrozenEmbeddingBagCollectionSharder,
    frozen_sharders,
)
from mim_torchrec.embeddings.table.format import Table, TableError, VersionMismatch
from tests.distributed.test_frozen_placement import (
    CPU,
    MANY,
    Counted,
    Pooled,
    _all,
    lookups_are_the_vectors,
    sharded,
)
from tests.frozen import DIM, FEATURES, IDS, ITEMS, Unpooled, batch, whole, write_table
from tests.ranks import run_ranks


def two_dimensional(model: nn.Module, frozen=None) -> DistributedModelParallel:
    """TorchRec's `DMPCollection` of 2 x 2 ranks, compiled without assertions, because it asserts a GPU.

    It also numbers the devices of trained tables, which a CPU does not have.
    """
    namespace = dict(vars(model_parallel))
    namespace["_remote_device"] = lambda place: _remote_device(place.rsplit(":", 1)[0])
    exec(compile(inspect.getsource(DMPCollection), "dmp_collection", "exec", optimize=1), namespace)
    sharders, plan = [EmbeddingCollectionSharder(), *frozen_sharders()], {}
    for name, module in model.named_children():
        sharder = next(each for each in sharders if each.module_type is type(module))
        tables = [config.name for config in module.embedding_configs()]
        how = frozen if frozen and name == "mm" else row_wise(compute_kernel="fused")
        plan[name] = construct_module_sharding_plan(
            module, dict.fromkeys(tables, how), sharder=sharder,
            device_type="cpu", local_size=2, world_size=2,
        )  # fmt: skip
    return namespace["DMPCollection"](
        model, device=CPU, plan=ShardingPlan(plan), world_size=4, sharding_group_size=2,
        global_pg=dist.group.WORLD, sharders=sharders, custom_all_reduce=SYNCHRONIZED.extend,
    )  # fmt: skip


SYNCHRONIZED: list[Tensor] = []


class Beside(Unpooled):
    """A frozen table beside a trained one."""

    def __init__(self, table: Table, **options) -> None:
        super().__init__(table, **options)
        config = EmbeddingConfig(
            name="id", num_embeddings=30, embedding_dim=4, feature_names=FEATURES, data_type=DataType.FP32
        )
        self.id = EmbeddingCollection(tables=[config], device=torch.device("meta"))
        apply_optimizer_in_backward(RowWiseAdagrad, self.id.parameters(), {"lr": 0.1})

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        trained = self.id(features)
        return {"trained": trained["behavior"].values(), **super().forward(features)}


class Trained(Beside):
    """With a loss, as pipelines want it."""

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = super().forward(features)
        return (found["trained"] * found["behavior"][:, :4]).sum(), found


def node_copies(model: nn.Module) -> DistributedModelParallel:
    """One copy on each of two nodes of two ranks."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return sharded(model, node_replicated())


def both(model: nn.Module) -> DistributedModelParallel:
    """One copy a node, in a model in two dimensions, whose sharding groups are not the nodes."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return two_dimensional(model, node_replicated())


WAYS = {"node": (node_copies, Unpooled), "2d": (two_dimensional, Beside), "both": (both, Beside)}


def _two_copies_are_right(path: Path, checkpoint: Path, way: str) -> None:
    place, build = WAYS[way]
    table = open_table(path)
    model, vectors = place(build(table, store_rows=True)), whole(table)
    group = dist.get_process_group_ranks(find_frozen(model, "mm")[0].placements["mm"].group)
    assert len(group) == 2 and (group[1] - group[0] == 1) == (way != "2d")
    load_table(model, table)
    frozen = find_frozen(model, "mm")[1]
    assert frozen.store.num_rows in (14, 13)  # of 27
    lookups_are_the_vectors(model, vectors)
    digest, index = table_digest(model), ItemIndex.of(table)
    written = update_items(model, index, IDS[:2], torch.ones(2, DIM), table_version="v1", seq=5).rows
    counts = torch.tensor([written])
    dist.all_reduce(counts)
    assert int(counts) == 4  # two rows on two copies
    vectors[1:3] = 1.0
    lookups_are_the_vectors(model, vectors)
    assert table_digest(model) != digest
    collection = find_frozen(model, "mm")[0]
    dcp.save({"mm": collection.state_dict()}, checkpoint_id=checkpoint)
    fresh = place(build(table, store_rows=True))
    collection = find_frozen(fresh, "mm")[0]
    state = {"mm": collection.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint)
    collection.load_state_dict(state["mm"])
    restore_index(fresh, ItemIndex.of(table))
    lookups_are_the_vectors(fresh, vectors)
    assert table_digest(fresh) == table_digest(model)
    if dist.get_rank() == 3:  # misses a window that the others apply
        find_frozen(model, "mm")[1].store.write(torch.tensor([0]), torch.ones(1, DIM, dtype=torch.float16))
    with pytest.raises(TableError, match="mm: its copies differ in block 1 of 2"):
        table_digest(model)


def _an_error_in_one_copy_is_raised_on_all_ranks(path: Path, way: str) -> None:
    place, build = WAYS[way]
    table = open_table(path)
    model = place(build(table))
    if dist.get_rank() == 3:
        find_frozen(model, "mm")[1].expected = TableState("v2")
    with pytest.raises(VersionMismatch, match="rank 3: .* v1, the checkpoint was trained on v2"):
        load_table(model, table)


def _rows_of_a_node_copy_do_not_leave_the_node(path: Path) -> None:
    table = open_table(path)
    near, away = {0, 1} if dist.get_rank() < 2 else {2, 3}, []
    for model in (node_copies(Unpooled(table)), sharded(Unpooled(table), row_wise())):
        load_table(model, table)
        with Counted(near) as counted:
            lookups_are_the_vectors(model, whole(table))
        assert counted.calls == 3 * 4
        away.append(counted.bytes_away)
    assert away[0] == 0 < away[1]


def _tables_of_one_collection_may_have_other_copies(path: Path) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    ways = {"first": row_wise(), "second": node_replicated(), "third": data_parallel(), "fourth": row_wise()}
    model, sharder = Pooled(list(MANY)), FrozenEmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(model.mm, ways, sharder=sharder, device_type="cpu")
    model = DistributedModelParallel(model, device=CPU, plan=ShardingPlan({"mm": plan}), sharders=[sharder])
    unsharded = Pooled(list(MANY))
    features = batch(0, 1 + ITEMS)
    with Counted() as counted:
        assert torch.equal(model(features), unsharded(features))
    assert counted.calls == 3 * 2


def _frozen_rows_are_not_synchronized(path: Path) -> None:
    table = open_table(path)
    model = two_dimensional(Beside(table))
    load_table(model, table)
    with Counted() as counted:
        model.sync()
    assert counted.calls == 0
    assert {tuple(tensor.shape) for tensor in SYNCHRONIZED} == {(15, 4), (15,)}  # weights and Adagrad's


def _a_trained_table_is_divided_by_the_world_beside_a_copy_a_node(path: Path) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    table = open_table(path)
    model, sharders = Trained(table), [EmbeddingCollectionSharder(), *frozen_sharders()]
    plan = {
        name: construct_module_sharding_plan(
            model.get_submodule(name), {table_name: how}, sharder=sharder, device_type="cpu"
        )
        for name, table_name, how, sharder in (
            ("id", "id", row_wise(), sharders[0]),
            ("mm", "mm", node_replicated(), sharders[1]),
        )
    }
    model = DistributedModelParallel(model, device=CPU, plan=ShardingPlan(plan), sharders=sharders)
    load_table(model, table)
    digest = table_digest(model)
    optimizer = torch.optim.SGD([torch.zeros(1)])  # the table has its own in the backward pass
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
    batches = iter([batch(step, 1 + ITEMS) for step in range(3)])
    for step in range(3):
        found = pipeline.progress(batches)
        for key in FEATURES:
            assert torch.equal(found[key], whole(table)[batch(step, 1 + ITEMS)[key].values()])
    assert table_digest(model) == digest
    (trained,) = (value for key, value in model.state_dict().items() if key.startswith("id."))
    assert [*trained.local_shards()[0].tensor.shape] == [8 if dist.get_rank() < 3 else 6, 4]  # of 30
    assert find_frozen(model, "mm")[1].store.num_rows == (13 if dist.get_rank() % 2 else 14)  # of 27


def _a_node_of_unknown_size_is_refused(path: Path) -> None:
    for size in (None, "3"):
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        if size:
            os.environ["LOCAL_WORLD_SIZE"] = size
        with pytest.raises(ValueError, match=f"needs LOCAL_WORLD_SIZE.* found {size or 'none'}"):
            sharded(Unpooled(open_table(path)), node_replicated())


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("copies") / "float16")


def test_copies_on_nodes_and_in_sharding_groups_are_right(table, tmp_path):
    claims = [
        (_two_copies_are_right, table, tmp_path / "node", "node"),
        (_two_copies_are_right, table, tmp_path / "2d", "2d"),
        (_two_copies_are_right, table, tmp_path / "both", "both"),
        (_an_error_in_one_copy_is_raised_on_all_ranks, table, "node"),
        (_an_error_in_one_copy_is_raised_on_all_ranks, table, "2d"),
        (_rows_of_a_node_copy_do_not_leave_the_node, table),
        (_tables_of_one_collection_may_have_other_copies, table),
        (_frozen_rows_are_not_synchronized, table),
        (_a_trained_table_is_divided_by_the_world_beside_a_copy_a_node, table),
        (_a_node_of_unknown_size_is_refused, table),
    ]
    run_ranks(_all, 4, claims)
