"""The error of a job that is refused before it is submitted."""

from mim_torchrec.errors import OptionError


class JobRefused(OptionError):
    """A job that cannot be what was asked for."""
