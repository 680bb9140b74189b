"""Frozen collections in models that others handle: fused, moved, emptied and restored."""

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.fused_embedding_modules import fuse_embedding_optimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.configs import DATA_TYPES
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingBagCollection, FrozenEmbeddingCollection
from mim_torchrec.embeddings.sharded.load import load_table
from mim_torchrec.embeddings.sharded.thawing import thaw_table
from mim_torchrec.embeddings.table.format import NonFiniteVector, Table, TableError
from tests.frozen import DIM, FEATURES, whole, write_table

KINDS = {FrozenEmbeddingCollection: EmbeddingConfig, FrozenEmbeddingBagCollection: EmbeddingBagConfig}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    return Table.open(write_table(tmp_path_factory.mktemp("tables") / "table"))


def make(kind=FrozenEmbeddingBagCollection, rows=5, dtype="float16", device="cpu", **options):
    config = KINDS[kind](
        name="mm", num_embeddings=rows, embedding_dim=DIM, feature_names=FEATURES, data_type=DATA_TYPES[dtype]
    )
    return kind([config], device=device, **options)


def filled(rows=5, dtype="float16"):
    """A collection whose checkpoints hold its rows."""
    module = make(rows=rows, dtype=dtype, store_rows=True)
    store = module.frozen_tables()["mm"].store
    store.write(torch.arange(rows), torch.ones(rows, store.stored_width).to(store.tensor.dtype))
    return module


def batch():
    return KeyedJaggedTensor(FEATURES, torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 0, 1, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_trained_table_is_made_of_a_frozen_one(kind):
    model = nn.Sequential(make(kind))
    with pytest.raises(TableError, match="frozen table mm: its config is of no trained table"):
        fuse_embedding_optimizer(model, torch.optim.SGD, {"lr": 0.1}, torch.device("meta"))
    assert isinstance(model[0], kind)
    config = (make(kind).embedding_configs if kind is FrozenEmbeddingCollection
              else make(kind).embedding_bag_configs)()[0]  # fmt: skip
    with pytest.raises(TableError, match="no trained table"):
        config.init_fn(torch.empty(5, DIM))


def test_a_frozen_collection_of_the_configs_of_another_is_thawed(table):
    model = nn.Module()
    rows = table.manifest.num_embeddings
    model.ebc = FrozenEmbeddingBagCollection(make(rows=rows).embedding_bag_configs(), device="cpu")
    load_table(model, table)
    thaw_table(model, "ebc.mm", torch.optim.SGD, {"lr": 0.1})
    assert torch.equal(model.ebc.embedding_bags["mm"].weight, whole(table))


@pytest.mark.parametrize("saved, problem", [
    (lambda: filled(rows=9), r"torch.float16 \(9, 8\), the model as torch.float16 \(5, 8\)"),
    (lambda: filled(rows=1), r"torch.float16 \(1, 8\)"),
    (lambda: filled(dtype="float32"), r"torch.float32 \(5, 8\)"),
    (lambda: filled(dtype="int8"), r"torch.uint8 \(5, 16\)"),
], ids=["larger", "one row", "other type", "codes"])  # fmt: skip
def test_rows_of_another_shape_or_type_are_not_restored(saved, problem):
    module = filled()
    with pytest.raises(TableError, match=f"frozen table mm: the checkpoint has its rows as {problem}"):
        module.load_state_dict(saved().state_dict())


def test_rows_with_nan_are_not_restored():
    state = filled().state_dict()
    state["embedding_bags.mm.weight"][3, 1] = torch.nan
    with pytest.raises(NonFiniteVector, match="mm: row 3 of the checkpoint holds NaN or infinity as float16"):
        filled().load_state_dict(state)


def test_the_meta_device_takes_no_rows_of_a_checkpoint():
    module = make(device="meta", store_rows=True)
    with pytest.raises(TableError, match="mm is on the meta device and cannot take the rows of a checkpoint"):
        module.load_state_dict(filled().state_dict(), assign=True)


def test_the_meta_device_keeps_no_rows_and_lookups_say_so(table):
    module = make(rows=table.manifest.num_embeddings)
    load_table(module, table)
    expected = module(batch()).values()
    with pytest.raises(TableError, match="frozen table mm has no rows yet"):
        module.to("meta")(batch())
    with pytest.raises(TableError, match="frozen table mm has no rows yet"):
        module.to_empty(device="cpu")(batch())
    load_table(module, table)
    assert torch.equal(module(batch()).values(), expected)


def test_a_collection_is_moved_from_the_meta_device_without_rows_and_loaded_there(table):
    model = nn.Sequential(make(rows=table.manifest.num_embeddings, device="meta"))
    load_table(model.to("cpu"), table)
    assert torch.equal(model(batch())["candidate"][0], whole(table)[1])
