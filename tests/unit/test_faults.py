"""The engine of `make faults`: it finds writers that lose or mix, and ours do not."""

import json
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.chaos.disk_faults import (
    file_writers,
    main,
    report_of,
    table_writers,
    try_writers,
)
from mim_torchrec.benchmarks.chaos.run_writers import input_writers, pipeline_writers, run_writers
from mim_torchrec.benchmarks.harness.fault_injection import Writer, try_all

QUICK = {"file", "directory", "window log append", "window log forget", "table grow --link", "config.json",
         "history", "metrics and predictions", "lease", "ids of the requests", "fetched input",
         "records of a pipeline"}  # fmt: skip


def two_files(root: Path, value: int) -> None:
    for name in ("a", "b"):
        partial = root / f"{name}.partial"
        partial.write_text(f"{value}")
        partial.replace(root / name)


def read_two(root: Path) -> tuple[int, ...]:
    return tuple(int((root / name).read_text()) for name in ("a", "b"))


def in_place(root: Path, value: int) -> None:
    (root / "a").write_text(json.dumps([value] * 3000))


BAD = {
    "mixed": Writer("two files", lambda r: two_files(r, 1), lambda r: two_files(r, 2), read_two),
    "lost": Writer("in place", lambda r: in_place(r, 1), lambda r: in_place(r, 2),
                   lambda r: json.loads((r / "a").read_text())),
}  # fmt: skip


@pytest.mark.parametrize("problem", BAD)
def test_a_writer_that_is_not_atomic_is_found(tmp_path, problem):
    outcome = try_all(BAD[problem], tmp_path / "w")
    assert getattr(outcome, problem) > 0
    assert outcome.injected == 3 * outcome.calls
    assert len(outcome.problems) == outcome.lost + outcome.mixed


def test_a_writer_that_does_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="changes nothing"):
        try_all(Writer("idle", lambda r: None, lambda r: None, lambda r: 1), tmp_path / "w")


def test_our_writers_leave_the_old_or_the_new():
    groups = (file_writers, table_writers, run_writers, input_writers, pipeline_writers)
    found = [writer for group in groups for writer in group() if writer.name in QUICK]
    assert {writer.name for writer in found} == QUICK
    report = report_of(try_writers(found))
    problems = [problem for outcome in report["by_writer"].values() for problem in outcome["problems"]]
    assert not problems
    assert report["writers"] == len(QUICK) and report["injected"] == 3 * report["calls"] > 200


def test_the_program_fails_where_something_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("mim_torchrec.benchmarks.chaos.disk_faults.writers", lambda: iter([BAD["mixed"]]))
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["writers"] == 1 and report["mixed"] > 0
