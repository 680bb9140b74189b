"""``mim table import``: external vectors become a table exactly, in any order, or are refused by place."""

import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from mim_torchrec.embeddings.table import arranging, external, external_parquet, external_tensors
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.table.importing import content_version, import_vectors
from mim_torchrec.embeddings.table.main import main
from mim_torchrec.embeddings.table.quantize import decode, encode, fuse_codes
from tests.table_sources import CODES, IDS, LISTS, VECTORS, npy, parquet


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
