"""``mim table grow`` makes room and changes nothing else; ``info`` says how much there is."""

import json
import os

import pytest
import torch

from mim_torchrec.embeddings.table.convert import convert
from mim_torchrec.embeddings.table.format import ChecksumMismatch, Table, TableError, TableWriter
from mim_torchrec.embeddings.table.grow import grow
from mim_torchrec.embeddings.table.main import main
from mim_torchrec.embeddings.table.permute import permute
from mim_torchrec.errors import OutputExists

IDS = torch.tensor([30, -5, 10, 7_000_000_000, 20, 50, 40])
VECTORS = torch.arange(28, dtype=torch.float32).reshape(7, 4) / 8


def write(path, dtype="float16", spare_rows=2, seq=9):
    writer = TableWriter(
        path, table_version="v1", dim=4, dtype=dtype, encoder={"name": "e"}, spare_rows=spare_rows, seq=seq
    )
    writer.write_shard(IDS[:3], VECTORS[:3])
    writer.write_shard(IDS[3:], VECTORS[3:])
    writer.finish()
    return path


def files(path):
    return {file.name: file.read_bytes() for file in path.glob("shard-*")}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("link", [[], ["--link"]])
def test_growing_keeps_rows_bytes_version_and_seq(tmp_path, capsys, dtype, link):
    before = Table.open(write(tmp_path / "t", dtype))
    main(["grow", str(tmp_path / "t"), "--out", str(tmp_path / "g"), "--spare-rows", "100", *link])
    after = Table.open(tmp_path / "g", expected_version="v1")
    assert (after.manifest.rows, after.manifest.capacity, after.manifest.spare_rows) == (7, 107, 100)
    assert after.manifest.seq == 9 and after.manifest.encoder == {"name": "e"}
    assert torch.equal(after.row_index().rows(IDS), before.row_index().rows(IDS))
    assert torch.equal(after.rows_for(0, 10), before.rows_for(0, 10))
    assert not after.rows_for(8, 108).any()
    assert files(tmp_path / "g") == files(tmp_path / "t")
    assert "100 spare rows, capacity 107" in capsys.readouterr().out


@pytest.mark.parametrize("link", [False, True])
def test_a_link_shares_the_file_and_a_copy_does_not(tmp_path, link):
    grow(write(tmp_path / "t"), tmp_path / "g", 3, link=link)
    shared = [
        os.path.samefile(tmp_path / "t" / name, tmp_path / "g" / name) for name in files(tmp_path / "t")
    ]
    assert shared == [link, link]


@pytest.mark.parametrize("spare_rows", [-1, 0, 1, 2])
def test_shrinking_and_staying_are_refused_naming_what_is_there(tmp_path, spare_rows):
    write(tmp_path / "t")
    with pytest.raises(TableError, match=rf"2 spare rows, and {spare_rows} is not more; .* give at least 3"):
        grow(tmp_path / "t", tmp_path / "g", spare_rows)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_table_that_exists_is_kept(tmp_path):
    write(tmp_path / "t")
    with pytest.raises(OutputExists, match="exists"):
        grow(tmp_path / "t", tmp_path / "t", 5)
    assert Table.open(tmp_path / "t").manifest.spare_rows == 2


def test_a_damaged_shard_is_not_copied_and_nothing_is_left(tmp_path):
    file = write(tmp_path / "t") / "shard-00000-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match="shard-00000-00001.safetensors"):
        grow(tmp_path / "t", tmp_path / "g", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_file_system_without_links_is_an_error_that_says_to_copy(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    write(tmp_path / "t")
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        TableError, match=r"shard-00000-00000.safetensors: cannot be linked .*leave out --link"
    ):
        grow(tmp_path / "t", tmp_path / "g", 5, link=True)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_table_grows_again(tmp_path):
    grow(write(tmp_path / "t"), tmp_path / "g", 5)
    assert grow(tmp_path / "g", tmp_path / "h", 50).capacity == 57


def test_converted_and_permuted_tables_keep_spare_rows_and_seq(tmp_path):
    write(tmp_path / "t")
    made = [
        convert(tmp_path / "t", tmp_path / "c", "int8").manifest,
        permute(tmp_path / "t", tmp_path / "p", seed=1),
    ]
    assert [(manifest.spare_rows, manifest.seq) for manifest in made] == [(2, 9)] * 2


def test_info_is_json_with_the_manifest_the_sizes_and_a_line_to_read(tmp_path, capsys):
    write(tmp_path / "t", "int8")
    main(["info", str(tmp_path / "t")])
    info = json.loads(capsys.readouterr().out)
    assert info["table_version"] == "v1" and info["capacity"] == 9 and len(info["shards"]) == 2
    assert (info["spare_rows"], info["row_bytes"]) == (2, 12)
    assert (info["vector_bytes"], info["live_bytes"]) == (7 * 12, 10 * 12)
    assert info["summary"] == (
        "7 x 4 int8, 12 bytes a row, 84 bytes; 2 spare rows, capacity 9, 120 bytes live"
    )
