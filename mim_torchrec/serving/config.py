"""Configuration of the server; every field is a flag of ``mim serve``."""

from dataclasses import dataclass
from typing import Annotated

from mim_torchrec.domains import Count, Domain, Natural
from mim_torchrec.embeddings.remote.places import LocalPath, Place


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes beyond which a request is refused."""

    max_body_bytes: Count = 8_000_000
    """Bytes of a request, as it is sent and decompressed."""
    max_users: Count = 64
    """Users of a request."""
    max_candidates: Count = 10_000
    """Candidates of a request, of all its users."""
    max_behaviors: Count = 50_000
    """Behaviors of a request, of all its users; the model uses the `max_behaviors` last ones of each."""
    max_queue: Count = 256
    """Requests that wait; further ones are answered 503."""
    deadline_ms: Annotated[float, Domain(least=1)] = 1000.0
    """Milliseconds from the arrival of a request to its answer: later it is answered 504, or 408 where its
    body is not there yet. A request may ask for less."""
    store_timeout_ms: Annotated[float, Domain(least=1)] = 250.0
    """Milliseconds that Redis may take to answer one command; less than `deadline_ms`."""
    batch_pairs: Count = 100_000
    """Pairs of candidate and behavior up to which waiting requests are scored together."""
    explain_pairs: Natural = 300_000
    """Pairs that a request with `explain` may take: those of the request for each behavior that is left out.
    0 refuses explanations."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer requests for scores by the Open Inference Protocol v2, over HTTP and gRPC.

    The server computes on CPUs, also on a host with GPUs.
    """

    release: LocalPath | None = None
    """Folder of releases (`mim release`). The current release is served; a promotion takes effect at once."""
    bundle: Place | None = None
    """Instead of --release: directory that `mim bundle` has written."""
    store: str | None = None
    """With --bundle: directory of the multi-modal table, or URL of a store that holds it. Base needs none."""
    id_store: str | None = None
    """With --bundle: URL of a store that holds the bundle's ID tables; by default they are read from the
    bundle."""
    windows: str | None = None
    """With --bundle: window log to follow, a directory or a Redis URL. Not needed if another process applies
    it to the store."""
    data: Place | None = None
    """Dataset directory, whose users and images the page at / shows; without it there is no page."""
    encoder: Place | None = None
    """With --data: directory of the encoder of the vectors (`<out>/encoder` of `mim csft`). The page then
    says where an item would rank that is not there yet. Its libraries take about 0.6 GiB of memory."""
    name: str = "mim"
    """Name of the model in addresses."""
    host: str = "127.0.0.1"
    """Address to bind to; beyond loopback --token-file is needed."""
    port: Annotated[int, Domain(least=0, most=65535)] = 8080
    """Port to bind to; 0 takes a free one, which is printed."""
    grpc_port: Annotated[int, Domain(least=0, most=65535)] | None = None
    """Port for the same protocol over gRPC, on the same address; 0 takes a free one, which is printed."""
    token_file: LocalPath | None = None
    """File with tokens, a line each; a request must carry one as `Authorization: Bearer`."""
    cache: Natural = 1000
    """Users' histories whose computed matrices are kept in memory."""
    workers: Count = 1
    """Processes that serve, on the same ports."""
    threads: Natural = 0
    """Threads of a worker that score; 0 is the number of cores over that of workers."""
    limits: Limits = Limits()
    """Sizes beyond which a request is refused."""
