"""Traces of requests for scores by OpenTelemetry: spans of the request, its reading, its scores, each lookup.

Spans go to the tracer provider of the process, which `opentelemetry-instrument mim serve …` sets up by the
variables of OpenTelemetry. Without one, or without the package, nothing is traced. A client's `traceparent`
is the parent of its request. Requests that are scored together share the span of their scores, which is a
child of the first and links to the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mim_torchrec.extras import is_installed

NAME = "mim_torchrec.serving"


class Spans:
    """Makes spans, or nothing where OpenTelemetry is not installed.

    Args:
        provider: of tracers; None for that of the process.
    """

    def __init__(self, provider: Any = None) -> None:
        self._api: Any = None
        if is_installed("traces"):
            from opentelemetry import propagate, trace

            self._api, self._propagate = trace, propagate
            self._tracer = trace.get_tracer(NAME, tracer_provider=provider)

    @contextmanager
    def request(self, name: str, carrier: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """The span of a request.

        Args:
            name: of the span.
            carrier: headers or metadata, which may name the span of the client.

        Yields:
            Attributes, which may be added to; `error` is taken for the reason that it has failed.
        """
        attributes: dict[str, Any] = {}
        if self._api is None:
            yield attributes
            return
        parent = self._propagate.extract(carrier)
        with self._tracer.start_as_current_span(
            name, context=parent, kind=self._api.SpanKind.SERVER,
            record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            try:
                yield attributes
            finally:
                error = attributes.pop("error", None)
                span.set_attributes(attributes)
                if error is not None:
                    span.set_status(self._api.StatusCode.ERROR, error)

    @contextmanager
    def part(self, name: str, **attributes: Any) -> Iterator[None]:
        """A part of what is done now in this thread or task."""
        if self._api is None:
            yield
            return
        with self._tracer.start_as_current_span(name, attributes=attributes):
            yield

    def here(self) -> Any:
        """The span that is current, to be named to `together`; None where there is none."""
        return None if self._api is None else self._api.get_current_span()

    @contextmanager
    def together(self, name: str, spans: Sequence[Any], **attributes: Any) -> Iterator[None]:
        """What is done for several requests at once, by another thread.

        Args:
            name: of the span.
            spans: by `here`, of each request.
            attributes: of the span.
        """
        if self._api is None:
            yield
            return
        parent = self._api.set_span_in_context(spans[0])
        links = [self._api.Link(span.get_span_context()) for span in spans[1:]]
        with self._tracer.start_as_current_span(name, context=parent, links=links, attributes=attributes):
            yield
