"""The command `mim`: hands its arguments to the `main` of a stage or tool, and loads nothing else."""

import sys
from functools import partial
from importlib import import_module
from importlib.metadata import version

from mim_torchrec.errors import OptionError, SetupError
from mim_torchrec.extras import MissingExtra
from mim_torchrec.program import DEBUG, run

COMMANDS = {
    "doctor": ("mim_torchrec.doctor", "check the installation and say how to fix it"),
    "shop": ("mim_torchrec.data.shop", "write a synthetic shop"),
    "prepare": ("mim_torchrec.prepare.main", "make a data set of event logs and a catalogue"),
    "import movielens": ("mim_torchrec.data.movielens", "convert MovieLens and posters"),
    "import public": ("mim_torchrec.data.public", "convert H&M, MicroLens or Amazon Reviews 2023"),
    "import taobao-mm": ("mim_torchrec.data.taobao_mm", "convert TAOBAO-MM, vectors and all"),
    "validate": ("mim_torchrec.validate.main", "check a data set before anything is trained on it"),
    "pretrain": ("mim_torchrec.pretraining.main", "adapt the towers to the items, align them"),
    "csft": ("mim_torchrec.csft.main", "fine-tune the item encoder on what users bought"),
    "retrieve": ("mim_torchrec.csft.retrieve", "find bought items by image with an encoder"),
    "export": ("mim_torchrec.representation.export", "encode every item into the multi-modal table"),
    "rim": ("mim_torchrec.rim.main", "encode new items as they come, publish them in windows"),
    "ctr": ("mim_torchrec.ctr.main", "train and evaluate a click-through-rate model"),
    "evaluate": ("mim_torchrec.ctr.evaluation", "score any split with a trained model"),
    "explain": ("mim_torchrec.serving.explain", "say why a request's candidates got their scores"),
    "choose": ("mim_torchrec.ctr.choosing", "choose the best of several models on validation"),
    "bundle": ("mim_torchrec.serving.bundling", "write what a server loads of a trained model"),
    "release": ("mim_torchrec.serving.releases", "make a model and its vectors current together"),
    "ablate": ("mim_torchrec.pipeline.ablation", "compare encoders by a search and by a click model"),
    "pipeline": ("mim_torchrec.pipeline.main", "run the stages of a file, on one machine or a cluster"),
    "serve": ("mim_torchrec.serving.main", "answer requests for scores over HTTP"),
    "plan": ("mim_torchrec.embeddings.plan", "say where tables would go on a cluster"),
    "table": ("mim_torchrec.embeddings.table.main", "import, check, compare, convert, compact a table"),
    "store": ("mim_torchrec.embeddings.stores.main", "put a table into Redis, keep it up, check it"),
}

TAIL = """mim <command> --help has its options. With --debug an error shows its traceback.

exit status:
  0  done
  1  a bug, with a traceback
  2  a refused option
  3  bad input: missing, malformed or damaged
  4  vectors, a model or a log of another version
  5  an output that exists, a run that cannot be resumed, a release that cannot be promoted
  6  the environment: disk, permissions, memory, network, Redis, a missing package
  130, 143  interrupted by Ctrl-C, by SIGTERM"""


def usage() -> str:
    """What `mim --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: mim <command> [options]", "", *lines, "", TAIL])


def main(argv: list[str] | None = None) -> None:
    """Run `mim <command>`.

    Args:
        argv: the words after `mim`; by default those of the process.

    Raises:
        SystemExit: always; `docs/errors.md` lists the statuses.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    named = [word for word in words if word != DEBUG]
    command = next((name for name in COMMANDS if named[: len(name.split())] == name.split()), None)
    if command is None:
        run(_without_command, words, "mim")
    sys.argv[0] = f"mim {command}"  # what the command's own --help calls it
    rest = named[len(command.split()) :] + [DEBUG] * (DEBUG in words)
    run(partial(_load_and_run, COMMANDS[command][0]), rest, f"mim {command}")


def _without_command(words: list[str]) -> None:
    if words in (["--help"], ["-h"]):
        print(usage())
    elif words == ["--version"]:
        print(version("mim-torchrec"))
    else:
        raise OptionError(f"{f'no command {words[0]!r}' if words else 'no command given'}; see mim --help")


def _load_and_run(module: str, words: list[str]) -> None:
    try:
        main = import_module(module).main
    except MissingExtra:
        raise
    except ImportError as error:
        raise SetupError(f"cannot be loaded: {error}; `mim doctor` says what is wrong") from error
    main(words)


if __name__ == "__main__":
    main()
