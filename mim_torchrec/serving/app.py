"""HTTP routes of the server: Open Inference Protocol v2, Prometheus metrics, and a page for people."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mim_torchrec.serving import bodies
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
    repository_index,
)
from mim_torchrec.serving.guards import Answers, Bodies, Tokens, exchange_of
from mim_torchrec.serving.inference import FAILURES, Inference
from mim_torchrec.serving.messages import ScoreRequest, Scores
from mim_torchrec.serving.openapi import ERRORS, INFER_BODY, UNREADY, describe
from mim_torchrec.serving.protocol import InferRequest, read_body, read_requests, write_response
from mim_torchrec.serving.scorer import Scorer
from mim_torchrec.serving.service import Served
from mim_torchrec.serving.tokens import TokenFile

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
    inference: Inference,
    *,
    tokens: TokenFile | None = None,
    page: Callable[[FastAPI, Callable[..., Awaitable[Scores]]], None] | None = None,
    beside: Callable[[Inference], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The application.

    Args:
        inference: what scores requests; it ends with the application.
        tokens: that requests must carry one of; None lets all in.
        page: adds the page for people.
        beside: begins what runs as long as the application, such as the same protocol over gRPC.
    """
    service, metrics, limits, name = inference.service, inference.metrics, inference.limits, inference.name
    find = inference.find

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with nullcontext() if beside is None else beside(inference):
            yield
        inference.close()

    # clients are generated with functions of these names
    app = FastAPI(title=SERVER, version="2", lifespan=lifespan, docs_url=None, redoc_url=None,
                  generate_unique_id_function=lambda route: route.name)  # fmt: skip
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
        return await repository_index(inference)

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
        return Response(
            await asyncio.to_thread(generate_latest, metrics.exposed()), media_type=CONTENT_TYPE_LATEST
        )

    async def readiness(**more: Any) -> Any:
        problem, release = await inference.health.problem(), service.release
        about = None if release is None else ReleaseAbout(**vars(release))
        if problem is not None:
            said: dict[str, Any] = {"error": problem}
            return JSONResponse(said if about is None else said | {"release": about.model_dump()}, 503)
        return Ready(ready=True, release=about, **more)

    async def answer(served: Served, request: Request) -> Response:
        body, coding = await request.body(), request.headers.get("content-encoding")
        read = partial(_read, body, coding, bodies.header_length(request.headers), limits)
        # a large one is read by a thread
        aside = len(body) >= bodies.LARGE or coding is not None
        body, json_length = await inference.infer(served, read, write_response, aside=aside,
                                                  arrived=exchange_of(request.scope).arrived)  # fmt: skip
        if json_length is None:
            return Response(body, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(json_length)}
        return Response(body, media_type="application/octet-stream", headers=headers)

    if page is not None:
        page(app, inference.batcher.score)
    return app


def _read(
    body: bytes, coding: str | None, header_length: int | None, limits: Limits, scorer: Scorer
) -> tuple[InferRequest, list[ScoreRequest]]:
    sent, binary = read_body(bodies.decoded(body, coding, limits.max_body_bytes), header_length)
    return sent, read_requests(sent, scorer, limits, binary)
