"""How programs end: one line and a status for expected errors, a traceback for bugs and for `--debug`."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from huggingface_hub.errors import LocalEntryNotFoundError

from mim_torchrec.ctr.warm_start import WarmStartError
from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.files import DiskFull
from mim_torchrec.embeddings.holder import LeaseError
from mim_torchrec.embeddings.remote.fetching import FetchError
from mim_torchrec.embeddings.remote.places import NoSuchPlace, StoreError
from mim_torchrec.embeddings.remote.published import PublishedError
from mim_torchrec.embeddings.sharded.item_index import SpareRowsExhausted
from mim_torchrec.embeddings.stable_ids import IdCollision
from mim_torchrec.embeddings.table.manifest import (
    ChecksumMismatch,
    DuplicateId,
    IncompleteTable,
    LossyVector,
    NonFiniteVector,
    TableError,
    TableLost,
    VersionMismatch,
)
from mim_torchrec.embeddings.tensor_files import DamagedFile
from mim_torchrec.embeddings.windows.log import LogMoved
from mim_torchrec.embeddings.windows.redis_address import RedisFull, RedisUnavailable
from mim_torchrec.embeddings.windows.window import MalformedWindow, WindowGap
from mim_torchrec.encoders.checkpoint import CheckpointError
from mim_torchrec.errors import (
    Diverged,
    ExpectedError,
    OptionError,
    OutputExists,
    SetupError,
    Status,
)
from mim_torchrec.extras import MissingExtra
from mim_torchrec.pipeline.execution import StageError
from mim_torchrec.pipeline.fingerprints import MissingInput
from mim_torchrec.pipeline.records import RecordError
from mim_torchrec.pipeline.resolving import ReferenceFailed
from mim_torchrec.pipeline.signals import RunInterrupted
from mim_torchrec.pipeline.spec import PipelineError
from mim_torchrec.prepare.mapping import MappingError
from mim_torchrec.program import heeded, run
from mim_torchrec.serving.releases import ReleaseError
from mim_torchrec.training.checkpoints import ResumeError
from mim_torchrec.training.liveness import RankStalled
from mim_torchrec.training.loop import Interrupted
from mim_torchrec.training.model_record import ModelMismatch

ROOT = Path(__file__).resolve().parents[2]
OURS = {
    OptionError: 2, PipelineError: 2, MappingError: 2,
    DataError: 3, CheckpointError: 3, DamagedFile: 3, Diverged: 3, TableError: 3, TableLost: 3,
    ChecksumMismatch: 3, IncompleteTable: 3, DuplicateId: 3,
    LossyVector: 3, IdCollision: 3, NonFiniteVector: 3, SpareRowsExhausted: 3,
    MalformedWindow: 3,
    StageError: 3, MissingInput: 3, ReferenceFailed: 3, NoSuchPlace: 3, FetchError: 3,
    VersionMismatch: 4, ModelMismatch: 4, WarmStartError: 4, WindowGap: 4,
    OutputExists: 5, LeaseError: 5, ResumeError: 5, ReleaseError: 5, LogMoved: 5,
    RecordError: 5, PublishedError: 5,
    SetupError: 6, RankStalled: 6, DiskFull: 6, MissingExtra: 6, RedisUnavailable: 6, RedisFull: 6,
    StoreError: 6,
    RunInterrupted: 143,
}  # fmt: skip
GLOO = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"
THEIRS = {
    "a missing file": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
        3,
        "check the path",
    ),
    "a file for a folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), 3, "check the path"),
    "an output that exists": (FileExistsError(errno.EEXIST, "File exists", "a"), 5, "choose another"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "a"), 6, "change its permissions"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "a/b"), 6, "bytes free; free space"),
    "an address in use": (OSError(errno.EADDRINUSE, "Address already in use"), 6, "another port"),
    "an error of all ranks": (OSError("rank 1: the disk is full"), 6, "rank 1: the disk is full"),
    "no Redis": (redis.ConnectionError("refused"), 6, "Redis: refused; check the URL"),
    "a wrong password": (redis.AuthenticationError("WRONGPASS"), 6, "password"),
    "no model on the hub": (LocalEntryNotFoundError("offline"), 6, "give a local directory"),
    "no memory": (MemoryError("17 GiB"), 6, "lower the batch size"),
    "a rank that has ended": (RuntimeError(GLOO), 6, "another rank has ended"),
    "a rank that has stopped": (RuntimeError("Timed out waiting 5000ms"), 6, "was waited for in vain"),
    "a rank that two waits were for": (
        RuntimeError("Application timeout caused pair closure"),
        6,
        "was waited for in vain",
    ),
    "a rank that cannot be reached": (RuntimeError("connect [::1]:1: No route to host"), 6, "has ended"),
}


def end_of(error: BaseException, *words: str) -> int:
    """The status of a program that raises an error."""

    def main(argv: list[str]) -> None:
        assert "--debug" not in argv
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main, list(words), "mim test")
    return ended.value.code


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_every_expected_error_has_its_status():
    package = {
        kind
        for kind in subclasses(ExpectedError)
        if kind.__module__.startswith("mim_torchrec.") and ".benchmarks." not in kind.__module__
    }
    assert {kind: int(kind.status) for kind in package - {ExpectedError}} == OURS


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_an_expected_error_is_one_line_and_a_status(kind, capsys):
    assert end_of(kind("part-0.parquet: wrong;\n  fix it")) == OURS[kind]
    assert capsys.readouterr().err == "mim test: part-0.parquet: wrong;; fix it\n"


@pytest.mark.parametrize("name", THEIRS)
def test_an_expected_error_of_a_library_is_one_line_and_a_status(name, capsys):
    error, status, remedy = THEIRS[name]
    assert end_of(error) == status
    shown = capsys.readouterr().err
    assert shown.startswith("mim test: ") and shown.count("\n") == 1 and remedy in shown


def test_debug_shows_the_traceback_as_well(capsys):
    assert end_of(DataError("wrong"), "--debug", "--rows", "3") == 3
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("\nmim test: wrong\n")


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError(), RuntimeError("x")])
def test_a_bug_shows_its_traceback(error, capsys):
    assert end_of(error) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_interruptions_have_the_status_of_their_signal(capsys):
    assert end_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "mim test: interrupted\n"
    assert end_of(Interrupted(Path("runs"))) == 143


def test_a_signal_that_is_ignored_is_not_heeded():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert heeded(signal.SIGTERM, signal.SIGINT) == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.SIGTERM in heeded(signal.SIGTERM, signal.SIGINT)


def test_a_rank_says_which_it_is(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    end_of(DataError("wrong"))
    assert capsys.readouterr().err == "mim test: rank 1: wrong\n"


def test_a_program_that_ends_well_has_status_0():
    with pytest.raises(SystemExit) as ended:
        run(lambda words: None, [])
    assert ended.value.code == Status.OK


@pytest.mark.parametrize("words", [["--help"], ["shop", "--help"]])
def test_a_reader_of_the_output_may_end_first(words):
    process = subprocess.Popen(
        [sys.executable, "-m", "mim_torchrec.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_the_page_of_errors_names_every_status_and_kind():
    page = (ROOT / "docs" / "errors.md").read_text()
    lines = {
        int(line.split("|")[1]): line
        for line in page.splitlines()
        if line.startswith("| ") and line[2].isdigit()
    }
    assert set(lines) == {int(status) for status in Status}
    for kind, status in OURS.items():
        assert f"`{kind.__name__}`" in lines[status]


def test_a_pipe_that_is_not_the_output_is_an_expected_error(capsys):
    assert end_of(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))) == 6
    assert "Broken pipe" in capsys.readouterr().err
