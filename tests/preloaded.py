"""What the fork server of `multiprocessing` has loaded before its first process; importing this loads it."""

import pytest  # noqa: F401

import mim_torchrec.benchmarks.harness.drawing
import mim_torchrec.benchmarks.measures.turns  # noqa: F401
from tests import fork_server

fork_server.load()
