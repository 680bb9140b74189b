"""The local copy of a published directory that a run goes on in, on the host that it was on or on another."""

import logging
import re
from collections.abc import Collection
from pathlib import Path

from mim_torchrec.embeddings.files import discard_directory, sha256
from mim_torchrec.embeddings.remote.fetching import FetchError, fetch_file
from mim_torchrec.embeddings.remote.published import Index

log = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"(?P<of>(.*/)?checkpoints)/(?P<name>[^/]+)/.+")


def restore(index: Index, root: Path, keep: Collection[str] = ()) -> None:
    """Make a local directory what was published; of checkpoints only the newest whole one.

    Files that are there already are not fetched again. Checkpoints that are damaged in the store are left
    out, with a warning, for an earlier one.

    Args:
        index: of what was published.
        root: the directory; what else is in it is removed.
        keep: names in it that stay.

    Raises:
        FetchError: an object is damaged or gone, and there is no earlier one.
    """
    root.mkdir(parents=True, exist_ok=True)
    checkpoints: dict[str, dict[str, list[str]]] = {}
    wanted: list[str] = []
    for path in sorted(index.files):
        found = CHECKPOINT.fullmatch(path)
        if found is None:
            wanted.append(path)
        else:
            checkpoints.setdefault(found["of"], {}).setdefault(found["name"], []).append(path)
    for path in wanted:
        _fetch(index, path, root)
    for of, by_name in checkpoints.items():
        wanted += _newest_whole(index, of, by_name, root)
    _remove_others(root, set(wanted), keep)


def _newest_whole(index: Index, of: str, by_name: dict[str, list[str]], root: Path) -> list[str]:
    problem: FetchError | None = None
    for name in sorted(by_name, reverse=True):
        try:
            for path in by_name[name]:
                _fetch(index, path, root)
        except FetchError as error:
            log.warning("%s is left out: %s", f"{index.url}/{of}/{name}", error)
            problem = problem or error
            continue
        return by_name[name]
    assert problem is not None  # there is at least one name
    raise problem


def _fetch(index: Index, path: str, root: Path) -> None:
    file, target = index.files[path], root / path
    if not (target.is_file() and target.stat().st_size == file.size and sha256(target) == file.sha256):
        target.unlink(missing_ok=True)
        fetch_file(index, path, target)


def _remove_others(root: Path, wanted: set[str], keep: Collection[str]) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        name = path.relative_to(root).as_posix()
        if name.split("/")[0] in keep or name in wanted:
            continue
        if path.is_dir():
            if not any(path.iterdir()):
                discard_directory(path)
        else:
            path.unlink()
