"""A training stage of a pipeline that is interrupted goes on from its checkpoint, to the same bytes."""

import os
import signal
import subprocess
import uuid

import pytest

from mim_torchrec.benchmarks.cluster.nodes import wait_until
from mim_torchrec.pipeline.main import main
from tests.pipeline_steps import command, tagged
from tests.programs import small_shop

pytestmark = pytest.mark.slow
CTR = """
name = "resume"
[stages.ctr]
component = "mim.ctr"
job.j = "1x2"
flags = {{ data = "{data}", mim = "off", epochs = 2, batch-size = 16, dropout = 0.2, "checkpoint.every" = 1 }}
"""


def test_an_interrupted_training_resumes_to_the_same_bytes(forked, monkeypatch, tmp_path, capsys):
    file, out, tag = tmp_path / "run.toml", tmp_path / "run", uuid.uuid4().hex
    file.write_text(CTR.format(data=small_shop(tmp_path, requests=80, users=30, searches=40)))
    words = ["run", str(file), "--out", str(out)]
    process = subprocess.Popen(command(*words), env={**os.environ, "TAG": tag})
    wait_until(lambda: any((out / "ctr" / "checkpoints").glob("*/*")), patience=300)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert tagged(tag) == []
    assert not (out / "ctr" / "predictions.parquet").exists()
    for name in ("MIM_PYTHON", "PYTHON_EXEC"):
        monkeypatch.setenv(name, forked[name])
    main(["plan", *words[1:]])
    assert "resume" in capsys.readouterr().out
    main(words)
    assert "ctr: resumed" in capsys.readouterr().out
    assert "resumed from" in (out / "stages" / "ctr.log").read_text()
    main([*words[:3], str(tmp_path / "whole")])
    whole = (tmp_path / "whole" / "ctr" / "predictions.parquet").read_bytes()
    assert (out / "ctr" / "predictions.parquet").read_bytes() == whole
