"""Frozen tables in TorchRec's quantized inference, whole and sharded, give the vectors that they are."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.global_settings import set_propogate_device
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.quant_embedding import ShardedQuantEmbeddingCollection
from torchrec.distributed.quant_embeddingbag import ShardedQuantEmbeddingBagCollection
from torchrec.inference.modules import quantize_inference_model, shard_quant_model
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantBags
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantRows
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    JoinedEmbeddingBags,
    frozen_bag_config,
    frozen_config,
    load_table,
)
from mim_torchrec.embeddings.sharded.load import find_frozen
from mim_torchrec.embeddings.sharded.quantized import (
    copy_quantized_rows,
    frozen_quantization_mapping,
    nbit_rows,
    quantized_sharders,
)
from mim_torchrec.embeddings.table.format import DTYPES, Table, TableWriter
from mim_torchrec.embeddings.table.quantize import decode, fuse_codes

DIM, ITEMS, KEYS = 8, 40, ["a", "b"]


class Model(nn.Module):
    """Unpooled and pooled frozen vectors, and a trained table beside them."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.mm = FrozenEmbeddingCollection([frozen_config(table, KEYS)], device="cpu")
        means = frozen_bag_config(table, KEYS, "mean", PoolingType.MEAN)
        weighted = frozen_bag_config(table, KEYS, "weighted")
        self.means = FrozenEmbeddingBagCollection([means], device="cpu")
        self.weighted = FrozenEmbeddingBagCollection([weighted], is_weighted=True, device="cpu")
        config = EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=DIM, feature_names=["id"])
        sums = FrozenEmbeddingBagCollection([frozen_bag_config(table, KEYS, "sum")], device="cpu")
        self.joined = JoinedEmbeddingBags(EmbeddingBagCollection(tables=[config], device="cpu"), sums)

    def forward(self, features: KeyedJaggedTensor) -> list[Tensor]:
        unpooled = [found.values() for found in self.mm(features).values()]
        sums = self.joined(features)
        frozen = [self.means(features).values(), self.weighted(features).values(), sums["a"], sums["b"]]
        return [*unpooled, *frozen, sums["id"]]


def features(seed: int, batch_size: int) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    keys = ["id", *KEYS]
    lengths = torch.randint(0, 5, (3 * batch_size,), generator=generator)
    of_ids = int(lengths[:batch_size].sum())
    rows = torch.randint(0, 1 + ITEMS, (int(lengths.sum()) - of_ids,), generator=generator)
    values = torch.cat([torch.randint(0, 9, (of_ids,), generator=generator), rows])
    weights = torch.rand(values.numel(), generator=generator)
    return KeyedJaggedTensor(keys, values, weights, lengths=lengths)


def make(folder: Path, dtype: str, vectors: Tensor) -> Model:
    writer = TableWriter(folder / "table", table_version="v1", dim=DIM, dtype=dtype, encoder={}, spare_rows=2)
    for ids in torch.arange(ITEMS).split(25):
        writer.write_shard(ids, vectors[ids])
    writer.finish()
    table = Table.open(folder / "table")
    model = Model(table).eval()
    for name in ("mm", "mean", "weighted", "sum"):
        load_table(model, table, name, mapped=name == "mean")
    return model


def quantize(model: nn.Module) -> nn.Module:
    return quantize_inference_model(copy.deepcopy(model), quantization_mapping=frozen_quantization_mapping())


def compare(found: nn.Module, expected: nn.Module, tolerance: float = 1e-6) -> None:
    """All outputs but the trained table's, which is quantized to int8."""
    for batch in (features(1, 7), features(2, 3)):
        for one, other in zip(found(batch)[:-1], expected(batch)[:-1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def rounded(model: nn.Module) -> None:
    """Round the scale and the bias of int8 rows to float16, in place."""
    for name in ("mm", "weighted", "sum"):
        stored = find_frozen(model, name)[1].store.tensor
        exact = stored[:, -8:].contiguous().view(torch.float32)
        stored[:, -8:] = exact.half().float().view(torch.uint8)
    spans = find_frozen(model, "mean")[1].store.spans
    for span in spans:
        span[:, -8:] = span[:, -8:].contiguous().view(torch.float32).half().float().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantized_model_gives_the_vectors_that_are_stored(tmp_path, dtype):
    vectors = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(0))
    model = make(tmp_path, dtype, vectors)
    quantized = quantize(model)
    assert type(quantized.mm) is QuantRows and type(quantized.means) is QuantBags
    assert all(type(collection) is QuantBags for collection in quantized.joined)
    if dtype == "int8":
        step = (vectors.max(1).values - vectors.min(1).values).max() / 255
        compare(quantized, model, tolerance=5 * float(step) / 2)  # bags have up to 5 rows
        rounded(model)
    compare(quantized, model)
    rows = quantized.mm.embeddings["mm"].weight
    codes = find_frozen(model, "mm")[1].store.tensor
    if dtype == "int8":
        assert torch.equal(rows[:, 4 : 4 + DIM], codes[:, :DIM])
    elif dtype != "bfloat16":
        assert torch.equal(rows, codes.view(torch.uint8))


def test_codes_without_a_scale_stay_exactly_what_they_are(tmp_path):
    codes = torch.randint(-128, 128, (ITEMS, DIM), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    model = make(tmp_path, "int8", torch.randn(ITEMS, DIM))
    store = find_frozen(model, "mm")[1].store
    store.write(torch.arange(1, 1 + ITEMS), fuse_codes(codes))
    batch = features(1, 5)
    found = quantize(model).mm(batch)["a"].values()
    assert torch.equal(found, decode(store.gather(batch["a"].values()), "int8"))


@pytest.mark.parametrize("vectors", [1e-7 * torch.randn(1, DIM), 1e6 * torch.randn(1, DIM)])
def test_a_scale_that_float16_cannot_hold_is_refused(tmp_path, vectors):
    model = make(tmp_path, "int8", torch.randn(ITEMS, DIM))
    table = find_frozen(model, "mm")[1]
    table.store.write(torch.tensor([5]), torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(vectors))
    with pytest.raises(ValueError, match="frozen table mm: row 5 has scale .*convert the table"):
        nbit_rows(table)


def test_a_type_that_is_not_mapped_stays_the_frozen_collection(tmp_path):
    model = make(tmp_path, "int8", torch.randn(ITEMS, DIM))
    found = quantize_inference_model(copy.deepcopy(model))
    assert type(found.mm) is FrozenEmbeddingCollection
    compare(found, model)


def shard(quantized: nn.Module, sharding: str, averages: str) -> nn.Module:
    """Shard a copy over two devices, which are both the CPU."""
    kinds = dict.fromkeys(("mm", "weighted", "sum", "t"), sharding) | {"mean": averages}
    constraints = {
        name: ParameterConstraints(sharding_types=[kind], compute_kernels=["quant"])
        for name, kind in kinds.items()
    }
    sharders = quantized_sharders(split_scales=sharding == "row_wise")
    sharded, _ = shard_quant_model(
        copy.deepcopy(quantized),
        world_size=2,
        compute_device="cpu",
        sharding_device="cpu",
        sharders=sharders,
        constraints=constraints,
    )
    return sharded


@pytest.fixture
def on_a_cpu():
    """TorchRec's inference shards for CPUs only with this."""
    set_propogate_device(True)
    yield
    set_propogate_device(False)


@pytest.mark.parametrize(
    ("dtype", "sharding"), [("float16", "table_wise"), ("int8", "table_wise"), ("int8", "row_wise")]
)
def test_a_sharded_quantized_model_gives_the_vectors_that_are_stored(tmp_path, on_a_cpu, dtype, sharding):
    quantized = quantize(make(tmp_path, dtype, torch.randn(ITEMS, DIM)))
    sharded = shard(quantized, sharding, "table_wise")
    copy_quantized_rows(quantized, sharded)
    assert type(sharded.mm) is ShardedQuantEmbeddingCollection
    assert type(sharded.means) is ShardedQuantEmbeddingBagCollection
    compare(sharded, quantized)
    with pytest.raises(ValueError, match=f"table mm: its shards have 0 of {ITEMS + 3} rows"):
        copy_quantized_rows(quantized.mm, nn.Linear(1, 1))


def test_averages_of_row_wise_shards_are_refused(tmp_path, on_a_cpu):
    quantized = quantize(make(tmp_path, "int8", torch.randn(ITEMS, DIM)))
    with pytest.raises(ValueError, match="table mean is averaged: .* shard it table-wise"):
        copy_quantized_rows(quantized, shard(quantized, "row_wise", "row_wise"))
