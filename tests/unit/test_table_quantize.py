"""Storage types of a table: how exact each is, what a row costs, and that nothing but numbers is stored."""

import json
import re

import pytest
import torch

from mim_torchrec.embeddings.table.convert import convert
from mim_torchrec.embeddings.table.format import (
    DTYPES,
    NonFiniteVector,
    Table,
    TableError,
    TableWriter,
    row_bytes,
    stored_width,
)
from mim_torchrec.embeddings.table.main import main
from mim_torchrec.embeddings.table.permute import permute
from mim_torchrec.embeddings.table.quantize import cosine_errors, decode, encode, finite_rows, fuse_codes

IDS = torch.arange(40).flip(0) * 7 - 50


@pytest.fixture
def vectors():
    return torch.randn(40, 128, generator=torch.Generator().manual_seed(0))


def write(path, vectors, dtype, ids=IDS, split=17, **options):
    writer = TableWriter(
        path, table_version="v1", dim=vectors.shape[1], dtype=dtype, encoder={"name": "e"}, **options
    )
    for part in (slice(None, split), slice(split, None)):
        writer.write_shard(ids[part], vectors[part])
    writer.finish()
    return path


def test_an_int8_row_takes_136_bytes_where_float16_takes_256():
    assert (row_bytes("int8", 128), row_bytes("float16", 128)) == (136, 256)
    assert row_bytes("int8", 128) / row_bytes("float16", 128) <= 0.54


def test_the_mean_cosine_error_of_int8_is_below_a_thousandth():
    vectors = torch.randn(2000, 128, generator=torch.Generator().manual_seed(1))
    assert float(cosine_errors(vectors, decode(encode(vectors, "int8"), "int8")).mean()) < 1e-3


def test_the_mean_cosine_error_of_int4_is_below_a_hundredth():
    vectors = torch.randn(2000, 128, generator=torch.Generator().manual_seed(1))
    assert 1e-3 < float(cosine_errors(vectors, decode(encode(vectors, "int4"), "int4")).mean()) < 1e-2


def test_an_int4_row_takes_half_of_an_int8_row():
    assert row_bytes("int4", 128) == 128 // 2 + 4 == row_bytes("int8", 128) // 2


@pytest.mark.parametrize(("dtype", "steps", "slack"), [("int8", 255, 0.5001), ("int4", 15, 0.53)])
def test_every_value_is_within_half_a_step_of_the_vector(vectors, dtype, steps, slack):
    step = (vectors.max(1).values - vectors.min(1).values) / steps  # of int4 scale and bias are float16
    error = (decode(encode(vectors, dtype), dtype) - vectors).abs().max(1).values
    assert (error <= slack * step).all()


def test_an_int4_row_is_two_codes_a_byte_then_scale_and_bias_as_float16():
    stored = encode(torch.tensor([[-1.0, 14.0, 2.0, 3.0]]), "int4")[0]
    assert stored[-4:].view(torch.float16).tolist() == [1.0, -1.0]
    assert stored[:2].tolist() == [0 + 16 * 15, 3 + 16 * 4]


def test_int4_of_a_range_beyond_float16_is_refused(tmp_path):
    writer = TableWriter(tmp_path / "t", table_version="v1", dim=4, dtype="int4", encoder={})
    with pytest.raises(NonFiniteVector, match="item id 7: .* as int4"):
        writer.write_shard(torch.tensor([7]), torch.tensor([[0.0, 2e6, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zero_bytes_is_the_zero_vector(dtype):
    zeros = torch.zeros(2, stored_width(dtype, 8), dtype=DTYPES[dtype])
    assert torch.equal(decode(zeros, dtype), torch.zeros(2, 8))
    assert torch.equal(encode(torch.zeros(2, 8), dtype), zeros)


def test_int8_codes_without_a_scale_are_stored_exactly():
    codes = torch.arange(-128, 128, dtype=torch.int8).reshape(2, 128)
    stored = fuse_codes(codes)
    assert torch.equal(decode(stored, "int8"), codes.float())
    assert torch.equal(stored[:, :128].int(), codes.int() + 128)
    assert stored[:, 128:].contiguous().view(torch.float32).tolist() == [[1.0, -128.0]] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 3, 7])
def test_a_value_that_is_no_number_is_found_after_encoding(dtype, bad, column):
    vectors = torch.ones(3, 8)
    vectors[1, column] = bad
    assert finite_rows(encode(vectors, dtype), dtype).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_reads_as_the_vectors_in_the_precision_of_its_type(tmp_path, vectors, dtype):
    table = Table.open(write(tmp_path / "t", vectors, dtype))
    read = table.read_float(IDS)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, decode(encode(vectors, dtype), dtype), rtol=0, atol=0)
    assert float(cosine_errors(vectors, read).max()) < (1e-2 if dtype == "int4" else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_and_rows_read_as_stored(tmp_path, vectors, dtype):
    table = Table.open(write(tmp_path / "t", vectors, dtype))
    stored = encode(vectors, dtype)
    assert torch.equal(table.read(IDS), stored)
    assert torch.equal(table.rows_for(1, 41), stored.flip(0))
    assert not table.rows_for(0, 1).any() and not table.read(torch.tensor([1000])).any()


def test_rows_given_as_they_are_stored_are_not_quantized_again(tmp_path):
    codes = torch.randint(-128, 128, (40, 128), generator=torch.manual_seed(0)).to(torch.int8)
    writer = TableWriter(tmp_path / "t", table_version="v1", dim=128, dtype="int8", encoder={})
    writer.write_shard(IDS, fuse_codes(codes))
    writer.finish()
    assert torch.equal(Table.open(tmp_path / "t").read_float(IDS), codes.float())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_nan_is_not_written_as_codes(tmp_path, vectors, dtype):
    vectors[3, 5] = float("nan")
    with pytest.raises(NonFiniteVector, match=rf"item id {int(IDS[3])}: .* as {dtype}"):
        write(tmp_path / "t", vectors, dtype)


def test_a_scale_that_is_no_number_is_refused_naming_the_row(tmp_path, vectors):
    stored = encode(vectors, "int8")
    stored[2, -8:-4] = torch.tensor([float("inf")]).view(torch.uint8)
    writer = TableWriter(tmp_path / "t", table_version="v1", dim=128, dtype="int8", encoder={})
    with pytest.raises(NonFiniteVector, match=r"row 37, item id"):
        writer.write_shard(IDS, stored)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes_of_a_dim_that_fbgemm_would_pad_on_a_gpu_are_refused(tmp_path, dtype):
    with pytest.raises(TableError, match="multiple of 4, found 6"):
        TableWriter(tmp_path / "t", table_version="v1", dim=6, dtype=dtype, encoder={})


def test_codes_are_not_taken_for_vectors(tmp_path):
    writer = TableWriter(tmp_path / "t", table_version="v1", dim=4, encoder={})
    with pytest.raises(TableError, match=r"found .*torch.int8 \(2, 4\)"):
        writer.write_shard(torch.tensor([1, 2]), torch.ones(2, 4, dtype=torch.int8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_converted_table_has_the_same_version_ids_and_spare_rows(tmp_path, vectors, dtype):
    source = Table.open(write(tmp_path / "t", vectors, "float32", spare_rows=5, seq=3))
    made = convert(tmp_path / "t", tmp_path / "c", dtype).manifest
    table = Table.open(tmp_path / "c", expected_version="v1")
    assert (made.dtype, made.rows, made.capacity, made.seq) == (dtype, 40, 45, 3)
    assert torch.equal(table.row_index().ids, source.row_index().ids)
    assert torch.equal(table.read(IDS), encode(vectors, dtype))


def test_the_error_reported_is_the_mean_over_the_rows(tmp_path, vectors):
    write(tmp_path / "t", vectors, "float32")
    made = convert(tmp_path / "t", tmp_path / "c", "int8", rows_per_shard=9)
    errors = cosine_errors(vectors, Table.open(tmp_path / "c").read_float(IDS))
    assert 0 < made.mean_cosine_error < 1e-3
    assert made.mean_cosine_error == pytest.approx(float(errors.mean()), rel=1e-6)
    assert made.max_cosine_error == pytest.approx(float(errors.max()), rel=1e-6)


def test_converting_to_the_same_type_puts_the_shards_in_order_and_changes_no_byte(tmp_path, vectors):
    mixed = torch.cat([IDS[::2], IDS[1::2]])
    source = Table.open(write(tmp_path / "t", vectors, "int8", ids=mixed, split=20))
    convert(tmp_path / "t", tmp_path / "c", "int8", rows_per_shard=16)
    table = Table.open(tmp_path / "c")
    assert torch.equal(table.read(IDS), source.read(IDS))
    assert [shard.rows for shard in table.manifest.shards] == [16, 16, 8]
    assert [first for first, _ in table.spans(0, 41)] == [1, 17, 33]


def test_a_vector_too_large_for_float16_ends_the_conversion_and_leaves_nothing(tmp_path, vectors):
    write(tmp_path / "t", vectors * 1e6, "float32")
    with pytest.raises(NonFiniteVector, match="as float16"):
        convert(tmp_path / "t", tmp_path / "c", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_an_int8_table_can_be_permuted(tmp_path, vectors):
    write(tmp_path / "t", vectors, "int8")
    permute(tmp_path / "t", tmp_path / "p", seed=1)
    before, after = Table.open(tmp_path / "t").read(IDS), Table.open(tmp_path / "p").read(IDS)
    assert sorted(before.tolist()) == sorted(after.tolist()) and not torch.equal(before, after)


def test_the_command_converts_and_prints_the_error(tmp_path, vectors, capsys):
    write(tmp_path / "t", vectors, "float16")
    main(["convert", str(tmp_path / "t"), "--dtype", "int8", "--out", str(tmp_path / "c")])
    printed = capsys.readouterr().out
    assert re.search(
        r"40 rows as int8, 136 bytes a row, table_version v1, cosine error \d\.\d\de-05", printed
    )
    main(["verify", str(tmp_path / "c"), "--table-version", "v1"])
    capsys.readouterr()
    main(["info", str(tmp_path / "c")])
    (step,) = json.loads(capsys.readouterr().out)["encoder"]["converted"]
    assert (step["from"], step["to"]) == ("float16", "int8") and 0 < step["mean_cosine_error"] < 1e-3


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("dim", [4, 36, 128])
def test_rows_and_vectors_are_those_of_the_kernels_of_fbgemm_gpu(dtype, dim):
    import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm

    spread = torch.Generator().manual_seed(dim)
    vectors = torch.randn(200, dim, generator=spread) * torch.randn(200, 1, generator=spread).exp()
    if dtype == "int8":
        stored = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(vectors)
        decoded = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(stored)
    else:
        stored = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(vectors, 4)
        decoded = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(stored, 4)
    torch.testing.assert_close(encode(vectors, dtype), stored, rtol=0, atol=0)
    torch.testing.assert_close(decode(stored, dtype), decoded, rtol=0, atol=0)
