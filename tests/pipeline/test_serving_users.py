"""Several users in one request get the scores that each gets alone."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import tritonclient.http as triton

from mim_torchrec.serving.config import Limits
from tests.pipeline.test_serving_clients import tensors
from tests.serving import DEFAULTS, INFER, application, deployment, get, messages, output, post, running

OUTPUTS = [{"name": "score"}, {"name": "content_contribution"}]


def together(sent: Sequence[dict], **more) -> dict:
    """The requests of several users as one."""
    inputs = []
    for given in sent[0]["inputs"]:
        parts = [next(i["data"] for i in one["inputs"] if i["name"] == given["name"]) for one in sent]
        data = [value for part in parts for value in part]
        inputs.append(given | {"data": data, "shape": [len(data)]})
        if given["name"].endswith("item_id"):
            name = given["name"].removesuffix("_item_id") + ".lengths"
            lengths = [len(part) for part in parts]
            inputs.append({"name": name, "shape": [len(sent)], "datatype": "INT64", "data": lengths})
    return {"inputs": inputs} | more


@pytest.fixture(scope="module")
def sent(serving_folder) -> list[dict]:
    return messages(serving_folder)[:8]


# few pairs: a request of several users is scored in parts
@pytest.fixture(scope="module", params=[DEFAULTS, Limits(deadline_ms=60_000, batch_pairs=5)])
def address(serving_folder, request):
    app, _ = application(deployment(serving_folder), request.param)
    with running(app) as where:
        yield where


@pytest.fixture(scope="module")
def alone(address, sent) -> list[dict]:
    return [post(address + INFER, json=one | {"outputs": OUTPUTS}).json() for one in sent]


def test_users_of_one_request_get_the_scores_of_each_alone(address, sent, alone):
    answer = post(address + INFER, json=together(sent, outputs=OUTPUTS))
    assert answer.status_code == 200, answer.text
    for name in ("score", "content_contribution"):
        expected = [value for one in alone for value in output(one, name)]
        np.testing.assert_allclose(output(answer.json(), name), expected, rtol=0, atol=1e-6)
    counts = answer.json()["parameters"]
    assert counts == {kind: sum(one["parameters"][kind] for one in alone) for kind in counts}


def test_tritonclient_sends_several_users(address, sent, alone):
    expected = [value for one in alone for value in output(one)]
    with triton.InferenceServerClient(address.removeprefix("http://")) as client:
        for binary in (True, False):
            found = client.infer("mim", tensors(together(sent), binary)).as_numpy("score")
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        (about,) = client.get_inference_statistics("mim")["model_stats"]
    assert about["inference_count"] > about["inference_stats"]["success"]["count"]
    said = get(f"{address}/metrics").text
    assert "mim_request_users_count" in said


def test_what_is_wrong_with_users_is_400(address, sent):
    made = together(sent)
    wrong = {"inputs": [given for given in made["inputs"] if given["name"] != "behavior.lengths"]}
    answer = post(address + INFER, content=json.dumps(wrong))
    assert answer.status_code == 400 and "behavior.lengths is missing" in answer.json()["error"]
    answer = post(address + INFER, json=made | {"parameters": {"explain": True}})
    assert answer.status_code == 400 and "an explanation is of one user" in answer.json()["error"]
