"""Stages of a run: what is run again, what is kept, and what a failure says."""

import json
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.harness import stages
from mim_torchrec.benchmarks.harness.stages import Run, Stage, StageError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose stages are Python programs; `<out>.count` holds how often each ran."""
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, sys\n"
        "out, count = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[2] + '.count')\n"
        "count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))\n"
        "if '--fail' in sys.argv: print('poster 7 is torn'); sys.exit(3)\n"
        "if '--nothing' not in sys.argv: out.write_text(sys.argv[-1])\n"
    )
    monkeypatch.setattr(
        Stage, "argv", lambda self: [stages.sys.executable, str(program), *stages._flags(self.options)]
    )
    return Run(tmp_path / "run", verbose=False)


def stage(run: Run, name: str = "a", after: tuple[Stage, ...] = (), files: tuple[Path, ...] = (), **options):
    return Stage(name=name, command=("shop",), out=run.root / name,
                 options={"out": run.root / name, **options}, after=after, files=files)  # fmt: skip


def times_run(made: Stage) -> int:
    return int(Path(f"{made.out}.count").read_text())


def test_a_finished_stage_is_not_run_again_and_keeps_its_time(run):
    run.run([stage(run)])
    seconds = run.seconds["a"]
    resumed = Run(run.root, verbose=False)
    resumed.run([stage(run)])
    assert times_run(stage(run)) == 1
    assert resumed.seconds == {"a": seconds}


def test_a_stage_runs_again_when_its_options_change(run):
    run.run([stage(run, lr=1)])
    run.run([stage(run, lr=2)])
    assert times_run(stage(run)) == 2
    assert (run.root / "a").read_text() == "2"


def test_a_stage_runs_again_when_what_it_reads_changes(run, tmp_path):
    ratings = tmp_path / "ratings.csv"
    ratings.write_text("1")
    first, second = stage(run, files=(ratings,)), None
    second = stage(run, "b", after=(first,))
    run.run([first, second])
    ratings.write_text("12")
    run.run([first, second])
    assert times_run(first) == times_run(second) == 2


def test_a_stage_runs_again_when_its_result_is_gone(run):
    run.run([stage(run)])
    (run.root / "a").unlink()
    run.run([stage(run)])
    assert times_run(stage(run)) == 2


def test_a_failed_stage_shows_the_end_of_its_log_and_is_tried_again(run, capsys):
    for attempt in (1, 2):
        with pytest.raises(StageError, match="^stage a failed with exit code 3; see .*a.log$"):
            run.run([stage(run, fail="yes")])
        assert "poster 7 is torn" in capsys.readouterr().err
        assert times_run(stage(run)) == attempt


def test_a_stage_that_makes_nothing_is_an_error(run):
    with pytest.raises(StageError, match="made no"):
        run.run([stage(run, nothing="yes")])


def test_a_stage_outside_the_run_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="outside"):
        run.run([Stage(name="a", command=("shop",), out=tmp_path / "elsewhere")])


def test_several_stages_run_side_by_side(run):
    made = [stage(run, name) for name in "abc"]
    run.run(made, jobs=3)
    assert [times_run(one) for one in made] == [1, 1, 1]
    assert sorted(run.seconds) == ["a", "b", "c"]


def test_the_end_of_a_log_is_what_the_ranks_said():
    lines = ["csft/0 [1]:ValueError: 3 pairs too few", "csft/0 [1]:", "csft/0 ChildFailed", "state: FAILED"]
    assert stages._tail(lines) == lines[0]
    assert stages._tail(["no rank", "spoke"]) == "no rank\nspoke"


def test_a_distributed_stage_is_a_torchx_command():
    made = Stage(name="x", command=("ctr",), out=Path("o"), ranks="1x2",
                 options={"data": "d", "out": "o", "mim": "off", "seed": 3})  # fmt: skip
    words = made.argv()
    assert words[words.index("run") :] == ["run", "-s", "local_cwd", "mim.ctr", "--data", "d", "--out", "o",
                                           "-j", "1x2", "--", "--mim", "off", "--seed", "3"]  # fmt: skip


def test_the_version_of_a_table_is_stated_to_the_stage_that_reads_it(tmp_path):
    table = Stage(name="t", command=("export",), out=tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"table_version": "v7"}))
    data = Stage(name="d", command=("shop",), out=tmp_path / "d")
    made = stages.ctr_stage("mim", root=tmp_path, data=data, table=table, seed=0, options={}, ranks="1x1")
    assert made.options["table-version"] == "v7"
