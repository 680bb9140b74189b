"""`mim pipeline run`: what is run again, what is kept, what a failure says, and the report."""

import sys

import pytest

from mim_torchrec.cli import COMMANDS
from mim_torchrec.pipeline.execution import StageError
from mim_torchrec.pipeline.fingerprints import SOURCES
from mim_torchrec.pipeline.main import main
from mim_torchrec.pipeline.reporting import end_of_log
from mim_torchrec.pipeline.spec import Stage
from mim_torchrec.pipeline.submission import Submitter, build
from tests.pipeline_steps import Steps

TWO = """
[stages.first]
step = true
flags.lr = 1
[stages.second]
step = true
flags = { reads = "${first}/words", auc = "${first/metrics.json#auc}" }
"""


@pytest.fixture
def steps(tmp_path):
    return Steps(tmp_path)


def test_stages_run_in_the_order_of_their_references(steps, capsys):
    run = steps.write("[stages.b]\nstep = true\nflags.reads = '${a}'\n[stages.a]\nstep = true\n")
    main(run)
    printed = capsys.readouterr().out
    assert printed.index("a: done") < printed.index("b: started")
    assert (steps.out / "b" / "words").read_text() == f"--reads {steps.out / 'a'}"
    assert steps.states() == {"b": "done", "a": "done"}


def test_a_value_of_a_result_reaches_the_stage_that_refers_to_it(steps):
    main(steps.write(TWO))
    assert (steps.out / "second" / "words").read_text() == f"--reads {steps.out / 'first'}/words --auc 0.75"


def test_a_finished_stage_is_kept_with_its_time(steps, capsys):
    run = steps.write(TWO)
    main(run)
    before = steps.record("first")["seconds"]
    capsys.readouterr()
    main(run)
    printed = capsys.readouterr().out
    assert "first: already there" in printed and "started" not in printed
    assert (steps.times_run("first"), steps.times_run("second")) == (1, 1)
    assert steps.states() == {"first": "kept", "second": "kept"}
    assert steps.report()["stages"]["first"]["seconds"] == before


def test_a_changed_flag_runs_the_stage_and_those_that_read_it(steps, capsys):
    main(steps.write(TWO))
    changed = steps.write(TWO.replace("lr = 1", "lr = 2"))
    capsys.readouterr()
    main(["plan", *changed[1:]])
    plan = capsys.readouterr().out
    assert "flags: lr 1 -> 2" in plan and "first has another result" in plan
    assert steps.times_run("first") == 1
    main(changed)
    assert (steps.times_run("first"), steps.times_run("second")) == (2, 2)


def test_a_stage_runs_again_when_its_source_changes(steps, capsys):
    run = steps.write(TWO)
    main(run)
    steps.component.write_text(steps.component.read_text() + "\n# changed\n")
    main(["plan", *run[1:]])
    assert "its source has changed" in capsys.readouterr().out
    main(run)
    assert (steps.times_run("first"), steps.times_run("second")) == (2, 2)


def test_a_stage_runs_again_when_a_file_that_it_reads_changes(steps):
    ratings = steps.folder / "ratings.csv"
    ratings.write_text("1")
    run = steps.write(f"[stages.a]\nstep = true\nfiles = ['{ratings}']\n")
    main(run)
    ratings.write_text("12")
    main(run)
    assert steps.times_run("a") == 2


def test_a_stage_runs_again_when_its_result_is_gone(steps):
    run = steps.write(TWO)
    main(run)
    (steps.out / "first" / "words").unlink()
    (steps.out / "first" / "metrics.json").unlink()
    (steps.out / "first").rmdir()
    main(run)
    assert (steps.times_run("first"), steps.times_run("second")) == (2, 1)


def test_parameters_are_set_on_the_command_line(steps):
    text = '[parameters]\nlr = 1\n[stages.a]\nstep = true\nflags.lr = "${lr}"\n'
    main([*steps.write(text), "--set", "lr=5"])
    assert (steps.out / "a" / "words").read_text() == "--lr 5"


def test_a_failed_stage_shows_its_own_error_and_is_tried_again(steps, capsys):
    run = steps.write("[stages.a]\nstep = true\nflags = { say = 'poster 7 is torn', fail = 3 }\n")
    for attempt in (1, 2):
        with pytest.raises(StageError, match=r"^stage a failed with exit code 3; see .*a\.log$"):
            main(run)
        said = capsys.readouterr()
        assert "poster 7 is torn" in said.err
        assert steps.times_run("a") == attempt
    assert "poster 7 is torn" in (steps.out / "stages" / "a.log").read_text()
    assert steps.states() == {"a": "failed"}


def test_stages_that_run_beside_a_failed_one_end_first_and_no_other_starts(steps, capsys):
    text = """
[stages.bad]
step = true
flags.fail = 1
[stages.slow]
step = true
flags.until = "${run}/stages/bad.json"
[stages.later]
step = true
after = ["bad"]
[stages.last]
step = true
after = ["later"]
[stages.other]
step = true
"""
    run = steps.write(text)
    with pytest.raises(StageError, match="stage bad failed"):
        main([*run, "--jobs", "2"])
    states = steps.states()
    assert states == {
        "bad": "failed",
        "slow": "done",
        "later": "blocked",
        "last": "blocked",
        "other": "waiting",
    }
    main(["status", str(steps.out)])
    printed = capsys.readouterr().out
    assert "stage bad failed with exit code 1" in printed


def test_a_stage_that_makes_nothing_is_an_error(steps):
    with pytest.raises(StageError, match="made no"):
        main(steps.write("[stages.a]\nstep = true\nflags.nothing = 1\n"))


def test_a_stage_may_have_no_output(steps, capsys):
    run = steps.write("[stages.b]\ncommand = 'table verify'\narguments = ['no-table']\nout = false\n")
    with pytest.raises(StageError, match="stage b failed with exit code 3"):
        main(run)
    assert "--out" not in steps.report()["stages"]["b"]["command"]
    assert "no-table" in capsys.readouterr().err


def test_the_report_has_states_times_commands_and_metrics(steps, capsys):
    main(steps.write(TWO))
    report = steps.report()
    assert report["state"] == "done" and report["scheduler"] == "local_cwd"
    first = report["stages"]["first"]
    assert first["metrics"] == {"auc": 0.75} and first["seconds"] > 0 and "--lr 1" in first["command"]
    assert "0.7500" in capsys.readouterr().out


def test_a_plan_writes_nothing(steps, capsys):
    run = steps.write(TWO)
    main(["plan", *run[1:]])
    assert "it never ran" in capsys.readouterr().out
    assert not steps.out.exists()


def test_some_stages_run_with_those_before_them(steps):
    main([*steps.write(TWO + "[stages.third]\nstep = true\n"), "--stages", "second"])
    assert [steps.times_run(name) for name in ("first", "second", "third")] == [1, 1, 0]


def test_jobs_run_the_interpreter_that_a_variable_names(tmp_path, monkeypatch):
    monkeypatch.delenv("MIM_PYTHON", raising=False)
    with Submitter("local_cwd", "", tmp_path) as submitter:
        for python in (sys.executable, "/another/python"):
            request = submitter.request("shop", build("shop", Stage(command="shop")), "a-mark").request
            assert request.role_params["shop"][0].env["MIM_PYTHON"] == python
            monkeypatch.setenv("MIM_PYTHON", "/another/python")


def test_the_end_of_a_log_is_what_the_ranks_said():
    lines = ["csft/0 [1]:ValueError: 3 pairs too few", "csft/0 [1]:", "csft/0 ChildFailed", "state: FAILED"]
    assert end_of_log(lines) == lines[0]
    assert end_of_log(["[0]:ValueError", "W1 torchrun: bye"]) == "[0]:ValueError"
    assert end_of_log(["no rank", "spoke"]) == "no rank\nspoke"


def test_every_program_that_can_be_a_stage_has_its_source_named():
    services = {"doctor", "rim", "serve", "pipeline"}
    assert {name.split()[0] for name in COMMANDS} - services <= SOURCES.keys()
