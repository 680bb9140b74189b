"""The Open Inference Protocol over gRPC: the same scores, deadlines, tokens and counts as over HTTP.

The service runs on the event loop of the HTTP server. The deadline of a call is that of its client, and at
most that of the server. Tokens come as metadata: `authorization: Bearer …`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict

from mim_torchrec.serving.bodies import LARGE
from mim_torchrec.serving.descriptions import (
    EXTENSIONS,
    SERVER,
    model_about,
    model_config,
    model_statistics,
    repository_index,
)
from mim_torchrec.serving.guards import DISCONNECTED
from mim_torchrec.serving.inference import FAILURES, Inference
from mim_torchrec.serving.rpc_messages import METHODS, SERVICE, message
from mim_torchrec.serving.rpc_tensors import read_message, write_message
from mim_torchrec.serving.tokens import TokenFile

log = logging.getLogger(__name__)

OPEN = ("ServerLive", "ServerReady")
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND, 409: grpc.StatusCode.FAILED_PRECONDITION,
    503: grpc.StatusCode.UNAVAILABLE, 504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
"""By status of an answer over HTTP."""
EXPECTED = tuple(FAILURES)
HANDSHAKE = 10_000  # milliseconds


class NoToken(PermissionError):
    """A call carries no known token."""


class Calls:
    """Answers to the methods of the service.

    Args:
        inference: what scores requests.
        tokens: that calls must carry one of; None lets all in.
    """

    def __init__(self, inference: Inference, tokens: TokenFile | None) -> None:
        self._inference, self._tokens = inference, tokens

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server of gRPC calls."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                method: grpc.unary_unary_rpc_method_handler(
                    partial(self._call, method),
                    request_deserializer=message(f"{method}Request").FromString,
                    response_serializer=message(f"{method}Response").SerializeToString,
                )
                for method in METHODS
            },
        )

    async def _call(self, method: str, request: Any, context: grpc.aio.ServicerContext) -> Any:
        metadata = context.invocation_metadata() or ()
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        if method != "ModelInfer":
            return await self._answer(method, request, context, carrier, {})
        with self._inference.metrics.spans.request(method, carrier) as span:
            return await self._answer(method, request, context, carrier, span)

    async def _answer(
        self,
        method: str,
        request: Any,
        context: grpc.aio.ServicerContext,
        carrier: Mapping[str, str],
        span: dict[str, Any],
    ) -> Any:
        """Answer a call and count it."""
        loop = asyncio.get_running_loop()
        arrived, status, cause = loop.time(), DISCONNECTED, "disconnected"
        try:
            self._check_token(method, carrier)
            answer: Callable[..., Awaitable[Any]] = getattr(self, f"_{method}")
            made = await answer(request, context, arrived)
            status, cause = 200, "ok"
            return made
        except asyncio.CancelledError:
            left = context.time_remaining()
            if left is not None and left <= 0:
                status, cause = 504, "deadline"
            raise
        except NoToken as error:
            status, cause = 401, "token"
            await context.abort(CODES[401], str(error))
        except EXPECTED as error:
            status, cause = FAILURES[type(error)]
            await context.abort(CODES[status], str(error))
        except Exception as error:
            log.exception("%s", method)
            status, cause = 500, type(error).__name__
            said = f"an error that the server did not expect, {cause}; its log has more"
            await context.abort(grpc.StatusCode.INTERNAL, said)
        finally:
            metrics = self._inference.metrics
            metrics.requests.labels(f"/{SERVICE}/{method}", str(status), cause).inc()
            if method == "ModelInfer":
                metrics.seconds.labels(str(status)).observe(loop.time() - arrived)
            span |= {"mim.cause": cause} | ({"error": cause} if status >= 500 else {})

    def _check_token(self, method: str, carrier: Mapping[str, str]) -> None:
        if self._tokens is None or method in OPEN:
            return
        if not self._tokens.accepts(carrier.get("authorization", "")):
            raise NoToken("a known token is needed in the metadata: authorization: Bearer …")

    async def _ServerLive(self, *_: Any) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _ServerReady(self, *_: Any) -> Any:
        return message("ServerReadyResponse")(ready=await self._inference.health.problem() is None)

    async def _ModelReady(self, request: Any, *_: Any) -> Any:
        self._inference.find(request.name, request.version or None)
        return message("ModelReadyResponse")(ready=await self._inference.health.problem() is None)

    async def _ServerMetadata(self, *_: Any) -> Any:
        return message("ServerMetadataResponse")(name=SERVER, version="2", extensions=EXTENSIONS)

    async def _ModelMetadata(self, request: Any, *_: Any) -> Any:
        served = self._inference.find(request.name, request.version or None)
        about = await asyncio.to_thread(model_about, self._inference.name, served)
        return _filled("ModelMetadataResponse", about.model_dump(exclude={"parameters"}))

    async def _ModelConfig(self, request: Any, *_: Any) -> Any:
        served = self._inference.find(request.name, request.version or None)
        about = await asyncio.to_thread(model_config, self._inference.name, served)
        return _filled("ModelConfigResponse", {"config": about.model_dump()})

    async def _ModelStatistics(self, request: Any, *_: Any) -> Any:
        name, version = self._inference.name, request.version or None
        if request.name or version:
            self._inference.find(request.name, version)
        return _filled(
            "ModelStatisticsResponse",
            model_statistics(name, self._inference.metrics.statistics, version).model_dump(),
        )

    async def _RepositoryIndex(self, request: Any, *_: Any) -> Any:
        entries = await repository_index(self._inference)
        kept = [one.model_dump() for one in entries if one.state == "READY" or not request.ready]
        return _filled("RepositoryIndexResponse", {"models": kept})

    async def _ModelInfer(self, request: Any, context: grpc.aio.ServicerContext, arrived: float) -> Any:
        served = self._inference.find(request.model_name, request.model_version or None)
        return await self._inference.infer(
            served,
            partial(read_message, request, self._inference.limits),
            partial(write_message, request),
            arrived=arrived,
            patience=context.time_remaining(),
            aside=request.ByteSize() >= LARGE,
        )


@asynccontextmanager
async def listening(
    inference: Inference, tokens: TokenFile | None, address: str, grace: float
) -> AsyncIterator[None]:
    """The service behind a port, until the context ends and calls that have begun are answered.

    Args:
        inference: what scores requests.
        tokens: that calls must carry one of; None lets all in.
        address: host and port; other processes may have the same.
        grace: seconds that calls that have begun may take at the end.

    Raises:
        RuntimeError: the port is taken.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", inference.limits.max_body_bytes),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE),
            ("grpc.so_reuseport", 1),
        ]
    )
    server.add_generic_rpc_handlers((Calls(inference, tokens).handlers(),))
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace)


def _filled(name: str, values: dict[str, Any]) -> Any:
    return ParseDict(values, message(name)(), ignore_unknown_fields=True)
