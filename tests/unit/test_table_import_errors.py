"""What ``mim table import`` refuses: the place is named and nothing is left."""

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import save_file

from mim_torchrec.embeddings.table.format import DuplicateId, NonFiniteVector, Table, TableError
from mim_torchrec.embeddings.table.importing import import_vectors
from mim_torchrec.errors import OutputExists
from tests.table_sources import CODES, IDS, VECTORS, npy, parquet


def with_value(row, column, value, of=VECTORS):
    rows = of.tolist()
    rows[row][column] = value
    return rows


def with_row(row, value):
    rows = VECTORS.tolist()
    rows[row] = value
    return rows


WRONG_ROWS = {
    "null id": (
        {"ids": [None if item == 20 else item for item in IDS.tolist()]},
        r"a.parquet: row group 1 row 0, column 'id': there is no id \(null\)",
    ),
    "null vector": (
        {"vectors": with_row(6, None)},
        r"row group 1 row 2, item id 1000, column 'v': there is no vector \(null\)",
    ),
    "null first vector": (
        {"vectors": with_row(0, None)},
        r"row group 0 row 0, column 'v': there is no vector",
    ),
    "null inside": (
        {"vectors": with_value(9, 3, None)},
        r"row group 2 row 1, item id 8, column 'v': a value of the vector is null",
    ),
    "uneven": (
        {"vectors": with_row(5, [1.0] * 7)},
        r"row group 1 row 1, item id 4, column 'v': the vector has 7 values, the first of the file has 8",
    ),
    "empty vector": ({"vectors": [[]] * 11}, r"row group 0 row 0, column 'v': the vector has no values"),
    "nan": (
        {"vectors": with_value(10, 7, float("nan"))},
        r"row group 2 row 2, item id 9, column 'v': the vector holds NaN or infinity",
    ),
    "infinity": (
        {"vectors": with_value(1, 0, float("-inf"))},
        r"row group 0 row 1, item id -7, column 'v': the vector holds NaN or infinity",
    ),
    "above float32": (
        {"vectors": with_value(4, 2, 1e39), "of": pa.float64()},
        r"row group 1 row 0, item id 20, column 'v': the vector is too large for float32",
    ),
    "above float16": (
        {"vectors": with_value(8, 2, 1e6)},
        r"row group 2 row 0, item id 77, column 'v': the vector is too large for float16; .*--dtype float32",
    ),
    "id twice": (
        {"ids": [20 if item == 9 else item for item in IDS.tolist()]},
        r"item id 20 has more than one vector: .*row group 1 row 0, .*a.parquet: row group 2 row 2",
    ),
    "dim not a multiple of 4": (
        {"vectors": CODES[:, :6]},
        r"a.parquet, column 'v': int8 rows need a dim that is a multiple of 4, found 6; .*--dtype float16",
    ),
    "no rows": ({"ids": [], "vectors": []}, r"a.parquet: there are no rows to import"),
    "ids of floats": (
        {"ids": [float(item) for item in IDS.tolist()], "id_type": pa.float64()},
        r"a.parquet: 0 columns \[\] may be the ids \(integers, .*\); .* --id-column; .*'id' \(double\)",
    ),
    "vectors of int64": (
        {"vectors": CODES.long(), "of": pa.int64()},
        r"a.parquet: 0 columns \[\] may be the vectors .*; there are 'id' \(int64\), 'v' \(list<.*int64>\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_a_wrong_row_or_column_is_refused_by_its_place_and_nothing_is_left(tmp_path, wrong):
    rows, message = WRONG_ROWS[wrong]
    kind = DuplicateId if wrong == "id twice" else TableError
    if wrong in ("nan", "infinity", "above float32", "above float16"):
        kind = NonFiniteVector
    with pytest.raises(kind, match=message):
        import_vectors(parquet(tmp_path / "a.parquet", **rows), tmp_path / "t", rows_per_shard=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("wrong", ["nan", "above float16"])
def test_a_wrong_vector_after_shards_were_written_in_order_leaves_nothing(tmp_path, wrong):
    order = IDS.argsort()
    vectors = VECTORS[order]
    vectors[10, 0] = float("nan") if wrong == "nan" else 1e6
    file = parquet(tmp_path / "a.parquet", IDS[order], vectors)
    with pytest.raises(NonFiniteVector, match=rf"row group 2 row 2, item id {1 << 40}, column 'v'"):
        import_vectors(file, tmp_path / "t", rows_per_shard=2, table_version="v")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_an_id_in_two_files_is_refused_naming_both(tmp_path):
    parquet(tmp_path / "a.parquet", IDS[:6], VECTORS[:6])
    file, ids_file = npy(tmp_path, IDS[5:], VECTORS[5:])
    message = r"item id 4 has more than one vector: .*a.parquet: row group 1 row 1, .*vectors.npy: row 0"
    with pytest.raises(DuplicateId, match=message):
        import_vectors([tmp_path / "a.parquet", file], tmp_path / "t", ids=[ids_file])


def test_columns_that_may_be_several_are_named_as_candidates(tmp_path):
    file = parquet(tmp_path / "a.parquet", shop=pa.array(IDS.tolist()))
    with pytest.raises(TableError, match=r"2 columns \['id', 'shop'\] may be the ids .*--id-column"):
        import_vectors(file, tmp_path / "t")


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        (
            "id_column",
            "item",
            r"a.parquet: no column 'item' of ids; there are 'id' \(int64\), 'v' .*--id-column",
        ),
        ("vector_column", "w", r"a.parquet: no column 'w' of vectors; .*--vector-column"),
        ("id_column", "v", r"column 'v' is list<element: float>, but ids must be integers, text or UUIDs"),
        ("vector_column", "id", r"column 'id' is int64, but vectors must be lists of int8, float16"),
    ],
)
def test_a_column_asked_for_that_is_absent_or_of_another_type_is_refused(tmp_path, option, name, message):
    with pytest.raises(TableError, match=message):
        import_vectors(parquet(tmp_path / "a.parquet"), tmp_path / "t", **{option: name})


def test_files_of_a_directory_must_have_the_columns_of_the_first(tmp_path):
    (tmp_path / "d").mkdir()
    parquet(tmp_path / "d" / "a.parquet", IDS[:4], VECTORS[:4])
    parquet(tmp_path / "d" / "b.parquet", IDS[4:], VECTORS[4:], names=("item", "v"))
    with pytest.raises(TableError, match=r"b.parquet: no column 'id' of ids; there are 'item' \(int64\)"):
        import_vectors(tmp_path / "d", tmp_path / "t")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (VECTORS[5:, :4], r"b.parquet: vectors of 4 values, those of .*a.parquet have 8"),
        (CODES[5:], r"b.parquet: vectors are int8, those of .*a.parquet float32; codes and floats"),
    ],
)
def test_files_of_another_length_or_kind_of_vector_are_refused(tmp_path, second, message):
    files = [
        parquet(tmp_path / "a.parquet", IDS[:5], VECTORS[:5]),
        parquet(tmp_path / "b.parquet", IDS[5:], second),
    ]
    with pytest.raises(TableError, match=message):
        import_vectors(files, tmp_path / "t")


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (IDS[:-1], VECTORS, r"ids.npy: 10 ids 'ids', but 11 vectors 'vectors' in .*vectors.npy"),
        (IDS.float(), VECTORS, r"ids.npy: 'ids' is float32 \(11,\), expected the ids as integers"),
        (IDS[:, None], VECTORS, r"ids.npy: 'ids' is int64 \(11, 1\), expected the ids as integers"),
        (
            IDS,
            VECTORS[:, 0],
            r"vectors.npy: 'vectors' is float32 \(11,\), expected vectors \(num_rows, dim\)",
        ),
        (
            IDS,
            CODES.long(),
            r"vectors.npy: 'vectors' is int64 \(11, 8\), expected vectors .* of int8, float16",
        ),
        (IDS[:0], VECTORS[:0], r"vectors.npy: there are no rows to import"),
        (IDS, np.array(["a"] * 11), r"vectors.npy: not a readable .npy file of numbers"),
        (IDS, np.array([None] * 11), r"vectors.npy: not a readable .npy file of numbers"),
    ],
)
def test_wrong_npy_files_are_refused(tmp_path, ids, vectors, message):
    file, ids_file = npy(tmp_path, ids, vectors)
    with pytest.raises(TableError, match=message):
        import_vectors(file, tmp_path / "t", ids=[ids_file])
    assert not (tmp_path / "t.partial").exists()


def test_npy_without_ids_and_ids_without_npy_are_refused(tmp_path):
    file, ids_file = npy(tmp_path)
    with pytest.raises(TableError, match=r"1 .npy files of vectors and 0 of ids; .*--ids FILE"):
        import_vectors(file, tmp_path / "t")
    with pytest.raises(TableError, match=r"0 .npy files of vectors and 1 of ids"):
        import_vectors(parquet(tmp_path / "a.parquet"), tmp_path / "t", ids=[ids_file])


def test_a_column_named_for_npy_is_refused(tmp_path):
    file, ids_file = npy(tmp_path)
    with pytest.raises(TableError, match=r"vectors.npy: a .npy file has no columns"):
        import_vectors(file, tmp_path / "t", ids=[ids_file], id_column="ids")


def test_a_tensor_that_is_not_there_is_refused_naming_those_that_are(tmp_path):
    save_file({"ids": IDS, "emb": VECTORS}, tmp_path / "a.safetensors")
    with pytest.raises(
        TableError, match=r"no tensor \['vectors'\], there are \['emb', 'ids'\]; .*--vector-column"
    ):
        import_vectors(tmp_path / "a.safetensors", tmp_path / "t")


@pytest.mark.parametrize("suffix", ["parquet", "safetensors", "npy", "npz"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"something else, and long enough to be looked at")
    np.save(tmp_path / "ids.npy", IDS)
    ids = [tmp_path / "ids.npy"] if suffix == "npy" else []
    with pytest.raises(TableError, match=rf"a.{suffix}: not a readable"):
        import_vectors(tmp_path / f"a.{suffix}", tmp_path / "t", ids=ids)


def test_sources_that_are_absent_unknown_or_empty_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("id,v\n")
    for path, message in (
        ("nothing.parquet", "nothing.parquet: not found"),
        ("empty", r"empty: there are no .parquet files"),
        ("a.csv", r"a.csv: not a .parquet, .npy, .npz or .safetensors file"),
    ):
        with pytest.raises(TableError, match=message):
            import_vectors(tmp_path / path, tmp_path / "t")
    with pytest.raises(TableError, match="no source was given"):
        import_vectors([], tmp_path / "t")


def test_an_existing_table_is_kept(tmp_path):
    file = parquet(tmp_path / "a.parquet")
    import_vectors(file, tmp_path / "t", table_version="first")
    with pytest.raises(OutputExists, match="exists; choose another"):
        import_vectors(file, tmp_path / "t", table_version="second")
    Table.open(tmp_path / "t", expected_version="first")


@pytest.mark.parametrize(
    ("option", "message"),
    [({"spare_rows": -1}, "--spare-rows is -1"), ({"table_version": " "}, "table_version given is empty")],
)
def test_senseless_options_are_refused(tmp_path, option, message):
    with pytest.raises(TableError, match=message):
        import_vectors(parquet(tmp_path / "a.parquet"), tmp_path / "t", **option)
