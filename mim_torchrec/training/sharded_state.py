"""State that ranks share or divide: `torch.distributed.checkpoint`, with digests and clear errors.

Every file that is written gets its SHA-256, computed on the way to the disk, in a file beside it; `seal` puts
those of all ranks into `sha256.json`. So a flipped bit is found before a state is loaded. A full disk is
reported as such: the library says `unexpected pos 704 vs 598`.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from mim_torchrec.embeddings.files import FULL, disk_full, sha256, write_bytes
from mim_torchrec.training.distributed import new_gloo_group

DIGESTS = "sha256.json"
DIGEST = ".sha256"


class DigestingFileSystem(FileSystem):
    """Computes the digest of what is written, and keeps the error of a write that failed.

    Attributes:
        error: of the last write that failed.
    """

    def __init__(self) -> None:
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[Any], mode: str) -> Iterator[Any]:
        """Open a file; one that is written gets a file with its digest beside it when it is closed."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        try:
            with Path(path).open("wb") as file:
                digesting = _Digesting(file, self)
                yield digesting
            digest_file = Path(f"{str(path).removesuffix('.tmp')}{DIGEST}")
            digest_file.write_text(digesting.digest.hexdigest())
        except OSError as error:
            self.error = self.error or error
            raise


class _Digesting:
    """A file that is written from the front to the end."""

    def __init__(self, file: IO[bytes], owner: DigestingFileSystem) -> None:
        self._file, self._owner = file, owner
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        try:
            count = self._file.write(data)
        except OSError as error:
            self._owner.error = self._owner.error or error
            raise
        self.digest.update(data)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Writer(dcp.FileSystemWriter):
    """Writes a state into a directory, with the digests of its files."""

    def __init__(self, path: Path, needed: int) -> None:
        super().__init__(str(path))
        self.fs: DigestingFileSystem = DigestingFileSystem()
        self._needed = needed

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As in the library; a full disk is `DiskFull`."""
        with self._errors_of_the_disk():
            return super().write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        """As in the library; a full disk is `DiskFull`."""
        with self._errors_of_the_disk():
            super().finish(metadata, results)

    @contextmanager
    def _errors_of_the_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            cause = self.fs.error
            if cause is None:
                raise
            if cause.errno in FULL:
                raise disk_full(Path(self.path), self._needed, cause) from error
            raise cause from error


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write a state into a directory, each rank its part; every rank calls it.

    Raises:
        OSError: a rank could not write; all ranks raise.
    """
    try:
        dcp.save(state, storage_writer=Writer(folder, size_of(state)))
    except CheckpointException as error:
        raise OSError(cause_of(error)) from error


def size_of(state: Any) -> int:
    """Bytes of the tensors in a state that are on this rank."""
    if isinstance(state, ShardedTensor):
        return sum(shard.tensor.nbytes for shard in state.local_shards())
    if isinstance(state, DTensor):
        return state.to_local().nbytes
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(size_of, state.values()))
    return sum(map(size_of, state)) if isinstance(state, list | tuple) else 0


def cause_of(error: CheckpointException) -> str:
    """What stopped the first rank that failed."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause}"


def seal(folder: Path) -> None:
    """Write down the digests of all files in a directory, once all are written; one rank calls it."""
    digests = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix == DIGEST:
            continue
        known = file.with_name(file.name + DIGEST)
        digests[str(file.relative_to(folder))] = known.read_text() if known.is_file() else sha256(file)
        known.unlink(missing_ok=True)
    write_bytes(folder / DIGESTS, _canonical(digests))


def damage(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with this rank's part of the files of a sealed directory; None where nothing is."""
    try:
        text = (folder / DIGESTS).read_bytes()
        digests = json.loads(text)
        if _canonical(digests) != text:
            return f"{DIGESTS} is damaged"
        for name in list(digests)[rank::world_size]:
            if sha256(folder / name) != digests[name]:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{DIGESTS} cannot be used: {error}"
    return None


def own_group() -> dist.ProcessGroup | None:
    """A group for a writer's thread, whose exchanges must not mix with those of training."""
    return new_gloo_group() if dist.is_initialized() else None


def _canonical(digests: dict[str, str]) -> bytes:
    return (json.dumps(digests, indent=2, sort_keys=True) + "\n").encode()
