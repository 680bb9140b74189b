"""What the fork server of `multiprocessing` has loaded before its first process; importing this loads it."""

import pytest  # noqa: F401

from tests import fork_server, line_coverage

line_coverage.measure()

import mim_torchrec.benchmarks.harness.drawing  # noqa: E402
import mim_torchrec.benchmarks.measures.turns  # noqa: E402, F401

fork_server.load()
