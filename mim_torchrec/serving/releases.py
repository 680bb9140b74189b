"""Releases: a model and its vectors under a name, promoted and rolled back together.

    <root>/<name>.json     the deployment, as staged
    <root>/current.json    the release that is served, and the one before it

A new encoder produces a table of another version. The new table is filled next to the old one, checked to
cover the old one's items, and promoted together with the model that was trained on it. `current.json` is
replaced atomically. Servers that follow it swap model and vectors together.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from mim_torchrec.domains import Natural, check_domains
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.remote.places import LocalPath, place
from mim_torchrec.embeddings.stores.store import is_remote
from mim_torchrec.embeddings.table.manifest import VersionMismatch
from mim_torchrec.embeddings.table.reader import Table
from mim_torchrec.embeddings.windows.compact import changes
from mim_torchrec.embeddings.windows.redis_address import refuse_password
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.errors import ExpectedError, Status
from mim_torchrec.program import run
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.service import Deployment

CURRENT = "current"
NAMED = 10


class ReleaseError(ExpectedError, ValueError):
    """A release cannot be staged or made current."""

    status = Status.STATE


@dataclass(frozen=True, kw_only=True)
class Release:
    """A model, its table and what keeps it up.

    Args:
        bundle: directory or URL of the model.
        table: directory or URL of the base table; None for Base.
        store: URL of the store that the table was loaded into, None to read the table itself.
        id_store: URL of the store with the ID tables, None to read those of the bundle.
        windows: directory or URL of the log of the table, None for none.
    """

    bundle: str
    table: str | None = None
    store: str | None = None
    id_store: str | None = None
    windows: str | None = None

    def deployment(self) -> Deployment:
        """What a server opens; a remote store is kept up by others."""
        remote = self.store is not None and is_remote(self.store)
        return Deployment(bundle=place(self.bundle), store=self.store or self.table, id_store=self.id_store,
                    windows=None if remote else self.windows)  # fmt: skip

    def items(self) -> Tensor:
        """(num_items,) int64: all items that have a vector, windows included; none of Base."""
        if self.table is None:
            return torch.empty(0, dtype=torch.int64)
        table = Table.open(self.table, verify=False)
        ids = table.row_index().ids
        if self.windows is None:
            return ids
        changed, _ = changes(open_log(self.windows, table.manifest.table_version), table.manifest)
        named = torch.tensor(sorted(changed), dtype=torch.int64)
        kept = torch.tensor([changed[item] is not None for item in named.tolist()], dtype=torch.bool)
        return torch.cat([ids[~torch.isin(ids, named)], named[kept]])


class Releases:
    """A folder of releases.

    Args:
        root: the folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def stage(self, name: str, release: Release) -> None:
        """Stage a release, after checking that its parts belong together.

        Raises:
            ReleaseError: the name is taken or reserved.
            OptionError: a URL holds a password.
            VersionMismatch: the model was trained on vectors of another version.
        """
        path = self._path(name)
        if name == CURRENT or path.exists():
            raise ReleaseError(f"{path} is there already; choose another name")
        for where in asdict(release).values():
            if where is not None:
                refuse_password(where)
        bundle = Bundle.open(release.bundle)
        if (bundle.table_version is None) != (release.table is None):
            needs = "no table" if bundle.table_version is None else "a table"
            raise ReleaseError(f"{release.bundle} needs {needs}")
        if release.table is not None:
            found = Table.open(release.table, verify=False).manifest
            if found.table_version != bundle.table_version:
                raise VersionMismatch(
                    f"{release.bundle} was trained on table_version {bundle.table_version}, {release.table} "
                    f"has {found.table_version}: a model and its vectors go together"
                )
            if release.windows is not None:
                open_log(release.windows, found.table_version, start=found.seq)
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(release))

    def check(self, name: str) -> dict[str, Any]:
        """Compare the items of a release with those of the current one.

        Returns:
            `items`, `current_items`, `missing` (of the current one's), and some of them in `examples`.
        """
        release = self.read(name)
        own = release.items()
        current, _ = self.current()
        now = self.read(current) if current is not None else None
        others = now.items() if now is not None else own[:0]
        missing = others[~torch.isin(others, own)]
        return {"items": own.numel(), "current_items": others.numel(), "missing": missing.numel(),
                "examples": missing[:NAMED].tolist()}  # fmt: skip

    def promote(self, name: str, allow_missing: int = 0) -> None:
        """Make a release the current one.

        Raises:
            ReleaseError: it lacks more items of the current one than are allowed.
        """
        found = self.check(name)
        if found["missing"] > allow_missing:
            raise ReleaseError(
                f"{name} has no vector of {found['missing']} items that the current release has, such as "
                f"{found['examples']}: back-fill them, or allow so many with --allow-missing"
            )
        current, _ = self.current()
        write_json(self._path(CURRENT), {"name": name, "before": current})

    def rollback(self) -> str:
        """Make the release before the current one current again; returns its name.

        Raises:
            ReleaseError: there is none.
        """
        current, before = self.current()
        if before is None:
            raise ReleaseError(f"{self.root} has no release before {current}")
        self.read(before)
        write_json(self._path(CURRENT), {"name": before, "before": current})
        return before

    def current(self) -> tuple[str | None, str | None]:
        """Names of the current release and of the one before it; None where there is none.

        Raises:
            ReleaseError: `current.json` is damaged.
        """
        path = self._path(CURRENT)
        if not path.exists():
            return None, None
        found = _fields(path)
        names = found.get("name"), found.get("before")
        if not isinstance(names[0], str) or not isinstance(names[1], str | None):
            raise ReleaseError(f"{path} is damaged: it names no release; promote one again")
        return names[0], names[1]

    def read(self, name: str) -> Release:
        """A release by its name.

        Raises:
            ReleaseError: there is none, or its file is damaged.
        """
        path = self._path(name)
        if name == CURRENT or not path.is_file():
            names = sorted(p.stem for p in self.root.glob("*.json") if p.stem != CURRENT)
            raise ReleaseError(f"{self.root} has no release {name!r}; it has {', '.join(names) or 'none'}")
        found = _fields(path)
        wrong = [key for key, value in found.items() if not isinstance(value, str | None)]
        if wrong or found.get("bundle") is None or found.keys() - Release.__dataclass_fields__.keys():
            raise ReleaseError(f"{path} is damaged: it is no release; stage it again")
        return Release(**found)

    def _path(self, name: str) -> Path:
        if not name or "/" in name or name.startswith("."):
            raise ReleaseError(f"{name!r} is no name of a release")
        return self.root / f"{name}.json"


def _fields(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ReleaseError: there is none in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"found {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"{path} is damaged: it is no JSON object ({error})") from None
    return found


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Stage a release: a model and the vectors that it was trained on."""

    root: LocalPath
    """Folder of the releases."""
    name: str
    """Name of the release."""
    bundle: str
    """Directory that mim bundle has written."""
    table: str | None = None
    """Directory of the base table; Base has none."""
    store: str | None = None
    """URL of the store that the table was loaded into; by default servers read the table itself."""
    id_store: str | None = None
    """URL of the store with the bundle's ID tables; by default servers read the bundle."""
    windows: str | None = None
    """Directory or URL of the window log of the table."""

    def run(self) -> None:
        release = Release(bundle=self.bundle, table=self.table, store=self.store, id_store=self.id_store,
                          windows=self.windows)  # fmt: skip
        Releases(self.root).stage(self.name, release)
        print(f"{self.name} is staged; `check` says what it lacks, `promote` makes it current")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Print, as JSON, the items of the current release that another one lacks."""

    root: LocalPath
    """Folder of the releases."""
    name: str
    """Name of the release."""

    def run(self) -> None:
        print(json.dumps(Releases(self.root).check(self.name)))


@dataclass(frozen=True, kw_only=True)
class Promote:
    """Make a release the current one; servers that follow the folder swap model and vectors together."""

    root: LocalPath
    """Folder of the releases."""
    name: str
    """Name of the release."""
    allow_missing: Natural = 0
    """Number of items of the current release that the new one may lack."""

    def run(self) -> None:
        Releases(self.root).promote(self.name, self.allow_missing)
        print(f"{self.name} is current")


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Make the release before the current one current again."""

    root: LocalPath
    """Folder of the releases."""

    def run(self) -> None:
        print(f"{Releases(self.root).rollback()} is current again")


Command = (
    Annotated[Stage, tyro.conf.subcommand("stage")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Promote, tyro.conf.subcommand("promote")]
    | Annotated[Rollback, tyro.conf.subcommand("rollback")]
)


def main(argv: list[str] | None = None) -> None:
    """Run ``mim release`` with the arguments ``argv`` (``None``: those of the process)."""
    command = tyro.cli(Command, args=argv, prog="mim release")
    check_domains(command)
    command.run()


if __name__ == "__main__":
    run(main)
