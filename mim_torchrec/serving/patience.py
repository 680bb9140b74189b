"""Connections that say nothing, or half a request, are closed: uvicorn waits for the headers for ever."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS = 10.0  # seconds in which the headers of a request must come, or the rest of one that was answered


class PatientProtocol(H11Protocol):
    """uvicorn's protocol of HTTP/1.1 with a limit of the time that headers take.

    The body has a limit of its own (`guards.Bodies`), and so have connections between two requests
    (`timeout_keep_alive` of uvicorn).
    """

    def __init__(self, *args: Any, **words: Any) -> None:
        super().__init__(*args, **words)
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected, and is to send a request."""
        super().connection_made(transport)  # type: ignore[arg-type]  # TCP has a Transport
        self._wait()

    def data_received(self, data: bytes) -> None:
        """A part of a request has come, or several requests."""
        super().data_received(data)
        if self._has_rest() or (self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None):
            self._wait()
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """A request was answered; its body may not be there yet."""
        super().on_response_complete()
        if self._has_rest():
            self._unset_keepalive_if_required()
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _has_rest(self) -> bool:
        """Whether a request was answered before all of its body came."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _wait(self) -> None:
        if self._limit is None:
            self._limit = self.loop.call_later(HEADERS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
