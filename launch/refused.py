"""The error of a job that is refused before it is submitted."""

from torchx.specs.finder import ComponentValidationException

from mim_torchrec.errors import OptionError


class JobRefused(OptionError, ComponentValidationException):
    """A job that cannot be what was asked for; `torchx run` shows its one line, and no traceback."""
