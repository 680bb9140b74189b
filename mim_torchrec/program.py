"""How every program ends: expected errors in one line and with a status, bugs with a traceback.

`run` is around the `main` of a program, where it is started: by `mim`, by `python -m`, or by torchrun. A
`main` that is called from Python raises. Under torchrun the message also goes into the error file of the
rank, from which torchrun and `torchx status` show it.
"""

import json
import logging
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mim_torchrec.errors import Status, explain

DEBUG = "--debug"


def run(
    main: Callable[[list[str]], object], argv: list[str] | None = None, name: str | None = None
) -> NoReturn:
    """Run a program and end the process.

    Args:
        main: takes the words of the command line; what it returns is ignored.
        argv: the words; by default those of the process. `--debug` is taken out: it asks for tracebacks.
        name: what error messages begin with; by default the module of `main`.

    Raises:
        SystemExit: always; `docs/errors.md` lists the statuses.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = name or program_name()
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    log_to_stderr()
    try:
        try:
            _recorded(main)(words)
        finally:
            sys.stdout.flush()  # a reader that has ended is noticed here, not while Python shuts down
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _end(f"{name}: interrupted", Status.KEYBOARD, debug)
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _reader_has_ended():
            raise SystemExit(Status.PIPE) from None
        found = explain(error)
        if found is None:
            _write_lines(traceback.format_exc())
            raise SystemExit(Status.BUG) from None
        _end(f"{name}: {_rank()}{found[0]}", found[1], debug)
    raise SystemExit(Status.OK)


def heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Signals without those that whoever started the process ignores, as `nohup` and `&` of a script do."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def log_to_stderr() -> None:
    """Log what this package says, and nothing of what torch and torchrec say about themselves."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:  # fbgemm_gpu adds one when it is imported
            root.removeHandler(handler)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[_OnLines()])
    logging.getLogger("mim_torchrec").setLevel(logging.INFO)
    ignore_warnings()
    # torchrec asks, in every process, what torch.fx warns of
    logging.getLogger("torch.fx._symbolic_trace").addFilter(
        lambda record: "is_fx_tracing will return true" not in record.getMessage()
    )


def ignore_warnings() -> None:
    """Ignore what libraries warn of and nobody who runs a program can change."""
    for message in (
        "Please use DTensor instead",
        "`broadcast_buffers` is deprecated",
        "`torch.distributed.reduce_scatter_tensor` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", module="PIL")  # of pictures that the decoder judges


def program_name() -> str:
    """The module that Python runs, or the name of its file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else os.path.basename(sys.argv[0])


class _OnLines(logging.StreamHandler):
    """Writes log records to standard error, each from the start of a line."""

    def format(self, record: logging.LogRecord) -> str:
        return _line_start() + super().format(record)


def _line_start() -> str:
    """On a terminal, what clears the line: the progress bar of this or another rank may stand there."""
    return "\r\x1b[K" if sys.stderr.isatty() else ""


def _write_lines(text: str) -> None:
    """Write whole lines to standard error in one call, so that those of several ranks do not mix."""
    sys.stderr.write(_line_start() + text)
    sys.stderr.flush()


def _end(line: str, status: Status, debug: bool) -> NoReturn:
    _write_lines((traceback.format_exc() if debug else "") + line + "\n")
    raise SystemExit(status) from None


def _rank() -> str:
    """Which of several ranks this is."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"rank {os.environ.get('RANK', '?')}: " if several else ""


def _recorded(main: Callable[[list[str]], object]) -> Callable[[list[str]], object]:
    """Under torchrun, torch elastic's `record` around a main: it writes the error file of the rank."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

    class OneLine(ErrorHandler):
        """Writes the line of an expected error where torchrun looks for a traceback."""

        def record_exception(self, e: BaseException) -> None:
            super().record_exception(e)
            found = explain(e)
            if found is not None:
                path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
                data = json.loads(path.read_text())
                data["message"]["message"] = data["message"]["extraInfo"]["py_callstack"] = found[0]
                path.write_text(json.dumps(data))

    return record(main, error_handler=OneLine())


def _reader_has_ended() -> bool:
    """Whether standard output is a pipe without a reader; then nothing is written to it any more."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # it is no file
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
