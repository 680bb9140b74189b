"""The examples in docstrings are true."""

import doctest
from importlib import import_module

import pytest

from tests.unit.test_packaging import SOURCES

WITH_EXAMPLES = [name for name, path in SOURCES.items() if ">>> " in path.read_text()]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_of(module):
    assert doctest.testmod(import_module(module)).failed == 0
