"""Traces of requests: spans under that of the client, over HTTP and gRPC, and none without OpenTelemetry."""

import asyncio

import grpc
import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tritonclient.grpc import service_pb2

from mim_torchrec.serving import spans as module
from mim_torchrec.serving.batcher import Batcher
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.spans import Spans
from tests.pipeline.test_serving_grpc import call, serving, typed
from tests.serving import INFER, application, deployment, messages, output, without
from tests.unit.test_batcher import Slow, ask

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
SENT = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter) -> Spans:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider)


@pytest.fixture(scope="module")
def sent(serving_folder) -> dict:
    return messages(serving_folder)[0]


def ended(exporter: InMemorySpanExporter, name: str):
    """The span of a request, which ends after its answer was sent."""
    while True:
        for span in exporter.get_finished_spans():
            if span.name == name:
                return span


def check_tree(exporter: InMemorySpanExporter, name: str) -> None:
    """The request is the client's child, its parts are its own, and lookups are of the scores."""
    root = ended(exporter, name)
    found = {span.name: span for span in exporter.get_finished_spans()}
    score = found["score"]
    assert root.context.trace_id == TRACE and root.parent.span_id == PARENT and root.kind is SpanKind.SERVER
    assert root.attributes["mim.cause"] == "ok" and root.status.status_code is StatusCode.UNSET
    assert {found[part].parent.span_id for part in ("read", "score")} == {root.context.span_id}
    lookups = [span for span in exporter.get_finished_spans() if span.name.startswith("lookup ")]
    assert {"lookup vectors", "lookup item_id", "lookup user_id"} <= {span.name for span in lookups}
    assert {span.parent.span_id for span in lookups} == {score.context.span_id}
    assert all(span.attributes["ids"] > 0 for span in lookups)


def test_a_request_over_http_is_traced(serving_folder, sent, spans, exporter):
    app, _ = application(deployment(serving_folder), spans=spans)
    with TestClient(app) as client:
        exporter.clear()  # the first scores were those of warming up
        assert client.post(INFER, json=sent, headers=SENT).status_code == 200
        check_tree(exporter, "POST infer")
        exporter.clear()
        assert client.post(INFER, json=without(sent, "user_id")).status_code == 400
        assert client.get("/metrics").status_code == 200
        root = ended(exporter, "POST infer")
        assert root.attributes["mim.cause"] == "bad_request" and root.status.status_code is StatusCode.UNSET
        assert root.attributes["http.response.status_code"] == 400 and root.parent is None


def test_a_call_over_grpc_is_traced(serving_folder, sent, spans, exporter):
    with serving(serving_folder, spans=spans) as (_, address, inference):
        exporter.clear()
        call(address, "ModelInfer", typed(sent), service_pb2.ModelInferResponse, metadata=[*SENT.items()])
        check_tree(exporter, "ModelInfer")
        exporter.clear()
        inference.batcher.score_all = None  # what nobody expects
        with pytest.raises(grpc.RpcError) as caught:
            call(address, "ModelInfer", typed(sent), service_pb2.ModelInferResponse)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        root = ended(exporter, "ModelInfer")
        assert root.status.status_code is StatusCode.ERROR and root.status.description == "TypeError"


def test_requests_that_are_scored_together_share_a_span(spans, exporter):
    async def run() -> None:
        batcher, scorer = Batcher(Limits(deadline_ms=60_000), Metrics(spans=spans)), Slow()

        async def one(number: int) -> None:
            with spans.request(f"request {number}", {}):
                await batcher.score(scorer, ask(number))

        first = asyncio.create_task(one(0))
        await asyncio.to_thread(scorer.begun.wait)
        rest = [asyncio.create_task(one(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0)  # they wait in the queue
        scorer.go.set()
        await asyncio.gather(first, *rest)
        assert scorer.batches == [1, 3]
        batcher.close()

    asyncio.run(run())
    found = {span.name: span for span in exporter.get_finished_spans()}
    (score,) = [span for span in exporter.get_finished_spans() if len(span.links) > 0]
    assert score.parent.span_id == found["request 1"].context.span_id
    linked = [link.context.span_id for link in score.links]
    assert linked == [found[f"request {number}"].context.span_id for number in (2, 3)]


def test_without_opentelemetry_scores_are_the_same(serving_folder, sent, monkeypatch):
    app, _ = application(deployment(serving_folder))
    with TestClient(app) as client:
        expected = output(client.post(INFER, json=sent).json())
    monkeypatch.setattr(module, "is_installed", lambda extra: False)
    off = Spans()
    assert off.here() is None
    app, _ = application(deployment(serving_folder), spans=off)
    with TestClient(app) as client:
        assert output(client.post(INFER, json=sent, headers=SENT).json()) == expected
