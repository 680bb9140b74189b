"""Graphs of models with frozen tables give what the models give: torch.fx, jit, export and compile."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
import torchrec.fx
from torch import Tensor, nn
from torch.export import Dim
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mim_torchrec.embeddings import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    JoinedEmbeddingBags,
    RowsAsInputs,
    frozen_bag_config,
    frozen_config,
    load_table,
    rows_of,
)
from mim_torchrec.embeddings.sharded.rows import CachedRows, DenseRows
from mim_torchrec.embeddings.table.format import DTYPES, Table, TableWriter

DIM, ITEMS, KEYS = 8, 40, ["a", "b"]
KINDS = ["unpooled", "sum", "mean", "weighted"]
DYNAMIC = {0: Dim.DYNAMIC}


class Model(nn.Module):
    """A linear layer on frozen vectors of two features."""

    def __init__(self, table: Table, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "unpooled":
            self.mm: nn.Module = FrozenEmbeddingCollection([frozen_config(table, KEYS)], device="cpu")
            self.dense = nn.Linear(DIM, 3)
        else:
            pooling = PoolingType.MEAN if kind == "mean" else PoolingType.SUM
            config = frozen_bag_config(table, KEYS, pooling=pooling)
            mm = FrozenEmbeddingBagCollection([config], is_weighted=kind == "weighted", device="cpu")
            self.mm = JoinedEmbeddingBags(mm)
            self.dense = nn.Linear(2 * DIM, 3)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.mm(features)
        return self.dense(found["b"].values() if self.kind == "unpooled" else found.values())


class OfTensors(nn.Module):
    """The model as a function of tensors only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.model(KeyedJaggedTensor(KEYS, values, weights, lengths=lengths))


def features(seed: int, batch_size: int, kind: str = "sum", longest: int = 5) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (2 * batch_size,), generator=generator)
    values = torch.randint(0, 1 + ITEMS, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(values.numel(), generator=generator) if kind == "weighted" else None
    return KeyedJaggedTensor(KEYS, values, weights, lengths=lengths)


def tensors(batch: KeyedJaggedTensor) -> tuple[Tensor, ...]:
    weights = batch.weights_or_none()
    return (batch.values(), batch.lengths()) + (() if weights is None else (weights,))


def agrees(model: nn.Module, graph: Callable[[KeyedJaggedTensor], Tensor]) -> None:
    """Compare on batches of other sizes than the first, one of them without a single id."""
    for batch in (
        features(1, 7, model.kind),
        features(2, 2, model.kind),
        features(3, 6, model.kind, longest=0),
    ):
        torch.testing.assert_close(graph(batch), model(batch))


def write(path: Path, dtype: str = "float32") -> Table:
    """Two shards, so that mapped rows are in several pieces."""
    writer = TableWriter(path, table_version="v1", dim=DIM, dtype=dtype, encoder={}, spare_rows=2)
    generator = torch.Generator().manual_seed(0)
    for ids in torch.arange(ITEMS).split(25):
        writer.write_shard(ids, torch.randn(len(ids), DIM, generator=generator))
    writer.finish()
    return Table.open(path)


def make(table: Table, kind: str, mapped: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Model(table, kind).eval()
    load_table(model, table, mapped=mapped)
    return model


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, Table]:
    folder = tmp_path_factory.mktemp("tables")
    return {dtype: write(folder / dtype, dtype) for dtype in DTYPES}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def dynamo():
    """What TrainPipelinePT2 sets before it compiles."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        capture_scalar_outputs=True,
        capture_dynamic_output_shape_ops=True,
        skip_torchrec=False,
        force_unspec_int_unbacked_size_like_on_torchrec_kjt=True,
    ):
        yield


def test_fx_graphs_are_the_model(tables, kind):
    for table in tables.values():
        model = make(table, kind)
        agrees(model, torch.fx.symbolic_trace(model))
        agrees(model, torchrec.fx.symbolic_trace(model))
        leaf = "FrozenEmbeddingCollection" if kind == "unpooled" else "FrozenEmbeddingBagCollection"
        agrees(model, torchrec.fx.symbolic_trace(model, leaf_modules=[leaf]))


def test_a_graph_sees_updates_and_refuses_rows_that_do_not_exist(tables):
    model = make(tables["float32"], "unpooled")
    graph = torch.fx.symbolic_trace(model)
    store = model.mm.frozen_tables()["mm"].store
    store.write(torch.tensor([3, 4]), torch.ones(2, DIM))
    agrees(model, graph)
    for row in (-1, ITEMS + 3):
        wrong = KeyedJaggedTensor(KEYS, torch.tensor([row]), lengths=torch.tensor([1, 0]))
        with pytest.raises(IndexError, match=f"mm: row {row} is not within 0:{ITEMS + 3}"):
            graph(wrong)


def test_a_graph_refuses_batches_of_variable_size_per_feature(tables):
    graph = torch.fx.symbolic_trace(make(tables["float32"], "sum"))
    inverse = (KEYS, torch.tensor([[0, 0], [0, 1]]))
    batch = KeyedJaggedTensor(
        KEYS,
        torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[1], [2]],
        inverse_indices=inverse,
    )
    with pytest.raises(ValueError, match="one batch size for all features"):
        graph(batch)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:The TorchScript type system:UserWarning"
)
def test_jit_scripts_what_fx_traces_and_refuses_the_rest_by_name(tables):
    for kind in ("unpooled", "sum", "mean"):
        model = make(tables["int8"], kind)
        agrees(model, torch.jit.script(torch.fx.symbolic_trace(Annotated(model))))
        with pytest.raises(TypeError, match="torch.jit.script cannot compile a frozen collection"):
            torch.jit.script(model)
        with pytest.raises(TypeError, match="torch.jit.trace fixes the numbers of ids"):
            torch.jit.trace(OfTensors(model), tensors(features(0, 4)))


class Annotated(nn.Module):
    """The type of the input, which torch.jit.script asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.model(features)


# the rows are set on the table for the time of the call
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize(("kind", "strict"), [*((kind, False) for kind in KINDS), ("weighted", True)])
def test_an_exported_program_is_the_model_and_holds_no_rows(tables, kind, strict):
    model = make(tables["float16"], kind)
    inputs = tensors(features(0, 4, kind))
    program = torch.export.export(
        RowsAsInputs(OfTensors(model)),
        (rows_of(model), *inputs),
        dynamic_shapes=({"mm": [None]}, tuple(DYNAMIC for _ in inputs)),
        strict=strict,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    rows = model.mm[0] if kind != "unpooled" else model.mm
    for tensor in (*program.state_dict.values(), *program.constants.values()):
        assert tensor.dtype != torch.float16 and tensor.numel() <= 3 * 2 * DIM
    file.seek(0)
    loaded = torch.export.load(file).module()
    agrees(model, lambda batch: loaded(rows_of(model), *tensors(batch)))
    rows.frozen_tables()["mm"].store.write(torch.tensor([3]), torch.ones(1, DIM, dtype=torch.float16))
    agrees(model, lambda batch: loaded(rows_of(model), *tensors(batch)))


def test_a_program_exported_with_a_keyed_jagged_tensor_is_the_model(tables, kind):
    model = make(tables["int8"], kind)
    leaves = [DYNAMIC, DYNAMIC if kind == "weighted" else None, DYNAMIC, None, None, None]
    program = torch.export.export(
        RowsAsInputs(model),
        (rows_of(model), features(0, 4, kind)),
        dynamic_shapes=({"mm": [None]}, (leaves,)),
    ).module()
    agrees(model, lambda batch: program(rows_of(model), batch))


def test_a_program_takes_mapped_rows_in_their_pieces(tables):
    model = make(tables["bfloat16"], "mean", mapped=True)
    rows = rows_of(model)
    assert len(rows["mm"]) > 2
    inputs = tensors(features(0, 4))
    program = torch.export.export(
        RowsAsInputs(OfTensors(model)),
        (rows, *inputs),
        dynamic_shapes=({"mm": [None] * len(rows["mm"])}, (DYNAMIC, DYNAMIC)),
    ).module()
    agrees(model, lambda batch: program(rows, *tensors(batch)))


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_that_would_copy_the_rows_is_refused(tables, strict):
    model = OfTensors(make(tables["float32"], "sum"))
    with pytest.raises(
        Exception, match=r"mm: an exported program would hold a copy of its rows; export RowsAs"
    ):
        torch.export.export(model, tensors(features(0, 4)), strict=strict)


def test_rows_as_inputs_needs_frozen_tables_of_distinct_names(tables):
    with pytest.raises(ValueError, match="no frozen table"):
        RowsAsInputs(nn.Linear(2, 2))
    twice = nn.ModuleList([make(tables["float32"], "sum"), make(tables["float32"], "mean")])
    with pytest.raises(ValueError, match="two frozen tables are called mm"):
        rows_of(twice)


def test_rows_behind_a_cache_are_refused_in_graphs(tables):
    model = make(tables["float32"], "unpooled")
    table = model.mm.frozen_tables()["mm"]
    assert isinstance(table.store, DenseRows)
    table.store = CachedRows(table.store, slots=5, device=torch.device("cpu"))
    with pytest.raises(TypeError, match="mm: rows in CachedRows are behind a cache"):
        torch.fx.symbolic_trace(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "aot_eager") for kind in KINDS), ("unpooled", "inductor"), ("mean", "inductor")],
)
def test_a_compiled_model_is_one_graph_and_the_model(tables, kind, backend, dynamo):
    model = make(tables["int8"], kind)
    agrees(model, torch.compile(model, fullgraph=True, dynamic=True, backend=backend))


def test_weights_get_their_gradients_through_a_compiled_lookup(tables, dynamo):
    model = make(tables["float32"], "weighted")
    compiled = torch.compile(OfTensors(model), fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = []
    for function in (OfTensors(model), compiled):
        values, lengths, weights = tensors(features(0, 4, "weighted"))
        weights.requires_grad_()
        function(values, lengths, weights).square().sum().backward()
        gradients.append(weights.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])
