"""A table of a checkpoint that TorchRec has saved on two ranks becomes a table, rows kept by number."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings.sharded.freezing import use_frozen_table
from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.load import load_table, open_table
from mim_torchrec.embeddings.table.external_dcp import CheckpointSource
from mim_torchrec.embeddings.table.format import Table, TableError
from mim_torchrec.embeddings.table.importing import import_vectors
from mim_torchrec.embeddings.table.main import main
from tests.distributed.freezing_model import DIM, ROWS, USERS, batch, build, look_up, optimizer_of, train
from tests.distributed.test_freezing_ranks import rows_of
from tests.ranks import run_ranks

NAMES = {
    "sparse.ebc.embedding_bags.user.weight": "sparse.ebc.user",
    "sparse.ebc.embedding_bags.item.weight": "sparse.ebc.item",
    "sparse.ec.embeddings.seen.weight": "sparse.ec.seen",
}


def save(folder: Path) -> dict[str, torch.Tensor]:
    model = build({"user": "row_wise", "item": "column_wise", "seen": "table_wise"})
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    return {key: rows_of(model, name) for key, name in NAMES.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    return folder, run_ranks(save, 2, folder)[0]


@pytest.mark.parametrize("key", NAMES)
def test_rows_of_every_sharding_are_imported_as_they_are(tmp_path, saved, key):
    folder, rows = saved
    main(["import", str(folder), "--key", f"model.{key}", "--out", str(tmp_path / "t")])
    table = Table.open(tmp_path / "t")
    assert table.manifest.by_number and table.manifest.dtype == "float32"
    assert torch.equal(table.rows_for(0, rows[key].shape[0]), rows[key])


def test_a_consumer_of_row_numbers_finds_the_rows_of_the_checkpoint(tmp_path, saved):
    folder, rows = saved
    key = "sparse.ec.embeddings.seen.weight"
    import_vectors(folder, tmp_path / "t", key=f"model.{key}")
    table = Table.open(tmp_path / "t")
    module = FrozenEmbeddingCollection([frozen_config(table, ["seen"])], device="cpu")
    load_table(module, table)
    numbers = torch.tensor([0, ROWS - 1, 5, 0])
    found = module(KeyedJaggedTensor(["seen"], numbers, lengths=torch.tensor([4])))["seen"].values()
    assert torch.equal(found, rows[key][numbers])


def use_imported(path: Path) -> None:
    model: DistributedModelParallel | nn.Module = build({})
    use_frozen_table(model, "sparse.ec.seen", open_table(path))
    assert torch.equal(look_up(model)[2][0], Table.open(path).rows_for(0, ROWS)[seen_rows()])


def seen_rows() -> torch.Tensor:
    return batch(999)["seen"].values()


def test_an_imported_table_takes_the_place_of_a_trained_one_in_a_sharded_model(tmp_path, saved):
    import_vectors(saved[0], tmp_path / "t", key="model.sparse.ec.embeddings.seen.weight")
    run_ranks(use_imported, 2, tmp_path / "t")


def test_ids_may_be_given_for_the_rows(tmp_path, saved):
    folder, rows = saved
    key = "sparse.ebc.embedding_bags.user.weight"
    ids = np.arange(USERS)[::-1] * 10 + 7
    np.save(tmp_path / "ids.npy", ids)
    import_vectors(folder, tmp_path / "t", key=f"model.{key}", ids=[tmp_path / "ids.npy"])
    table = Table.open(tmp_path / "t")
    assert not table.manifest.by_number
    assert torch.equal(table.read(torch.from_numpy(ids.copy())), rows[key])


def test_a_wrong_key_lists_the_tables(tmp_path, saved):
    with pytest.raises(TableError, match="has no table 'item'; name one with --key; there are") as refused:
        import_vectors(saved[0], tmp_path / "t", key="item")
    for key in NAMES:
        assert f"'model.{key}'" in str(refused.value)
    assert f"'model.sparse.ebc.embedding_bags.item.weight' ({ROWS} x {DIM} float32)" in str(refused.value)
    with pytest.raises(TableError, match="tensors of two dimensions; name one with --key"):
        import_vectors(saved[0], tmp_path / "t")


def test_the_only_table_needs_no_key_and_keeps_its_type(tmp_path):
    rows = torch.randn(9, 4).bfloat16()
    dcp.save({"rows": rows, "bias": torch.zeros(3)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    import_vectors(tmp_path / "saved", tmp_path / "t")
    table = Table.open(tmp_path / "t")
    assert table.manifest.dtype == "bfloat16" and torch.equal(table.rows_for(0, 9), rows)
    origin = table.manifest.encoder["imported"]
    assert origin["format"] == ["dcp"] and origin["columns"] == {"id": "row number", "vector": "rows"}
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["format_version"] == 3


def test_values_are_mapped_and_read_some_rows_at_a_time(tmp_path, monkeypatch):
    rows = torch.randn(1000, 64)
    dcp.save({"rows": rows}, checkpoint_id=tmp_path / "saved", no_dist=True)
    monkeypatch.setattr("mim_torchrec.embeddings.table.external.BATCH_BYTES", 64 * 4 * 100)
    source = CheckpointSource(tmp_path / "saved", "rows")
    file = next((tmp_path / "saved").glob("*.distcp"))
    start = source._blocks[0][2].data_ptr()
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in lines if line.endswith(str(file))]
    bounds = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    assert any(first <= start < last for first, last in bounds)
    parts = list(source.read())
    assert [part[0].numel() for part in parts] == [100] * 10
    assert torch.equal(torch.cat([vectors for _, vectors in parts]), rows)


def damaged(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:300])


REFUSED = {
    "a damaged file": (damaged, {}, "part of 'rows' is not readable|shorter than"),
    "no file": (lambda folder: next(folder.glob("*.distcp")).unlink(), {}, "part of 'rows' is not readable"),
    "damaged metadata": (lambda folder: (folder / ".metadata").write_bytes(b"x"), {}, "not readable as"),
    "a column": (lambda folder: None, {"vector_column": "v"}, "no columns; name its table with --key"),
    "ids of other rows": (
        lambda folder: np.save(folder / "ids.npy", np.arange(3)), {"ids": ["ids.npy"]}, "(3,) ids, but",
    ),
    "ids that are no integers": (
        lambda folder: np.save(folder / "ids.npy", np.ones(9)), {"ids": ["ids.npy"]}, "is float64, expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_refused(tmp_path, name):
    folder = tmp_path / "saved"
    dcp.save({"rows": torch.randn(9, 4)}, checkpoint_id=folder, no_dist=True)
    spoil, options, message = REFUSED[name]
    spoil(folder)
    options = {**options, **({"ids": [folder / "ids.npy"]} if "ids" in options else {})}
    with pytest.raises(TableError, match=message.replace("(3,)", r"\(3,\)")):
        import_vectors(folder, tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_other_sources_have_no_key(tmp_path):
    np.save(tmp_path / "v.npy", np.ones((2, 4), np.float32))
    with pytest.raises(TableError, match="--key names a table of a checkpoint"):
        import_vectors(tmp_path / "v.npy", tmp_path / "t", key="rows")
