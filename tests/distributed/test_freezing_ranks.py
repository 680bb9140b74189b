"""A table is frozen in the middle of training, and thawed: on 1 and on 2 gloo ranks, in every sharding."""

import contextlib
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, table_wise
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim import RowWiseAdagrad

from mim_torchrec.embeddings.sharded import trained, transfer, writing
from mim_torchrec.embeddings.sharded.freezing import freeze_table, use_frozen_table
from mim_torchrec.embeddings.sharded.load import open_table, table_digest
from mim_torchrec.embeddings.sharded.thawing import thaw_table
from mim_torchrec.embeddings.table.format import NonFiniteVector, Table, TableError
from mim_torchrec.errors import OutputExists
from tests.distributed.freezing_model import DIM, ROWS, batch, build, look_up, optimizer_of, train
from tests.ranks import run_ranks

TABLES = ("sparse.ebc.item", "sparse.ec.seen", "sparse.alone.alone")
STEPS = 20
SHARDINGS = ("row_wise", "table_wise", "column_wise")


def rows_of(model: DistributedModelParallel, name: str) -> Tensor:
    """All rows of a trained table, on every rank."""
    collection, _, table = name.rpartition(".")
    module = model.module.get_submodule(collection)
    rows = trained.rows_of(module, table, dist.group.WORLD)
    whole = torch.zeros(rows.num_rows, rows.dim)
    for block, values in rows.own:
        whole[block.row : block.row_stop, block.column : block.column_stop] = values
    dist.all_reduce(whole)
    return whole


def sparse_bytes(model: DistributedModelParallel) -> tuple[int, int]:
    """Bytes of this rank's sparse parameters, and of their optimizer state."""
    parameters = sum(each.nbytes for name, each in model.named_parameters() if "sparse" in name)
    state = model.fused_optimizer.state_dict()["state"]
    return parameters, sum(
        shard.tensor.nbytes for values in state.values() for each in values.values()
        for shard in each.local_shards()
    )  # fmt: skip


def whole_of(model: DistributedModelParallel, sharding: str) -> dict[str, Any]:
    """What the tables of the model hold that are trained in any case, and its dense weights."""
    state: dict[str, Any] = {
        name: each.detach() for name, each in model.named_parameters() if "sparse" not in name
    }
    for collection, table in (("ebc", "user"), ("ebc", "place"), ("ec", "other")):
        module = model.module.get_submodule(f"sparse.{collection}")
        inner = f"{collection}.trained" if hasattr(module, "trained") else collection
        state[table] = rows_of(model, f"sparse.{inner}.{table}")
        optimizer = module.trained.fused_optimizer if hasattr(module, "trained") else module.fused_optimizer
        momentum = next(
            each for key, each in optimizer.state_dict()["state"].items() if key.endswith(f".{table}.weight")
        )
        sums = [shard.tensor.double().sum() for each in momentum.values() for shard in each.local_shards()]
        total = torch.stack([torch.zeros((), dtype=torch.float64), *sums]).sum()
        dist.all_reduce(total)
        state[f"{table} momentum"] = total
    return state


def freeze_in_training(folder: Path, sharding: str) -> dict[str, Any]:
    transfer.STEP, writing.PIECE = 5, 4  # so that 37 rows take several steps, and rank 1 writes some
    lr = {table: 0.1 for table in ("item", "seen", "alone")} | {"user": 0.05, "place": 0.05, "other": 0.05}
    kinds = dict.fromkeys(("item", "seen", "alone"), sharding)
    model, with_zero = build(kinds, lr), build(kinds, lr)
    optimizer, optimizer_of_zero = optimizer_of(model), optimizer_of(with_zero)
    found: dict[str, Any] = {"losses": train(model, optimizer, range(STEPS))}
    train(with_zero, optimizer_of_zero, range(STEPS))

    before, bags_before = look_up(model), look_up(model, bag=5)
    rows = {name: rows_of(model, name) for name in TABLES}
    bytes_before = sparse_bytes(model)
    kernels = [weakref.ref(lookup) for name in ("ebc", "ec", "alone")
               for lookup in model.module.get_submodule(f"sparse.{name}")._lookups]  # fmt: skip
    reports = [freeze_table(model, name, folder / name, optimizer=optimizer) for name in TABLES]
    gc.collect()
    assert [ref() for ref in kernels] == [None] * len(kernels)  # nothing keeps the old tables

    after, bags_after = look_up(model), look_up(model, bag=5)
    assert after[1] == before[1]
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(bags_after[0], bags_before[0])
    for one, other in zip(before[2], after[2], strict=True):
        assert torch.equal(one, other)
    for name, report in zip(TABLES, reports, strict=True):
        table = Table.open(folder / name)
        assert table.manifest.by_number and table.manifest.table_version == report.table_version
        assert torch.equal(table.rows_for(0, ROWS), rows[name])
    assert len(Table.open(folder / TABLES[0]).manifest.shards) == dist.get_world_size()

    shards = dist.get_world_size() if sharding == "column_wise" else 1
    gone = [torch.tensor(a - b) for a, b in zip(bytes_before, sparse_bytes(model), strict=True)]
    for each in gone:
        dist.all_reduce(each)
    assert [int(each) for each in gone] == [3 * 4 * ROWS * DIM, 3 * 4 * ROWS * shards]
    assert sum(report.optimizer_bytes for report in reports) == 3 * 4 * ROWS * shards

    tables = ("item", "seen", "alone")
    digests = [table_digest(model, table) for table in tables]
    for key, group in _groups(with_zero):
        if key in tables:
            group["lr"] = 0.0
    found["losses"] += train(model, optimizer, range(STEPS, 2 * STEPS))
    losses = train(with_zero, optimizer_of_zero, range(STEPS, 2 * STEPS))
    assert found["losses"][STEPS:] == losses
    assert [table_digest(model, table) for table in tables] == digests
    expected = whole_of(with_zero, sharding)
    for name, values in whole_of(model, sharding).items():
        assert torch.equal(values, expected[name]), name
    found["vectors"] = look_up(model)[::2]
    return found


def _groups(model: DistributedModelParallel) -> list[tuple[str, dict[str, Any]]]:
    return [
        (key.split(".")[-2], group)
        for _, module in model.fused_optimizer.optimizers
        for _, kernel in module.optimizers
        for group in kernel.param_groups
        for key in kernel.params
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_training_goes_on_as_with_a_learning_rate_of_zero(tmp_path, sharding):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (one,) = run_ranks(freeze_in_training, 1, tmp_path / "one", sharding)
    two = run_ranks(freeze_in_training, 2, tmp_path / "two", sharding)
    both = [a + b for a, b in zip(*(each["losses"] for each in two), strict=True)]
    torch.testing.assert_close(torch.tensor(both), torch.tensor(one["losses"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two[0]["vectors"], one["vectors"], rtol=1e-4, atol=1e-4)
    first, second = (Table.open(tmp_path / each / TABLES[0]).rows_for(0, ROWS) for each in ("one", "two"))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def thaw(folder: Path, how: str) -> None:
    transfer.STEP = 5
    kinds = dict.fromkeys(("item", "seen", "alone"), "row_wise")
    model, never = build(kinds), build(kinds)
    optimizer, other = optimizer_of(model), optimizer_of(never)
    train(model, optimizer, range(5))
    train(never, other, range(5))
    for name in TABLES:
        freeze_table(model, name, folder / name, optimizer=optimizer)
    before = look_up(model)
    rank = dist.get_world_size() - 1
    sharding = {
        "row_wise": None,
        "table_wise": table_wise(rank=rank, compute_kernel="fused"),
        "column_wise": column_wise(ranks=list(range(dist.get_world_size())), compute_kernel="fused"),
    }[how]
    for name in TABLES:
        thaw_table(model, name, RowWiseAdagrad, {"lr": 0.1}, sharding=sharding, optimizer=optimizer)
    after = look_up(model)
    assert after[1] == before[1] and torch.equal(after[0], before[0])
    assert all(torch.equal(one, two) for one, two in zip(before[2], after[2], strict=True))
    inner = "sparse.ebc.trained.item" if hasattr(model.module.sparse.ebc, "trained") else TABLES[0]
    frozen_rows = Table.open(folder / TABLES[0]).rows_for(0, ROWS)
    assert torch.equal(rows_of(model, inner), frozen_rows)
    assert set(model.fused_optimizer.params) == {
        f"{path}.{table}.weight".replace(
            "sparse.ebc", "sparse.ebc" + (".trained" if inner != TABLES[0] else "")
        )
        for path, names in {
            "sparse.ebc.embedding_bags": ("user", "item", "place"),
            "sparse.ec.embeddings": ("seen", "other"),
            "sparse.alone.embeddings": ("alone",),
        }.items()
        for table in names
    }
    train(model, optimizer, range(5, 10))
    assert not torch.equal(rows_of(model, inner), frozen_rows)  # it trains again

    # A table of which only the state was lost trains as the thawed ones do.
    state = never.fused_optimizer.state_dict()["state"]
    for key, values in state.items():
        if key.split(".")[-2] in ("item", "seen", "alone"):
            for each in values.values():
                for shard in each.local_shards():
                    shard.tensor.zero_()
    train(never, other, range(5, 10))
    if how != "column_wise":  # its state is by column shard
        for one, two in zip(look_up(model)[2], look_up(never)[2], strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("how", SHARDINGS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_thawed_tables_train_on_from_their_rows(tmp_path, how, world_size):
    run_ranks(thaw, world_size, tmp_path, how)


def resume(folder: Path) -> None:
    """Train, freeze and save; then build the model again with the frozen table, load and go on."""
    model = build({})
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    freeze_table(model, TABLES[0], folder / "table", optimizer=optimizer)
    train(model, optimizer, range(3, 6))
    dcp.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder / "saved"
    )
    expected = train(model, optimizer, range(6, 9))

    again = build({})
    use_frozen_table(again, TABLES[0], open_table(folder / "table"))
    optimizer = optimizer_of(again)
    optimizer.init_state()
    state = {"model": again.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder / "saved")
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(again, optimizer, range(6, 9)) == expected


def test_a_checkpoint_after_freezing_is_resumed_with_the_table_from_disk(tmp_path):
    run_ranks(resume, 2, tmp_path)


def freeze_as(folder: Path, dtype: str) -> None:
    model = build({"item": "column_wise"})
    freeze_table(model, TABLES[0], folder / "table", dtype=dtype, table_version="mine")
    table = Table.open(folder / "table", expected_version="mine")
    assert table.manifest.dtype == dtype
    expected = table.read_float(torch.arange(ROWS))
    found = model.module.sparse.ebc(batch(7)).to_dict()["item"]
    assert torch.equal(found, expected[batch(7)["item"].values()])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rows_are_frozen_in_another_type(tmp_path, dtype):
    run_ranks(freeze_as, 2, tmp_path, dtype)


def refusals(folder: Path) -> None:
    model = build({"user": "data_parallel"})
    with pytest.raises(TableError, match=r"has no table 'sparse.ebc.items' .* 'sparse.ebc.item', "):
        freeze_table(model, "sparse.ebc.items", folder / "t")
    with pytest.raises(TableError, match=r"sparse.ebc.user: is sharded data_parallel with kernel 'dense'"):
        freeze_table(model, "sparse.ebc.item", folder / "t")
    with pytest.raises(TableError, match="sparse.ec.seen: is not frozen"):
        thaw_table(model, "sparse.ec.seen", RowWiseAdagrad, {"lr": 0.1})
    assert not (folder / "t").exists()

    freeze_table(model, "sparse.ec.seen", folder / "seen")
    with pytest.raises(TableError, match="sparse.ec.seen: is frozen already"):
        freeze_table(model, "sparse.ec.seen", folder / "t")
    before = look_up(model)[2]
    with pytest.raises(OutputExists):
        freeze_table(model, "sparse.alone.alone", folder / "seen")
    with pytest.raises(TableError, match="sparse.ec.other: is sharded|13 rows of dim 8"):
        use_frozen_table(model, "sparse.ec.other", open_table(folder / "seen"))
    with pytest.raises(TableError, match=r"sparse.ec.seen: is sharded table_wise with kernel 'dense'"):
        thaw_table(
            model,
            "sparse.ec.seen",
            RowWiseAdagrad,
            {"lr": 0.1},
            sharding=table_wise(0, compute_kernel="dense"),
        )
    rows = model.module.sparse.alone.state_dict()["embeddings.alone.weight"].local_shards()[0].tensor
    rows[0, 0] = float("nan") if dist.get_rank() else 1.0
    with pytest.raises(NonFiniteVector, match="rank 0: .*item id"):  # rank 0 writes all of 37 rows
        freeze_table(model, "sparse.alone.alone", folder / "t")
    assert not (folder / "t").exists() and not (folder / "t.partial").exists()
    rows[0, 0] = 1.0
    after = look_up(model)[2]
    assert all(torch.equal(one, two) for one, two in zip(before[:2], after[:2], strict=True))
    freeze_table(model, "sparse.alone.alone", folder / "t")


def test_what_cannot_be_frozen_is_refused_on_all_ranks_and_changes_nothing(tmp_path):
    run_ranks(refusals, 2, tmp_path)


def in_a_pipeline(folder: Path) -> None:
    model = build({})
    optimizer = optimizer_of(model)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    batches = iter([batch(step) for step in range(4)])
    pipeline.progress(batches)
    with pytest.raises(TableError, match="is in a train pipeline .* let the pipeline end"):
        freeze_table(model, TABLES[0], folder / "t")
    with contextlib.suppress(StopIteration):
        while True:
            pipeline.progress(batches)
    pipeline.detach()
    freeze_table(model, TABLES[0], folder / "t")
    again = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    digest = table_digest(model, "item")
    losses, batches = [], iter([batch(step) for step in range(4, 8)])
    with contextlib.suppress(StopIteration):
        while True:
            losses.append(float(again.progress(batches)))
    assert len(losses) == 4 and table_digest(model, "item") == digest
    names = {module.forward.name for module in again._pipelined_modules}
    assert {"sparse.ebc.trained", "sparse.ebc.frozen.item"} <= {name.split("model.")[-1] for name in names}


def test_a_pipeline_ends_before_a_table_is_frozen_and_both_parts_are_pipelined_after(tmp_path):
    run_ranks(in_a_pipeline, 2, tmp_path)
