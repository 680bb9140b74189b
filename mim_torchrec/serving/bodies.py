"""Bodies of HTTP requests: their encoding, where their JSON ends, and which thread reads them."""

import zlib
from collections.abc import Mapping

HEADER_LENGTH = "inference-header-content-length"
LARGE = 32 * 1024  # bytes; larger bodies are read by a thread, so that the event loop answers meanwhile
_GZIP, _ZLIB, _RAW = 31, 15, -15  # of zlib: which header comes first
_CODINGS = {"gzip": (_GZIP,), "x-gzip": (_GZIP,), "deflate": (_ZLIB, _RAW), "identity": ()}


class BadBody(ValueError):
    """A body cannot be read.

    Args:
        problem: what is wrong.
        status: of the answer.
    """

    def __init__(self, problem: str, status: int = 400) -> None:
        super().__init__(problem)
        self.status = status


def header_length(headers: Mapping[str, str]) -> int | None:
    """Bytes of JSON at the beginning of a body; None where all of it is JSON.

    Raises:
        BadBody: the header is no number.
    """
    said = headers.get(HEADER_LENGTH)
    if said is None:
        return None
    if not (said.isascii() and said.isdigit()):
        raise BadBody(f"Inference-Header-Content-Length: {said!r} is no number of bytes")
    return int(said)


def decoded(body: bytes, coding: str | None, limit: int) -> bytes:
    """A body without its compression.

    Args:
        body: as it came.
        coding: the header Content-Encoding: gzip, deflate or none.
        limit: bytes of what comes out.

    Raises:
        BadBody: it is damaged, larger than the limit, or compressed in another way.

    >>> import gzip
    >>> decoded(gzip.compress(b"{}"), "gzip", 10), decoded(zlib.compress(b"{}"), "deflate", 10)
    (b'{}', b'{}')
    """
    name = (coding or "identity").strip().lower()
    if name not in _CODINGS:
        raise BadBody(f"Content-Encoding: {coding} is not supported; send gzip, deflate or none", 415)
    forms = _CODINGS[name]
    for number, form in enumerate(forms, 1):
        try:
            return _inflated(body, form, limit)
        except zlib.error as error:
            if number == len(forms):
                raise BadBody(f"the body is no {name}: {error}") from None
    return body


def _inflated(body: bytes, form: int, limit: int) -> bytes:
    parts: list[bytes] = []
    left = limit
    while body:
        one = zlib.decompressobj(form)
        parts.append(one.decompress(body, left + 1))
        left -= len(parts[-1])
        if left < 0:
            raise BadBody(f"the request has more than {limit} bytes when it is decompressed", 413)
        if not one.eof:
            raise zlib.error("it ends too early")
        body = one.unused_data  # a further member, as of gzip files that were joined
    return b"".join(parts)
