"""Files and directories that are either whole or not there."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; what JSON does not know (a Path, say) becomes a string."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(partial, path)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to write into that becomes `path` at the end, in the place of what is there.

    After an error nothing of it is left, and what was at `path` is still there.

    Args:
        path: where the directory shall be; its parents are made.

    Yields:
        An empty directory beside `path`.
    """
    mark = uuid.uuid4().hex
    partial = path.with_name(f"{path.name}.{mark}.partial")
    old = path.with_name(f"{path.name}.{mark}.old")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
