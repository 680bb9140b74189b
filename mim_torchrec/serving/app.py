"""HTTP routes of the server: Open Inference Protocol v2, Prometheus metrics, and a page for people."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mim_torchrec.embeddings.windows.redis_address import RedisUnavailable
from mim_torchrec.serving.batcher import Batcher, DeadlinePassed, QueueFull
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.protocol import (
    InferRequest,
    datatypes,
    inputs_of,
    outputs_of,
    read_request,
    write_response,
)
from mim_torchrec.serving.scorer import BadRequest, Scores
from mim_torchrec.serving.service import Service

log = logging.getLogger(__name__)

OPEN = ("/v2/health/live", "/v2/health/ready")
STATUS = {BadRequest: 400, QueueFull: 503, DeadlinePassed: 504, RedisUnavailable: 503}


class Error(BaseModel):
    """What is answered where something is wrong."""

    error: str


class InferOutputs(BaseModel):
    """Scores."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, int]
    outputs: list[dict[str, Any]]


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The request cannot be scored."},
    401: {"model": Error, "description": "The token is missing or wrong."},
    404: {"model": Error, "description": "There is no such model or version."},
    409: {"model": Error, "description": "The vectors are of another version than was asked for."},
    413: {"model": Error, "description": "The request is too large."},
    503: {"model": Error, "description": "Too many requests wait, or a store does not answer."},
    504: {"model": Error, "description": "The request has waited too long."},
}


class SizeLimit:
    """Refuses bodies beyond a size while they arrive.

    Args:
        app: what is behind it.
        limit: bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            size += len(message.get("body", b""))
            if size > self._limit:
                answer = JSONResponse({"error": f"the request has more than {self._limit} bytes"}, 413)
                await answer(scope, receive, send)
                return
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(parts)
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


class Tokens:
    """Lets requests with a known token through.

    Args:
        app: what is behind it.
        tokens: that are known; none lets everything through.
    """

    def __init__(self, app: ASGIApp, tokens: frozenset[str]) -> None:
        self._app, self._tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._tokens or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        token = said.removeprefix("Bearer ").encode()
        # every token is compared, in constant time
        known = [secrets.compare_digest(token, one.encode()) for one in self._tokens]
        if said.startswith("Bearer ") and any(known):
            await self._app(scope, receive, send)
            return
        answer = JSONResponse({"error": "a known token is needed: Authorization: Bearer …"}, 401,
                              {"WWW-Authenticate": "Bearer"})  # fmt: skip
        await answer(scope, receive, send)


def make_app(
    service: Service,
    metrics: Metrics,
    limits: Limits,
    *,
    name: str = "mim",
    tokens: frozenset[str] = frozenset(),
    page: Callable[[FastAPI, Callable[..., Awaitable[Scores]]], None] | None = None,
) -> FastAPI:
    """The application.

    Args:
        service: what is served.
        metrics: are told what happens.
        limits: of requests.
        name: of the model.
        tokens: that requests must carry one of; none lets all in.
        page: adds the page for people.
    """
    batcher = Batcher(limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()
        service.close()

    app = FastAPI(title="mim-torchrec", version="2", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(SizeLimit, limit=limits.max_body_bytes)
    app.add_middleware(Tokens, tokens=tokens)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse({"error": f"{place}: {first['msg']}" if place else first["msg"]}, 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    async def unable(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, STATUS[type(error)])

    for kind in STATUS:
        app.add_exception_handler(kind, unable)

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Whether the server runs."""
        return {"live": True}

    @app.get("/v2/health/ready", responses={503: {"model": Error, "description": "Not ready."}})
    async def ready() -> Any:
        """Whether scores can be given, and vectors are kept up."""
        return await readiness()

    @app.get("/v2")
    async def about() -> dict[str, Any]:
        """Name, version and extensions of this server."""
        return {"name": "mim-torchrec", "version": "2", "extensions": []}

    @app.get("/v2/models/{model}", responses={404: ERRORS[404]})
    async def model_about(model: str) -> dict[str, Any]:
        """Inputs and outputs of the model, and the versions that are served."""
        known(model)
        served = service.current
        scorer = served.scorer
        inputs = [
            {"name": i, "datatype": datatypes(kind)[0], "shape": [-1]}
            for i, kind in inputs_of(scorer).items()
        ]
        outputs = [{"name": o, "datatype": "FP32", "shape": [-1]} for o in outputs_of(scorer)]
        return {
            "name": name,
            "versions": [served.model_version],
            "platform": "mim-torchrec",
            "inputs": inputs,
            "outputs": outputs,
            "parameters": {
                "table_version": scorer.bundle.table_version,
                "window_seq": None if scorer.mm is None else scorer.mm.seq,
                "max_behaviors": scorer.config.max_behaviors,
                "second_label": scorer.config.second_label,
            },
        }

    @app.get("/v2/models/{model}/ready", responses={404: ERRORS[404], 503: ERRORS[503]})
    async def model_ready(model: str) -> Any:
        """Whether the model can give scores."""
        known(model)
        return await readiness()

    @app.post("/v2/models/{model}/infer", responses=ERRORS, response_model=InferOutputs)
    async def infer(model: str, sent: InferRequest) -> Any:
        """Score the candidates of a request."""
        return await answer(model, None, sent)

    @app.post("/v2/models/{model}/versions/{version}/infer", responses=ERRORS, response_model=InferOutputs)
    async def infer_version(model: str, version: str, sent: InferRequest) -> Any:
        """Score with this version of the model, or not at all."""
        return await answer(model, version, sent)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def known(model: str) -> None:
        if model != name:
            raise HTTPException(404, f"there is no model {model!r}; there is {name!r}")

    async def readiness() -> Any:
        served = service.current
        problem, store = served.problem, served.scorer.mm
        if problem is None and store is not None:
            try:
                await asyncio.to_thread(lambda: store.seq)
            except RedisUnavailable as error:
                problem = str(error)
        if problem is not None:
            return JSONResponse({"error": problem}, 503)
        return {"ready": True}

    async def score(sent: InferRequest) -> tuple[Scores, str]:
        """Scores of a request, and the version of the model that gave them."""
        served = service.current
        table_version = served.scorer.bundle.table_version
        wanted = None if sent.parameters is None else sent.parameters.table_version
        if wanted is not None and wanted != table_version:
            raise HTTPException(409, f"the vectors are of table_version {table_version}, not {wanted}")
        request = read_request(sent, served.scorer, limits)
        patience = None if sent.parameters is None else sent.parameters.timeout_ms
        found = await batcher.score(served.scorer, request, patience)
        if found.was_kept is not None:
            (metrics.cache_hits if found.was_kept else metrics.cache_misses).inc()
        metrics.candidates.inc(len(found.scores))
        for kind, count in found.unknown.items():
            metrics.unknown.labels(kind).inc(count)
        return found, served.model_version

    async def answer(model: str, version: str | None, sent: InferRequest) -> Any:
        known(model)
        now = service.current.model_version
        if version is not None and version != now:
            raise HTTPException(404, f"version {version!r} is not served; {now!r} is")
        started = time.perf_counter()
        try:
            found, served_version = await score(sent)
        except tuple(STATUS) as error:
            metrics.requests.labels(str(STATUS[type(error)])).inc()
            raise
        metrics.requests.labels("200").inc()
        metrics.seconds.observe(time.perf_counter() - started)
        return JSONResponse(write_response(sent, found, name, served_version))

    if page is not None:
        page(app, batcher.score)
    return app
