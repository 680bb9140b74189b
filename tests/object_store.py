"""A server of the S3 protocol on loopback, with a bucket, and with faults on demand."""

import re
from collections.abc import Iterable
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.remote.published import read_index

BUCKET = "shops"
REFUSED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class ObjectStore:
    """A server with one bucket.

    Attributes:
        environment: what a process needs in its environment to use it.
        refuse: regular expression of the paths of requests to write that are denied; None denies none.
        hide: regular expression of the prefixes that may not be listed.
        ignore_conditions: write also where a condition forbids it, as older servers do.
    """

    def __init__(self) -> None:
        self.refuse: str | None = None
        self.hide: str | None = None
        self.ignore_conditions = False
        self.puts: list[str] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.client = boto3.client(
            "s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], aws_access_key_id="key",
            aws_secret_access_key="secret", region_name="us-east-1",
        )  # fmt: skip
        self.client.create_bucket(Bucket=BUCKET)

    def close(self) -> None:
        """End the server."""
        self.client.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] in ("PUT", "POST"):
            self.puts.append(path)
            if self.refuse is not None and re.search(self.refuse, path):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("403 Forbidden", [("Content-Type", "application/xml")])
                return [REFUSED]
            if self.ignore_conditions:
                environ.pop("HTTP_IF_NONE_MATCH", None)
        prefix = parse_qs(environ["QUERY_STRING"]).get("prefix", [""])[0]
        if environ["REQUEST_METHOD"] == "GET" and self.hide is not None and re.search(self.hide, prefix):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [REFUSED]
        return self._app(environ, start_response)


def contents(url: str) -> dict[str, bytes]:
    """The files of a published directory, by path."""
    index = read_index(Url(url))
    return {path: index.url_of(path).read_bytes() for path in index.files}


def upload(folder: Path, url: str) -> None:
    """Put a directory there as a tool of the store would, without an index."""
    for file in folder.rglob("*"):
        if file.is_file():
            Url(f"{url}/{file.relative_to(folder).as_posix()}").upload(file)
