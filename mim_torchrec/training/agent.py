"""torchrun for the jobs of this package: `python -m mim_torchrec.training.agent`, with torchrun's options.

torchrun ends with 1 whatever happened. A scheduler needs to know: this one ends with the status of the rank
that failed first, 143 after a signal that asked it to end, and 6 where nodes do not meet. It also removes the
folder of error files and logs that torchrun leaves in /tmp.
"""

import sys
import tempfile
from signal import SIGTERM

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args
from torch.distributed.run import run as torchrun

from mim_torchrec import program
from mim_torchrec.errors import Status


def main(argv: list[str] | None = None) -> None:
    """Run torchrun.

    Args:
        argv: torchrun's options and the program with its own; by default the words of the process.

    Raises:
        SystemExit: the program failed or was interrupted.
    """
    words = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory(prefix="torchelastic_", ignore_cleanup_errors=True) as folder:
        options = parse_args(["--log_dir", folder, *words])
        try:
            record(torchrun)(options)
        except SignalException as signal:
            raise SystemExit(128 + signal.sigval) from None
        except ChildFailedError as error:
            status = status_of(error)
            if status != Status.TERMINATED:
                print(error, file=sys.stderr, flush=True)
            raise SystemExit(status) from None
        except (RendezvousError, DistError) as error:
            print(f"the nodes of this job do not meet: {error}", file=sys.stderr, flush=True)
            raise SystemExit(Status.ENVIRONMENT) from None


def status_of(error: ChildFailedError) -> int:
    """The status of the rank that failed first; those that were only interrupted count if no other failed."""
    failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
    codes = [failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode for failure in failures]
    return next((code for code in codes if code != 128 + SIGTERM), int(Status.TERMINATED))


if __name__ == "__main__":
    program.run(main)
