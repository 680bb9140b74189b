"""Clients of other projects that cannot be installed beside ours: KServe's, and one made of our OpenAPI."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.test_serving_grpc import serving
from tests.serving import INFER, get, messages, output, post

pytestmark = [pytest.mark.slow, pytest.mark.registry]

PINS = Path(__file__).parents[1] / "foreign_clients.txt"
HOPELESS = 120  # seconds


@pytest.fixture(scope="module")
def clients(tmp_path_factory) -> dict[str, str]:
    """Variables of an environment in which Python finds them."""
    folder = tmp_path_factory.mktemp("clients")
    words = ["install", "--quiet", "--no-deps", "--only-binary=:all:", "--retries", "0"]
    words += ["--target", str(folder), "-r", str(PINS)]
    installed = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the package registry cannot be reached: {installed.stderr.strip().splitlines()[-1]}")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def servers(serving_folder):
    """Addresses of HTTP and gRPC."""
    with serving(serving_folder) as (http, grpc, _):
        yield http, grpc


@pytest.fixture(scope="module")
def sent(serving_folder) -> dict:
    """A request with several behaviors."""
    return next(m for m in messages(serving_folder) if len(m["inputs"][3]["data"]) > 1)


@pytest.fixture(scope="module")
def expected(servers, sent) -> list[float]:
    return output(post(servers[0] + INFER, json=sent).json())


def told(program: str, environment: dict[str, str], *words: object, cwd: Path | None = None) -> dict:
    """What a program prints as JSON."""
    run = subprocess.run([sys.executable, "-c", program, *map(str, words)], env=environment, cwd=cwd,
                         capture_output=True, text=True, timeout=HOPELESS)  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

http, grpc, sent = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
KINDS = {"INT64": np.int64, "BYTES": np.object_}

def request(binary):
    inputs = []
    for given in sent["inputs"]:
        one = InferInput(given["name"], given["shape"], given["datatype"])
        one.set_data_from_numpy(np.array(given["data"], KINDS[given["datatype"]]), binary_data=binary)
        inputs.append(one)
    return InferRequest("mim", inputs, request_id="k1")

def scores(answer):
    (one,) = [output for output in answer.outputs if output.name == "score"]
    return [answer.id, answer.model_name, one.as_numpy().tolist()]

async def main():
    found = {}
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    found["states"] = [await rest.is_server_live(http), await rest.is_server_ready(http),
                       await rest.is_model_ready(http, "mim")]
    found["json"] = scores(await rest.infer(http, request(False), model_name="mim"))
    found["binary"] = scores(await rest.infer(http, request(True), model_name="mim"))
    try:
        await rest.infer(http, InferRequest("mim", request(False).inputs[1:]), model_name="mim")
    except Exception as error:
        found["refused"] = str(error)
    await rest.close()
    async with InferenceGRPCClient(grpc) as client:
        found["states"] += [await client.is_server_live(), await client.is_server_ready(),
                            await client.is_model_ready("mim")]
        found["grpc"] = scores(await client.infer(request(True)))
    print(json.dumps(found))

asyncio.run(main())
"""


def test_the_client_of_kserve_gets_the_scores(clients, servers, sent, expected):
    found = told(KSERVE, clients, *servers, json.dumps(sent))
    assert found["states"] == [True] * 6
    assert "user_id is missing" in found["refused"]
    for form in ("json", "binary", "grpc"):
        identity, model, scores = found[form]
        assert (identity, model) == ("k1", "mim")
        assert scores == pytest.approx(expected, rel=1e-6), form


GENERATED = """
import json, sys
from generated import AuthenticatedClient, models
from generated.api.default import about_model, infer, live, model_ready, ready, version_ready

address, sent = sys.argv[1], json.loads(sys.argv[2])
with AuthenticatedClient(address, token="any") as client:
    body = models.InferRequest.from_dict(sent)
    assert body.inputs[0].datatype is models.InferInputDatatype.INT64
    scored = infer.sync(client=client, model="mim", body=body)
    assert isinstance(scored, models.InferOutputs), scored
    about = about_model.sync(client=client, model="mim")
    fewer = models.InferRequest(inputs=body.inputs[1:])
    refused = infer.sync_detailed(client=client, model="mim", body=fewer)
    assert isinstance(refused.parsed, models.Error)
    version = about.versions[0]
    states = [live.sync(client=client).live, ready.sync(client=client).ready,
              model_ready.sync(client=client, model="mim").ready,
              version_ready.sync(client=client, model="mim", version=version).ready]
    missing = about_model.sync(client=client, model="other")
    print(json.dumps({
        "scores": next(one.data for one in scored.outputs if one.name == "score"),
        "version": scored.model_version == version,
        "inputs": {one.name: one.datatype for one in about.inputs},
        "refused": [refused.status_code, refused.parsed.error], "states": states, "missing": missing.error,
    }))
"""


def test_a_client_that_is_generated_from_our_document_gets_the_scores(
    clients, servers, sent, expected, tmp_path
):
    document = tmp_path / "openapi.json"
    document.write_text(get(f"{servers[0]}/openapi.json").text)
    words = [
        "generate",
        "--path",
        str(document),
        "--output-path",
        str(tmp_path / "generated"),
        "--meta",
        "none",
    ]
    config = tmp_path / "config.yaml"
    config.write_text("post_hooks: []\n")  # no formatting
    made = subprocess.run([sys.executable, "-m", "openapi_python_client", *words, "--config", str(config),
                           "--fail-on-warning"], env=clients, capture_output=True, text=True)  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    found = told(GENERATED, dict(os.environ), servers[0], json.dumps(sent), cwd=tmp_path)
    assert found["scores"] == expected and found["version"]
    assert found["states"] == [True] * 4
    assert found["inputs"]["candidate_category"] == "BYTES"
    assert found["refused"][0] == 400 and "user_id is missing" in found["refused"][1]
    assert "there is no model 'other'" in found["missing"]
