"""The data files of a folder, as writers of partitioned data lay them out."""

from pathlib import Path


def data_files(folder: Path, suffix: str = ".parquet") -> list[Path]:
    """Files below a folder, also in nested and partitioned folders (`dt=2026-11-01/`), sorted.

    As in Spark and Hive, what lies at or below a name that begins with `.` or `_` is no data: files that are
    being written, checksums, logs of commits (`.part-0.parquet`, `_SUCCESS`, `_delta_log/`). A partition such
    as `_key=1` is data.

    Args:
        folder: where to look; nothing is found where there is none.
        suffix: of the names of data files.
    """
    found = (path for path in folder.rglob(f"*{suffix}") if path.is_file())
    return sorted(path for path in found if is_data(path.relative_to(folder).as_posix(), suffix))


def is_data(path: str, suffix: str = ".parquet") -> bool:
    """Whether a path in a folder is that of a data file, as `data_files` says."""
    return path.endswith(suffix) and not any(map(_hidden, path.split("/")))


def _hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)
