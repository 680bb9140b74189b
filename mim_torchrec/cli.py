"""The command `mim`: hands its arguments to the `main` of a stage or tool, and loads nothing else."""

import sys
from importlib import import_module
from importlib.metadata import version

from mim_torchrec.extras import MissingExtra

COMMANDS = {
    "doctor": ("mim_torchrec.doctor", "check the installation and say how to fix it"),
    "shop": ("mim_torchrec.data.shop", "write a synthetic shop"),
    "import movielens": ("mim_torchrec.data.movielens", "convert MovieLens and posters"),
    "import taobao-mm": ("mim_torchrec.data.taobao_mm", "convert TAOBAO-MM, vectors and all"),
    "pretrain": ("mim_torchrec.pretraining.main", "adapt the towers to the items, align them"),
    "csft": ("mim_torchrec.csft.main", "fine-tune the item encoder on what users bought"),
    "retrieve": ("mim_torchrec.csft.retrieve", "find bought items by image with an encoder"),
    "export": ("mim_torchrec.representation.export", "encode every item into the multi-modal table"),
    "rim": ("mim_torchrec.rim.main", "encode new items as they come, publish them in windows"),
    "ctr": ("mim_torchrec.ctr.main", "train and evaluate a click-through-rate model"),
    "evaluate": ("mim_torchrec.ctr.evaluation", "score any split with a trained model"),
    "bundle": ("mim_torchrec.serving.bundle", "write what a server loads of a trained model"),
    "release": ("mim_torchrec.serving.releases", "make a model and its vectors current together"),
    "serve": ("mim_torchrec.serving.main", "answer requests for scores over HTTP"),
    "plan": ("mim_torchrec.embeddings.sharded.plan", "say where tables would go on a cluster"),
    "table": ("mim_torchrec.embeddings.table.main", "import, check, compare, convert, compact a table"),
    "store": ("mim_torchrec.embeddings.stores.main", "put a table into Redis, keep it up, check it"),
}


def usage() -> str:
    """What `mim --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    head, tail = "usage: mim <command> [options]", "mim <command> --help has its options."
    return "\n".join([head, "", *lines, "", tail])


def main(argv: list[str] | None = None) -> None:
    """Run `mim <command>`.

    Args:
        argv: the words after `mim`; by default those of the process.

    Raises:
        SystemExit: with status 2 when there is no such command.
    """
    words = sys.argv[1:] if argv is None else argv
    if words in (["--help"], ["-h"]):
        print(usage())
        return
    if words == ["--version"]:
        print(version("mim-torchrec"))
        return
    command = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if command is None:
        problem = f"there is no command {words[0]!r}" if words else "which command?"
        print(f"mim: {problem}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv[0] = f"mim {command}"  # what the command's own --help calls it
    try:
        module = import_module(COMMANDS[command][0])
    except MissingExtra as error:
        print(f"mim {command}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except ImportError:
        print(f"mim {command} cannot be loaded; `mim doctor` says what is wrong", file=sys.stderr)
        raise
    module.main(words[len(command.split()) :])


if __name__ == "__main__":
    main()
