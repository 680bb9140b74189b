"""A frozen table in one process: looked up as written, filled from the table that fits, never trained."""

import pytest
import torch
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.configs import frozen_bag_config
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.load import load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.sharder import FrozenEmbeddingCollectionSharder
from mim_torchrec.embeddings.table.format import ChecksumMismatch, Table, TableError, TableWriter

FEATURES = ["candidate_mm", "behavior_mm"]


@pytest.fixture(params=["float16", "float32", "bfloat16", "int8", "int4"])
def table(request, tmp_path):
    torch.manual_seed(0)
    writer = TableWriter(tmp_path / "t", table_version="v1", dim=4, dtype=request.param, encoder={})
    writer.write_shard(torch.tensor([30, 10, 20]), torch.randn(3, 4))
    writer.write_shard(torch.tensor([15, 40]), torch.randn(2, 4))
    writer.finish()
    return Table.open(tmp_path / "t")


def features(table, candidates, behaviors, lengths):
    rows = table.row_index().rows(torch.tensor(candidates + behaviors))
    return KeyedJaggedTensor(keys=FEATURES, values=rows, lengths=torch.tensor(lengths))


@pytest.mark.parametrize("config", [frozen_config, frozen_bag_config])
def test_one_name_of_a_feature_is_no_list_of_its_letters(table, config):
    with pytest.raises(ValueError, match=r"give a list of names, \['item'\]"):
        config(table, "item")


def test_lookups_are_the_vectors_of_the_items_as_float32(table):
    module = FrozenEmbeddingCollection([frozen_config(table, FEATURES)], device="cpu")
    load_table(module, table)
    out = module(features(table, [10, 40], [15, 15, 99], [2, 0, 1, 2]))
    assert out["candidate_mm"].values().dtype == torch.float32
    assert torch.equal(out["candidate_mm"].values(), table.read_float(torch.tensor([10, 40])))
    assert torch.equal(out["behavior_mm"].values(), table.read_float(torch.tensor([15, 15, 99])))
    assert out["behavior_mm"].lengths().tolist() == [1, 2]


def test_an_unsharded_frozen_module_has_no_parameter_no_buffer_and_no_gradient(table):
    module = FrozenEmbeddingCollection([frozen_config(table, FEATURES)], device="cpu")
    load_table(module, table)
    out = module(features(table, [10], [], [1, 0]))
    assert list(module.parameters()) == [] and list(module.buffers()) == []
    assert not out["candidate_mm"].values().requires_grad


def test_its_state_dict_says_which_vectors_it_has_and_holds_none(table):
    module = FrozenEmbeddingCollection([frozen_config(table, FEATURES)], device="cpu")
    load_table(module, table)
    assert module.state_dict() == {"_extra_state": '{"mm": ["v1", 0]}'}


def test_the_load_report_says_what_was_loaded(table):
    module = FrozenEmbeddingCollection([frozen_config(table, FEATURES)], device="cpu")
    before = table_digest(module)
    report = load_table(module, table)
    assert (report.first_row, report.rows, report.total_rows, report.table_version) == (0, 6, 6, "v1")
    assert table_digest(module) != before


def test_a_model_without_the_table_is_refused_by_name(table):
    with pytest.raises(TableError, match="no frozen table 'mm'"):
        load_table(torch.nn.Linear(1, 1), table)


def test_a_table_of_another_shape_is_refused_naming_both(table):
    config = EmbeddingConfig(name="mm", num_embeddings=9, embedding_dim=4, feature_names=FEATURES)
    module = FrozenEmbeddingCollection([config], device="cpu")
    with pytest.raises(TableError, match=r"\(6, 4, .*\(9, 4, "):
        load_table(module, table)


def test_a_data_type_that_is_not_stored_is_refused():
    config = EmbeddingConfig(
        name="mm", num_embeddings=9, embedding_dim=4, feature_names=FEATURES, data_type=DataType.INT2
    )
    with pytest.raises(ValueError, match="mm: data type .* is none of FP32, FP16, BF16, INT8, INT4"):
        FrozenEmbeddingCollection([config])


def test_a_changed_shard_is_refused_when_ranks_open_a_table_together(table):
    file = table.path / table.manifest.shards[1].file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match=file.name):
        open_table(table.path)


def test_any_plan_but_row_wise_is_refused(table):
    module = FrozenEmbeddingCollection([frozen_config(table, FEATURES)])
    plan = {"mm": ParameterSharding(sharding_type="table_wise", compute_kernel="fused", ranks=[0])}
    with pytest.raises(ValueError, match="mm is sharded row_wise, not table_wise"):
        FrozenEmbeddingCollectionSharder().shard(module, plan, env=None)
