"""Side information of behaviors: read beside them, refused where malformed, added to their embeddings."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig

from mim_torchrec.ciubm.side_information import SideInformation
from mim_torchrec.ciubm.ubm.registry import built_in_models
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.model import CTRModel
from mim_torchrec.ctr.sharding import build_model
from mim_torchrec.data.batch import RequestBatch
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features
from mim_torchrec.data.id_scan import scan_ids
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import REQUESTS, category_ids
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from mim_torchrec.errors import OptionError
from tests.datasets import request_rows

FEATURES = Features(
    sparse=("behavior_action",), dense=("behavior_price",), buckets={"behavior_dwell": "2,10"}
)
TYPES = {
    "behavior_action": pa.list_(pa.string()), "behavior_price": pa.list_(pa.float64()),
    "behavior_dwell": pa.list_(pa.int32()),
}  # fmt: skip
ACTIONS = ("view", "cart", "buy")


def rows(count: int = 12) -> list[dict]:
    """Requests whose behaviors have an action, a price and a dwell time."""
    rng = np.random.default_rng(6)
    made = request_rows(count)
    for row in made:
        behaviors = len(row["behavior_item_ids"])
        row |= {
            "behavior_action": [ACTIONS[k] for k in rng.integers(3, size=behaviors)],
            "behavior_price": rng.lognormal(3, 2, behaviors).tolist(),
            "behavior_dwell": rng.integers(20, size=behaviors).tolist(),
        }
    return made


def write(path: Path, made: list[dict], **types: pa.DataType) -> Path:
    fields = [pa.field(name, kind) for name, kind in (TYPES | types).items() if name in made[0]]
    schema = pa.schema([*(field for field in REQUESTS if field.name in made[0]), *fields])
    pq.write_table(pa.Table.from_pylist(made, schema=schema), path, row_group_size=4)
    return path


def read(file: Path, features: Features = FEATURES, **options) -> list[RequestBatch]:
    return list(RequestReader([file], batch_size=5, features=features, **options))


def by_request(batches: Iterable[RequestBatch]) -> dict[int, list[tuple[int, float, int]]]:
    """Naive: action, scaled price and range of the dwell time of the behaviors of each request."""
    found = {}
    for batch in batches:
        price = iter(batch.behavior_dense.squeeze(1).tolist())
        actions, ranges = (batch.sparse[f"behavior_{name}"].to_dense() for name in ("action", "dwell"))
        for request, action, dwell in zip(batch.request_ids.tolist(), actions, ranges, strict=True):
            own = zip(action.tolist(), dwell.tolist(), strict=True)
            found[request] = [(a, next(price), d) for a, d in own]
        assert next(price, None) is None
    return found


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("max_behaviors", [2, 50])
def test_behaviors_keep_what_is_known_of_them(tmp_path, shuffle, max_behaviors):
    made = rows()
    found = by_request(
        read(write(tmp_path / "a.parquet", made), shuffle=shuffle, max_behaviors=max_behaviors)
    )
    assert found.keys() == {row["request_id"] for row in made}
    for row in made:
        expected = [
            (int(category_ids(pa.array([action]))[0]), pytest.approx(math.log1p(price), rel=1e-6),
             (dwell >= 2) + (dwell >= 10))
            for action, price, dwell in zip(
                row["behavior_action"], row["behavior_price"], row["behavior_dwell"], strict=True
            )
        ]  # fmt: skip
        assert found[row["request_id"]] == expected[-max_behaviors:]


def test_a_null_beside_an_empty_history_is_an_empty_list(tmp_path):
    made = rows()
    nothing = dict.fromkeys(
        ("behavior_item_ids", "behavior_categories", "behavior_ts", "behavior_action", "behavior_price")
    )
    made[6] |= nothing | {"behavior_dwell": []}
    assert by_request(read(write(tmp_path / "a.parquet", made)))[made[6]["request_id"]] == []


@pytest.mark.parametrize(
    ("column", "change", "problem"),
    [
        ("behavior_action", lambda values: values[:-1], "its length is not that of behavior_item_ids"),
        ("behavior_action", lambda values: None, "its length is not that of behavior_item_ids"),
        ("behavior_action", lambda values: [None, *values[1:]], "a value in the list is null"),
        ("behavior_price", lambda values: [*values, 1.0], "its length is not that of behavior_item_ids"),
        ("behavior_price", lambda values: [float("nan"), *values[1:]], "NaN"),
        ("behavior_price", lambda values: [1e300, *values[1:]], "beyond float32"),
        ("behavior_dwell", lambda values: [None, *values[1:]], "a value in the list is null"),
    ],
)
def test_a_malformed_value_is_an_error_that_names_it_or_skipped(tmp_path, column, change, problem):
    made = rows()
    made[7][column] = change(made[7][column])
    file = write(tmp_path / "a.parquet", made)
    with pytest.raises(DataError, match=problem) as error:
        read(file)
    assert f"row group 1, row 3, column {column}" in str(error.value)
    assert by_request(read(file, on_bad_row="skip")).keys() == {r["request_id"] for r in made} - {8}


@pytest.mark.parametrize(
    ("column", "kind", "value"),
    [
        ("behavior_action", pa.string(), "view"),
        ("behavior_price", pa.float64(), 1.0),
        ("behavior_price", pa.list_(pa.string()), ["dear"]),
        ("behavior_action", pa.list_(pa.float64()), [1.0]),
    ],
)
def test_a_wrong_type_is_an_error(tmp_path, column, kind, value):
    file = write(tmp_path / "a.parquet", [row | {column: value} for row in rows()], **{column: kind})
    with pytest.raises(DataError, match=f"column {column}: expected .*, one a behavior; found"):
        read(file)


def test_a_missing_column_is_an_error_that_lists_what_is_there(tmp_path):
    file = write(tmp_path / "a.parquet", rows())
    with pytest.raises(
        DataError, match="column behavior_prize: the column is missing; add it, .*behavior_price"
    ):
        read(file, Features(dense=("behavior_prize",)))


def test_columns_that_all_requests_have_are_no_features():
    with pytest.raises(OptionError, match="behavior_ts: requests have it anyway"):
        Features(dense=("behavior_ts",))


def test_a_batch_keeps_them_on_the_way_to_a_device(tmp_path):
    batch = read(write(tmp_path / "a.parquet", rows()))[0]
    assert torch.equal(batch.to(torch.device("cpu")).behavior_dense, batch.behavior_dense)


def config(folder: Path, **words) -> CTRConfig:
    return CTRConfig(
        data=folder, out=folder, embedding_dim=4, tower=(8,),
        **({"sparse_features": FEATURES.sparse, "dense_features": FEATURES.dense,
            "bucket_features": FEATURES.buckets} | words),
    )  # fmt: skip


MM = EmbeddingConfig(
    name="mm", embedding_dim=6, num_embeddings=11, feature_names=["candidate_mm", "behavior_mm"]
)


def model_and_batch(folder: Path, **words) -> tuple[CTRModel, RequestBatch]:
    """A model with content interest, its W not 0, and rows of one batch of all requests."""
    file = write(folder / "a.parquet", rows())
    vocabularies = {name: Vocabulary.build(ids) for name, ids in scan_ids([file], FEATURES).items()}
    (batch,) = RequestReader([file], batch_size=1000, features=FEATURES)
    batch = IdMapper(vocabularies, None, 1.0)(batch)
    sizes = {name: vocabulary.num_embeddings for name, vocabulary in vocabularies.items()}
    model = build_model(config(folder, mim="off", **words), sizes, None, torch.device("cpu"))
    if model.side is not None:
        torch.nn.init.normal_(model.side.projection.weight, generator=torch.Generator().manual_seed(2))
    return model, batch


def given_to(module: torch.nn.Module) -> list:
    given = []
    module.register_forward_pre_hook(lambda _, args: given.append(args))
    return given


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("ubm", built_in_models())
def test_every_model_is_given_what_a_loop_over_behaviors_adds(tmp_path, ubm, batch_norm, training):
    model, batch = model_and_batch(tmp_path, ubm=ubm, batch_norm=batch_norm, dot_product_features=True)
    model.train(training)
    given = given_to(model.ciubm.ubm)
    prices = [math.log1p(p) for row in rows() for p in row["behavior_price"]]
    mean, std = np.mean(prices), math.sqrt(np.var(prices) + 1e-5)
    model(batch)
    tables = model.item_embeddings.embeddings
    names = {"item_id": "behavior_item_id", "category": "behavior_category"}
    side = ("behavior_action", "behavior_dwell")
    expected = []
    for k, price in enumerate(prices):
        own = torch.cat([tables[t].weight[batch.sparse[f].values()[k]] for t, f in names.items()])
        if batch_norm:
            price = (price - mean) / std if training else price / math.sqrt(1 + 1e-5)
        known = [tables[name].weight[batch.sparse[name].values()[k]] for name in side]
        known = torch.cat([*known, torch.tensor([float(price)])])
        expected.append(own + model.side.projection.weight @ known)
    candidates, behaviors = given[0][:2]
    torch.testing.assert_close(behaviors, torch.stack(expected), atol=1e-5, rtol=1e-5)
    own = [tables[t].weight[batch.sparse[f"candidate_{t}"].values()] for t in names]
    torch.testing.assert_close(candidates, torch.cat(own, dim=1))


@pytest.mark.parametrize("ubm", built_in_models())
def test_every_model_learns_from_them(tmp_path, ubm):
    model, batch = model_and_batch(tmp_path, ubm=ubm)
    model(batch).logits.square().sum().backward()
    for weight in (model.side.projection.weight, model.item_embeddings.embeddings["behavior_action"].weight):
        assert weight.grad.abs().sum() > 0


def test_a_cut_history_keeps_the_side_information_of_what_is_left(tmp_path):
    model, batch = model_and_batch(tmp_path, ubm="bst", batch_norm=False)
    model.ciubm.ubm.max_positions = 2
    tower = given_to(model.tower)
    model.eval()(batch)
    file = tmp_path / "a.parquet"
    vocabularies = {name: Vocabulary.build(ids) for name, ids in scan_ids([file], FEATURES).items()}
    (short,) = RequestReader([file], batch_size=1000, features=FEATURES, max_behaviors=2)
    model(IdMapper(vocabularies, None, 1.0)(short))
    whole, cut = (args[0][:, :-1] for args in tower)  # all but the length of the history
    torch.testing.assert_close(cut, whole)


def test_a_model_begins_as_the_one_without_side_information(tmp_path):
    none = {"sparse_features": (), "dense_features": (), "bucket_features": {}}
    sizes = {name: 9 for name in ("user_id", "item_id", "category", *FEATURES.names)}
    built = [build_model(config(tmp_path, **words), sizes, MM, torch.device("meta")) for words in ({}, none)]
    known, plain = ({name: p for name, p in m.named_parameters() if not p.is_meta} for m in built)
    assert known.keys() - plain.keys() == {"side.projection.weight"}
    assert all(torch.equal(known[name], parameter) for name, parameter in plain.items())
    assert not known["side.projection.weight"].any()
    assert not [name for name in built[1].state_dict() if name.startswith("side")]


def test_the_tower_does_not_get_what_is_known_of_behaviors(tmp_path):
    model, _ = model_and_batch(tmp_path)
    assert model.candidate_columns == [] and model.behavior_columns == ["behavior_action", "behavior_dwell"]


def test_a_model_that_would_not_read_them_is_refused(tmp_path):
    with pytest.raises(OptionError, match="behavior_action, .*: only ID and fusion interest read"):
        model_and_batch(tmp_path, id_interest=False, content_interest=True)


def test_fusion_interest_reads_them(tmp_path):
    words = {"id_interest": False, "content_interest": False}
    sizes = {name: 9 for name in ("user_id", "item_id", "category", *FEATURES.names)}
    model = build_model(config(tmp_path, **words), sizes, MM, torch.device("meta"))
    assert model.side is not None and model.ciubm.fusion


def test_no_behaviors_give_no_rows():
    side = SideInformation(4, 3, 2, batch_norm=True)
    found = side(torch.zeros(0, 4), [torch.zeros(0, 3)], torch.zeros(0, 2))
    assert found.shape == (0, 4)
    found.sum().backward()
    assert not side.projection.weight.grad.any()
