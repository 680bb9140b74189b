"""RIM (§3.5): encode new items as they arrive, and publish them in windows to all readers of vectors.

    python -m mim_torchrec.rim.main --source DIR --encoder DIR --table TABLE --log LOG --out DIR

One process follows a source. It may be killed at any time: the log records what was published, and the same
command continues from there. A second process on the same source and log loses the race for every window and
publishes nothing twice. On SIGTERM the process publishes what it has read and ends.
"""

import logging
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from threading import Event
from typing import TypeVar, cast, get_args

import torch
import tyro
from PIL import Image
from torch import Tensor

from mim_torchrec import program
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.images import decode_image
from mim_torchrec.domains import check_domains
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.remote.places import local_path
from mim_torchrec.embeddings.table.manifest import Manifest, VersionMismatch
from mim_torchrec.embeddings.table.quantize import LOSS_LIMIT, encode, finite_rows, relative_errors
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.windows.log import LogMoved
from mim_torchrec.embeddings.windows.progress import order, positions_of
from mim_torchrec.embeddings.windows.redis_address import is_redis
from mim_torchrec.embeddings.windows.transport import Transport, open_log
from mim_torchrec.encoders.tower import compute_in
from mim_torchrec.representation.export import TrainedEncoder
from mim_torchrec.rim.config import RIMConfig
from mim_torchrec.rim.dead_letter import DeadLetterFile
from mim_torchrec.rim.progress import window_name
from mim_torchrec.rim.sources import Arrival, DirectorySource, ItemSource, StreamSource
from mim_torchrec.training.lease import Lease, leased
from mim_torchrec.training.precision import Precision, matrix_products_in

log = logging.getLogger("mim_torchrec.rim.main")  # also where it runs as __main__

LOOK = 0.5  # seconds between two looks at whether to stop
Value = TypeVar("Value")


@dataclass
class Counts:
    """What RIM did since it was started; `rim.json` holds the same."""

    windows: int = 0
    items: int = 0
    removed: int = 0
    dead_lettered: int = 0
    encode_seconds: float = 0.0
    publish_seconds: float = 0.0


@dataclass
class _Open:
    """A window that is not closed yet."""

    arrivals: list[Arrival] = field(default_factory=list)
    vectors: list[Tensor | None] = field(default_factory=list)  # None: in the dead-letter file, or deleted
    began: float = 0.0

    def keep(self, is_kept: Callable[[Arrival], bool]) -> None:
        """Forget arrivals."""
        kept = [k for k, arrival in enumerate(self.arrivals) if is_kept(arrival)]
        self.arrivals = [self.arrivals[k] for k in kept]
        self.vectors = [self.vectors[k] for k in kept]

    def contents(self, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, vectors, and ids deleted; of an item that came twice, what came last."""
        last: dict[int, Tensor | None] = {}
        for arrival, vector in zip(self.arrivals, self.vectors, strict=True):
            if arrival.item_id is not None and (vector is not None or arrival.removed):
                last[arrival.item_id] = vector
        found = {item: vector for item, vector in last.items() if vector is not None}
        deleted = [item for item, vector in last.items() if vector is None]
        vectors = [torch.empty(0, dim), *(vector[None] for vector in found.values())]
        int64 = torch.int64
        return torch.tensor([*found], dtype=int64), torch.cat(vectors), torch.tensor(deleted, dtype=int64)


class RIM:
    """New items from a source into a log.

    Args:
        config: what to do.
        device: where the encoder runs.

    Raises:
        VersionMismatch: the encoder is not the table's, or the log is of another one.
        DataError: the source does not exist.
    """

    def __init__(self, config: RIMConfig, device: torch.device, lease: Lease | None = None) -> None:
        self._config, self._lease = config, lease
        self._encoder = TrainedEncoder(str(config.encoder), device)
        manifest = Table.open(config.table, verify=False).manifest
        if self._encoder.version != manifest.table_version:
            raise VersionMismatch(
                f"{config.table} is of table_version {manifest.table_version}, {config.encoder} makes "
                f"vectors of {self._encoder.version}: use the encoder that the table was exported with"
            )
        self._dtype = manifest.dtype
        self.precision = config.precision or precision_of(manifest)
        compute_in(self.precision, self._encoder.vision, self._encoder.text)
        config.out.mkdir(parents=True, exist_ok=True)
        self._dead_letter = DeadLetterFile(config.out / "dead-letter.jsonl")
        self._log: Transport = open_log(config.log, manifest.table_version, start=manifest.seq)
        self._source: ItemSource = (
            StreamSource(config.source, config.name)
            if is_redis(config.source)
            else DirectorySource(local_path(config.source), config.name)
        )
        self.counts = Counts()
        self._window = _Open()
        self._last_seq = 0
        self._bad: list[tuple[Arrival, str]] = []
        self._seek()

    def run(self, stop: Event) -> Counts:
        """Follow the source until asked to stop or, with `once`, to its end.

        Raises:
            LeaseError: another process has taken the lease over; this one adds no window any more.
        """
        config = self._config
        with ThreadPoolExecutor() as self._pool:
            while not stop.is_set():
                room = config.window_items - len(self._window.arrivals)
                read = partial(self._source.read, min(config.batch_size, room), self._patience())
                arrivals = self._insist(read, stop)
                if arrivals is None:
                    break
                if arrivals:
                    self._take(arrivals)
                ended = config.once and not arrivals
                if self._is_due() or ended:
                    self._publish(stop)
                if ended:
                    break
            self._publish(stop)
        return self.counts

    def _patience(self) -> float:
        """Seconds to wait for further items."""
        if self._config.once:
            return 0.0
        if not self._window.arrivals:
            return LOOK
        return min(max(self._window.began + self._config.window_seconds - time.monotonic(), 0.0), LOOK)

    def _is_due(self) -> bool:
        window, config = self._window, self._config
        if not window.arrivals:
            return bool(self._bad)
        is_old = time.monotonic() - window.began >= config.window_seconds
        return is_old or len(window.arrivals) >= config.window_items

    def _take(self, arrivals: list[Arrival]) -> None:
        """Encode arrivals and add them to the open window."""
        started = time.monotonic()
        if not self._window.arrivals:
            self._window.began = started
        read = list(self._pool.map(self._image, arrivals))
        images = {k: found for k, found in enumerate(read) if isinstance(found, Image.Image)}
        problems = {k: found for k, found in enumerate(read) if isinstance(found, str)}
        encoded = self._encode([*images.values()], [arrivals[k].title or "" for k in images])
        vectors: dict[int, Tensor] = {}
        for k, vector in zip(images, encoded, strict=True):
            if isinstance(vector, str):
                problems[k] = vector
            else:
                stored = encode(vector[None], self._dtype)
                if not bool(finite_rows(stored, self._dtype)):
                    problems[k] = f"its vector holds NaN or infinity as {self._dtype}"
                elif float(relative_errors(vector[None], stored, self._dtype)) > LOSS_LIMIT[self._dtype]:
                    problems[k] = f"its vector is too small for {self._dtype}"
                else:
                    vectors[k] = vector
        for k, arrival in enumerate(arrivals):
            if k in problems:
                self._bad.append((arrival, problems[k]))
            if arrival.unit:  # without a unit there is no position to resume from
                self._window.arrivals.append(arrival)
                self._window.vectors.append(vectors.get(k))
        self.counts.encode_seconds += time.monotonic() - started

    def _encode(self, images: list[Image.Image], titles: list[str]) -> list[Tensor | str]:
        """The vector (dim,) of each item, or why it has none.

        Raises:
            Exception: the encoder does not even encode a blank image, so that no item is at fault.
        """
        if not images:
            return []
        try:
            with torch.inference_mode():
                return list(self._encoder(images, titles).float().cpu().clone())
        except Exception as error:
            if len(images) > 1:
                items = zip(images, titles, strict=True)
                return [self._encode([image], [title])[0] for image, title in items]
            with torch.inference_mode():
                self._encoder([Image.new("RGB", (64, 64))], ["a"])
            return [f"the encoder fails: {type(error).__name__}: {error}"]

    def _image(self, arrival: Arrival) -> Image.Image | str | None:
        """The image of an item, the reason why it cannot be encoded, or None for a deleted item."""
        if arrival.problem is not None:
            return arrival.problem
        if arrival.item_id is None:
            return "there is no item_id"
        if arrival.removed:
            return None
        if not (arrival.title or "").strip():
            return "the title is empty"
        if not arrival.image:
            return "there is no image"
        if len(arrival.image) > self._config.max_image_bytes:
            return f"the image has {len(arrival.image)} bytes, more than {self._config.max_image_bytes}"
        try:
            return decode_image(arrival.image)
        except DataError as error:
            return error.problem

    def _publish(self, stop: Event) -> None:
        """Close the window and add it to the log, after the dead-letter file."""
        started = time.monotonic()
        known = len(self._dead_letter)
        self._insist(self._leased(lambda: self._dead_letter.add(self._bad)), stop, give_up=False)
        self.counts.dead_lettered += len(self._dead_letter) - known
        self._bad = []
        while self._window.arrivals:
            window = self._window
            ids, vectors, removed = window.contents(self._encoder.dim)
            try:
                append = partial(
                    self._log.append, window_name(window.arrivals), ids, vectors, dtype=self._dtype,
                    removed=removed, seq=self._last_seq + 1,
                )  # fmt: skip
                seq = self._insist(self._leased(append), stop, give_up=False)
                assert seq is not None  # without giving up it appends or raises
            except LogMoved as error:
                log.warning("%s", error)
                reached = self._seek()
                window.keep(partial(_is_behind, reached))
                continue
            self._last_seq, self._window = seq, _Open()
            self.counts.windows += 1
            self.counts.items += ids.numel()
            self.counts.removed += removed.numel()
            self.counts.publish_seconds += time.monotonic() - started
            log.info("window %d: %d items, %d deleted", seq, ids.numel(), removed.numel())
            write_counts = partial(write_json, self._config.out / "rim.json", asdict(self.counts))
            self._insist(self._leased(write_counts), stop)

    def _seek(self) -> dict[str, str]:
        """Read from the log how far the source was read, and continue there."""
        self._last_seq = self._log.last_seq()
        reached = positions_of(self._log.names())
        self._source.seek(reached | window_positions(self._window.arrivals, reached))
        return reached

    def _leased(self, write: Callable[[], Value]) -> Callable[[], Value]:
        """A write that first looks whether the lease is still this process's, at every attempt."""

        def look_and_write() -> Value:
            if self._lease is not None:
                self._lease.check()
            return write()

        return look_and_write

    def _insist(self, action: Callable[[], Value], stop: Event, give_up: bool = True) -> Value | None:
        """Retry an action until the server or disk allows it; None if asked to stop meanwhile.

        What was read is published when told to stop: then (`give_up` False) it is tried once more, and
        failing is an error.
        """
        waited = False
        while True:
            try:
                done = action()
                if waited:
                    log.warning("going on")
                return done
            except OSError as error:
                if stop.is_set():
                    if give_up:
                        return None
                    raise
                if not waited:
                    log.warning("%s; trying again until it works", error)
                waited = True
                stop.wait(LOOK)


def precision_of(manifest: Manifest) -> Precision:
    """In which `mim export` encoded the items of a table; fp32 where the manifest does not say."""
    found = manifest.encoder.get("export", {}).get("precision", "fp32")
    if found not in get_args(Precision):
        raise DataError(f"the table was exported in {found!r}, which this version does not know")
    return cast(Precision, found)


def _is_behind(reached: dict[str, str], arrival: Arrival) -> bool:
    """Whether an item comes after what the log has reached in its unit."""
    return arrival.unit not in reached or order(arrival.position) > order(reached[arrival.unit])


def window_positions(arrivals: list[Arrival], reached: dict[str, str]) -> dict[str, str]:
    """The end positions of an open window that lie behind those of the log."""
    ends = {arrival.unit: arrival.position for arrival in arrivals}
    return {unit: end for unit, end in ends.items()
            if unit not in reached or order(end) > order(reached[unit])}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``mim rim``."""
    config = tyro.cli(RIMConfig, args=argv, description=__doc__)
    stop = Event()
    for number in program.heeded(signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_domains(config)
    torch.set_num_threads(config.threads)
    with leased(config.out / "lease.json") as lease:
        rim = RIM(config, device, lease)
        with matrix_products_in(rim.precision, device):
            counts = rim.run(stop)
    log.info("%d items in %d windows, %d deleted, %d in the dead-letter file", counts.items, counts.windows,
             counts.removed, counts.dead_lettered)  # fmt: skip


if __name__ == "__main__":
    program.run(main)
