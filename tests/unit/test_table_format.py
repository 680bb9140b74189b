"""The table on disk: what is written is read, and whatever is wrong is refused by file, row and id."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mim_torchrec.embeddings.table.format import (
    ChecksumMismatch,
    DuplicateId,
    IncompleteTable,
    NonFiniteVector,
    RowIndex,
    Table,
    TableError,
    TableWriter,
    VersionMismatch,
)
from mim_torchrec.embeddings.table.main import main
from mim_torchrec.embeddings.table.permute import permute
from mim_torchrec.errors import OutputExists

IDS = torch.tensor([30, -5, 10, 7_000_000_000, 20, 50, 40])
VECTORS = torch.arange(28, dtype=torch.float32).reshape(7, 4) / 8


def write(path, *, ids=IDS, vectors=VECTORS, split=3, dtype="float16"):
    writer = TableWriter(path, table_version="v1", dim=4, dtype=dtype, encoder={"name": "test"})
    for part in (slice(None, split), slice(split, None)):
        writer.write_shard(ids[part], vectors[part])
    writer.finish()
    return path


def rewrite(path, shard, **tensors):
    """Write a shard again, with the right checksum, as another program might."""
    file = path / shard
    save_file({**load_file(file), **tensors}, file, metadata={"table_version": "v1"})
    manifest = json.loads((path / "manifest.json").read_text())
    for info in manifest["shards"]:
        info["sha256"] = hashlib.sha256((path / info["file"]).read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_are_read_as_written_in_any_order_of_ids(tmp_path, dtype):
    table = Table.open(write(tmp_path / "t", dtype=dtype), expected_version="v1")
    assert table.manifest.rows == 7 and table.manifest.dim == 4
    torch.testing.assert_close(table.read(IDS).float(), VECTORS, rtol=0, atol=0)


def test_an_unknown_id_reads_as_the_zero_vector_and_row_zero(tmp_path):
    table = Table.open(write(tmp_path / "t"))
    assert not table.read(torch.tensor([31])).any()
    assert table.row_index().rows(torch.tensor([31, -6, 8_000_000_000])).tolist() == [0, 0, 0]


def test_rows_are_one_plus_the_position_in_ascending_order_of_ids(tmp_path):
    index = Table.open(write(tmp_path / "t")).row_index()
    assert index.num_embeddings == 8
    assert index.rows(torch.tensor([[-5, 10], [50, 7_000_000_000]])).tolist() == [[1, 2], [6, 7]]


def test_an_empty_index_knows_nothing():
    index = RowIndex(torch.empty(0, dtype=torch.int64))
    assert index.num_embeddings == 1 and index.rows(torch.tensor([3, 4])).tolist() == [0, 0]


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 4), (4, 8), (1, 2), (7, 8), (3, 3), (0, 1)])
def test_any_range_of_rows_equals_the_reading_by_id(tmp_path, start, stop):
    table = Table.open(write(tmp_path / "t"))
    whole = torch.cat([torch.zeros(1, 4, dtype=torch.float16), table.read(table.row_index().ids)])
    assert torch.equal(table.rows_for(start, stop), whole[start:stop])


def test_a_range_outside_the_table_is_refused(tmp_path):
    with pytest.raises(TableError, match="rows 4:9 not within 0:8"):
        Table.open(write(tmp_path / "t")).rows_for(4, 9)


def test_shards_of_two_ranks_make_one_table(tmp_path):
    first = TableWriter(tmp_path / "t", table_version="v1", dim=4, encoder={})
    second = TableWriter(tmp_path / "t", table_version="v1", dim=4, encoder={}, rank=1)
    shards = [first.write_shard(IDS[:5], VECTORS[:5]), second.write_shard(IDS[5:], VECTORS[5:])]
    first.finish(shards)
    assert torch.equal(Table.open(tmp_path / "t").read(IDS), VECTORS.half())


def test_a_changed_byte_is_a_checksum_mismatch_naming_the_file(tmp_path):
    path = write(tmp_path / "t")
    file = path / "shard-00000-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match=re.escape(str(file))):
        Table.open(path)


def test_a_truncated_shard_is_refused_even_without_checksums(tmp_path):
    path = write(tmp_path / "t")
    file = path / "shard-00000-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(TableError, match=re.escape(str(file))):
        Table.open(path, verify=False)


def test_another_version_is_refused_naming_both(tmp_path):
    path = write(tmp_path / "t")
    with pytest.raises(VersionMismatch, match="table_version is v1, expected v2"):
        Table.open(path, expected_version="v2")


def test_a_shard_of_another_version_is_refused_naming_the_file(tmp_path):
    path = write(tmp_path / "t")
    file = path / "shard-00000-00000.safetensors"
    save_file(load_file(file), file, metadata={"table_version": "v0"})
    with pytest.raises(VersionMismatch, match=re.escape(str(file))):
        Table.open(path, verify=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_a_vector_that_is_not_finite_in_the_stored_type_is_not_written(tmp_path, bad):
    vectors = VECTORS.clone()
    vectors[2, 1] = bad
    with pytest.raises(NonFiniteVector, match=r"shard-00000-00000.safetensors: row 1, item id 10"):
        write(tmp_path / "t", vectors=vectors)
    assert not (tmp_path / "t").exists()


def test_a_nan_written_by_another_program_is_not_read(tmp_path):
    path = write(tmp_path / "t")
    vectors = load_file(path / "shard-00000-00001.safetensors")["vectors"]
    vectors[3, 0] = float("nan")
    rewrite(path, "shard-00000-00001.safetensors", vectors=vectors)
    table = Table.open(path)
    message = r"shard-00000-00001.safetensors: row 3, item id 7000000000"
    with pytest.raises(NonFiniteVector, match=message):
        table.rows_for(4, 8)
    with pytest.raises(NonFiniteVector, match=message):
        table.read(IDS)
    table.rows_for(0, 4)


def test_an_id_twice_in_a_shard_is_refused_naming_rows_and_id(tmp_path):
    with pytest.raises(DuplicateId, match="rows 1 and 2 both have item id 30"):
        write(tmp_path / "t", ids=torch.tensor([30, -5, 30, 1, 2, 3, 4]))


def test_an_id_in_two_shards_is_refused_naming_both_places_and_never_gets_a_name(tmp_path):
    with pytest.raises(DuplicateId, match=r"id 30 .*00000.safetensors row 2, .*00001.safetensors row 3"):
        write(tmp_path / "t", ids=torch.tensor([30, -5, 10, 30, 2, 3, 4]))
    assert not (tmp_path / "t").exists()


def test_content_is_of_vectors_and_not_of_where_they_lie(tmp_path):
    def content(name: str, **what) -> str:
        write(tmp_path / name, **what)
        return Table.open(tmp_path / name).manifest.content

    first = content("a")
    assert content("elsewhere") == first
    assert content("other-vectors", vectors=VECTORS + 1) != first
    assert content("other-type", dtype="float32") != first


def test_a_crash_before_finish_leaves_no_table_and_the_next_writer_starts_anew(tmp_path):
    writer = TableWriter(tmp_path / "t", table_version="v1", dim=4, encoder={})
    writer.write_shard(IDS, VECTORS)
    del writer
    with pytest.raises(IncompleteTable, match="half-written"):
        Table.open(tmp_path / "t")
    write(tmp_path / "t")
    assert torch.equal(Table.open(tmp_path / "t").read(IDS), VECTORS.half())
    assert not (tmp_path / "t.partial").exists()


def test_a_missing_shard_and_a_missing_table_are_refused(tmp_path):
    with pytest.raises(IncompleteTable, match="not found"):
        Table.open(tmp_path / "nothing")
    path = write(tmp_path / "t")
    (path / "shard-00000-00001.safetensors").unlink()
    with pytest.raises(IncompleteTable, match="shard-00000-00001.safetensors: listed in the manifest"):
        Table.open(path)


def test_an_existing_table_is_never_overwritten(tmp_path):
    write(tmp_path / "t")
    with pytest.raises(OutputExists, match="exists"):
        TableWriter(tmp_path / "t", table_version="v2", dim=4, encoder={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 4}, "format_version 4"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"rows": 8}, "rows is 8 but the shards have 7"),
        ({"dtype": "int2"}, "dtype 'int2'"),
        ({"dtype": "int4"}, "expected int4"),
        ({"dim": 5}, r"expected float16 \(3, 5\)"),
    ],
)
def test_a_wrong_manifest_is_refused_naming_what_is_wrong(tmp_path, change, message):
    path = write(tmp_path / "t")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(TableError, match=message):
        Table.open(path)


def test_permuting_keeps_the_vectors_and_changes_whose_they_are(tmp_path):
    source = Table.open(write(tmp_path / "t"))
    manifest = permute(tmp_path / "t", tmp_path / "p", seed=3)
    permuted = Table.open(tmp_path / "p", expected_version="permuted-3-v1")
    assert manifest.rows == 7 and manifest.encoder["permuted"] == {"seed": 3, "table_version": "v1"}
    before, after = source.read(IDS), permuted.read(IDS)
    assert not torch.equal(before, after)
    assert torch.equal(before[:, 0].sort().values, after[:, 0].sort().values)


def test_the_commands_print_verify_and_permute(tmp_path, capsys):
    path = write(tmp_path / "t")
    main(["info", str(path)])
    assert json.loads(capsys.readouterr().out)["table_version"] == "v1"
    main(["permute", str(path), "--out", str(tmp_path / "p"), "--seed", "1"])
    main(["verify", str(tmp_path / "p"), "--table-version", "permuted-1-v1"])
    assert "all checksums match" in capsys.readouterr().out
    with pytest.raises(VersionMismatch):
        main(["verify", str(path), "--table-version", "v2"])
