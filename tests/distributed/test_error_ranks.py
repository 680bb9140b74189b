"""An expected error of one of two ranks: one line on the screen, and the same in torchrun's error file."""

import json
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.programs import small_shop

pytestmark = pytest.mark.slow


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A shop whose training requests are two row groups, one of which has a label of 2."""
    shop = small_shop(tmp_path)
    (file,) = (shop / "requests" / "train").glob("*.parquet")
    table = pq.read_table(file)
    half = len(table) // 2
    labels = table["labels"].to_pylist()
    labels[-1][0] = 2
    at = table.schema.get_field_index("labels")
    table = table.set_column(at, table.schema.field(at), pa.array(labels, table.schema.field(at).type))
    with pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table.slice(0, half))
        writer.write_table(table.slice(half))
    return shop


def test_a_bad_row_of_one_rank_is_named_in_one_line_and_in_the_error_file(damaged, forked, tmp_path):
    line = [
        "torchrun", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
        "--monitor_interval", "0.1", "-m", "mim_torchrec.ctr.main",
        "--data", str(damaged), "--out", str(tmp_path / "run"), "--mim", "off", "--batch-size", "16",
    ]  # fmt: skip
    record = tmp_path / "error.json"
    environment = {**os.environ, **forked, "TORCHELASTIC_ERROR_FILE": str(record)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1, done.stderr[-3000:]  # torchrun's own

    said = [line for line in done.stderr.splitlines() if line.startswith("mim_torchrec.ctr.main: ")]
    mine = [line for line in said if "column labels: a label is neither 0 nor 1" in line]
    assert len(mine) == 1, done.stderr[-3000:]
    assert "row group 1, row" in mine[0] and "--on-bad-row skip" in mine[0]
    assert all(line == mine[0] or "another rank has ended" in line for line in said)
    before_torchrun = done.stderr.split("torch/distributed/elastic")[0]
    assert "Traceback" not in before_torchrun

    cause = json.loads(record.read_text())["message"]
    assert cause["message"] in mine[0] and cause["message"].startswith(str(damaged))
    assert cause["extraInfo"]["py_callstack"] == cause["message"]
