"""The Open Inference Protocol with clients of platforms: Triton's, curl, and the messages of KServe's."""

import gzip
import json
import struct
import subprocess
import zlib

import numpy as np
import pytest
import tritonclient.http as triton
from fastapi.testclient import TestClient

from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.config import Limits
from tests.serving import INFER, application, changed, deployment, get, messages, output, post, running

KINDS = {"INT64": np.int64, "BYTES": np.object_}


@pytest.fixture(scope="module")
def sent(serving_folder) -> dict:
    """A request with several behaviors."""
    return next(m for m in messages(serving_folder) if len(m["inputs"][3]["data"]) > 1)


@pytest.fixture(scope="module")
def version(serving_folder) -> str:
    return Bundle.open(serving_folder / "run" / "bundle").model_version


@pytest.fixture(scope="module")
def address(serving_folder):
    app, _ = application(deployment(serving_folder))
    with running(app) as where:
        yield where


@pytest.fixture(scope="module")
def expected(address, sent) -> dict[str, list[float]]:
    """Outputs as JSON has them."""
    outputs = [{"name": "score"}, {"name": "content_contribution"}]
    body = post(address + INFER, json=sent | {"outputs": outputs}).json()
    return {name: output(body, name) for name in ("score", "content_contribution")}


@pytest.fixture
def client(address):
    with triton.InferenceServerClient(address.removeprefix("http://")) as one:
        yield one


def tensors(sent: dict, binary: bool = True) -> list[triton.InferInput]:
    """A request as users of Triton's client make it, by the datatypes that the server names."""
    found = []
    for given in sent["inputs"]:
        one = triton.InferInput(given["name"], given["shape"], given["datatype"])
        values = np.array(given["data"], KINDS[given["datatype"]]).reshape(given["shape"])
        one.set_data_from_numpy(values, binary_data=binary)
        found.append(one)
    return found


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_gets_the_scores(client, sent, expected, version, binary, compression):
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in expected]
    for asked in (None, outputs):
        found = client.infer("mim", tensors(sent, binary), outputs=asked, request_id="r1", timeout=50_000_000,
                             request_compression_algorithm=compression)  # fmt: skip
        about = found.get_response()
        assert (about["id"], about["model_name"], about["model_version"]) == ("r1", "mim", version)
        for name in ("score",) if asked is None else expected:
            assert found.as_numpy(name).tolist() == np.array(expected[name], np.float32).tolist()
    assert client.infer("mim", tensors(sent), model_version=version).as_numpy("score") is not None


def test_tritonclient_finds_out_what_there_is(client, sent, version):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("mim") and client.is_model_ready("mim", version)
    assert not client.is_model_ready("mim", "other") and not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    about = client.get_model_metadata("mim", version)
    assert about == client.get_model_metadata("mim")
    datatypes = {one["name"]: one["datatype"] for one in about["inputs"]}
    lengths = {name: datatypes.pop(f"{name}.lengths") for name in ("candidate", "behavior")}
    assert lengths == {"candidate": "INT64", "behavior": "INT64"}
    # what the metadata names is what the log has: a client that believes it gets the trainer's scores
    assert datatypes == {given["name"]: given["datatype"] for given in sent["inputs"]}
    shapes = {one["name"]: one["shape"] for one in about["inputs"]}
    assert shapes["user_id"] == [-1] and shapes["behavior_category"] == [-1]
    config = client.get_model_config("mim", version)
    types = {one["name"]: one["data_type"] for one in config["input"]}
    assert types["candidate_category"] == "TYPE_STRING" and types["user_id"] == "TYPE_INT64"
    assert config["max_batch_size"] == 0
    assert {one["name"] for one in config["input"] if one["optional"]} >= {"candidate.lengths"}
    (listed,) = client.get_model_repository_index()
    assert listed == {"name": "mim", "version": version, "state": "READY", "reason": ""}


def test_statistics_count_what_was_scored_and_what_failed(client, sent, version):
    def count() -> dict:
        (one,) = client.get_inference_statistics("mim", version)["model_stats"]
        return one

    client.infer("mim", tensors(sent))
    before = count()
    client.infer("mim", tensors(sent))
    with pytest.raises(Exception, match="user_id is missing"):
        client.infer("mim", tensors(sent)[1:])
    after = count()
    assert after["version"] == version and after["inference_count"] == before["inference_count"] + 1
    for kind in ("success", "fail", "compute_infer"):
        assert after["inference_stats"][kind]["count"] == before["inference_stats"][kind]["count"] + 1
    assert after["inference_stats"]["success"]["ns"] > after["inference_stats"]["compute_infer"]["ns"] > 0
    assert client.get_inference_statistics()["model_stats"] == [after]


@pytest.mark.parametrize("words", [[], ["-H", "Content-Type:"], ["-H", "Content-Type: text/html"]])
def test_curl_needs_no_header(address, sent, expected, tmp_path, words):
    path = tmp_path / "request.json"
    path.write_text(json.dumps(sent))
    command = ["curl", "--silent", "--fail-with-body", *words, "-d", f"@{path}", address + INFER]
    body = json.loads(subprocess.check_output(command, text=True))
    assert output(body) == expected["score"]


def test_messages_of_kserve_are_scored(address, sent, expected):
    """As `InferRequest.to_rest` of KServe 0.21 writes them: with model_name, and nested where numpy is."""
    nested = [given | {"shape": [1, *given["shape"]], "data": [given["data"]]} for given in sent["inputs"]]
    for inputs in (sent["inputs"], nested):
        body = {"id": "k1", "model_name": "mim", "inputs": inputs, "parameters": {"trace": "x"}}
        answer = post(address + INFER, content=json.dumps(body),
                            headers={"content-type": "application/json"})  # fmt: skip
        assert output(answer.json()) == expected["score"], answer.text


def binary(sent: dict, **sizes: int) -> tuple[bytes, int]:
    """A request in the binary form, and the length of its JSON."""
    inputs, parts = [], []
    for given in sent["inputs"]:
        if given["datatype"] == "BYTES":
            texts = [text.encode() for text in given["data"]]
            parts.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
        else:
            parts.append(np.array(given["data"], "<i8").tobytes())
        kept = {name: given[name] for name in ("name", "shape", "datatype")}
        size = sizes.get(given["name"], len(parts[-1]))
        inputs.append(kept | {"parameters": {"binary_data_size": size}})
    header = json.dumps({"inputs": inputs}).encode()
    return header + b"".join(parts), len(header)


def test_damaged_bodies_are_400_and_say_what_is_wrong(serving_folder, sent):
    app, _ = application(deployment(serving_folder), Limits(max_body_bytes=20_000, deadline_ms=60_000))
    body, length = binary(sent)
    name = {"Inference-Header-Content-Length": str(length)}
    packed = gzip.compress(body)
    long = changed(sent, "candidate_category", data=["\udcff"])
    cases = [
        (body, name, 200, ""),
        (packed, name | {"Content-Encoding": "gzip"}, 200, ""),
        (zlib.compress(body)[2:-4], name | {"Content-Encoding": "deflate"}, 200, ""),  # without zlib's header
        (body[:-1], name, 400, "bytes behind the JSON"),
        (body, {}, 400, "trailing characters"),
        (body, {"Inference-Header-Content-Length": "-1"}, 400, "no number of bytes"),
        (body, {"Inference-Header-Content-Length": "99999"}, 400, "names 99999 bytes"),
        (binary(sent, user_id=7)[0] + b"x", {"Inference-Header-Content-Length":
                                             str(binary(sent, user_id=7)[1])}, 400, "bytes"),
        (packed[:-9], name | {"Content-Encoding": "gzip"}, 400, "ends too early"),
        (b"no gzip", {"Content-Encoding": "gzip"}, 400, "is no gzip"),
        (body, name | {"Content-Encoding": "br"}, 415, "gzip, deflate or none"),
        (gzip.compress(b" " * 10**6), {"Content-Encoding": "gzip"}, 413, "when it is decompressed"),
        (b" " * 20_001, {}, 413, "20000 bytes"),
        (b"[" * 10_000, {}, 400, "recursion limit"),
        (json.dumps(long).encode(), {}, 400, ""),
        (body.replace(b"c1", b"\xff\xfe").replace(b"c2", b"\xff\xfe"), name, 400, "UTF-8"),
    ]  # fmt: skip
    with TestClient(app) as http:
        for content, headers, status, said in cases:
            answer = http.post(INFER, content=content, headers=headers)
            assert answer.status_code == status, (said, answer.text)
            assert status == 200 or said in answer.json()["error"], (said, answer.text)


def test_binary_values_have_the_type_that_was_said(serving_folder, sent):
    app, _ = application(deployment(serving_folder))
    with TestClient(app) as http:
        expected = output(http.post(INFER, json=sent).json())
        for datatype, numpy in {"INT32": "<i4", "UINT64": "<u8", "UINT16": "<u2"}.items():
            one = changed(sent, "user_id", datatype=datatype)
            given = next(i for i in one["inputs"] if i["name"] == "user_id")
            raw = np.array(given.pop("data"), numpy).tobytes()
            given["parameters"] = {"binary_data_size": len(raw)}
            header = json.dumps(one).encode()
            for content, status in ((header + raw, 200), (header + raw + b"x", 400)):
                answer = http.post(INFER, content=content,
                                   headers={"Inference-Header-Content-Length": str(len(header))})  # fmt: skip
                assert answer.status_code == status, answer.text
                assert status == 400 or output(answer.json()) == expected


def test_openapi_says_who_may_ask_and_what_is_answered(address):
    said = get(f"{address}/openapi.json").json()
    assert said["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert said["paths"]["/v2/health/ready"]["get"]["security"] == []
    schemas = said["components"]["schemas"]
    about = said["paths"]["/v2/models/{model}"]["get"]["responses"]["200"]["content"]["application/json"]
    assert about["schema"] == {"$ref": "#/components/schemas/ModelAbout"}
    assert schemas["TensorAbout"]["required"] == ["name", "datatype", "shape"]
    body = said["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"] == {"$ref": "#/components/schemas/InferRequest"}
    assert {"InferInput", "InferParameters"} <= schemas.keys()
    for path, operations in said["paths"].items():
        for operation in operations.values():
            schema = operation["responses"]["200"]["content"]
            assert all(found["schema"] != {} for found in schema.values()), path
