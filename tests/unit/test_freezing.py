"""Freezing and thawing in one process, of a model that is not sharded, or not yet."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.freezing import freeze_table, use_frozen_table
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingBagCollection, frozen_bag_config
from mim_torchrec.embeddings.sharded.joined import JoinedEmbeddingBags
from mim_torchrec.embeddings.sharded.load import load_table, table_digest
from mim_torchrec.embeddings.sharded.split import SplitEmbeddingBags
from mim_torchrec.embeddings.sharded.thawing import thaw_table
from mim_torchrec.embeddings.table.format import Table, TableError, TableWriter

DIM, ROWS = 4, 9
CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, device: torch.device = CPU, weighted: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ebc = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[name])
                for name in ("user", "item", "place")
            ],
            device=device,
            is_weighted=weighted,
        )
        self.ec = EmbeddingCollection(
            [EmbeddingConfig(name="seen", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["user"])],
            device=device,
            need_indices=True,
        )
        self.dense = nn.Linear(4 * DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.dense(
            torch.cat([self.ebc(features).values(), self.ec(features)["user"].values()], 1)
        ).sum()


def batch(weighted: bool = False) -> KeyedJaggedTensor:
    rows = torch.tensor([0, 1, 2, 8, 3, 0, 4, 4])
    lengths = torch.tensor([1, 1, 2, 1, 0, 3])
    weights = torch.linspace(0.5, 2, 8) if weighted else None
    return KeyedJaggedTensor(["user", "item", "place"], rows, weights, lengths=lengths)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(batch()).backward()
        optimizer.step()


def adam(parameters: Iterable[Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=0.1)


@pytest.mark.parametrize("keyed", [False, True])
def test_a_table_is_dropped_from_the_optimizer_and_the_others_train_on(tmp_path, keyed):
    model, reference = Model(), Model()
    optimizers = []
    for each in (model, reference):
        parameters = dict(each.named_parameters())
        optimizers.append(
            CombinedOptimizer([KeyedOptimizerWrapper(parameters, adam)]) if keyed else adam(each.parameters())
        )
    optimizer = optimizers[0]
    for each, its in zip((model, reference), optimizers, strict=True):
        step(each, its, 3)
    before = model(batch()).detach()
    item = model.ebc.embedding_bags["item"].weight
    state = len(optimizer.state)
    report = freeze_table(model, "ebc.item", tmp_path / "t", optimizer=optimizer)
    assert report.optimizer_bytes == 4 + 2 * 4 * ROWS * DIM  # Adam's step, and two moments
    assert item not in optimizer.state and len(optimizer.state) == state - 1
    assert all(item is not each for group in optimizer.param_groups for each in group["params"])
    assert not any("item" in name for name, _ in model.named_parameters())
    assert torch.equal(model(batch()), before)
    assert torch.equal(Table.open(tmp_path / "t").rows_for(0, ROWS), item)

    digest = table_digest(model, "item")
    step(model, optimizer, 4)
    frozen = reference.ebc.embedding_bags["item"].weight
    kept = frozen.detach().clone()
    for _ in range(4):
        step(reference, optimizers[1])
        frozen.data.copy_(kept)
    assert table_digest(model, "item") == digest
    assert torch.equal(model(batch()), reference(batch()))


def test_the_only_table_of_a_collection_is_replaced_by_a_frozen_collection(tmp_path):
    model = Model()
    before = model.ec(batch())["user"]
    freeze_table(model, "ec.seen", tmp_path / "t")
    after = model.ec(batch())["user"]
    assert type(model.ec).__name__ == "FrozenEmbeddingCollection"
    assert torch.equal(after.values(), before.values()) and torch.equal(after.weights(), before.weights())


def test_all_tables_of_a_collection_are_frozen_one_by_one_and_thawed(tmp_path):
    model = Model()
    before = model.ebc(batch())
    names = ["ebc.place", "ebc.user", "ebc.item"]
    for name in names:
        freeze_table(model, name, tmp_path / name)
    assert isinstance(model.ebc, SplitEmbeddingBags) and model.ebc.trained is None
    found = model.ebc(batch())
    assert found.keys() == before.keys() and torch.equal(found.values(), before.values())
    assert not list(model.ebc.parameters())
    for name in names[1:]:
        thaw_table(model, name, torch.optim.SGD, {"lr": 1.0})
        assert torch.equal(model.ebc(batch()).values(), before.values())
    thaw_table(model, names[0], torch.optim.SGD, {"lr": 1.0})
    assert type(model.ebc) is EmbeddingBagCollection
    rows = model.ebc.embedding_bags["item"].weight.detach().clone()
    model(batch()).backward()  # the optimizer steps in it
    assert not torch.equal(model.ebc.embedding_bags["item"].weight, rows)
    assert [config.name for config in model.ebc.embedding_bag_configs()] == ["user", "item", "place"]


def test_an_optimizer_in_backward_goes_with_its_table_and_stays_with_the_others(tmp_path):
    model = Model()
    _apply_optimizer_in_backward(torch.optim.Adagrad, model.ebc.parameters(), {"lr": 0.1})
    model(batch()).backward()
    report = freeze_table(model, "ebc.item", tmp_path / "t")
    assert report.optimizer_bytes == 4 + 4 * ROWS * DIM  # Adagrad's step and sums
    user = model.ebc.trained.embedding_bags["user"].weight
    before, digest = user.detach().clone(), table_digest(model, "item")
    model(batch()).backward()
    assert not torch.equal(user, before) and table_digest(model, "item") == digest


def test_weighted_bags_stay_weighted(tmp_path):
    model = Model(weighted=True)
    before = model.ebc(batch(weighted=True)).values()
    freeze_table(model, "ebc.item", tmp_path / "t")
    torch.testing.assert_close(model.ebc(batch(weighted=True)).values(), before)
    thaw_table(model, "ebc.item", torch.optim.SGD, {"lr": 1.0})
    assert model.ebc.is_weighted()


def test_a_model_without_memory_is_given_a_frozen_table_that_is_loaded_later(tmp_path):
    trained = Model()
    freeze_table(trained, "ebc.item", tmp_path / "t")
    table = Table.open(tmp_path / "t")
    model = Model(torch.device("meta"))
    use_frozen_table(model, "ebc.item", table)
    assert model.ebc.frozen["item"].frozen_tables()["item"].state.table_version is None
    with pytest.raises(TableError, match="ebc.item: is frozen and not loaded"):
        thaw_table(model, "ebc.item", torch.optim.SGD, {"lr": 1.0})
    model.to_empty(device="cpu")
    load_table(model, table, "item")
    assert torch.equal(model.ebc(batch()).to_dict()["item"], trained.ebc(batch()).to_dict()["item"])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rows_are_thawed_as_float32_from_any_type(tmp_path, dtype):
    model = Model()
    freeze_table(model, "ebc.item", tmp_path / "t", dtype=dtype)
    found = model.ebc(batch()).values().detach()
    thaw_table(model, "ebc.item", torch.optim.SGD, {"lr": 1.0})
    weight = model.ebc.embedding_bags["item"].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, Table.open(tmp_path / "t").read_float(torch.arange(ROWS)))
    torch.testing.assert_close(model.ebc(batch()).values(), found)


def test_half_rows_stay_half(tmp_path):
    model = Model()
    model.ec = EmbeddingCollection(
        [EmbeddingConfig(name="seen", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["user"],
                         data_type=DataType.FP16)],
        device=CPU,
    )  # fmt: skip
    before = model.ec(batch())["user"].values()
    freeze_table(model, "ec.seen", tmp_path / "t")
    after = model.ec(batch())["user"].values()
    assert Table.open(tmp_path / "t").manifest.dtype == "float16"
    assert after.dtype == torch.float16 and torch.equal(after, before)


def test_the_version_says_what_the_rows_are(tmp_path):
    versions = [freeze_table(Model(), "ebc.item", tmp_path / str(k)).table_version for k in range(2)]
    other = freeze_table(Model(), "ebc.user", tmp_path / "other").table_version
    assert versions[0] == versions[1] != other and other.startswith("trained-")


def test_wrappers_of_optimizers_see_the_tables_that_are_left(tmp_path):
    model = Model()
    parameters = dict(model.named_parameters())
    inner = KeyedOptimizerWrapper(parameters, lambda found: torch.optim.SGD(found, lr=0.1))
    optimizer = WarmupOptimizer(inner, [WarmupStage(WarmupPolicy.CONSTANT, value=1.0)])
    freeze_table(model, "ebc.item", tmp_path / "t", optimizer=optimizer)
    assert set(optimizer.params) == set(parameters) - {"ebc.embedding_bags.item.weight"}
    step(model, optimizer)


def by_id(path: Path) -> Table:
    writer = TableWriter(path, table_version="v", dim=DIM, dtype="float32", encoder={})
    writer.write_shard(torch.arange(ROWS), torch.randn(ROWS, DIM))
    writer.finish()
    return Table.open(path)


def test_what_cannot_be_frozen_is_refused_by_name(tmp_path):
    model = Model()
    with pytest.raises(
        TableError, match=r"no table 'ebc.film' .*'ebc.user', 'ebc.item', 'ebc.place', 'ec.seen'"
    ):
        freeze_table(model, "ebc.film", tmp_path / "t")
    with pytest.raises(TableError, match="user: the model is the collection itself"):
        freeze_table(model.ebc, "user", tmp_path / "t")
    with pytest.raises(TableError, match="rows are in the order of ids, those of ebc.item have numbers"):
        use_frozen_table(model, "ebc.item", by_id(tmp_path / "ids"))
    model.again = model.ebc
    with pytest.raises(TableError, match=r"under several names: \['ebc', 'again'\]"):
        freeze_table(model, "ebc.item", tmp_path / "t")
    del model.again
    table = by_id(tmp_path / "two")
    configs = [frozen_bag_config(table, [name], name) for name in ("a", "b")]
    model.mm = FrozenEmbeddingBagCollection(configs, device=CPU)
    with pytest.raises(TableError, match=r"mm: one frozen collection of tables \['a', 'b'\]"):
        thaw_table(model, "mm.a", torch.optim.SGD, {"lr": 1.0})
    assert not (tmp_path / "t").exists()


def test_a_table_that_was_imported_by_ids_is_thawed_with_its_row_of_unknown_ids(tmp_path):
    model, table = Model(), by_id(tmp_path / "ids")
    model.mm = FrozenEmbeddingBagCollection([frozen_bag_config(table, ["user"])], device=CPU)
    load_table(model, table)
    before = model.mm(batch()).values()
    thaw_table(model, "mm.mm", torch.optim.SGD, {"lr": 1.0})
    assert type(model.mm) is EmbeddingBagCollection
    assert torch.equal(model.mm(batch()).values(), before)
    assert not model.mm.embedding_bags["mm"].weight[0].any()


def test_a_table_in_joined_collections_is_frozen_where_it_is(tmp_path):
    model = Model()
    model.bags = JoinedEmbeddingBags(model.ebc)
    del model.ebc
    before = model.bags(batch())
    freeze_table(model, "bags.0.item", tmp_path / "t")
    after = model.bags(batch())
    assert isinstance(model.bags[0], SplitEmbeddingBags)
    assert after.keys() == before.keys() and torch.equal(after.values(), before.values())
    assert [config.name for config in model.bags.embedding_bag_configs()] == ["user", "item", "place"]
