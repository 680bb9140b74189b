"""The examples run on two ranks, and a frozen table costs a user's program at most 15 lines."""

import difflib
import math
import os
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from mim_torchrec.embeddings.table.format import TableWriter

pytestmark = pytest.mark.slow


EXAMPLES = Path(__file__).parents[2] / "examples"
PAIRS = [("dlrm.py", "dlrm_frozen.py"), ("two_tower.py", "two_tower_frozen.py")]
ITEMS, DIM = 1000, 16  # as in the examples


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Vectors of all items but the last hundred."""
    path = tmp_path_factory.mktemp("example") / "table"
    writer = TableWriter(path, table_version="v1", dim=DIM, encoder={}, spare_rows=10)
    writer.write_shard(torch.arange(ITEMS - 100), torch.randn(ITEMS - 100, DIM))
    writer.finish()
    return path


def code(name: str) -> list[str]:
    """Lines of an example after its docstring."""
    return (EXAMPLES / name).read_text().split('"""\n', 2)[1].splitlines()


@pytest.mark.parametrize(("plain", "frozen"), PAIRS)
def test_a_frozen_table_takes_at_most_15_lines(plain, frozen):
    changes = difflib.unified_diff(code(plain), code(frozen), lineterm="", n=0)
    added = [line for line in changes if line.startswith("+") and line[1:].strip() and line[:3] != "+++"]
    assert 0 < len(added) <= 15


@pytest.fixture
def run(forked, table) -> Callable[[str], list[float]]:
    """Runs an example on two ranks, and returns the losses that it prints."""
    return partial(losses, {**os.environ, **forked}, table)


def losses(environment: dict[str, str], table: Path, example: str) -> list[float]:
    words = ["torchrun", "--standalone", "--nproc_per_node", "2", str(EXAMPLES / example), str(table)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"rank ([01]): loss (\d\.\d+)", done.stdout)
    assert sorted(rank for rank, _ in found) == ["0", "1"]
    return [float(loss) for _, loss in found]


@pytest.mark.parametrize("example", [name for pair in PAIRS for name in pair])
def test_it_trains_on_two_ranks(example, run):
    assert all(loss > 0 for loss in run(example))


def test_a_model_of_ones_own_learns_from_the_interests(run):
    assert max(run("content_interest.py")) < 0.5 < math.log(2)
