"""What the page says of a request: ranks with and without content, likeness in words, and a new item."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from mim_torchrec.data.schema import Dataset, category_ids
from mim_torchrec.embeddings.table.manifest import VersionMismatch
from mim_torchrec.embeddings.windows.window import Window
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.logged import Log
from mim_torchrec.serving.page.likeness import WORDS, Likeness
from mim_torchrec.serving.page.new_item import NO_ENCODER, ItemEncoder, with_new_item
from mim_torchrec.serving.page.page import Page
from mim_torchrec.serving.scorer import Scorer
from tests.page import shop_with_encoder
from tests.serving import application, deployment


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return shop_with_encoder(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def scorer(folder) -> Scorer:
    return Scorer(Bundle.open(folder / "run" / "bundle"), folder / "table")


@pytest.fixture(scope="module")
def encoder(folder, scorer) -> ItemEncoder:
    return ItemEncoder(folder / "encoder", scorer.bundle.table_version)


def client_of(folder: Path, cache: Path, encoder: ItemEncoder | None = None, **words) -> TestClient:
    app, _ = application(
        deployment(folder, **words),
        page_of=lambda service: Page(folder / "data", cache, service, 10**7, encoder),
    )
    return TestClient(app)


@pytest.fixture(scope="module")
def client(folder, encoder, tmp_path_factory):
    with client_of(folder, tmp_path_factory.mktemp("items"), encoder) as one:
        yield one


@pytest.fixture(scope="module")
def row(folder) -> dict:
    """The newest test request of a user with a history."""
    rows = pq.read_table(folder / "data" / "requests" / "test").to_pylist()
    newest = {row["user_id"]: row for row in rows if row["behavior_item_ids"]}
    return max(newest.values(), key=lambda row: len(row["behavior_item_ids"]))


@pytest.fixture(scope="module")
def items(folder) -> dict[int, dict]:
    return {row["item_id"]: row for row in pq.read_table(folder / "data" / "items").to_pylist()}


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(buffer, "PNG")
    return buffer.getvalue()


def ask(client: TestClient, row: dict, body: bytes | None = None, **words: str):
    """Where a new item would rank for the user of a row."""
    words = {"user": str(row["user_id"]), "title": "red chair", "category": "chair"} | words
    return client.post("/demo/what-if", params=words, content=png("red") if body is None else body)


def test_ranks_with_and_without_content_are_those_of_the_scores(client, scorer, folder, row):
    shown = client.get(f"/demo/users/{row['user_id']}").json()["candidates"]
    logged = next(one for one in Log(Dataset(folder / "data"), "test", scorer.features)
                  if one.known_as("request_id") == str(row["request_id"]))  # fmt: skip
    found = scorer.score([logged.asked(scorer, contribution=True)])[0]
    without = (found.scores - found.contribution).tolist()
    by_item = {one["item_id"]: one for one in shown}
    assert [one["score"] for one in shown] == sorted((one["score"] for one in shown), reverse=True)
    for item, score, other in zip(row["candidate_item_ids"], found.scores.tolist(), without, strict=True):
        one = by_item[str(item)]
        assert (one["score"], one["without"]) == pytest.approx((score, other), abs=1e-6)
    for name, rank in (("score", "rank"), ("without", "rank_without")):
        values = [round(one[name], 6) for one in shown]
        assert [one[rank] for one in shown] == [1 + sum(v > value for v in values) for value in values]


def test_cards_have_category_and_age_at_the_request(client, row, items):
    found = client.get(f"/demo/users/{row['user_id']}").json()
    for one in found["candidates"]:
        item = items[int(one["item_id"])]
        assert (one["title"], one["category"]) == (item["title"], item["category"])
        assert one["age"] == pytest.approx((row["ts"] - item["listed_at"]).total_seconds())
    times = [(row["ts"] - ts).total_seconds() for ts in reversed(row["behavior_ts"])]
    assert [one["ago"] for one in found["history"]] == pytest.approx(times[:24])
    assert found["behaviors"] == len(row["behavior_item_ids"])


def test_the_behaviors_that_are_named_are_the_most_alike(client, scorer, row):
    found = client.get(f"/demo/users/{row['user_id']}").json()
    behaviors = torch.tensor(row["behavior_item_ids"])
    vectors, known = scorer.mm.lookup(behaviors)
    assert known.all()
    for one in found["candidates"]:
        own, _ = scorer.mm.lookup(torch.tensor([int(one["item_id"])]))
        cosines = torch.nn.functional.cosine_similarity(own, vectors).sort(descending=True).values
        assert [other["cosine"] for other in one["alike"]] == pytest.approx(cosines[:3].tolist(), abs=1e-5)
        assert one["has_vector"] and all(other["words"] for other in one["alike"])


def test_likeness_in_words_is_by_the_pairs_that_are_less_alike(scorer, items):
    ids = np.array(sorted(items))
    likeness = Likeness(scorer.mm, ids)
    unit = torch.nn.functional.normalize(scorer.mm.lookup(torch.from_numpy(ids))[0], dim=1)
    pairs = [float(unit[i] @ unit[j]) for i in range(len(ids)) for j in range(i)]
    for cosine in (min(pairs) - 0.1, float(np.median(pairs)), float(np.quantile(pairs, 0.95)), 1.1):
        said = likeness.said(cosine)
        fraction = sum(pair < cosine - 1e-6 for pair in pairs) / len(pairs)
        assert said["closer_than"] == pytest.approx(fraction, abs=1e-3)
        expected = [words for least, words in WORDS if said["closer_than"] >= least]
        assert said["words"] == (expected[0] if expected else "not similar")
    assert likeness.said(1.1)["words"] == "nearly the same"


def test_where_no_pair_has_vectors_nothing_is_said_in_words(scorer):
    assert Likeness(scorer.mm, np.array([-5, -6])).said(0.5) == {
        "cosine": 0.5, "closer_than": None, "words": None,
    }  # fmt: skip


def test_a_new_item_scores_as_if_its_vector_had_been_published(folder, encoder, client, row):
    """RIM would publish a window with the vector; then the store has it, and nothing is given."""
    found = ask(client, row).json()
    new = next(one for one in found["candidates"] if one["is_new"])
    published = Scorer(Bundle.open(folder / "run" / "bundle"), folder / "table")
    with torch.inference_mode():
        vector = encoder._encoder([Image.new("RGB", (32, 32), "red")], ["red chair"]).float().clone()
    logged = next(one for one in Log(Dataset(folder / "data"), "test", published.features)
                  if one.known_as("request_id") == str(row["request_id"]))  # fmt: skip
    asked = with_new_item(published, logged.asked(published, contribution=True), vector[0], "chair")
    window = Window.of(asked.ids["candidate_item_id"][-1:], vector, seq=1, window_id="one", dtype="float32",
                       table_version=published.mm.table_version)  # fmt: skip
    assert published.apply(window)
    assert asked.ids["candidate_category"][-1] == int(category_ids(pa.array(["chair"]))[0])
    expected = published.score([replace(asked, vectors={})])[0]
    assert new["score"] == pytest.approx(float(expected.scores[-1]), abs=1e-6)
    assert new["score"] - new["without"] == pytest.approx(float(expected.contribution[-1]), abs=1e-6)
    assert new["rank"] == 1 + int((expected.scores > expected.scores[-1]).sum())
    assert len(found["candidates"]) == len(row["candidate_item_ids"]) + 1
    cosines = published.relevance(replace(asked, vectors={}))[-1].sort(descending=True).values
    assert [other["cosine"] for other in new["alike"]] == pytest.approx(cosines[:3].tolist(), abs=1e-5)


def test_the_picture_and_the_title_of_a_new_item_matter(client, row):
    def score(*body, **words) -> float:
        shown = ask(client, row, *body, **words).json()["candidates"]
        return next(one["score"] for one in shown if one["is_new"])

    first = score()
    assert score() == first
    assert score(png("blue")) != first and score(title="blue bag") != first and score(category="bag") != first


@pytest.mark.parametrize(("words", "body", "problem"), [
    ({"title": " "}, None, "the title is empty"),
    ({"category": ""}, None, "the category is empty"),
    ({}, b"", "there is no picture"),
    ({}, b"no image", "cannot be decoded"),
])  # fmt: skip
def test_what_a_new_item_lacks_is_said(client, row, words, body, problem):
    answer = ask(client, row, body, **words)
    assert answer.status_code == 400 and problem in answer.json()["error"]


def test_a_server_without_an_encoder_says_so(folder, row, tmp_path):
    with client_of(folder, tmp_path) as client:
        assert client.get("/demo/about").json()["what_if_problem"] == NO_ENCODER
        answer = ask(client, row)
    assert answer.status_code == 409 and answer.json()["error"] == NO_ENCODER


def test_an_encoder_of_other_vectors_is_refused(folder, encoder):
    with pytest.raises(VersionMismatch, match="the server has vectors of other"):
        ItemEncoder(folder / "encoder", "other")
    with pytest.raises(VersionMismatch, match="the model is Base"):
        ItemEncoder(folder / "encoder", None)
    assert encoder.problem("later").endswith("the server has vectors of later")


def test_users_are_found_by_parts_of_their_ids(client, folder):
    rows = pq.read_table(folder / "data" / "requests" / "test").to_pylist()
    newest = {str(row["user_id"]): len(row["behavior_item_ids"]) for row in rows if row["behavior_item_ids"]}
    found = client.get("/demo/users").json()
    assert {one["user_id"]: one["behaviors"] for one in found["users"]} == newest
    assert found["count"] == len(newest)
    last = next(iter(newest))[-2:]
    found = client.get("/demo/users", params={"search": last}).json()["users"]
    assert {one["user_id"] for one in found} == {user for user in newest if last in user}
    assert client.get("/demo/users", params={"search": "nobody"}).json()["users"] == []


def test_what_is_not_there_is_answered_so(client):
    for path in ("users/nobody", "items/1/image", f"items/{2**63}/image", "page.py", "other.css"):
        answer = client.get(f"/demo/{path}")
        assert answer.status_code == 404 and "error" in answer.json()
