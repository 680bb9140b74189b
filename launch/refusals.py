"""How a job that cannot run is refused at submission: by an expected error, one line of the command `torchx`.

TorchX prints a traceback for an error of a component or of a scheduler and ends with status 1.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mim_torchrec.errors import ExpectedError, one_line


@contextmanager
def refusals() -> Iterator[None]:
    """Around what reads a submission: under `torchx`, end its expected errors as every command of ours does.

    From Python, such as through TorchX's `Runner`, the error is raised as it is.

    Raises:
        ExpectedError: the submission is refused.
        SystemExit: it is, and the process is the command `torchx`; `docs/errors.md` lists the statuses.
    """
    try:
        yield
    except ExpectedError as error:
        if "torchx.cli.cmd_run" not in sys.modules:  # only the command loads it
            raise
        print(f"torchx run: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(error.status) from None
