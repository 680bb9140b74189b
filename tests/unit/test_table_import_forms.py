"""``mim table import`` takes what other teams have: ids of text, vectors of integers, wide columns, npz."""

import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mim_torchrec.embeddings.stable_ids import stable_ids
from mim_torchrec.embeddings.table.format import Table, TableError
from mim_torchrec.embeddings.table.importing import import_vectors
from mim_torchrec.embeddings.table.main import main
from tests.table_sources import CODES, IDS, VECTORS, npy, parquet

FLOAT = pa.float32()
SMALL = torch.randint(0, 256, (11, 8), generator=torch.Generator().manual_seed(4))


def vectors_of(path, ids) -> torch.Tensor:
    return Table.open(path).read_float(torch.as_tensor(ids))


@pytest.mark.parametrize("of", [pa.uint8(), pa.int16(), pa.uint16(), pa.int32()], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_of_integers_are_imported_as_floats(tmp_path, of, dtype):
    file = parquet(tmp_path / "a.parquet", vectors=SMALL, of=of)
    assert import_vectors(file, tmp_path / "t", dtype=dtype).dtype == dtype
    assert torch.equal(vectors_of(tmp_path / "t", IDS), SMALL.float())


@pytest.mark.parametrize("of", [torch.uint8, torch.int16, torch.int32])
def test_npy_of_integers_is_imported_as_floats(tmp_path, of):
    file, ids = npy(tmp_path, vectors=SMALL.to(of))
    import_vectors(file, tmp_path / "t", ids=[ids])
    assert torch.equal(vectors_of(tmp_path / "t", IDS), SMALL.float())


def test_a_list_of_floats_is_preferred_to_one_of_other_integers(tmp_path):
    tags = pa.array([[1, 2]] * 11, pa.list_(pa.int32()))
    import_vectors(parquet(tmp_path / "a.parquet", tags=tags), tmp_path / "t", dtype="float32")
    assert torch.equal(vectors_of(tmp_path / "t", IDS), VECTORS)


def wide(path, first: int = 0, of=FLOAT, columns: int = 8, names="emb_{}"):
    """Vectors as columns, in the alphabetical order of their names: emb_0, emb_1, emb_10, emb_11, emb_2."""
    values = torch.randn(11, columns, generator=torch.Generator().manual_seed(7))
    made = {names.format(first + k): pa.array(values[:, k].numpy()).cast(of) for k in range(columns)}
    table = pa.table({"item": IDS.numpy(), **dict(sorted(made.items()))})
    pq.write_table(table, path, row_group_size=4)
    return values


@pytest.mark.parametrize("first", [0, 1])
def test_wide_columns_are_put_side_by_side_in_the_order_of_their_numbers(tmp_path, first):
    values = wide(tmp_path / "a.parquet", first, columns=12)
    main(["import", str(tmp_path / "a.parquet"), "--vector-column", "emb_*", "--dtype", "float32",
          "--out", str(tmp_path / "t")])  # fmt: skip
    assert torch.equal(vectors_of(tmp_path / "t", IDS), values)
    assert Table.open(tmp_path / "t").manifest.encoder["imported"]["columns"]["vector"] == "emb_*"


def test_wide_columns_of_float64_are_imported(tmp_path):
    values = wide(tmp_path / "a.parquet", of=pa.float64(), names="v{}_x")
    import_vectors(tmp_path / "a.parquet", tmp_path / "t", vector_column="v*_x", dtype="float32")
    assert torch.equal(vectors_of(tmp_path / "t", IDS), values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns("emb_3"), r"columns 'emb_\*' are not numbered from 0 or 1 without gaps"),
        (lambda t: t.drop_columns(["emb_0", "emb_1"]), "are not numbered from 0 or 1 without gaps"),
        (lambda t: t.rename_columns([n.replace("emb", "e") for n in t.column_names]), r"gaps \(none\)"),
        (lambda t: t.set_column(3, "emb_2", t["emb_2"].cast(pa.float64())), "are double, float, exp"),
        (lambda t: t.set_column(3, "emb_2", pa.array([None] + [1.0] * 10, pa.float32())),
         r"row group 0 row 0, item id 50, column 'emb_\*': the value of 'emb_2' is null"),
        (lambda t: t.set_column(3, "emb_2", pa.array([1.0] * 10 + [float("nan")], pa.float32())),
         r"row group 2 row 2, item id 9, column 'emb_\*': the vector holds NaN"),
    ],
)  # fmt: skip
def test_wrong_wide_columns_are_refused(tmp_path, change, message):
    wide(tmp_path / "a.parquet")
    pq.write_table(change(pq.read_table(tmp_path / "a.parquet")), tmp_path / "a.parquet", row_group_size=4)
    with pytest.raises(TableError, match=message):
        import_vectors(tmp_path / "a.parquet", tmp_path / "t", vector_column="emb_*")


TEXTS = [f"sku-{item}" for item in IDS.tolist()]
UUIDS = [uuid.UUID(int=item % 2**128) for item in IDS.tolist()]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_ids_of_text_become_their_stable_numbers(tmp_path, kind):
    file = parquet(tmp_path / "a.parquet", ids=TEXTS, id_type=pa.string())
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "id", table["id"].cast(kind)), file)
    import_vectors(file, tmp_path / "t", dtype="float32")
    assert torch.equal(vectors_of(tmp_path / "t", stable_ids(pa.array(TEXTS)).to_numpy().copy()), VECTORS)


def test_ids_of_uuids_become_the_numbers_of_their_text(tmp_path):
    file = parquet(tmp_path / "a.parquet", ids=[one.bytes for one in UUIDS], id_type=pa.binary(16))
    import_vectors(file, tmp_path / "t", dtype="float32")
    numbers = stable_ids(pa.array([str(one) for one in UUIDS])).to_numpy().copy()
    assert torch.equal(vectors_of(tmp_path / "t", numbers), VECTORS)


def test_ids_above_2_to_63_wrap_around(tmp_path):
    ids = [2**64 - 1 - k for k in range(11)]
    import_vectors(
        parquet(tmp_path / "a.parquet", ids=ids, id_type=pa.uint64()), tmp_path / "t", dtype="float32"
    )
    assert torch.equal(vectors_of(tmp_path / "t", [-1 - k for k in range(11)]), VECTORS)
    file, ids_file = npy(tmp_path, np.array(ids, np.uint64))
    import_vectors(file, tmp_path / "u", ids=[ids_file], dtype="float32")
    assert torch.equal(vectors_of(tmp_path / "u", [-1 - k for k in range(11)]), VECTORS)


def test_npy_may_have_ids_of_text(tmp_path):
    file, ids_file = npy(tmp_path, np.array(TEXTS))
    import_vectors(file, tmp_path / "t", ids=[ids_file], dtype="float32")
    assert torch.equal(vectors_of(tmp_path / "t", stable_ids(pa.array(TEXTS)).to_numpy().copy()), VECTORS)


def test_ids_of_text_in_one_file_and_numbers_in_another_are_refused(tmp_path):
    files = [
        parquet(tmp_path / "a.parquet", ids=TEXTS, id_type=pa.string()),
        parquet(tmp_path / "b.parquet"),
    ]
    with pytest.raises(TableError, match=r"b\.parquet: ids are integers, those of .*a\.parquet are text"):
        import_vectors(files, tmp_path / "t")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_imported(tmp_path, save):
    save(tmp_path / "a.npz", ids=IDS, vectors=VECTORS)
    import_vectors(tmp_path / "a.npz", tmp_path / "t", dtype="float32")
    assert torch.equal(vectors_of(tmp_path / "t", IDS), VECTORS)
    save(tmp_path / "b.npz", sku=np.array(TEXTS), emb=CODES)
    made = import_vectors(tmp_path / "b.npz", tmp_path / "u", id_column="sku", vector_column="emb")
    assert made.dtype == "int8" and made.encoder["imported"]["format"] == ["npz"]
    assert torch.equal(
        vectors_of(tmp_path / "u", stable_ids(pa.array(TEXTS)).to_numpy().copy()), CODES.float()
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": IDS}, r"a\.npz: no array \['vectors'\], there are \['ids'\]; .*--vector-column"),
        ({"ids": IDS[:3], "vectors": VECTORS}, "3 ids 'ids', but 11 vectors"),
        ({"ids": IDS, "vectors": np.array([None] * 11)}, r"a\.npz: not a readable \.npz file"),
        ({"ids": IDS, "vectors": np.array(["a"] * 11)}, r"a\.npz: not arrays of numbers"),
        ({"ids": IDS, "vectors": VECTORS.numpy().astype(">f4")}, r"a\.npz: not arrays of numbers"),
    ],
)
def test_wrong_npz_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(TableError, match=message):
        import_vectors(tmp_path / "a.npz", tmp_path / "t")


def test_a_part_without_rows_is_left_out(tmp_path):
    (tmp_path / "d" / "dt=2026-11-01").mkdir(parents=True)
    parquet(tmp_path / "d" / "a.parquet", IDS[:0], VECTORS[:0])
    parquet(tmp_path / "d" / "dt=2026-11-01" / "b.parquet")
    assert import_vectors(tmp_path / "d", tmp_path / "t").rows == 11
