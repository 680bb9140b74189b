"""`mim explain` and the server's answer with `explain`: of a run, of its bundle, and of the same request."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from mim_torchrec.data.errors import DataError
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.explain import main as explain
from mim_torchrec.serving.explaining import explain as make_explanation
from mim_torchrec.serving.messages import ScoreRequest, Scores
from mim_torchrec.serving.page.page import Page
from mim_torchrec.serving.scorer import Scorer
from tests.pipeline.test_ctr_main import write_dataset
from tests.pipeline.test_evaluate_main import write_table
from tests.serving import INFER, application, deployment, message, output, trained_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("explain")
    write_dataset(root / "data")
    write_table(root / "table", "styles")
    trained_bundle(root, "run")
    return root


@pytest.fixture(scope="module")
def row(folder) -> dict:
    """The newest test request of a user, with a history, that is not the first one that has any."""
    rows = pq.read_table(folder / "data" / "requests" / "test").to_pylist()
    newest = {row["user_id"]: row for row in rows if row["behavior_item_ids"]}
    return [row for row in newest.values() if len(row["behavior_item_ids"]) > 2][1]


@pytest.fixture(scope="module")
def report(folder, row) -> dict:
    explain(["--model", str(folder / "run"), "--request", str(row["request_id"]),
             "--out", str(folder / "report.json")])  # fmt: skip
    return json.loads((folder / "report.json").read_text())


def test_a_report_names_request_candidates_and_behaviors(report, row):
    assert (report["request_id"], report["user_id"]) == (str(row["request_id"]), str(row["user_id"]))
    of_candidates = dict(zip(map(str, row["candidate_item_ids"]), row["labels"], strict=True))
    assert {one["item_id"]: int(one["clicked"]) for one in report["candidates"]} == of_candidates
    scores = [one["score"] for one in report["candidates"]]
    assert scores == sorted(scores, reverse=True)
    for one in report["candidates"]:
        assert [b["item_id"] for b in one["behaviors"]] == [str(item) for item in row["behavior_item_ids"]]
        assert [b["age"] for b in one["behaviors"]] == list(reversed(range(len(one["behaviors"]))))
        assert all(b["title"].startswith("item ") for b in one["behaviors"])
        assert list(one["interests"]) == ["id", "content", "fusion"]
        assert torch.tensor(one["logit"]).sigmoid().item() == pytest.approx(one["score"], abs=1e-6)


def test_the_server_gives_the_same_explanation(folder, report, row):
    app, _ = application(deployment(folder))
    with TestClient(app) as client:
        body = client.post(INFER, json=message(row, parameters={"explain": True})).json()
    shapes = {one["name"]: one["shape"] for one in body["outputs"]}
    n, m = len(row["candidate_item_ids"]), len(row["behavior_item_ids"])
    of_candidates = ("score", "explain_logit", "explain_id", "explain_content", "explain_fusion")
    of_pairs = ("explain_behavior", "explain_relevance")
    assert shapes == dict.fromkeys(of_candidates, [n]) | dict.fromkeys(of_pairs, [n, m])
    by_item = {one["item_id"]: one for one in report["candidates"]}
    of_behaviors, relevance = (output(body, f"explain_{name}") for name in ("behavior", "relevance"))
    for k, item in enumerate(row["candidate_item_ids"]):
        one = by_item[str(item)]
        assert output(body, "explain_logit")[k] == pytest.approx(one["logit"], abs=1e-5)
        for name, lost in one["interests"].items():
            assert output(body, f"explain_{name}")[k] == pytest.approx(lost, abs=1e-5)
        for place, behavior in enumerate(one["behaviors"]):
            assert of_behaviors[k * m + place] == pytest.approx(behavior["contribution"], abs=1e-5)
            assert relevance[k * m + place] == pytest.approx(behavior["alpha"], abs=1e-5)


def test_too_large_an_explanation_is_refused_and_the_scores_are_not(folder, row):
    pairs = len(row["candidate_item_ids"]) * len(row["behavior_item_ids"])
    app, _ = application(deployment(folder), Limits(deadline_ms=60_000, explain_pairs=pairs))
    with TestClient(app) as client:
        assert client.post(INFER, json=message(row)).status_code == 200
        answer = client.post(INFER, json=message(row, parameters={"explain": True}))
    assert answer.status_code == 400
    assert f"more than {pairs}; send fewer candidates" in answer.json()["error"]


def test_a_bundle_is_explained_like_its_run_and_the_text_names_what_is_largest(folder, report, row, capsys):
    words = ["--model", str(folder / "run" / "bundle"), "--request", str(row["request_id"])]
    explain([*words, "--candidates", "2", "--behaviors", "1"])
    said = capsys.readouterr().out
    first = report["candidates"][0]
    assert f"request {row['request_id']} of user {row['user_id']}" in said
    assert said.count("score 0.") == 2 and said.count("alpha") == 2
    assert f"item {first['item_id']} 'item " in said
    largest = max(first["behaviors"], key=lambda b: abs(b["contribution"]))
    assert f"{largest['contribution']:+.3f}  alpha {largest['alpha']:+.3f}" in said


def test_the_page_shows_interests_and_the_behaviors_that_raise_a_score(folder, report, row, tmp_path):
    service = application(deployment(folder))[1]
    page, app = Page(folder / "data", tmp_path, service, 10**6), FastAPI()

    async def score(scorer: Scorer, asked: ScoreRequest) -> Scores:
        assert asked.explain and asked.contribution
        return replace(scorer.score([asked])[0], explanation=make_explanation(scorer, asked))

    page(app, score)
    with TestClient(app) as client:
        shown = client.get(f"/demo/users/{row['user_id']}").json()["candidates"]
    for one in shown:
        assert list(one["interests"]) == ["id", "content", "fusion"]
        lost = [other["lost"] for other in one["because"]]
        assert lost == sorted(lost, reverse=True) and all(value > 0 for value in lost) and len(lost) <= 3
    of_request = {one["item_id"]: one for one in report["candidates"]}
    assert {one["item_id"] for one in shown} == set(of_request)
    for one in shown:
        found = [b["contribution"] for b in of_request[one["item_id"]]["behaviors"]]
        raised = sorted((value for value in found if value > 0), reverse=True)[:3]
        assert [other["lost"] for other in one["because"]] == pytest.approx(raised, abs=1e-5)


def test_without_an_id_the_first_request_with_behaviors_is_explained(folder, capsys):
    explain(["--model", str(folder / "run" / "bundle")])
    rows = pq.read_table(folder / "data" / "requests" / "test").to_pylist()
    first = next(row for row in rows if row["behavior_item_ids"])
    assert f"request {first['request_id']} of user" in capsys.readouterr().out


def test_a_request_that_is_not_there_is_named(folder):
    with pytest.raises(DataError, match="no request 'x7'; see its column request_id"):
        explain(["--model", str(folder / "run" / "bundle"), "--request", "x7"])
