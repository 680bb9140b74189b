"""``mim table import``: external vectors become a table exactly, in any order, or are refused by place."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from mim_torchrec.embeddings.table import arranging, external, external_parquet, external_tensors
from mim_torchrec.embeddings.table.format import DuplicateId, NonFiniteVector, Table, TableError
from mim_torchrec.embeddings.table.importing import content_version, import_vectors
from mim_torchrec.embeddings.table.main import main
from mim_torchrec.embeddings.table.quantize import decode, encode, fuse_codes
from mim_torchrec.errors import OutputExists

IDS = torch.tensor([50, -7, 3, 1 << 40, 20, 4, 1000, 12, 77, 8, 9])
VECTORS = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
CODES = torch.randint(-128, 128, (11, 8), generator=torch.Generator().manual_seed(1)).to(torch.int8)
LISTS = {
    "list": pa.list_,
    "large_list": pa.large_list,
    "fixed_size_list": lambda of: pa.list_(of, 8),
}


def parquet(
    path, ids=IDS, vectors=VECTORS, *, of=None, make=pa.list_, id_type=None, names=("id", "v"), **more
):
    """Write a Parquet file of ids and vectors, given as tensors or as lists for Arrow to convert."""
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    of = of or (
        pa.int8() if isinstance(vectors, torch.Tensor) and vectors.dtype == torch.int8 else pa.float32()
    )
    rows = vectors.numpy() if isinstance(vectors, torch.Tensor) else vectors
    if of == pa.float16():
        rows = [None if row is None else np.asarray(row, np.float16) for row in rows]
    columns = {
        names[0]: pa.array(ids, id_type or pa.int64()),
        names[1]: pa.array(list(rows), make(of)),
    }
    pq.write_table(pa.table({**columns, **more}), path, row_group_size=4)
    return path


def npy(path, ids=IDS, vectors=VECTORS):
    np.save(path / "vectors.npy", vectors)
    np.save(path / "ids.npy", ids)
    return path / "vectors.npy", path / "ids.npy"


def assert_holds(path, ids, vectors, dtype):
    """The table has these vectors and no others, in shards of consecutive ascending ids."""
    table = Table.open(path)
    expected = dict(zip(ids.tolist(), decode(encode(vectors.float(), dtype), dtype).tolist(), strict=True))
    own = table.row_index().ids
    assert own.tolist() == sorted(expected)
    assert table.read_float(own).tolist() == [expected[item] for item in sorted(expected)]
    assert torch.cat([part for _, part in table.spans(1, 1 + len(ids))]).equal(table.read(own))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("make", LISTS)
@pytest.mark.parametrize("of", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_parquet_of_every_list_and_float_type_is_stored_in_every_type(tmp_path, of, make, dtype):
    vectors = VECTORS.half() if of == pa.float16() else VECTORS
    file = parquet(tmp_path / "a.parquet", vectors=vectors, of=of, make=LISTS[make])
    manifest = import_vectors(file, tmp_path / "t", dtype=dtype)
    assert (manifest.rows, manifest.dim, manifest.dtype) == (11, 8, dtype)
    assert_holds(tmp_path / "t", IDS, vectors, dtype)


@pytest.mark.parametrize("make", LISTS)
def test_int8_without_a_scale_is_stored_exactly_by_default(tmp_path, make):
    file = parquet(tmp_path / "a.parquet", vectors=CODES, make=LISTS[make])
    assert import_vectors(file, tmp_path / "t").dtype == "int8"
    table = Table.open(tmp_path / "t")
    assert torch.equal(table.read_float(IDS), CODES.float())
    assert torch.equal(table.read(IDS), fuse_codes(CODES))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_int8_without_a_scale_in_another_type_is_the_codes_as_floats(tmp_path, dtype):
    import_vectors(parquet(tmp_path / "a.parquet", vectors=CODES), tmp_path / "t", dtype=dtype)
    assert torch.equal(Table.open(tmp_path / "t").read_float(IDS), CODES.float())


def test_floats_are_stored_as_float16_by_default(tmp_path):
    assert import_vectors(parquet(tmp_path / "a.parquet"), tmp_path / "t").dtype == "float16"


def test_the_layout_of_taobao_mm_is_imported_by_the_command_without_options(tmp_path, capsys):
    codes = torch.randint(-128, 128, (20, 128), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(3))[:20]
    parquet(tmp_path / "scl.parquet", ids, codes, names=("205", "205_c"))
    main(["import", str(tmp_path / "scl.parquet"), "--out", str(tmp_path / "t"), "--spare-rows", "5"])
    printed = capsys.readouterr().out
    assert "ids from '205', vectors from '205_c' (int8)" in printed
    assert "20 x 128 int8, 136 bytes a row, 2.72 kB; 5 spare rows, capacity 25" in printed
    table = Table.open(tmp_path / "t")
    assert torch.equal(table.read_float(ids), codes.float())
    assert table.manifest.spare_rows == 5 and table.manifest.seq == 0


@pytest.mark.parametrize(
    "vectors", [VECTORS, VECTORS.half(), VECTORS.double(), CODES], ids=lambda v: str(v.dtype)
)
@pytest.mark.parametrize("id_type", [np.int64, np.int32, np.uint64])
def test_npy_with_ids_beside_it_is_imported(tmp_path, vectors, id_type):
    ids = torch.tensor([50, 7, 3, 2**31 - 1, 20, 4, 1000, 12, 77, 8, 9])
    file, ids_file = npy(tmp_path, ids.numpy().astype(id_type), vectors)
    main(["import", str(file), "--ids", str(ids_file), "--dtype", "float32", "--out", str(tmp_path / "t")])
    assert_holds(tmp_path / "t", ids, vectors, "float32")


def test_several_npy_have_their_ids_in_the_same_order(tmp_path):
    files = []
    for name, own in (("a", slice(0, 5)), ("b", slice(5, 11))):
        (tmp_path / name).mkdir()
        files.append(npy(tmp_path / name, IDS[own], VECTORS[own]))
    (a, a_ids), (b, b_ids) = files
    main(["import", str(a), str(b), "--ids", str(a_ids), "--ids", str(b_ids), "--out", str(tmp_path / "t")])
    assert_holds(tmp_path / "t", IDS, VECTORS, "float16")


def test_npy_in_the_order_of_columns_is_read_as_the_same_vectors(tmp_path):
    file, ids_file = npy(tmp_path, vectors=np.asfortranarray(VECTORS.numpy()))
    import_vectors(file, tmp_path / "t", ids=[ids_file], dtype="float32")
    assert_holds(tmp_path / "t", IDS, VECTORS, "float32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_safetensors_are_imported(tmp_path, dtype):
    vectors = CODES if dtype == torch.int8 else VECTORS.to(dtype)
    save_file({"ids": IDS, "vectors": vectors}, tmp_path / "a.safetensors")
    main(["import", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "t"), "--dtype", "float32"])
    assert_holds(tmp_path / "t", IDS, vectors, "float32")


def test_tensors_of_other_names_are_given_by_options(tmp_path):
    save_file({"item": IDS.int().long(), "emb": VECTORS}, tmp_path / "a.safetensors")
    names = ["--id-column", "item", "--vector-column", "emb"]
    main(["import", str(tmp_path / "a.safetensors"), *names, "--out", str(tmp_path / "t")])
    assert_holds(tmp_path / "t", IDS.int().long(), VECTORS, "float16")


@pytest.mark.parametrize("source", ["parquet", "npy", "safetensors"])
@pytest.mark.parametrize("rows_per_shard", [1, 3, 7, 1000])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_any_order_shard_and_batch_size_equals_a_dictionary(
    tmp_path, monkeypatch, source, rows_per_shard, in_order, batch
):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randperm(10_000, generator=generator)[:50] - 5000
    ids = ids.sort().values if in_order else ids
    vectors = torch.randn(50, 4, generator=generator)
    for module in (arranging, external, external_parquet, external_tensors):
        monkeypatch.setattr(module, "CHUNK", batch)
    if source == "parquet":
        options = {"paths": parquet(tmp_path / "a.parquet", ids, vectors)}
    elif source == "npy":
        file, ids_file = npy(tmp_path, ids, vectors)
        options = {"paths": file, "ids": [ids_file]}
    else:
        save_file({"ids": ids, "vectors": vectors}, tmp_path / "a.safetensors")
        options = {"paths": tmp_path / "a.safetensors"}
    manifest = import_vectors(out=tmp_path / "t", rows_per_shard=rows_per_shard, dtype="float32", **options)
    sizes = [shard.rows for shard in manifest.shards]
    assert sum(sizes) == 50 and set(sizes[:-1]) <= {rows_per_shard} and max(sizes) <= rows_per_shard
    assert_holds(tmp_path / "t", ids, vectors, "float32")
    assert not (tmp_path / "t.partial").exists() and not (tmp_path / "t" / "arranged").exists()


@pytest.mark.parametrize("vectors", [VECTORS.half(), VECTORS.bfloat16(), CODES], ids=lambda v: str(v.dtype))
def test_rows_are_arranged_in_the_type_they_came_in(tmp_path, vectors):
    save_file({"ids": IDS, "vectors": vectors}, tmp_path / "a.safetensors")
    import_vectors(tmp_path / "a.safetensors", tmp_path / "t", dtype="float32", rows_per_shard=2)
    assert_holds(tmp_path / "t", IDS, vectors, "float32")


def test_a_directory_and_files_of_several_formats_make_one_table(tmp_path):
    (tmp_path / "parts" / "day=2").mkdir(parents=True)
    parquet(tmp_path / "parts" / "b.parquet", IDS[:3], VECTORS[:3])
    parquet(tmp_path / "parts" / "a.parquet", IDS[3:3], VECTORS[3:3])
    parquet(tmp_path / "parts" / "day=2" / "a.parquet", IDS[3:6], VECTORS[3:6], of=pa.float64())
    save_file({"ids": IDS[6:], "vectors": VECTORS[6:].half()}, tmp_path / "c.safetensors")
    sources = [tmp_path / "parts", tmp_path / "c.safetensors"]
    manifest = import_vectors(sources, tmp_path / "t", dtype="float32", rows_per_shard=4)
    assert_holds(tmp_path / "t", IDS, torch.cat([VECTORS[:6], VECTORS[6:].half().float()]), "float32")
    assert manifest.encoder["imported"]["files"] == ["b.parquet", "a.parquet", "c.safetensors"]
    assert manifest.encoder["imported"]["format"] == ["parquet", "safetensors"]


def test_the_columns_are_those_named_among_several(tmp_path):
    more = {"shop": pa.array(IDS.tolist()), "other": pa.array(list((-VECTORS).numpy()))}
    file = parquet(tmp_path / "a.parquet", **more)
    import_vectors(file, tmp_path / "t", id_column="id", vector_column="other", dtype="float32")
    assert_holds(tmp_path / "t", IDS, -VECTORS, "float32")


def test_the_version_is_of_the_content_whatever_its_order_file_or_type(tmp_path):
    order = IDS.argsort()
    half = VECTORS.half()
    parquet(tmp_path / "a.parquet", IDS, half, of=pa.float16())
    file, ids_file = npy(tmp_path, IDS[order], half[order].double())
    made = [
        import_vectors(tmp_path / "a.parquet", tmp_path / "1", dtype="int8", rows_per_shard=2),
        import_vectors(file, tmp_path / "2", ids=[ids_file], dtype="bfloat16"),
    ]
    expected = content_version([(IDS[order], half[order])])
    assert [manifest.table_version for manifest in made] == [expected] * 2
    assert re.fullmatch("imported-[0-9a-f]{16}", expected)


def test_another_id_or_vector_is_another_version():
    vectors = VECTORS.clone()
    vectors[10, 7] += 1e-3
    ids = IDS.clone()
    ids[4] += 1
    parts = [(IDS, VECTORS), (IDS, vectors), (ids, VECTORS), (IDS[:-1], VECTORS[:-1])]
    assert len({content_version([part]) for part in parts}) == 4


def test_the_version_does_not_depend_on_the_batches():
    batches = [(IDS[:4], VECTORS[:4]), (IDS[4:], VECTORS[4:])]
    assert content_version(batches) == content_version([(IDS, VECTORS)])


def test_a_version_given_is_that_of_the_table_and_its_shards(tmp_path):
    file = parquet(tmp_path / "a.parquet")
    main(["import", str(file), "--out", str(tmp_path / "t"), "--table-version", "clip-7"])
    Table.open(tmp_path / "t", expected_version="clip-7")


def test_the_manifest_says_where_the_vectors_come_from(tmp_path):
    manifest = import_vectors(parquet(tmp_path / "a.parquet", vectors=CODES), tmp_path / "t", spare_rows=2)
    origin = dict(manifest.encoder["imported"])
    assert origin.pop("created_by").startswith("mim-torchrec ")
    assert origin == {
        "files": ["a.parquet"],
        "format": ["parquet"],
        "columns": {"id": "id", "vector": "v"},
        "vectors": ["int8"],
        "options": {"dtype": "int8", "spare_rows": 2},
    }


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
    "too large an id": (
        {"ids": [2**63 + 5 if item == 77 else abs(item) for item in IDS.tolist()], "id_type": pa.uint64()},
        r"row group 2 row 0, column 'id': item id 9223372036854775813 is above .* does not fit int64",
    ),
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
    "ids of text": (
        {"ids": [str(item) for item in IDS.tolist()], "id_type": pa.string()},
        r"a.parquet: 0 columns \[\] may be the ids \(integers\); .* --id-column; .*'id' \(string\)",
    ),
    "vectors of int32": (
        {"vectors": CODES.int(), "of": pa.int32()},
        r"a.parquet: 0 columns \[\] may be the vectors .*; there are 'id' \(int64\), 'v' \(list<.*int32>\)",
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
        ("id_column", "v", r"column 'v' is list<element: float>, but ids must be integers"),
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
            CODES.int(),
            r"vectors.npy: 'vectors' is int32 \(11, 8\), expected vectors .* of int8, float16",
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


@pytest.mark.parametrize("suffix", ["parquet", "safetensors", "npy"])
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
        ("a.csv", r"a.csv: not a .parquet, .npy or .safetensors file"),
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
