"""What stages have written: directories of the run, or at URLs of an object store."""

import shutil
from pathlib import Path

from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.outputs import withdraw
from mim_torchrec.embeddings.remote.places import NoSuchPlace, Url
from mim_torchrec.embeddings.remote.published import find_index


def is_there(out: Path | Url) -> bool:
    """Whether a stage has written it."""
    return out.exists() if isinstance(out, Path) else find_index(out) is not None


def read_text(out: Path | Url, file: str) -> str:
    """A file of an output.

    Raises:
        OSError: there is none.
    """
    return (out if isinstance(out, Path) else fetched(out, [file])).joinpath(file).read_text()


def local_files(out: Path | Url, *names: str) -> Path | None:
    """A local directory that holds some files of an output, as far as they are there; None without any."""
    try:
        return fetched(out, names)
    except NoSuchPlace:
        return None


def remove_output(out: Path | Url) -> None:
    """Remove an outdated result, and what a writer of it left when it was killed.

    Raises:
        LeaseError: it is at a URL, and a process still writes it.
    """
    if isinstance(out, Url):
        withdraw(out)
        return
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
