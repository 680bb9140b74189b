"""HTTP routes of the server: Open Inference Protocol v2, Prometheus metrics, and a page for people."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mim_torchrec.serving import bodies
from mim_torchrec.serving.batcher import Batcher, DeadlinePassed, QueueFull
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.descriptions import (
    EXTENSIONS,
    SERVER,
    AllStatistics,
    InferOutputs,
    Live,
    ModelAbout,
    ModelConfig,
    RepositoryEntry,
    ServerAbout,
    model_about,
    model_config,
    model_statistics,
)
from mim_torchrec.serving.guarded import StoreFailed
from mim_torchrec.serving.guards import Answers, Bodies, Tokens, exchange_of
from mim_torchrec.serving.health import Health
from mim_torchrec.serving.messages import BadRequest, ScoreRequest, Scores
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.openapi import ERRORS, INFER_BODY, UNREADY, describe
from mim_torchrec.serving.protocol import InferRequest, read_body, read_request, write_response
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.service import Served, Service
from mim_torchrec.serving.statistics import Spent
from mim_torchrec.serving.tokens import TokenFile

FAILURES = {
    BadRequest: (400, "bad_request"), QueueFull: (503, "queue_full"), DeadlinePassed: (504, "deadline"),
    StoreFailed: (503, "store"),
}  # fmt: skip
"""Errors that requests come to: the status of the answer, and its cause in the metrics."""
MODEL, VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"


class ReleaseAbout(BaseModel):
    """The release that is current, and the one that is served."""

    wanted: str | None
    served: str
    problem: str | None = None


class Ready(BaseModel):
    """Whether scores can be given."""

    ready: bool
    name: str | None = None
    release: ReleaseAbout | None = None


def make_app(
    service: Service,
    metrics: Metrics,
    limits: Limits,
    *,
    name: str = "mim",
    tokens: TokenFile | None = None,
    page: Callable[[FastAPI, Callable[..., Awaitable[Scores]]], None] | None = None,
) -> FastAPI:
    """The application.

    Args:
        service: what is served.
        metrics: are told what happens.
        limits: of requests.
        name: of the model.
        tokens: that requests must carry one of; None lets all in.
        page: adds the page for people.
    """
    batcher, health = Batcher(limits, metrics), Health(service)
    reader = ThreadPoolExecutor(1, thread_name_prefix="read")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()
        health.close()
        reader.shutdown(wait=False, cancel_futures=True)
        service.close()

    app = FastAPI(title=SERVER, version="2", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Bodies, limits=limits)
    app.add_middleware(Tokens, tokens=tokens)
    app.add_middleware(Answers, metrics=metrics)
    describe(app, needs_token=tokens is not None)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    async def unable(request: Request, error: Exception) -> JSONResponse:
        status, exchange_of(request.scope).cause = FAILURES[type(error)]
        return JSONResponse({"error": str(error)}, status)

    for kind in FAILURES:
        app.add_exception_handler(kind, unable)

    @app.exception_handler(bodies.BadBody)
    async def unreadable(_: Request, error: bodies.BadBody) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status)

    @app.get("/v2/health/live")
    async def live() -> Live:
        """Whether the server runs."""
        return Live(live=True)

    @app.get("/v2/health/ready", responses=UNREADY, response_model=Ready, response_model_exclude_none=True)
    async def ready() -> Any:
        """Whether scores can be given, and vectors are kept up."""
        return await readiness()

    @app.get("/v2")
    async def about() -> ServerAbout:
        """Name, version and extensions of this server."""
        return ServerAbout(name=SERVER, version="2", extensions=EXTENSIONS)

    @app.get("/v2/models/stats")
    async def all_statistics() -> AllStatistics:
        """Statistics of all versions that were served."""
        return model_statistics(name, metrics.statistics)

    @app.get(MODEL, responses=ERRORS.of(404, 503))
    async def about_model(model: str) -> ModelAbout:
        """Inputs and outputs of the model, and the version that is served."""
        return await asyncio.to_thread(model_about, name, find(model, None))

    @app.get(VERSION, responses=ERRORS.of(404, 503))
    async def about_version(model: str, version: str) -> ModelAbout:
        """The same, if this version is served."""
        return await asyncio.to_thread(model_about, name, find(model, version))

    @app.get(f"{MODEL}/config", responses=ERRORS.of(404, 503))
    async def config(model: str) -> ModelConfig:
        """The configuration of the model, as Triton describes one."""
        return await asyncio.to_thread(model_config, name, find(model, None))

    @app.get(f"{VERSION}/config", responses=ERRORS.of(404, 503))
    async def version_config(model: str, version: str) -> ModelConfig:
        """The same, if this version is served."""
        return await asyncio.to_thread(model_config, name, find(model, version))

    @app.get(f"{MODEL}/stats", responses=ERRORS.of(404))
    async def statistics(model: str) -> AllStatistics:
        """Statistics of all versions of the model that were served."""
        find(model, None)
        return model_statistics(name, metrics.statistics)

    @app.get(f"{VERSION}/stats", responses=ERRORS.of(404))
    async def version_statistics(model: str, version: str) -> AllStatistics:
        """Statistics of the version that is served."""
        find(model, version)
        return model_statistics(name, metrics.statistics, version)

    @app.post("/v2/repository/index")
    async def index() -> list[RepositoryEntry]:
        """The model that is served, and whether it is ready."""
        problem, version = await health.problem(), service.current.model_version
        state = "READY" if problem is None else "UNAVAILABLE"
        return [RepositoryEntry(name=name, version=version, state=state, reason=problem or "")]

    @app.get(f"{MODEL}/ready", responses=ERRORS.of(404) | UNREADY, response_model=Ready,
             response_model_exclude_none=True)  # fmt: skip
    async def model_ready(model: str) -> Any:
        """Whether the model can give scores."""
        find(model, None)
        return await readiness(name=name)

    @app.get(f"{VERSION}/ready", responses=ERRORS.of(404) | UNREADY, response_model=Ready,
             response_model_exclude_none=True)  # fmt: skip
    async def version_ready(model: str, version: str) -> Any:
        """Whether this version of the model can give scores."""
        find(model, version)
        return await readiness(name=name)

    @app.post(f"{MODEL}/infer", responses=ERRORS.all, response_model=InferOutputs, openapi_extra=INFER_BODY)
    async def infer(model: str, request: Request) -> Response:
        """Score the candidates of a request."""
        return await answer(find(model, None), request)

    @app.post(f"{VERSION}/infer", responses=ERRORS.all, response_model=InferOutputs, openapi_extra=INFER_BODY)
    async def infer_version(model: str, version: str, request: Request) -> Response:
        """Score with this version of the model, or not at all."""
        return await answer(find(model, version), request)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def find(model: str, version: str | None) -> Served:
        """What is served, if it is this model and this version of it."""
        served = service.current
        if model != name:
            raise HTTPException(404, f"there is no model {model!r}; there is {name!r}")
        if version not in (None, served.model_version):
            raise HTTPException(404, f"version {version!r} is not served; {served.model_version!r} is")
        return served

    async def readiness(**more: Any) -> Any:
        problem, release = await health.problem(), service.release
        about = None if release is None else ReleaseAbout(**vars(release))
        if problem is not None:
            said: dict[str, Any] = {"error": problem}
            return JSONResponse(said if about is None else said | {"release": about.model_dump()}, 503)
        return Ready(ready=True, release=about, **more)

    async def answer(served: Served, request: Request) -> Response:
        exchange, loop, version = exchange_of(request.scope), asyncio.get_running_loop(), served.model_version
        spent = Spent()
        try:
            batcher.check_room()
            until = exchange.arrived + limits.deadline_ms / 1000
            sent, wanted = await read(request, served.scorer, until, spent)
            if sent.model_name not in (None, name):
                raise BadRequest(f"model_name is {sent.model_name!r}; the address is of {name!r}")
            said = sent.parameters and sent.parameters.table_version
            if said and said != served.scorer.bundle.table_version:
                has = served.scorer.bundle.table_version
                raise HTTPException(409, f"the vectors are of table_version {has}, not {said}")
            if sent.patience_ms is not None:
                until = min(until, exchange.arrived + sent.patience_ms / 1000)
            found = await batcher.score(served.scorer, wanted, until, spent)
        except Exception:
            metrics.statistics.add(version, loop.time() - exchange.arrived, None)
            raise
        begun = time.perf_counter()
        if found.was_kept is not None:
            (metrics.cache_hits if found.was_kept else metrics.cache_misses).inc()
        metrics.candidates.inc(len(found.scores))
        for kind, count in found.unknown.items():
            metrics.unknown.labels(kind).inc(count)
        body, json_length = write_response(sent, found, name, version)
        spent.parts["compute_output"] = time.perf_counter() - begun
        metrics.statistics.add(version, loop.time() - exchange.arrived, spent, found.was_kept)
        if json_length is None:
            return Response(body, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(json_length)}
        return Response(body, media_type="application/octet-stream", headers=headers)

    async def read(
        request: Request, scorer: Scorer, until: float, spent: Spent
    ) -> tuple[InferRequest, ScoreRequest]:
        """The message and the request that a body holds; a large one is read by a thread."""
        body, coding = await request.body(), request.headers.get("content-encoding")
        length = bodies.header_length(request.headers)
        begun = time.perf_counter()
        work = partial(_read, body, coding, length, scorer, limits)
        if len(body) < bodies.LARGE and coding is None:
            found = work()
        else:
            batcher.reading += 1
            try:
                async with asyncio.timeout_at(until):
                    found = await asyncio.get_running_loop().run_in_executor(reader, work)
            except TimeoutError:
                raise DeadlinePassed from None
            finally:
                batcher.reading -= 1
        spent.parts["compute_input"] = time.perf_counter() - begun
        return found

    if page is not None:
        page(app, batcher.score)
    return app


def _read(
    body: bytes, coding: str | None, header_length: int | None, scorer: Scorer, limits: Limits
) -> tuple[InferRequest, ScoreRequest]:
    sent, binary = read_body(bodies.decoded(body, coding, limits.max_body_bytes), header_length)
    return sent, read_request(sent, scorer, limits, binary)
