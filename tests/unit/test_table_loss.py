"""Vectors that a storage type would lose are refused wherever vectors are stored; others pass."""

import json

import numpy as np
import pytest
import torch

from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingCollection, frozen_config
from mim_torchrec.embeddings.sharded.live import ItemIndex, apply_window, update_items
from mim_torchrec.embeddings.sharded.load import load_table
from mim_torchrec.embeddings.table.convert import convert
from mim_torchrec.embeddings.table.format import LossyVector, Table, TableWriter, decode, encode
from mim_torchrec.embeddings.table.importing import import_vectors
from mim_torchrec.embeddings.table.main import main
from mim_torchrec.embeddings.table.quantize import LOSS_LIMIT, relative_errors
from mim_torchrec.embeddings.windows.window import Window

DIM = 8
IDS = torch.tensor([10, 20, 30])


def vectors(small: float = 1e-9) -> torch.Tensor:
    """Three rows, of which the second is small."""
    made = torch.nn.functional.normalize(torch.arange(1.0, 1 + 3 * DIM).reshape(3, DIM), dim=1)
    made[1] *= small
    return made


def files(folder, values: np.ndarray):
    np.save(folder / "v.npy", values)
    np.save(folder / "i.npy", IDS.numpy())
    return folder / "v.npy", {"ids": [folder / "i.npy"]}


def table(path, dtype: str = "float32", small: float = 1e-9) -> Table:
    writer = TableWriter(path, table_version="v", dim=DIM, dtype=dtype, encoder={}, spare_rows=2)
    writer.write_shard(IDS, vectors(small))
    writer.finish()
    return Table.open(path)


def live(path) -> tuple[FrozenEmbeddingCollection, ItemIndex]:
    made = table(path, "float16", small=1)
    module = FrozenEmbeddingCollection([frozen_config(made, ["item"])], device="cpu")
    load_table(module, made)
    return module, ItemIndex.of(made)


def window(dtype: str) -> Window:
    return Window.of(IDS, vectors(), table_version="v", seq=1, window_id="w", dtype=dtype)


def import_float16(folder):
    path, ids = files(folder, vectors().numpy())
    import_vectors(path, folder / "out", **ids)


def import_int8(folder):
    path, ids = files(folder, vectors().numpy())
    import_vectors(path, folder / "out", dtype="int8", **ids)


def import_float64(folder):
    path, ids = files(folder, vectors().double().numpy() * np.array([[1], [1e-40], [1]]))
    import_vectors(path, folder / "out", dtype="float32", **ids)


def update_live(folder):
    update_items(*live(folder / "live"), IDS, vectors(), table_version="v", seq=1)


def apply_live(folder):
    apply_window(*live(folder / "live"), window("float32"))


REFUSED = {
    "import": (import_float16, r"v.npy: row 1, column 'vectors', item id 20: float16 .* by 100%"),
    "import as int8": (import_int8, "item id 20: int8"),
    "import of float64": (import_float64, "item id 20: float32"),
    "a shard": (lambda folder: table(folder / "out", "float16"), "item id 20: float16"),
    "convert": (lambda folder: convert(table(folder / "a").path, folder / "out", "float16"), "row 2, item"),
    "convert to int8": (lambda folder: convert(table(folder / "a").path, folder / "out", "int8"), "row 2"),
    "a window": (lambda folder: window("float16"), "window 1, row 1, item id 20: float16"),
    "a window of a table of another type": (apply_live, "window 1, row 1, item id 20: float16"),
    "an update": (update_live, "window 1, row 1, item id 20: float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_vector_that_would_be_lost_is_refused_by_id_with_the_way_out(tmp_path, name):
    work, message = REFUSED[name]
    with pytest.raises(LossyVector, match=message) as refused:
        work(tmp_path)
    assert "float32" in str(refused.value) and "%" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_refused_update_changes_nothing(tmp_path):
    module, index = live(tmp_path / "live")
    before = module.frozen_tables()["mm"].store.tensor.clone()
    for work in (
        lambda: update_items(module, index, torch.tensor([10, 99, 30]), vectors(), table_version="v", seq=1),
        lambda: apply_window(module, index, window("float32")),
    ):
        with pytest.raises(LossyVector):
            work()
    assert torch.equal(module.frozen_tables()["mm"].store.tensor, before)
    assert len(index) == 3 and index.spare_rows == 2


@pytest.mark.parametrize("dtype", LOSS_LIMIT)
@pytest.mark.parametrize("dim", [8, 128, 1536])
def test_normalized_vectors_with_tiny_values_and_zero_and_constant_rows_pass(tmp_path, dtype, dim):
    made = torch.nn.functional.normalize(
        torch.randn(50, dim, generator=torch.Generator().manual_seed(0)), dim=1
    )
    made[:, ::3] *= 1e-9
    made[1], made[2] = 0, 0.3
    made[3] = 1e-4
    made[3, 1] = 1  # one large value
    writer = TableWriter(tmp_path / "t", table_version="v", dim=dim, dtype=dtype, encoder={})
    writer.write_shard(torch.arange(50), made)
    writer.finish()
    found = Table.open(tmp_path / "t").read_float(torch.arange(50))
    assert float(relative_errors(made, encode(made, dtype), dtype).max()) <= LOSS_LIMIT[dtype]
    assert not found[1].any()
    torch.testing.assert_close(found[2], made[2], rtol=4e-3, atol=0)


def test_float32_keeps_what_float16_loses(tmp_path):
    path, ids = files(tmp_path, vectors().numpy())
    import_vectors(path, tmp_path / "t", dtype="float32", **ids)
    assert torch.equal(Table.open(tmp_path / "t").read_float(IDS), vectors())


def test_errors_are_relative_to_the_length_whatever_it_is():
    made = torch.tensor([[3e-30, 4e-30], [3e30, 4e30], [0.0, 0.0]])
    zeros = torch.zeros_like(made)
    assert relative_errors(made, zeros, "float32").tolist() == [1.0, 1.0, 0.0]
    assert relative_errors(made, made, "float32").tolist() == [0.0, 0.0, 0.0]
    assert relative_errors(zeros, made, "float32")[0] == float("inf")
    assert relative_errors(made[:0], made[:0], "float32").shape == (0,)
    half = torch.randn(9000, 4)
    expected = (decode(half.half(), "float16").double() - half).norm(dim=1) / half.double().norm(dim=1)
    torch.testing.assert_close(relative_errors(half, half.half(), "float16"), expected)


def test_the_command_refuses_in_one_line(tmp_path):
    path, ids = files(tmp_path, vectors().numpy())
    with pytest.raises(LossyVector) as refused:
        main(["import", str(path), "--ids", str(ids["ids"][0]), "--out", str(tmp_path / "out")])
    assert "--dtype float32" in str(refused.value) and "\n" not in str(refused.value)
    main(
        [
            "import",
            str(path),
            "--ids",
            str(ids["ids"][0]),
            "--out",
            str(tmp_path / "out"),
            "--dtype",
            "float32",
        ]
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dtype"] == "float32"
