"""Line coverage by room from coverage's JSON report: `python -m tests.coverage_by_room coverage.json`."""

import json
import sys
from collections import defaultdict
from pathlib import Path

LOW = 0.8


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


def main(path: str) -> None:
    """Print the whole figure and the rooms below 80%."""
    report = json.loads(Path(path).read_text())
    files = {
        name: (found["summary"]["covered_lines"], found["summary"]["num_statements"])
        for name, found in report["files"].items()
    }
    rooms = by_room(files)
    print(f"coverage: {report['totals']['percent_covered']:.1f}% of the lines of {len(files)} files")
    for room, fraction in rooms.items():
        print(f"  {fraction:6.1%}  {room}{'   below 80%' if fraction < LOW else ''}")


if __name__ == "__main__":
    main(*sys.argv[1:])
