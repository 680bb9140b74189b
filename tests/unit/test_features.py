"""Further columns of requests: read as written, refused where malformed, pooled and scaled as documented."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.sharding import build_model
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features
from mim_torchrec.data.id_scan import count_ids, scan_ids
from mim_torchrec.data.requests import RequestReader
from mim_torchrec.data.schema import REQUESTS, category_ids
from mim_torchrec.data.vocabulary import IdMapper, Vocabulary
from tests.datasets import request_rows

FEATURES = Features(
    sparse=("city", "interests", "device", "candidate_brand"),
    dense=("age", "candidate_price", "candidate_is_new"),
)
TYPES = {
    "city": pa.int32(), "interests": pa.list_(pa.int64()), "device": pa.string(),
    "candidate_brand": pa.list_(pa.string()), "age": pa.float64(),
    "candidate_price": pa.list_(pa.float32()), "candidate_is_new": pa.list_(pa.bool_()),
}  # fmt: skip


def rows(count: int = 12) -> list[dict]:
    """Requests with further columns; some have no city, no interests, no device."""
    rng = np.random.default_rng(5)
    made = request_rows(count)
    for k, row in enumerate(made):
        candidates = len(row["candidate_item_ids"])
        row |= {
            "city": None if k % 5 == 0 else int(rng.integers(-3, 3)),
            "interests": None if k == 3 else rng.integers(50, size=k % 4).tolist(),
            "device": None if k == 1 else f"phone {k % 3}",
            "candidate_brand": [f"brand {b}" for b in rng.integers(4, size=candidates)],
            "age": float(rng.normal(0, 30)),
            "candidate_price": rng.lognormal(3, 2, candidates).astype(np.float32).tolist(),
            "candidate_is_new": (rng.random(candidates) < 0.5).tolist(),
        }
    return made


def write(path: Path, made: list[dict], **types: pa.DataType) -> Path:
    fields = [pa.field(name, kind) for name, kind in (TYPES | types).items() if name in made[0]]
    schema = pa.schema([*(field for field in REQUESTS if field.name in made[0]), *fields])
    pq.write_table(pa.Table.from_pylist(made, schema=schema), path, row_group_size=4)
    return path


def read(file: Path, features: Features = FEATURES, **options) -> list:
    return list(RequestReader([file], batch_size=5, features=features, **options))


def ids_of(value) -> list[int]:
    """Naive: the ids of a value, which may be null, one or a list."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [category_ids(pa.array([v]))[0] for v in values]


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_the_columns_of_the_rows(tmp_path, shuffle):
    made = rows()
    by_id = {row["request_id"]: row for row in made}
    found = 0
    for batch in read(write(tmp_path / "a.parquet", made), shuffle=shuffle):
        ends = np.cumsum(batch.sparse["candidate_item_id"].lengths().numpy())
        for k, request in enumerate(batch.request_ids.tolist()):
            row = by_id[request]
            for name in FEATURES.sparse:
                assert batch.sparse[name].to_dense()[k].tolist() == ids_of(row[name]), name
            age = row["age"]
            expected = math.copysign(math.log(1 + abs(age)), age)
            assert batch.request_dense[k].tolist() == pytest.approx([expected], rel=1e-6)
            first, last = ends[k] - len(row["candidate_item_ids"]), ends[k]
            pairs = zip(row["candidate_price"], row["candidate_is_new"], strict=True)
            expected = [[math.log(1 + price), math.log(1 + new)] for price, new in pairs]
            np.testing.assert_allclose(batch.candidate_dense[first:last].numpy(), expected, rtol=1e-6)
            found += 1
    assert found == len(made)


def test_without_features_batches_are_as_they_were(tmp_path):
    file = write(tmp_path / "a.parquet", rows())
    for batch in read(file, Features()):
        assert batch.request_dense is None and batch.candidate_dense is None
        assert not {*FEATURES.sparse} & {*batch.sparse.keys()}


def test_a_batch_keeps_its_dense_columns_on_the_way_to_a_device(tmp_path):
    batch = read(write(tmp_path / "a.parquet", rows()))[0]
    moved = batch.to(torch.device("cpu"))
    torch.testing.assert_close(moved.candidate_dense, batch.candidate_dense)
    torch.testing.assert_close(moved.request_dense, batch.request_dense)


@pytest.mark.parametrize(
    ("column", "change", "problem"),
    [
        ("age", lambda row: float("nan"), "NaN"),
        ("age", lambda row: None, "is null"),
        ("age", lambda row: 1e300, "beyond float32"),
        ("candidate_price", lambda row: [float("inf")] * len(row["candidate_price"]), "infinite"),
        ("candidate_price", lambda row: row["candidate_price"][:-1], "length"),
        ("candidate_price", lambda row: None, "is null"),
        ("candidate_brand", lambda row: [*row["candidate_brand"], "one more"], "length"),
        ("candidate_brand", lambda row: [None] * len(row["candidate_brand"]), "value in the list is null"),
        ("interests", lambda row: [1, None], "value in the list is null"),
    ],
)
def test_a_malformed_value_is_an_error_that_names_it_or_skipped(tmp_path, column, change, problem):
    made = rows()
    made[6][column] = change(made[6])
    file = write(tmp_path / "a.parquet", made)
    with pytest.raises(DataError, match=problem) as error:
        read(file)
    assert f"row group 1, row 2, column {column}" in str(error.value)
    kept = read(file, on_bad_row="skip")
    assert sum(batch.num_requests for batch in kept) == len(made) - 1


@pytest.mark.parametrize(
    ("column", "kind", "value", "problem"),
    [
        ("city", pa.float32(), 1.5, "integers or strings"),
        ("candidate_brand", pa.string(), "x", "one a candidate"),
        ("age", pa.string(), "old", "expected numbers"),
        ("age", pa.list_(pa.float32()), [1.0], "one a request"),
        ("candidate_price", pa.float32(), 1.0, "one a candidate"),
        ("city", pa.binary(), b"x", "integers or strings"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_both(tmp_path, column, kind, value, problem):
    made = [row | {column: value} for row in rows()]
    with pytest.raises(DataError, match=problem) as error:
        read(write(tmp_path / "a.parquet", made, **{column: kind}))
    assert f"column {column}" in str(error.value)
    assert f"found {kind}".replace("item", "element") in str(error.value)


def test_a_missing_column_is_an_error_that_lists_what_is_there(tmp_path):
    file = write(tmp_path / "a.parquet", rows())
    with pytest.raises(DataError, match=r"missing; add it, .*city") as error:
        read(file, Features(dense=("height",)))
    assert "column height" in str(error.value)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"sparse": ("city", "city")}, "more than once: city"),
        ({"sparse": ("city",), "dense": ("city",)}, "more than once: city"),
        ({"sparse": ("user_id",)}, "user_id: requests have it anyway"),
        ({"dense": ("candidate_item_id",)}, "candidate_item_id: requests have it anyway"),
        ({"dense": ("age",), "buckets": {"age": "0"}}, "more than once: age"),
        ({"buckets": {"age": "0,x"}}, "'0,x' is no list of ascending numbers"),
        ({"buckets": {"age": "5,5"}}, "'5,5' is no list of ascending numbers"),
        ({"buckets": {"age": "0,inf"}}, "'0,inf' is no list of ascending numbers"),
        ({"buckets": {"age": ""}}, "'' is no list of ascending numbers"),
    ],
)
def test_names_that_cannot_be_features_are_errors(words, problem):
    with pytest.raises(ValueError, match=problem):
        Features(**words)


def test_numbers_are_divided_into_ranges(tmp_path):
    made = rows()
    for row, age in zip(made, [-5, 0, 9.9, 10, 1e9, None, float("nan"), 3, 4, 10.5, -0.1, 11], strict=True):
        row["age"] = age
    features = Features(buckets={"age": "0,10", "candidate_price": "20"})
    file = write(tmp_path / "a.parquet", made)
    batches = read(file, features)
    found = [part.tolist() for batch in batches for part in batch.sparse["age"].to_dense()]
    assert found == [[0], [1], [1], [2], [2], [], [3], [1], [1], [2], [0], [2]]
    prices = [part.tolist() for batch in batches for part in batch.sparse["candidate_price"].to_dense()]
    assert prices == [[int(price >= 20) for price in row["candidate_price"]] for row in made]
    assert scan_ids([file], features)["age"].tolist() == [0, 1, 2, 3]


def scanned(file: Path, shrinkage: float = 0.0) -> dict[str, Vocabulary]:
    return {
        name: Vocabulary.build(found.ids, 0.0, np.array([7, *found.impressions]), shrinkage)
        for name, found in count_ids([file], FEATURES).items()
    }


def test_each_sparse_column_has_a_vocabulary_of_its_own(tmp_path):
    made = rows()
    vocabularies = scanned(write(tmp_path / "a.parquet", made))
    for name in FEATURES.sparse:
        assert vocabularies[name].ids.tolist() == sorted({i for row in made for i in ids_of(row[name])}), name


@pytest.mark.parametrize("shrinkage", [0.0, 6.0])
def test_the_tower_is_given_mean_embeddings_and_scaled_numbers(tmp_path, shrinkage):
    file = write(tmp_path / "a.parquet", rows())
    vocabularies = scanned(file, shrinkage)
    config = CTRConfig(
        data=tmp_path, out=tmp_path, mim="off", embedding_dim=4, tower=(8,), batch_norm=False,
        sparse_features=FEATURES.sparse, dense_features=FEATURES.dense, id_shrinkage=shrinkage,
    )  # fmt: skip
    sizes = {name: vocabulary.num_embeddings for name, vocabulary in vocabularies.items()}
    model = build_model(config, sizes, None, torch.device("cpu")).eval()
    given = []
    model.tower.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    batch = IdMapper(vocabularies, None, 1.0)(read(file)[0])
    model(batch)
    bags = model.request_embeddings.embedding_bags
    items = model.item_embeddings.embeddings

    def embedding(weights: torch.Tensor, name: str, row: int) -> torch.Tensor:
        count = float(vocabularies[name].impressions[row])
        return weights[row] * (count / (count + shrinkage) if shrinkage else 1.0)

    candidate = 0
    for request in range(batch.num_requests):
        for nth in range(int(batch.sparse["candidate_item_id"].lengths()[request])):
            expected = []
            for name in ("user_id", "query_id", "city", "interests", "device"):
                own = batch.sparse[name].to_dense()[request]
                rows_of = [embedding(bags[name].weight, name, row) for row in own.tolist()]
                expected.append(sum(rows_of) / len(rows_of) if rows_of else torch.zeros(4))
            for name, key in (("item_id", "candidate_item_id"), ("category", "candidate_category"),
                              ("candidate_brand", "candidate_brand")):  # fmt: skip
                row = batch.sparse[key].to_dense()[request][nth]
                expected.append(embedding(items[name].weight, name, int(row)))
            expected += [batch.request_dense[request], batch.candidate_dense[candidate]]
            expected = torch.cat(expected)
            torch.testing.assert_close(given[0][candidate, : len(expected)], expected)
            candidate += 1
    assert candidate == len(given[0])


def test_features_do_not_change_what_behaviors_are_compared_by(tmp_path):
    config = CTRConfig(data=tmp_path, out=tmp_path, embedding_dim=4, sparse_features=("candidate_brand",))
    sizes = {"user_id": 3, "item_id": 5, "candidate_brand": 7}
    mm = EmbeddingConfig(name="mm", embedding_dim=6, num_embeddings=5, feature_names=["candidate_mm",
                         "behavior_mm"])  # fmt: skip
    model = build_model(config, sizes, mm, torch.device("meta"))
    assert model.item_columns == ["item_id"]
    assert model.candidate_columns == ["candidate_brand"]
