"""The scorer of the server gives the trainer's scores, with rows from stores and interests by matrices."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from mim_torchrec.ciubm.ciubm import CiUBM
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ctr.evaluation import main as evaluate
from mim_torchrec.ctr.main import main as train
from mim_torchrec.data.schema import category_ids
from mim_torchrec.embeddings.stores.redis_store import RedisStore
from mim_torchrec.embeddings.table.format import Table, VersionMismatch
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.bundling import main as bundle_command
from mim_torchrec.serving.bundling import write_bundle
from mim_torchrec.serving.grid import Grid
from mim_torchrec.serving.matrix import MatrixCache, MatrixCiUBM, interest_matrix, normalized
from mim_torchrec.serving.messages import BadRequest, ScoreRequest, Scores
from mim_torchrec.serving.scorer import Scorer
from tests.pipeline.test_ctr_main import SMALL, STYLES, write_dataset
from tests.pipeline.test_evaluate_main import write_table

MODELS = {
    "paper-din": ["--ubm", "din"],
    "paper-sim": ["--ubm", "sim", "--top-k", "2"],
    "recommended-din": ["--preset", "recommended", "--ubm", "din"],
    "recommended-twin": ["--preset", "recommended", "--ubm", "twin", "--top-k", "2"],
    "temperature-bst": ["--ubm", "bst", "--content-temperature", "0.1"],
    "hard-sim": ["--ubm", "sim", "--search", "hard", "--top-k", "2"],
    "dien-projection": ["--ubm", "dien", "--content-projection", "linear"],
    "paper-din-shrunk": [
        "--id-shrinkage",
        "5",
        "--id-shrinkage-of",
        "user_id",
        "20",
        "category",
        "0",
        "--min-count",
        "4",
        "--normalize-ids",
        "False",
    ],
    "base-avg_pooling": ["--ubm", "avg_pooling", "--mim", "off"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("serving")
    write_dataset(root / "data")
    write_table(root / "table", "styles")
    return root


@pytest.fixture(scope="module", params=MODELS)
def run(request, folder) -> Path:
    """A trained model, what the trainer says of the test requests, and its bundle."""
    out = folder / request.param
    words = ["--data", str(folder / "data"), "--out", str(out), *SMALL, *MODELS[request.param]]
    train(words if "off" in words else [*words, "--table", str(folder / "table")])
    evaluate(["--model", str(out), "--out", str(out / "evaluation"), "--draws", "0"])
    write_bundle(out, out / "bundle")
    return out


def requests(folder: Path) -> list[ScoreRequest]:
    """The test requests as a client sends them."""
    found = []
    for row in pq.read_table(folder / "data" / "requests" / "test").to_pylist():
        ids = {"user_id": [row["user_id"]], "query_id": [row["query_id"]]}
        for role, plural in (("candidate", "candidate"), ("behavior", "behavior")):
            ids[f"{role}_item_id"] = row[f"{plural}_item_ids"]
        tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in ids.items()}
        for role in ("candidate", "behavior"):
            hashed = category_ids(pa.array(row[f"{role}_categories"], pa.string())).copy()
            tensors[f"{role}_category"] = torch.from_numpy(hashed)
        micro = [int(t.timestamp() * 1e6) for t in row["behavior_ts"]]
        found.append(ScoreRequest(ids=tensors, request_ts=int(row["ts"].timestamp() * 1e6),
                                  behavior_ts=torch.tensor(micro, dtype=torch.int64)))  # fmt: skip
    return found


def trained(run: Path) -> np.ndarray:
    return pq.read_table(run / "evaluation" / "predictions.parquet")["score"].to_numpy()


def scorer(run: Path, **words) -> Scorer:
    bundle = Bundle.open(run / "bundle")
    return Scorer(bundle, run.parent / "table" if bundle.table_version else None, **words)


def all_scores(one: Scorer, sent: list[ScoreRequest], together: int) -> np.ndarray:
    return torch.cat([scores.scores for scores in answers(one, sent, together)]).numpy()


def answers(one: Scorer, sent: list[ScoreRequest], together: int) -> list[Scores]:
    return [scores for k in range(0, len(sent), together) for scores in one.score(sent[k : k + together])]


@pytest.mark.parametrize("together", [1, 7])
def test_scores_are_the_trainers(run, folder, together):
    sent = requests(folder)
    one = scorer(run, cache=100)
    np.testing.assert_allclose(all_scores(one, sent, together), trained(run), rtol=0, atol=1e-5)
    np.testing.assert_allclose(all_scores(one, sent, together), trained(run), rtol=0, atol=1e-5)
    linear = run.name.startswith(("paper", "hard", "dien"))
    assert {found.was_kept for found in answers(one, sent, together)} == {True if linear else None}


def test_without_a_cache_nothing_is_kept(din, folder):
    assert {found.was_kept for found in answers(scorer(din), requests(folder), 1)} == {None}


@pytest.fixture(scope="module")
def din(folder) -> Path:
    out = folder / "one"
    train(["--data", str(folder / "data"), "--out", str(out), *SMALL, "--table", str(folder / "table")])
    write_bundle(out, out / "bundle")
    return out


def test_rows_may_come_from_redis(din, folder, redis_url):
    bundle = Bundle.open(din / "bundle")
    RedisStore.load(redis_url, Table.open(folder / "table"))
    for name in bundle.tables:
        RedisStore.load(redis_url, bundle.table(name))
    remote = Scorer(bundle, redis_url, id_store=redis_url)
    sent = requests(folder)[:10]
    np.testing.assert_array_equal(all_scores(remote, sent, 1), all_scores(scorer(din), sent, 1))


def test_unknown_ids_are_scored_as_the_trainer_does_and_counted(din, folder):
    sent = requests(folder)[0]
    ids = sent.ids | {"user_id": torch.tensor([-9]), "candidate_item_id": torch.tensor([-1, -2, 1000])}
    ids["candidate_category"] = sent.ids["candidate_category"][:3]
    (found,) = scorer(din).score([ScoreRequest(ids=ids)])
    assert found.unknown == {"user": 1, "item": 2, "vector": 2, "query": 0, "category": 0}
    assert found.scores[0] != found.scores[2]


def test_an_item_that_was_deleted_is_unknown_at_once_also_in_the_cache(din, folder):
    one, sent = scorer(din, cache=100), requests(folder)
    gone = next(
        (r, b)
        for r in sent
        for b in r.ids["behavior_item_id"]
        if ((b - 1000) // 7 % STYLES == (r.ids["candidate_item_id"] - 1000) // 7 % STYLES).any()
    )
    sent, gone = gone[0], gone[1][None]
    before = one.score([sent])[0]
    assert one.score([sent])[0].unknown["vector"] == 0 and len(one.cache) == 1
    none = torch.empty(0, dtype=torch.int64)
    window = Window.of(none, torch.empty(0, 8), table_version="styles", seq=1, window_id="w", removed=gone)
    assert one.apply(window) and len(one.cache) == 0
    after = one.score([sent])[0]
    assert after.unknown["vector"] == 1 and not torch.equal(before.scores, after.scores)


def test_a_window_of_another_client_drops_the_histories_with_its_items_only(din, folder, redis_url):
    bundle, base = Bundle.open(din / "bundle"), Table.open(folder / "table")
    store = RedisStore.load(redis_url, base)
    one, sent = Scorer(bundle, redis_url, cache=1000), requests(folder)
    sent = [request for request in sent if request.num_behaviors]
    changed = sent[0].ids["behavior_item_id"][:1]
    touched = [bool(torch.isin(changed, request.ids["behavior_item_id"])) for request in sent]
    assert {True, False} == set(touched)
    answers(one, sent, 1)
    window = Window.of(changed, torch.randn(1, base.manifest.dim), table_version="styles", seq=1,
                       window_id="w", dtype="float32")  # fmt: skip
    assert store.apply(window)
    found = answers(one, sent, 1)
    distinct = {request.ids["behavior_item_id"].numpy().tobytes() for request in sent}
    assert len(distinct) == len(sent)  # else a later request finds what an earlier one has made
    assert [scores.was_kept for scores in found] == [not own for own in touched]
    fresh = Scorer(bundle, redis_url)  # keeps no matrix
    np.testing.assert_allclose(
        torch.cat([scores.scores for scores in found]).numpy(), all_scores(fresh, sent, 1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("mm_dim", "num_behaviors"), [(6, 4), (5, 3), (1, 2), (4, 0)])
def test_the_matrix_of_a_history_gives_the_sums_of_equations_7_and_8(mm_dim, num_behaviors):
    generator = torch.Generator().manual_seed(mm_dim)
    vectors = torch.randn(num_behaviors, mm_dim, generator=generator)
    vectors[1:2] = 0  # an item without a vector
    ids = torch.randn(num_behaviors, 3, generator=generator)
    target = torch.randn(mm_dim, generator=generator)
    content, fusion = torch.zeros(mm_dim), torch.zeros(3)
    for vector, row in zip(vectors, ids, strict=True):
        length = float(target.norm() * vector.norm())
        relevance = float(target @ vector) / length if length else 0.0
        content += relevance * vector
        fusion += relevance * row
    found = target / target.norm() @ interest_matrix(vectors, ids)
    torch.testing.assert_close(found, torch.cat([content, fusion]))


def test_vectors_are_normalized_to_the_digit_as_in_training():
    vectors = torch.randn(50, 7) * torch.logspace(-14, 14, 50)[:, None]
    vectors[3] = 0  # an item without a vector
    assert torch.equal(normalized(vectors), F.normalize(vectors, dim=-1))


def test_a_matrix_of_rows_from_before_a_window_is_not_kept():
    cache, items, matrix = MatrixCache(2), torch.tensor([1, 2]), torch.ones(2, 2)
    generation = cache.generation
    cache.drop(torch.tensor([9]))
    cache.put(b"k", items, matrix, generation)
    assert cache.get(b"k") is None
    for key in (b"a", b"b", b"c"):
        cache.put(key, items, matrix, cache.generation)
    assert cache.get(b"a") is None and cache.get(b"c") is matrix and len(cache) == 2
    cache.drop(torch.tensor([2]))
    assert len(cache) == 0


def test_histories_that_are_dropped_are_those_with_an_item_that_changed():
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 3, 40):
        cache, matrix = MatrixCache(100), torch.ones(1, 1)
        histories = {k: torch.randint(-50, 50, (k % 7,), generator=generator) for k in range(60)}
        for key, items in histories.items():
            cache.put(key, items, matrix, cache.generation)
        changed = torch.randint(-50, 50, (size,), generator=generator)
        cache.drop(changed)
        kept = {key for key in histories if cache.get(key) is not None}
        named = set(changed.tolist())
        assert kept == {key for key, items in histories.items() if named.isdisjoint(items.tolist())}


def test_content_contributes_what_the_score_loses_without_it(din, folder):
    sent = requests(folder)[0]
    with_it = ScoreRequest(ids=sent.ids, request_ts=sent.request_ts, behavior_ts=sent.behavior_ts,
                           contribution=True)  # fmt: skip
    one = scorer(din)
    (found,) = one.score([with_it])
    window = Window.of(torch.empty(0, dtype=torch.int64), torch.empty(0, 8), table_version="styles", seq=1,
                       window_id="w", removed=sent.ids["candidate_item_id"].unique())  # fmt: skip
    one.apply(window)
    if set(sent.ids["candidate_item_id"].tolist()) & set(sent.ids["behavior_item_id"].tolist()):
        pytest.fail("the request was to have no candidate among its behaviors")
    (without,) = one.score([sent])
    torch.testing.assert_close(found.contribution, found.scores - without.scores, rtol=0, atol=1e-6)


def test_what_the_model_needs_and_a_request_lacks_is_named(din, folder):
    sent = requests(folder)[0]
    with pytest.raises(BadRequest, match="needs the feature query_id"):
        scorer(din).score([ScoreRequest(ids={k: v for k, v in sent.ids.items() if k != "query_id"})])


def test_vectors_of_another_version_are_refused(din, folder, tmp_path):
    write_table(tmp_path / "other", "v9")
    with pytest.raises(VersionMismatch, match="v9"):
        Scorer(Bundle.open(din / "bundle"), tmp_path / "other")
    with pytest.raises(ValueError, match="say where its vectors are"):
        Scorer(Bundle.open(din / "bundle"), None)
    dense = din / "bundle" / "dense.safetensors"
    data = dense.read_bytes()
    try:
        dense.write_bytes(data[:-4] + bytes(4))
        with pytest.raises(VersionMismatch, match="does not hold the weights"):
            scorer(din)
    finally:
        dense.write_bytes(data)


def test_the_command_writes_a_bundle_and_refuses_what_is_no_run(din, tmp_path, capsys):
    bundle_command(["--run", str(din), "--out", str(tmp_path / "bundle"), "--export"])
    assert "of table_version styles, tables category, item_id" in capsys.readouterr().out
    facts = {"inputs.json": ""}
    torch.export.load(tmp_path / "bundle" / "dense.pt2", extra_files=facts)
    names = [one["name"] for one in json.loads(facts["inputs.json"])["inputs"]]
    assert {"user_id", "query_id", "candidate_category", "behavior_item_id", "behavior_mm"} <= set(names)
    with pytest.raises(ValueError, match="is no run"):
        bundle_command(["--run", str(tmp_path), "--out", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="is no bundle"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("shape", [(3, 5), (4, 0), (2, 1), (1, 40)])
def test_a_grid_computes_what_packed_pairs_do(shape):
    torch.manual_seed(sum(shape))
    grid = Grid(*shape)
    packed = RequestPairs.build(torch.tensor([0, shape[0]]), torch.tensor([0, shape[1]]))
    candidates, behaviors = torch.randn(shape[0], 6), torch.randn(shape[1], 6)
    behaviors[1:] = behaviors[1:].round()  # some are equal
    scores = packed.inner_products(candidates, behaviors)
    torch.testing.assert_close(grid.inner_products(candidates, behaviors), scores)
    for name in ("candidate_index", "behavior_index", "pair_offsets", "num_pairs", "longest", "order"):
        assert torch.equal(torch.as_tensor(getattr(grid, name)), torch.as_tensor(getattr(packed, name))), name
    rounded = scores.round()
    for k in (1, 2, 3, 20):
        kept = packed.top_k(rounded, k)
        assert torch.equal(grid.top_k(rounded, k), kept)
        some, expected = grid.select(kept), packed.select(kept)
        assert torch.equal(some.behavior_index, expected.behavior_index)
        weights = expected.segment_softmax(scores[kept])
        torch.testing.assert_close(some.segment_softmax(scores[kept]), weights)
        torch.testing.assert_close(some.weighted_sum(behaviors, weights),
                                   expected.weighted_sum(behaviors, weights))  # fmt: skip
        torch.testing.assert_close(some.inner_products(candidates, behaviors), scores[kept])
    torch.testing.assert_close(grid.segment_softmax(scores), packed.segment_softmax(scores))
    torch.testing.assert_close(grid.weighted_sum(behaviors, scores), packed.weighted_sum(behaviors, scores))
    with pytest.raises(NotImplementedError, match="train on"):
        _ = grid.by_behavior


def test_a_temperature_is_not_linear(folder):
    with pytest.raises(ValueError, match="not linear"):
        MatrixCiUBM(CiUBM(None, content=True, fusion=True, temperature=0.1))
