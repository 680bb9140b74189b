"""Manifests that somebody has damaged or made up: a clear error, and no file outside the table is read."""

import json
import os
from pathlib import Path

import pytest
import torch

from mim_torchrec.embeddings.table.format import Table, TableError, TableWriter


@pytest.fixture
def table(tmp_path) -> Path:
    for name in ("table", "other"):
        writer = TableWriter(tmp_path / name, table_version="v1", dim=2, dtype="float32", encoder={})
        writer.write_shard(torch.tensor([1, 2]), torch.ones(2, 2))
        writer.finish()
    return tmp_path / "table"


def shard_of(table: Path) -> str:
    return json.loads((table / "manifest.json").read_text())["shards"][0]["file"]


def change(table: Path, **words) -> None:
    """Change fields of the manifest; `shard` changes those of its shard."""
    raw = json.loads((table / "manifest.json").read_text())
    raw["shards"][0].update(words.pop("shard", {}))
    (table / "manifest.json").write_text(json.dumps(raw | words))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("place", ["../other/{}", "{root}/other/{}", "./{}", "", "..", "a\0b", "a\\b"])
def test_a_shard_outside_the_table_is_refused(table, place, verify):
    change(table, shard={"file": place.format(shard_of(table), root=table.parent)})
    with pytest.raises(TableError, match="is no name of a file in the table"):
        Table.open(table, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_link_out_of_the_table_is_refused(table, verify):
    shard = table / shard_of(table)
    shard.unlink()
    shard.symlink_to(table.parent / "other" / shard.name)
    with pytest.raises(TableError, match="is outside the table"):
        Table.open(table, verify=verify)


def test_links_within_a_table_and_to_a_table_are_followed(table):
    shard = table / shard_of(table)
    os.rename(shard, table / "kept")
    shard.symlink_to("kept")
    (table.parent / "link").symlink_to(table)
    assert Table.open(table.parent / "link").manifest.rows == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"shards": 7}, "shards is int, expected list"),
        ({"shards": [7]}, r"shards\[0\] is int, expected an object"),
        ({"shards": [None]}, "expected an object"),
        ({"shard": {"rows": "2"}}, r"shards\[0\].rows is str, expected int"),
        ({"shard": {"file": None}}, r"shards\[0\].file is NoneType, expected str"),
        ({"shard": {"rows": -2}}, "which is negative"),
        ({"rows": "2"}, "rows is str, expected int"),
        ({"rows": True}, "rows is bool, expected int"),
        ({"capacity": None}, "capacity is NoneType, expected int"),
        ({"dim": 2.0}, "dim is float, expected int"),
        ({"dtype": []}, "dtype is list, expected str"),
        ({"table_version": 1}, "table_version is int, expected str"),
        ({"encoder": []}, "encoder is list, expected dict"),
        ({"seq": "0"}, "seq is str, expected int"),
        ({"format_version": [2]}, "format_version"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(table, words, said):
    change(table, **words)
    with pytest.raises(TableError, match=said):
        Table.open(table)


def test_json_that_is_too_deep_is_no_json(table):
    (table / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(TableError, match="not JSON"):
        Table.open(table)
