"""`make gpu`: its parts on the pretended GPU; its budget, limits and records with parts that do nothing."""

import importlib
import json

import pytest

from mim_torchrec.benchmarks.gpu import contrast, lookups, roofline, steps
from mim_torchrec.benchmarks.gpu import main as command
from mim_torchrec.benchmarks.gpu.main import PARTS, GPUConfig, Part, run_all
from mim_torchrec.benchmarks.rehearsal.budgets import BUDGETS
from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.pretended import pretended_gpu
from mim_torchrec.benchmarks.rehearsal.steps import CASES
from mim_torchrec.errors import OptionError, SetupError

FEW = ["--rounds", "2", "--warmup", "1"]


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU; the profiler, which would ask a real one, counts nothing."""
    monkeypatch.setattr(steps, "host_calls", lambda step: step(0))
    counts = Counts()
    with pretended_gpu(counts):
        yield counts
    assert not counts.mixed and not counts.no_kernel


def test_steps_of_all_kinds_are_timed(tmp_path, gpu):
    steps.main(["--out", str(tmp_path), *FEW, "--batch-size", "32", "--items", "60", "--users", "20",
                "--categories", "7", "--dims", "4", "--mm-dim", "4", "--batches", "2",
                "--models", "din", "sim+recommended"])  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device"] == "cuda:0" and set(report["models"]) == {"din", "sim+recommended"}
    found = report["models"]["sim+recommended"]["4"]
    assert found["ms"] > 0 and found["samples_per_s"] > 0 and found["peak_mib"] is not None
    assert found["rehearsed"]["launches"] == BUDGETS["sim+recommended"].launches
    with pytest.raises(OptionError, match="--models none: there are avg_pooling, din"):
        steps.main(["--out", str(tmp_path), "--models", "none"])


def test_lookups_of_every_memory_are_timed(tmp_path, gpu):
    lookups.main(["--out", str(tmp_path), *FEW, "--rows", "300", "--dim", "8", "--requests", "4",
                  "--behaviors", "5"])  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["memory"]) == {"device", "uvm", "uvm_caching"}
    assert all(set(found) == set(lookups.DTYPES) for found in report["memory"].values())
    assert report["memory"]["device"]["int8"]["vs_index_select"] > 0


def test_the_loss_is_timed(tmp_path, gpu):
    contrast.main(["--out", str(tmp_path), *FEW, "--queries", "8", "--dim", "4", "--queue-batches", "3"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["items"] == 64 and report["ms"] > 0 and report["tflops"] > 0


def test_the_roofline_says_what_bounds_a_step(tmp_path, capsys):
    roofline.main(["--out", str(tmp_path), "--batch-size", "16", "--items", "60", "--users", "20",
                   "--categories", "7", "--dim", "4", "--mm-dim", "4", "--operator-us", "1e-9"])  # fmt: skip
    found = json.loads((tmp_path / "report.json").read_text())["models"]
    assert set(found) == {case.name for case in CASES if case.ranks == 1}
    base, mim = (found[name]["one"] for name in ("din", "din+recommended"))
    assert mim["arithmetic"] > base["arithmetic"] > base["host"] and mim["memory"] > base["memory"]
    assert set(found["din+recommended"]["several"]) == {"host", "arithmetic", "memory", "links"}
    assert "bound by" in capsys.readouterr().out


def script(name: str, text: str, **more) -> Part:
    return Part(name, ("-c", text), **{"seconds": 60.0, "report": None, **more})


def test_each_part_is_entered_as_it_ends(tmp_path):
    writes = "import json, pathlib; pathlib.Path(r'{out}/report.json').write_text(json.dumps({'ms': 3}))"
    waits = f"{writes}; import time; time.sleep(600)"
    parts = [
        script("good", writes, report="report.json"),
        script("bad", "raise SystemExit('no such kernel')"),
        script("slow", waits, seconds=3.0, report="report.json"),
        script("many", writes, gpus=2),
    ]
    report = run_all(GPUConfig(out=tmp_path), parts, gpus=1)
    assert json.loads((tmp_path / "report.json").read_text())["parts"] == report["parts"]
    found = report["parts"]
    assert found["good"]["state"] == "done" and found["good"]["report"] == {"ms": 3}
    assert found["bad"]["state"] == "failed" and found["bad"]["log"] == ["no such kernel"]
    assert found["slow"]["state"] == "cut off" and found["slow"]["report"] == {"ms": 3}
    assert found["many"]["state"] == "left out: needs 2 GPUs, there are 1"


def test_no_part_begins_when_the_budget_is_spent(tmp_path):
    times = iter([0.0, 0.0, 45.0])
    parts = [script("first", "pass"), script("second", "pass")]
    report = run_all(GPUConfig(out=tmp_path, budget_minutes=1.0), parts, 1, clock=lambda: next(times))
    assert report["parts"]["first"]["state"] == "done"
    assert report["parts"]["second"] == {"state": "left out: the budget is spent"}


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SetupError, match="there is no GPU; make rehearsal"):
        command.main(["--out", str(tmp_path)])
    with pytest.raises(OptionError, match="--only speed: there are doctor, tests"):
        command.main(["--only", "speed"])


@pytest.mark.parametrize("part", [part for part in PARTS if part.name != "tests"], ids=lambda part: part.name)
def test_every_part_is_a_program_that_takes_its_words(part, capsys):
    at = max(place for place, word in enumerate(part.words) if word == "-m") + 1
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(part.words[at]).main([*part.words[at + 1 :], "--help"])
    assert ended.value.code == 0, capsys.readouterr().err
