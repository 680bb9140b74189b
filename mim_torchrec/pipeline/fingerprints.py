"""Fingerprints of stages: what their results depend on. Equal fingerprints give equal results.

Resources do not count, but for the number of ranks, the image and the environment variables.
"""

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchx.specs.finder import get_component

from mim_torchrec.embeddings.remote.places import Url, place
from mim_torchrec.embeddings.remote.published import find_index
from mim_torchrec.errors import ExpectedError
from mim_torchrec.pipeline.resolving import Resolver
from mim_torchrec.pipeline.spec import Stage

COMMON = ("data", "training")
CTR = (*COMMON, "ctr", "ciubm", "embeddings")
SOURCES: dict[str, tuple[str, ...]] = {
    "shop": ("data",),
    "import": ("data",),
    "prepare": ("data", "prepare"),
    "validate": ("data", "validate"),
    "table": ("embeddings.table",),
    "pretrain": (*COMMON, "pretraining", "encoders", "losses"),
    "csft": (*COMMON, "csft", "encoders", "losses"),
    "retrieve": (*COMMON, "csft", "encoders", "representation"),
    "export": (*COMMON, "representation", "encoders", "embeddings.table"),
    "ctr": CTR,
    "evaluate": CTR,
    "choose": ("training", "ctr"),
    "bundle": (*CTR, "serving"),
    "explain": (*CTR, "serving"),
    "release": ("embeddings", "serving"),
    "store": ("embeddings",),
    "plan": ("embeddings",),
    "ablate": (*CTR, "csft", "encoders", "losses", "representation", "pipeline"),
    "bench": (*CTR, "csft", "encoders", "representation", "serving", "rim", "benchmarks"),
}
"""Packages of `mim_torchrec` that a command or a component of ours runs; services are no stages."""
OURS = "mim."


class MissingInput(ExpectedError, FileNotFoundError):
    """A file that a stage reads is not there."""


def fingerprint(resolver: Resolver, name: str, of_others: Mapping[str, str]) -> dict[str, Any]:
    """What the result of a stage depends on, by kind.

    Args:
        resolver: of the run.
        name: of the stage.
        of_others: digests of the stages that it waits for.

    Returns:
        JSON values; `digest` makes one of them.

    Raises:
        MissingInput: a file is not there.
    """
    stage = resolver.pipeline.stages[name]
    return {
        "program": stage.component or stage.command,
        "arguments": [str(value) for value in stage.arguments],
        "flags": {flag: str(value) for flag, value in stage.flags.items()},
        "out": str(resolver.pipeline.output(name)),
        "ranks": stage.job.j,
        "image": stage.job.image,
        "env": dict(stage.job.env),
        "values": resolver.values(name),
        "stages": {other: of_others[other] for other in resolver.pipeline.dependencies[name]},
        "files": {file: _stat(name, file) for file in stage.files},
        "source": source_of(stage),
    }


def digest(parts: Mapping[str, Any]) -> str:
    """A hash of a fingerprint."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What has changed, in words; "" where nothing has."""
    said = []
    for kind, value in now.items():
        old = before.get(kind)
        if old == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            names = [name for name in {**old, **value} if old.get(name) != value.get(name)]
            match kind:
                case "stages":
                    said.append(f"{', '.join(names)} has another result")
                case "files":
                    said.append(f"{', '.join(names)} has changed")
                case _:
                    changes = [f"{n} {_shown(old.get(n))} -> {_shown(value.get(n))}" for n in names]
                    said.append(f"{kind}: {', '.join(changes)}")
        elif kind == "source":
            said.append("its source has changed")
        else:
            said.append(f"{kind}: {_shown(old)} -> {_shown(value)}")
    return "; ".join(said)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _stat(name: str, file: str) -> list[int | str]:
    where = place(file)
    try:
        if isinstance(where, Url):
            return _stat_at_url(where)
        found = where.stat()
    except FileNotFoundError:
        raise MissingInput(f"stages.{name}.files: {file} does not exist") from None
    return [found.st_size, found.st_mtime_ns]


def _stat_at_url(url: Url) -> list[int | str]:
    """Of an object its size and mark; of a directory the hash of what it holds."""
    index = find_index(url)
    if index is not None:
        return [len(index.files), index.digest]
    found = url.walk()
    if found:
        text = json.dumps([[path, stat.size, stat.mark] for path, stat in sorted(found.items())])
        return [len(found), hashlib.sha256(text.encode()).hexdigest()]
    stat = url.stat()
    return [stat.size, stat.mark]


def source_of(stage: Stage) -> str:
    """Hash of the source that a stage runs: of our packages, or of the file of a component."""
    word = own_program(stage)
    if word is not None:
        return _source(SOURCES[word])
    file, is_file, _ = str(stage.component).rpartition(":")
    if not is_file:
        file = inspect.getsourcefile(get_component(str(stage.component)).fn) or ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def own_program(stage: Stage) -> str | None:
    """Which of our programs a stage runs, a key of `SOURCES` if it can be a stage; None for one of others."""
    if stage.command is not None:
        return stage.command.split()[0]
    component = str(stage.component)
    return component.removeprefix(OURS) if component.startswith(OURS) else None


def _source(packages: Sequence[str]) -> str:
    found = hashlib.sha256()
    for package in packages:
        first, _, rest = package.partition(".")
        spec = importlib.util.find_spec(f"mim_torchrec.{first}")  # imports the parent alone
        assert spec is not None and spec.submodule_search_locations is not None  # SOURCES names packages
        (top,) = spec.submodule_search_locations
        folder = Path(top, *rest.split(".")) if rest else Path(top)
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{package}/{path.relative_to(folder)}".encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
