"""The Open Inference Protocol over gRPC with Triton's client: scores, deadlines, tokens, counts and names."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import model_config_pb2, service_pb2

from mim_torchrec.serving import rpc_messages
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.inference import Inference
from mim_torchrec.serving.rpc import listening
from mim_torchrec.serving.sockets import reserved
from mim_torchrec.serving.tokens import TokenFile
from tests.pipeline.test_serving_users import together
from tests.serving import DEFAULTS, INFER, application, deployment, get, messages, output, post, running

NUMPY = {"INT64": np.int64, "BYTES": np.object_, "INT32": np.int32}


@contextmanager
def serving(folder, limits: Limits = DEFAULTS, **words) -> Iterator[tuple[str, str, Inference]]:
    """Addresses of HTTP and gRPC, and what is behind both."""
    found: list[Inference] = []
    with reserved("127.0.0.1", 0) as port:

        def beside(inference: Inference):
            found.append(inference)
            return listening(inference, words.get("tokens"), f"127.0.0.1:{port}", 5.0)

        app, _ = application(deployment(folder), limits, beside=beside, **words)
        with running(app) as address:
            yield address, f"127.0.0.1:{port}", found[0]


@pytest.fixture(scope="module")
def servers(serving_folder):
    with serving(serving_folder) as found:
        yield found


@pytest.fixture(scope="module")
def sent(serving_folder) -> list[dict]:
    return [m for m in messages(serving_folder) if len(m["inputs"][3]["data"]) > 1][:4]


@pytest.fixture(scope="module")
def version(serving_folder) -> str:
    return Bundle.open(serving_folder / "run" / "bundle").model_version


@pytest.fixture
def client(servers):
    with triton.InferenceServerClient(servers[1]) as one:
        yield one


def tensors(sent: dict) -> list[triton.InferInput]:
    found = []
    for given in sent["inputs"]:
        one = triton.InferInput(given["name"], given["shape"], given["datatype"])
        one.set_data_from_numpy(np.array(given["data"], NUMPY[given["datatype"]]).reshape(given["shape"]))
        found.append(one)
    return found


def typed(sent: dict, **more) -> service_pb2.ModelInferRequest:
    """A request with typed contents, as clients that are written by hand send it."""
    request = service_pb2.ModelInferRequest(model_name="mim", **more)
    for given in sent["inputs"]:
        one = request.inputs.add(name=given["name"], datatype=given["datatype"], shape=given["shape"])
        if given["datatype"] == "BYTES":
            one.contents.bytes_contents.extend(text.encode() for text in given["data"])
        else:
            one.contents.int64_contents.extend(given["data"])
    return request


def call(address: str, method: str, request, answer, **words):
    with grpc.insecure_channel(address) as channel:
        made = channel.unary_unary(f"/inference.GRPCInferenceService/{method}",
                                   request_serializer=type(request).SerializeToString,
                                   response_deserializer=answer.FromString)  # fmt: skip
        return made(request, **{"timeout": 60} | words)


def test_messages_are_those_of_the_protocol():
    """Every name, number and type is that of the code that Triton's client has of the same messages."""
    theirs = {
        **service_pb2.DESCRIPTOR.message_types_by_name,
        **model_config_pb2.DESCRIPTOR.message_types_by_name,
    }
    for name in rpc_messages.MESSAGES:
        ours, other = rpc_messages.message(name).DESCRIPTOR, theirs[name.partition(".")[0]]
        for part in name.split(".")[1:]:
            other = other.nested_types_by_name[part]
        assert ours.full_name == other.full_name
        for field in ours.fields:
            same = other.fields_by_name[field.name]
            for what in ("number", "type", "is_repeated"):
                assert getattr(field, what) == getattr(same, what), (name, field.name, what)
            if field.message_type is not None:
                assert field.message_type.full_name == same.message_type.full_name
            if field.containing_oneof is not None:
                assert field.containing_oneof.name == same.containing_oneof.name
    enum = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"]
    assert all(enum.values[k].name == f"TYPE_{name}" for k, name in enumerate(rpc_messages.DATA_TYPES))
    known = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    assert set(rpc_messages.METHODS) <= set(known.keys())


def test_tritonclient_gets_the_scores_of_http(servers, client, sent, version):
    for message in (sent[0], together(sent)):
        names = ("score", "content_contribution")
        wanted = message | {"outputs": [{"name": name} for name in names]}
        body = post(servers[0] + INFER, json=wanted).json()
        asked = [triton.InferRequestedOutput(name) for name in names]
        for outputs, compression in ((asked, None), (None, "gzip")):
            found = client.infer("mim", tensors(message), outputs=outputs, request_id="r1",
                                 timeout=50_000_000,
                                 model_version=version,
                                 compression_algorithm=compression)  # fmt: skip
            about = found.get_response()
            assert (about.id, about.model_name, about.model_version) == ("r1", "mim", version)
            assert {k: v.int64_param for k, v in about.parameters.items()} == body["parameters"]
            for name in names if outputs else names[:1]:
                assert found.as_numpy(name).tolist() == np.array(output(body, name), np.float32).tolist()


def test_typed_contents_are_answered_by_typed_contents(servers, sent):
    body = post(servers[0] + INFER, json=sent[0]).json()
    found = call(servers[1], "ModelInfer", typed(sent[0]), service_pb2.ModelInferResponse)
    assert not found.raw_output_contents and list(found.outputs[0].shape) == [len(output(body))]
    expected = np.array(output(body), np.float32)
    assert np.array(found.outputs[0].contents.fp32_contents, np.float32).tolist() == expected.tolist()


def test_tritonclient_finds_out_what_there_is(servers, client, sent, version):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("mim", version)
    with pytest.raises(triton.InferenceServerException, match="there is no model 'other'"):
        client.is_model_ready("other")
    assert client.get_server_metadata().name == "mim-torchrec"
    about = client.get_model_metadata("mim", as_json=True)
    known = get(servers[0] + "/v2/models/mim").json()
    assert [one["name"] for one in about["inputs"]] == [one["name"] for one in known["inputs"]]
    assert [one["datatype"] for one in about["inputs"]] == [one["datatype"] for one in known["inputs"]]
    config = client.get_model_config("mim", version).config
    types = {one.name: model_config_pb2.DataType.Name(one.data_type) for one in config.input}
    assert types["candidate_category"] == "TYPE_STRING" and types["user_id"] == "TYPE_INT64"
    assert {one.name for one in config.input if one.optional} >= {"candidate.lengths"}
    (listed,) = client.get_model_repository_index().models
    assert (listed.name, listed.version, listed.state) == ("mim", version, "READY")
    client.infer("mim", tensors(sent[0]))
    (found,) = client.get_inference_statistics("mim").model_stats
    (same,) = get(servers[0] + "/v2/models/mim/stats").json()["model_stats"]
    assert found.inference_count == same["inference_count"] > 0
    assert found.inference_stats.compute_infer.ns == same["inference_stats"]["compute_infer"]["ns"] > 0


def changed(request: service_pb2.ModelInferRequest, **words) -> service_pb2.ModelInferRequest:
    made = service_pb2.ModelInferRequest()
    made.CopyFrom(request)
    for name, value in words.items():
        setattr(made, name, value)
    return made


def test_what_is_wrong_has_a_status_and_is_counted(servers, sent):
    right = typed(sent[0])
    both = changed(right)
    both.raw_input_contents.extend([b""] * len(both.inputs))
    fewer = changed(right)
    fewer.raw_input_contents.append(b"")
    twice = changed(right)
    twice.inputs.append(twice.inputs[0])
    field = changed(right)
    field.inputs[0].contents.fp32_contents.append(1.0)
    text = changed(right)
    next(one for one in text.inputs if one.datatype == "BYTES").contents.bytes_contents[0] = b"\xff"
    vectors = changed(right)
    vectors.parameters["table_version"].string_param = "other"
    shared = changed(right)
    shared.inputs[0].parameters["shared_memory_region"].string_param = "x"
    half = changed(right)
    half.inputs[0].datatype = "FP16"
    cases = [
        (changed(right, model_name="other"), "NOT_FOUND", "there is no model"),
        (changed(right, model_version="other"), "NOT_FOUND", "is not served"),
        (service_pb2.ModelInferRequest(model_name="mim"), "INVALID_ARGUMENT", "inputs"),
        (both, "INVALID_ARGUMENT", "both contents and raw_input_contents"),
        (fewer, "INVALID_ARGUMENT", "raw_input_contents has 1 tensors"),
        (twice, "INVALID_ARGUMENT", "is there twice"),
        (field, "INVALID_ARGUMENT", "are sent in int64_contents, not in fp32_contents"),
        (half, "INVALID_ARGUMENT", "sent by raw_input_contents, not in int64_contents"),
        (text, "INVALID_ARGUMENT", "UTF-8"),
        (shared, "INVALID_ARGUMENT", "shared_memory_region is not supported"),
        (vectors, "FAILED_PRECONDITION", "table_version"),
    ]
    for request, code, said in cases:
        with pytest.raises(grpc.RpcError) as caught:
            call(servers[1], "ModelInfer", request, service_pb2.ModelInferResponse)
        assert caught.value.code().name == code and said in caught.value.details(), caught.value
    metrics = get(servers[0] + "/metrics").text
    route = "/inference.GRPCInferenceService/ModelInfer"
    for status, cause in ((400, "bad_request"), (404, "not_found"), (409, "table_version"), (200, "ok")):
        assert f'cause="{cause}",route="{route}",status="{status}"' in metrics


def test_the_deadline_of_a_call_is_its_clients(servers, sent):
    inference = servers[2]
    until: list[float] = []
    score = inference.batcher.score_all

    async def noted(scorer, requests, at, spent):
        until.append(at - time.monotonic())
        return await score(scorer, requests, at, spent)

    inference.batcher.score_all = noted
    try:
        for words in ({}, {"timeout": 20.0}):
            call(servers[1], "ModelInfer", typed(sent[0]), service_pb2.ModelInferResponse, **words)
    finally:
        inference.batcher.score_all = score
    assert until[0] > 30 > until[1] > 0  # gRPC rounds up what it sends
    late = typed(sent[0])
    late.parameters["timeout_ms"].double_param = 1e-3
    with pytest.raises(grpc.RpcError) as caught:
        call(servers[1], "ModelInfer", late, service_pb2.ModelInferResponse)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_calls_carry_a_token_and_are_bounded(serving_folder, sent, tmp_path):
    path = tmp_path / "tokens"
    path.write_text("secret\n")
    path.chmod(0o600)
    limits = Limits(deadline_ms=60_000, max_body_bytes=10_000)
    with serving(serving_folder, limits, tokens=TokenFile(path)) as (_, address, _):
        with triton.InferenceServerClient(address) as client:
            assert client.is_server_live() and client.is_server_ready()
            for headers in (None, {"authorization": "Bearer other"}):
                with pytest.raises(triton.InferenceServerException, match="UNAUTHENTICATED"):
                    client.infer("mim", tensors(sent[0]), headers=headers)
            right = {"authorization": "bearer secret"}
            assert client.infer("mim", tensors(sent[0]), headers=right).as_numpy("score") is not None
            long = triton.InferInput("user_id", [2000], "INT64")
            long.set_data_from_numpy(np.zeros(2000, np.int64))
            with pytest.raises(triton.InferenceServerException, match="RESOURCE_EXHAUSTED"):
                client.infer("mim", [long], headers=right)
