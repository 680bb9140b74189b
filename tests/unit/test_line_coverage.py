"""Probes note the lines that a trace function sees, and change nothing that the code does."""

import json
import subprocess
import sys

from tests import line_coverage
from tests.line_coverage import FOLDER, LINES, Lines, places, with_probes

SOURCE = '''"""A docstring."""
from __future__ import annotations
import functools
class Thing:
    """Another."""
    name: str = "a"
    def own(self):
        return self.name
    def never(self):
        return 1
@functools.cache
def chosen(
    number,
):
    if number == 1:
        return "one"
    elif number == 2:
        return "two"
    else:
        found = []
    for index in range(number):
        if index == 1:
            continue
        found.append(index)
    else:
        found.append("end")
    while False:
        found.clear()
    return found
def caught(error):
    try:
        raise error
    except KeyError:
        kind = "key"
    except (ValueError, TypeError):
        kind = "value"
    finally:
        kind = kind + "!"
    match kind:
        case "key!":
            return 0
        case _:
            return 1
lazy = lambda: 3; given = [x for x in range(2)]
results = Thing().own(), chosen(1), chosen(3), caught(KeyError())
'''


def names(code) -> dict:
    found: dict = {"__name__": "sample", "__file__": "sample.py"}
    exec(code, found)
    return found


def test_they_note_what_a_trace_function_sees():
    seen = set()

    def trace(frame, event, _):
        if frame.f_code.co_filename != "sample.py":
            return None
        if event == "line":
            seen.add(frame.f_lineno)
        return trace

    plain, before = compile(SOURCE, "sample.py", "exec"), sys.gettrace()
    sys.settrace(trace)
    try:
        expected = names(plain)["results"]
    finally:
        sys.settrace(before)
    tree = with_probes(SOURCE, "sample.py")
    LINES["sample.py"] = Lines()
    try:
        assert names(compile(tree, "sample.py", "exec"))["results"] == expected
        noted = {int(name[1:]) for name in vars(LINES["sample.py"])}
    finally:
        del LINES["sample.py"]
    lines = {line for _, _, line in places(line_coverage.ast.parse(SOURCE))}
    assert noted == seen & lines
    unseen = {SOURCE.splitlines()[line - 1].strip() for line in lines - noted}
    assert unseen == {
        "return 1", 'return "two"', "found.clear()", 'kind = "value"',
        "except (ValueError, TypeError):", "case _:",
    }  # fmt: skip


def test_what_a_process_has_run_is_shown_by_room(tmp_path, capsys):
    code = "from tests.line_coverage import measure; measure(); import mim_torchrec.errors"
    subprocess.run(
        [sys.executable, "-c", code], cwd=line_coverage.ROOT, check=True, env={FOLDER: str(tmp_path)}
    )
    line_coverage.main(str(tmp_path))
    shown = capsys.readouterr().out
    assert "% of the lines of" in shown and "  mim_torchrec   below 80%" in shown
    noted = {name for file in tmp_path.glob("*.json") for name in json.loads(file.read_text())}
    assert str(line_coverage.ROOT / "mim_torchrec" / "errors.py") in noted
