"""Pipelines whose stages are small programs, started by a TorchX component of a file."""

import json
import os
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import pathlib, signal, subprocess, sys, time
out, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
flags = dict(zip(words[::2], words[1::2]))
count = pathlib.Path(f"{out}.count")
count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
if "--say" in flags:
    print(flags["--say"], file=sys.stderr)
if "--child" in flags:  # in a session of its own, as a rank of torchrun
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
if "--ready" in flags:
    with open(flags["--ready"], "w") as fifo:
        fifo.write("ready")
    signal.pause()
if "--started" in flags:
    with open(flags["--started"], "w") as fifo:
        fifo.write("started")
if "--fail" in flags:
    sys.exit(int(flags["--fail"]))
while "--until" in flags and '"failed"' not in pathlib.Path(flags["--until"]).read_text():
    time.sleep(0.02)
if "--nothing" not in flags:
    out.mkdir(exist_ok=True)
    (out / "metrics.json").write_text('{"auc": 0.75, "name": "%s"}' % out.name)
    (out / "words").write_text(" ".join(words))
"""

COMPONENT = """
import sys

import torchx.specs as specs


def step(*script_args: str, out: str) -> specs.AppDef:
    \"\"\"
    A step.

    Args:
        script_args: flags
        out: directory
    \"\"\"
    words = [{program!r}, out, *script_args]
    role = specs.Role(name="step", image="", entrypoint=sys.executable, args=words)
    return specs.AppDef(name="step", roles=[role])
"""


class Steps:
    """A file of stages in a folder, and the runs of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.out = folder, folder / "steps.toml", folder / "run"
        program, self.component = folder / "program.py", folder / "component.py"
        program.write_text(PROGRAM)
        self.component.write_text(COMPONENT.format(program=str(program)))

    def write(self, text: str) -> list[str]:
        """Write stages, `step` standing for the component; returns the words of `mim pipeline run`."""
        program = f'component = "{self.component}:step"'
        self.file.write_text(f'name = "steps"\n{text.replace("step = true", program)}')
        return ["run", str(self.file), "--out", str(self.out)]

    def times_run(self, stage: str) -> int:
        """How often a stage has run."""
        count = self.out / f"{stage}.count"
        return int(count.read_text()) if count.exists() else 0

    def record(self, stage: str) -> dict[str, Any]:
        """The record of a stage."""
        found: dict[str, Any] = json.loads((self.out / "stages" / f"{stage}.json").read_text())
        return found

    def report(self) -> dict[str, Any]:
        """The report of the last run."""
        found: dict[str, Any] = json.loads((self.out / "pipeline" / "report.json").read_text())
        return found

    def states(self) -> dict[str, str]:
        """States of the stages in the report."""
        return {name: stage["state"] for name, stage in self.report()["stages"].items()}


def command(*words: str) -> list[str]:
    """A command line of `mim pipeline` in a process of its own."""
    return [sys.executable, "-m", "mim_torchrec.cli", "pipeline", *words]


def tagged(tag: str) -> list[int]:
    """Processes that run and have a tag in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"TAG={tag}".encode() in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(entry.name)] if state not in "ZX" and int(entry.name) != os.getpid() else []
        except OSError:  # it has ended
            continue
    return found
