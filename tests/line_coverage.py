"""Which lines of the package the tests run, written to the folder `MIM_COVERAGE` and shown by this program.

A probe before every statement notes its line, at the cost of an assignment. While a trace function is set,
Python 3.11 runs all code slowly, that of libraries too: tests took half as long again. Noted are the lines of
processes of pytest, of ranks, and of commands of the fork server that are not killed. Programs that start
Python anew are not measured.
"""

import ast
import atexit
import json
import os
import sys
import uuid
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing.util import Finalize, register_after_fork
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
ROOMS = ("mim_torchrec", "embeddings", "launch", "benchmarks")
FOLDER = "MIM_COVERAGE"
LOW = 0.8


class Lines:
    """Has an attribute for every line of a file that was run: torch.compile traces its assignment."""


LINES: dict[str, Lines] = {}
"""By path."""


class ProbingLoader(SourceFileLoader):
    """Loads a module with probes."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        LINES.setdefault(path, Lines())
        return compile(with_probes(self.get_data(path), path), path, "exec", dont_inherit=True)


class ProbingFinder(MetaPathFinder):
    """Finds the modules of the package as the finders behind it do."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "mim_torchrec":
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if type(spec.loader) is SourceFileLoader and spec.origin is not None:
                    if Path(spec.origin).is_relative_to(ROOT):
                        spec.loader = ProbingLoader(fullname, spec.origin)
                return spec
        return None


def measure() -> None:
    """Load modules of the package with probes from now on, if `MIM_COVERAGE` names a folder."""
    folder = os.environ.get(FOLDER)
    if folder and not any(isinstance(finder, ProbingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ProbingFinder())
        os.register_at_fork(after_in_child=forget)
        atexit.register(save, folder)
        # processes of `multiprocessing` end without `atexit`
        register_after_fork(forget, lambda _: Finalize(None, save, (folder,), exitpriority=-100))


def forget() -> None:
    """Forget the lines run so far: a forked process notes its own."""
    for lines in list(LINES.values()):
        vars(lines).clear()


def save(folder: str) -> None:
    """Write the lines run since the last call, in a file of its own, and forget them."""
    # copies, because other threads may run lines
    noted = {path: list(vars(lines)) for path, lines in list(LINES.items())}
    if found := {path: [int(name[1:]) for name in names] for path, names in noted.items() if names}:
        place = Path(folder, uuid.uuid4().hex)
        with suppress(OSError):  # in a container, or as another user
            place.write_text(json.dumps(found))
            place.rename(place.with_suffix(".json"))
        forget()


def with_probes(source: str | bytes, path: str) -> ast.Module:
    """Put `__lines__.l<line> = 1` before every statement that does something."""
    tree = ast.parse(source, path)
    for block, index, line in reversed(places(tree)):
        block.insert(index, _located(f"__lines__.l{line} = 1", line))
    first = next((index for index, statement in enumerate(tree.body) if not _is_first(statement, index)), 0)
    found = f"__lines__ = __import__({__name__!r}, fromlist=['LINES']).LINES[{path!r}]"
    tree.body.insert(first, _located(found, 1))
    return tree


def places(tree: ast.Module) -> list[tuple[list[ast.stmt], int, int]]:
    """Where probes belong: blocks, indices in them in ascending order, and lines.

    >>> [line for _, _, line in places(ast.parse("'''A text.'''\\nif a:\\n    b\\nelif c:\\n    d"))]
    [2, 3, 4, 5]
    """
    found = []
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block: Any = getattr(node, name, None)
            if not isinstance(block, list):  # of a lambda or a conditional expression
                continue
            if isinstance(node, ast.ExceptHandler):
                found.append((block, 0, node.lineno))
            elif isinstance(node, ast.match_case):
                found.append((block, 0, node.pattern.lineno))
            for index, statement in enumerate(block):
                if not _is_first(statement, index):
                    found.append((block, index, statement.lineno))
    return found


def _is_first(statement: ast.stmt, index: int) -> bool:
    """Whether a statement is a docstring or an import from the future, before which nothing may stand."""
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    value = statement.value if isinstance(statement, ast.Expr) else None
    return index == 0 and isinstance(value, ast.Constant) and isinstance(value.value, str)


def _located(code: str, line: int) -> ast.stmt:
    (statement,) = ast.parse(code).body
    for node in ast.walk(statement):
        if "lineno" in node._attributes:
            node.lineno = node.end_lineno = line  # type: ignore[attr-defined]
    return statement


def by_room(files: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Covered fraction of each folder.

    Args:
        files: by path, lines covered and lines that could be.

    >>> by_room({"a/b.py": (1, 2), "a/c.py": (3, 4), "d/e.py": (0, 0)})
    {'a': 0.6666666666666666}
    """
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, (covered, lines) in files.items():
        room = totals[str(Path(name).parent)]
        room[0] += covered
        room[1] += lines
    return {room: covered / lines for room, (covered, lines) in sorted(totals.items()) if lines}


def main(folder: str) -> None:
    """Print the whole figure and the rooms below 80%."""
    run: dict[str, set[int]] = defaultdict(set)
    for file in Path(folder).glob("*.json"):
        for path, lines in json.loads(file.read_text()).items():
            run[path].update(lines)
    if not run:
        raise SystemExit(f"{folder} has no lines that were run")
    files = {}
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        lines = {line for _, _, line in places(ast.parse(path.read_bytes()))}
        files[str(path.relative_to(ROOT))] = len(run[str(path)] & lines), len(lines)
    covered, lines = (sum(column) for column in zip(*files.values(), strict=True))
    print(f"coverage: {covered / lines:.1%} of the lines of {len(files)} files")
    for room, fraction in by_room(files).items():
        print(f"  {fraction:6.1%}  {room}{'   below 80%' if fraction < LOW else ''}")


if __name__ == "__main__":
    main(*sys.argv[1:])
