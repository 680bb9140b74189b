"""Run stages one after the other or side by side, as a user would: by `torchx run -s local_cwd mim.<stage>`.

Every finished stage leaves a record beside its log, `<run>/stages/<name>.{json,log}`: a digest of its
command, of what it reads and of the source it runs, and the seconds it took. A stage whose record still
matches is not run again, so that an interrupted run resumes where it stopped.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import ExpectedError, OptionError

COMMON = ("data", "training")
SOURCES = {
    "shop": ("data",),
    "import": ("data",),
    "table": ("embeddings.table",),
    "pretrain": (*COMMON, "pretraining", "encoders", "losses"),
    "csft": (*COMMON, "csft", "encoders", "losses"),
    "retrieve": (*COMMON, "csft", "encoders", "representation"),
    "export": (*COMMON, "representation", "encoders", "embeddings.table"),
    "ctr": (*COMMON, "ctr", "ciubm", "embeddings"),
}
"""Packages of `mim_torchrec` that a command runs."""
TAIL_LINES = 40
OF_A_RANK = re.compile(r"\S+/\d+ \[\d+\]:.*\S")

Value = str | int | float | bool | Path


class StageError(ExpectedError, RuntimeError):
    """A stage ended with an error; the end of its log is on standard error."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of a run.

    Args:
        name: unique in the run; names the log and the entry of the report.
        command: words after `mim`, such as ("import", "movielens") or ("ctr",).
        out: file or directory that the command makes; an outdated one is removed before it runs.
        arguments: positional arguments.
        options: flags and their values.
        ranks: `<nodes>x<processes>` to launch with TorchX; None runs `mim <command>` in one process.
        launcher_options: which of the options are arguments of the TorchX component itself.
        after: stages whose results this one reads.
        files: files from outside the run that it reads; changing one makes the result outdated.
    """

    name: str
    command: tuple[str, ...]
    out: Path
    arguments: tuple[Value, ...] = ()
    options: Mapping[str, Value] = field(default_factory=dict)
    ranks: str | None = None
    launcher_options: tuple[str, ...] = ("data", "out", "encoder", "table")
    after: tuple["Stage", ...] = ()
    files: tuple[Path, ...] = ()

    def argv(self) -> list[str]:
        """The command line."""
        if self.ranks is None:
            start = [sys.executable, "-m", "mim_torchrec.cli", *self.command]
            return start + [str(a) for a in self.arguments] + _flags(self.options)
        own = {key: value for key, value in self.options.items() if key in self.launcher_options}
        rest = {key: value for key, value in self.options.items() if key not in self.launcher_options}
        start = [sys.executable, "-m", "torchx.cli.main", "--log_level", "WARNING", "run", "-s", "local_cwd"]
        tail = ["--", *_flags(rest)] if rest else []
        return [*start, f"mim.{self.command[0]}", *_flags(own), "-j", self.ranks, *tail]

    def digest(self) -> str:
        """Hash of the command, its inputs and its source; equal digests give equal results."""
        content = {
            "command": self.command,
            "arguments": [str(a) for a in self.arguments],
            "options": {key: str(value) for key, value in self.options.items()},
            "ranks": self.ranks,
            "after": [stage.digest() for stage in self.after],
            "files": [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files],
            "source": _source_digest(SOURCES[self.command[0]]),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flags(options: Mapping[str, Value]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def _source_digest(packages: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(f"mim_torchrec.{package}")
        assert spec is not None and spec.submodule_search_locations is not None  # SOURCES names packages
        (folder,) = spec.submodule_search_locations
        for path in sorted(Path(folder).rglob("*.py")):
            name = f"{package}/{path.relative_to(folder)}"
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Run:
    """The stages of one run directory.

    Args:
        root: directory of the run; every stage's `out` lies inside.
        verbose: print one line when a stage starts and one when it ends.
    """

    def __init__(self, root: Path, verbose: bool = True) -> None:
        self.root = root.resolve()
        self.seconds: dict[str, float] = {}
        self._verbose = verbose

    def run(self, stages: Iterable[Stage], jobs: int = 1, threads: int | None = None) -> None:
        """Run stages, `jobs` at a time and in the order given, skipping those whose result is there.

        Args:
            stages: independent of one another when `jobs` is more than 1.
            jobs: how many run side by side.
            threads: OMP_NUM_THREADS of every process; by default the launcher decides.

        Raises:
            StageError: a stage failed; those already running end first.
        """
        stages = list(stages)
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            for future in [pool.submit(self._run_one, stage, threads) for stage in stages]:
                try:
                    future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def _run_one(self, stage: Stage, threads: int | None) -> None:
        if not stage.out.resolve().is_relative_to(self.root):
            raise OptionError(f"stage {stage.name} writes to {stage.out}, which is outside {self.root}")
        folder = self.root / "stages"
        folder.mkdir(parents=True, exist_ok=True)
        record, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
        digest = stage.digest()
        if record.exists() and stage.out.exists():
            done = json.loads(record.read_text())
            if done["digest"] == digest:
                self.seconds[stage.name] = done["seconds"]
                self._say(f"{stage.name}: already there ({done['seconds']:.0f} s)")
                return
        record.unlink(missing_ok=True)
        _remove(stage.out)
        self._say(f"{stage.name}: started, log in {log}")
        seconds = self._execute(stage, log, threads)
        if not stage.out.exists():
            raise StageError(f"stage {stage.name} ended without an error but made no {stage.out}; log: {log}")
        write_json(record, {"digest": digest, "seconds": seconds, "argv": stage.argv()})
        self.seconds[stage.name] = seconds
        self._say(f"{stage.name}: done in {seconds:.0f} s")

    def _execute(self, stage: Stage, log: Path, threads: int | None) -> float:
        # the launched processes find this interpreter first, whether or not its environment is activated
        environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        environment["MIM_PYTHON"] = sys.executable
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        argv = stage.argv()
        started = time.monotonic()
        with log.open("w") as stream:
            stream.write(" ".join(argv) + "\n")
            stream.flush()
            code = subprocess.run(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            tail = _tail(log.read_text(errors="replace").splitlines())
            print(f"end of {log}:\n{tail}", file=sys.stderr, flush=True)
            raise StageError(f"stage {stage.name} failed with exit code {code}; see {log}")
        return time.monotonic() - started

    def _say(self, line: str) -> None:
        if self._verbose:
            print(line, flush=True)


def _tail(lines: Sequence[str]) -> str:
    # what a rank said comes before the long farewell of its launchers
    of_ranks = [line for line in lines if OF_A_RANK.match(line)]
    return "\n".join((of_ranks or lines)[-TAIL_LINES:])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)


def ctr_stage(
    name: str,
    *,
    root: Path,
    data: Stage,
    table: Stage | None,
    seed: int,
    options: Mapping[str, Value],
    ranks: str,
) -> Stage:
    """A run of the CTR stage: MIM on `table`, Base where it is None. The table must be there already."""
    flags: dict[str, Value] = {"data": data.out, "out": root / "ctr" / name, "seed": seed}
    flags["item-cache"] = root / "items" / data.name
    if table is None:
        flags["mim"] = "off"
    else:
        version = json.loads((table.out / "manifest.json").read_text())["table_version"]
        flags |= {"mim": "on", "table": table.out, "table-version": version}
    return Stage(
        name=f"ctr-{name}",
        command=("ctr",),
        out=root / "ctr" / name,
        options=flags | dict(options),
        ranks=ranks,
        after=(data,) if table is None else (data, table),
    )


def export_stage(
    root: Path,
    name: str,
    data: Stage,
    encoder: Stage | str,
    ranks: str,
    options: Mapping[str, Value] | None = None,
) -> Stage:
    """The table of all items, by the encoder of a C-SFT stage or a `plain:<vision>+<text>`."""
    flags: dict[str, Value] = {"data": data.out, "out": root / name}
    flags["encoder"] = encoder.out / "encoder" if isinstance(encoder, Stage) else encoder
    return Stage(
        name=f"export-{name}",
        command=("export",),
        options=flags | dict(options or {}),
        out=root / name,
        ranks=ranks,
        after=(data, encoder) if isinstance(encoder, Stage) else (data,),
    )


def permute_stage(table: Stage, *, out: Path, seed: int) -> Stage:
    """Negative control: the table with its vectors permuted among the items."""
    return Stage(
        name=out.name,
        command=("table", "permute"),
        arguments=(table.out,),
        options={"out": out, "seed": seed},
        out=out,
        after=(table,),
    )
