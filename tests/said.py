"""What one module of the package has logged: others may log in any test, as when a generator is collected."""

import sys

import pytest


def said(caplog: pytest.LogCaptureFixture, module: str) -> list[str]:
    """The messages of a loaded module's own logger, in their order; its name is without the package's."""
    name = sys.modules[f"mim_torchrec.{module}"].__name__
    return [record.getMessage() for record in caplog.records if record.name == name]
