"""A table whose rows are kept by number: row r is that of id r, row 0 is an item's, nothing is unknown."""

import json

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.live import ItemIndex
from mim_torchrec.embeddings.sharded.load import load_table
from mim_torchrec.embeddings.table.convert import convert
from mim_torchrec.embeddings.table.format import Table, TableError, TableWriter
from mim_torchrec.embeddings.table.grow import grow
from mim_torchrec.embeddings.table.main import main
from mim_torchrec.embeddings.table.permute import permute

ROWS, DIM = 11, 4
VECTORS = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))


def write(path, parts=((0, 5), (5, ROWS)), spare_rows=2):
    writer = TableWriter(
        path, table_version="v", dim=DIM, dtype="float32", encoder={}, spare_rows=spare_rows, by_number=True
    )
    for start, stop in parts:
        writer.write_shard(torch.arange(start, stop), VECTORS[start:stop])
    writer.finish()
    return Table.open(path)


@pytest.mark.parametrize("mapped", [False, True])
def test_row_r_of_a_live_table_is_row_r_of_the_table(tmp_path, mapped):
    table = write(tmp_path / "t")
    config = frozen_config(table, ["item"])
    assert config.num_embeddings == ROWS + 2
    module = FrozenEmbeddingCollection([config], device="cpu")
    load_table(module, table, mapped=mapped)
    rows = torch.tensor([0, 10, 3, 3, 11])
    found = module(KeyedJaggedTensor(["item"], rows, lengths=torch.tensor([5])))["item"].values()
    assert torch.equal(found, torch.cat([VECTORS, torch.zeros(2, DIM)])[rows])


def test_any_range_of_rows_is_read_by_number(tmp_path):
    table = write(tmp_path / "t")
    expected = torch.cat([VECTORS, torch.zeros(2, DIM)])
    for start in range(ROWS + 2):
        for stop in range(start, ROWS + 3):
            assert torch.equal(table.rows_for(start, stop), expected[start:stop])
    with pytest.raises(TableError, match="rows 0:14 not within 0:13"):
        table.rows_for(0, 14)


def test_shards_of_interleaved_rows_are_read_by_number(tmp_path):
    writer = TableWriter(
        tmp_path / "t", table_version="v", dim=DIM, dtype="float32", encoder={}, by_number=True
    )
    for k in range(2):
        writer.write_shard(torch.arange(k, ROWS, 2), VECTORS[k::2])
    writer.finish()
    assert torch.equal(Table.open(tmp_path / "t").rows_for(0, ROWS), VECTORS)


def test_row_numbers_map_to_themselves_and_others_are_refused(tmp_path):
    index = write(tmp_path / "t").row_index()
    assert index.rows(torch.tensor([[0, 10], [4, 4]])).tolist() == [[0, 10], [4, 4]]
    for wrong in (-1, 11):
        with pytest.raises(TableError, match=f"kept by number, 0 to 10, and {wrong} is none of them"):
            index.rows(torch.tensor([3, wrong]))


def test_an_index_of_items_is_refused(tmp_path):
    with pytest.raises(TableError, match="kept by number; look up row numbers as they are"):
        ItemIndex.of(write(tmp_path / "t"))


@pytest.mark.parametrize("parts", [((1, ROWS),), ((0, 5), (6, ROWS))])
def test_a_table_with_a_row_missing_is_refused(tmp_path, parts):
    with pytest.raises(TableError, match="rows are kept by number, so the ids of 1. rows are 0 to"):
        write(tmp_path / "t", parts)


def test_copies_keep_rows_by_number(tmp_path):
    table = write(tmp_path / "t")
    grow(table.path, tmp_path / "grown", 7)
    convert(table.path, tmp_path / "converted", "float16", rows_per_shard=4)
    permute(table.path, tmp_path / "permuted", seed=1)
    assert torch.equal(Table.open(tmp_path / "grown").rows_for(0, ROWS), VECTORS)
    assert torch.equal(Table.open(tmp_path / "converted").rows_for(0, ROWS), VECTORS.half())
    permuted = Table.open(tmp_path / "permuted")
    assert permuted.manifest.by_number and not torch.equal(permuted.rows_for(0, ROWS), VECTORS)


def test_only_such_a_table_is_of_format_version_3(tmp_path, capsys):
    table = write(tmp_path / "t")
    file = table.path / "manifest.json"
    facts = json.loads(file.read_text())
    assert (facts["format_version"], facts["first_row"]) == (3, 0)
    main(["verify", str(table.path)])
    main(["info", str(table.path)])
    assert json.loads(capsys.readouterr().out.split("finite\n")[1])["live_bytes"] == (ROWS + 2) * 4 * DIM
    for change in ({"first_row": 1}, {"format_version": 2}):
        file.write_text(json.dumps(facts | change))
        with pytest.raises(TableError, match="first_row is"):
            Table.open(table.path)
    by_id = TableWriter(tmp_path / "ids", table_version="v", dim=DIM, encoder={})
    by_id.write_shard(torch.arange(3), VECTORS[:3])
    by_id.finish()
    facts = json.loads((tmp_path / "ids" / "manifest.json").read_text())
    assert facts["format_version"] == 2 and "first_row" not in facts
    assert Table.open(tmp_path / "ids").manifest.num_embeddings == 4
