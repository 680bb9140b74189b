"""What every HTTP request passes: it is counted, its token is checked, and its body is read within limits.

A request that is refused here costs no parsing. Every answer is counted with its cause, also those of errors
that nobody expected.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import cast

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.metrics import Metrics
from mim_torchrec.serving.tokens import TokenFile

log = logging.getLogger(__name__)

OPEN = ("/v2/health/live", "/v2/health/ready")
CAUSES = {
    400: "bad_request", 401: "token", 404: "not_found", 405: "method", 408: "slow_body",
    409: "table_version", 413: "too_large", 415: "encoding", 504: "deadline",
}  # fmt: skip
DISCONNECTED = 499
_EXCHANGE = "mim.exchange"


@dataclass
class Exchange:
    """A request and what becomes of it.

    Attributes:
        arrived: when its headers had come, by the clock of the event loop.
        cause: of its answer, where the status alone does not say it.
    """

    arrived: float
    cause: str | None = None


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that a scope belongs to."""
    return cast(Exchange, scope[_EXCHANGE])


class Answers:
    """Counts every answer, and answers errors that nobody expected by 500 in JSON.

    Args:
        app: what is behind it.
        metrics: are told.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[_EXCHANGE] = Exchange(asyncio.get_running_loop().time())
        if not scope["path"].endswith("/infer"):
            await self._answer(exchange, scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with self._metrics.spans.request(f"{scope['method']} infer", headers) as span:
            status, cause = await self._answer(exchange, scope, receive, send)
            span |= {"http.response.status_code": status, "mim.cause": cause}
            if status >= 500:
                span["error"] = cause

    async def _answer(
        self, exchange: Exchange, scope: Scope, receive: Receive, send: Send
    ) -> tuple[int, str]:
        """Have a request answered and count it: the status and its cause."""
        status: int | None = None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            log.exception("%s %s", scope["method"], scope["path"])
            exchange.cause = type(error).__name__
            if status is None:
                said = f"an error that the server did not expect, {type(error).__name__}; its log has more"
                await JSONResponse({"error": said}, 500)(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            number = DISCONNECTED if status is None else status
            cause = exchange.cause or CAUSES.get(number, "ok" if status == 200 else "other")
            cause = "disconnected" if status is None else cause
            self._metrics.requests.labels(route, str(number), cause).inc()
            if route.endswith("/infer"):
                seconds = asyncio.get_running_loop().time() - exchange.arrived
                self._metrics.seconds.labels(str(number)).observe(seconds)
        return number, cause


class Tokens:
    """Lets requests with a known token through.

    Args:
        app: what is behind it.
        tokens: that are known; None lets everything through.
    """

    def __init__(self, app: ASGIApp, tokens: TokenFile | None) -> None:
        self._app, self._tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._tokens is None or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        if self._tokens.accepts(dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")):
            await self._app(scope, receive, send)
            return
        answer = JSONResponse({"error": "a known token is needed: Authorization: Bearer …"}, 401,
                              {"WWW-Authenticate": "Bearer"})  # fmt: skip
        await answer(scope, receive, send)


class Bodies:
    """Reads the body of a request before it is handled, and refuses one that is too large or too slow.

    Args:
        app: what is behind it.
        limits: of the size, and of the time, which is that of the answer.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        limit, patience = self._limits.max_body_bytes, self._limits.deadline_ms / 1000
        try:
            async with asyncio.timeout_at(exchange_of(scope).arrived + patience):
                body = await _body(scope, receive, limit)
        except TimeoutError:
            said = f"the body did not arrive within {self._limits.deadline_ms:g} ms"
            # the connection stays open for what is left: closed now, it might take the answer with it
            await JSONResponse({"error": said}, 408)(scope, receive, send)
            return
        except _TooLarge:
            answer = JSONResponse({"error": f"the request has more than {limit} bytes"}, 413)
            await answer(scope, receive, send)
            return
        if body is None:  # its client has gone
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


class _TooLarge(Exception):
    """A body has too many bytes."""


async def _body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The body of a request; None where its client has gone."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise _TooLarge
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _TooLarge
        more = message.get("more_body", False)
    return b"".join(parts)
