"""Weights that other people have written, read strictly.

A library that fills what a file lacks with random numbers, and says so in a line of its log, gives vectors
that mean nothing. Here every tensor of a tower is in the file. Every tensor of the file has a place in the
tower, or belongs to a part that the tower does not have, such as a classifier. Anything else is refused.
"""

import argparse
import json
import logging
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor, nn

from mim_torchrec.errors import OptionError

log = logging.getLogger(__name__)

NAMED = 3
PATTERNS = ("*.safetensors", "*.bin", "*.pth", "*.pth.tar", "*.pt")
"""Files of weights; hubs have the same weights in several forms, of which the first is read."""
OF_TRAINING = {
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
}
"""What trainers write beside weights."""
POINTER = b"version https://git-lfs.github.com/spec/"


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of a directory, in one form."""
    for pattern in PATTERNS:
        if found := sorted(file for file in folder.glob(pattern) if file.name not in OF_TRAINING):
            return found
    return []


def refuse_pointer(file: Path) -> None:
    """See that a file is one.

    Raises:
        OptionError: it is what Git LFS leaves where it has not fetched one.
    """
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise OptionError(f"{file} is a pointer of Git LFS, not the file; run `git lfs pull` there")


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file, empty where there is no file.

    Raises:
        OptionError: it cannot be read.
    """
    if not file.is_file():
        return {}
    refuse_pointer(file)
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise OptionError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise OptionError(f"{file} holds no JSON object")
    return found


def shards_of(folder: Path) -> list[Path]:
    """The files that the index of a directory names; none where it has no index, or whole weights that come
    before those of the index.

    Raises:
        OptionError: a file is missing.
    """
    for kind in PATTERNS[:2]:
        index = next(iter(sorted(folder.glob(f"{kind}.index.json"))), None)
        if index is None:
            if any(folder.glob(kind)):
                return []
            continue
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"{index} cannot be read: {error!r}") from None
        # an index names files beside it, and no others
        if lost := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
            raise OptionError(f"{folder} has no {lost[0]}, which {index.name} names; download it whole")
        return [folder / name for name in names]
    return []


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Tensors by name: of a training checkpoint its averaged weights (EMA) if it has some, else its weights.

    Prefixes of DDP (`module.`) and of `torch.compile` (`_orig_mod.`) are removed.

    Raises:
        OptionError: a file is none of weights, or holds objects that only its own code can read.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        refuse_pointer(file)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the options of timm's training
                found = load_state_dict(str(file), use_ema=True, weights_only=True)
            state |= clean_state_dict(found["module"]) if isinstance(found.get("module"), dict) else found
        except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise OptionError(
                f"weights {file} cannot be read ({reason}); save the state dict alone, as .safetensors"
            ) from error
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def load_strictly(
    module: nn.Module, state: dict[str, Tensor], source: str, left_out: Callable[[str], bool]
) -> None:
    """Put tensors into a tower.

    Args:
        module: the tower.
        state: tensors by the tower's names.
        source: of the tensors, for messages.
        left_out: whether a tensor belongs to a part that the tower does not have.

    Raises:
        OptionError: as `refuse_others`, or a tensor has another shape.
    """
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise OptionError(f"weights {source}: {error}") from error
    refuse_others(missing, unexpected, source, left_out)


def refuse_others(
    missing: Iterable[str], unexpected: Iterable[str], source: str, left_out: Callable[[str], bool]
) -> None:
    """See that a tower has got all its tensors, and that none was left over.

    Args:
        missing: names of the tower's tensors that the source lacks.
        unexpected: names of the source's tensors that the tower lacks.
        source: for messages.
        left_out: whether a tensor belongs to a part that the tower does not have.

    Raises:
        OptionError: it names the first of them.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    surplus = [name for name in unexpected if not left_out(name)]
    problems = []
    if missing:
        problems.append(f"lack {len(missing)} tensors of the tower ({_some(missing)})")
    if surplus:
        problems.append(f"have {len(surplus)} tensors that the tower has not ({_some(surplus)})")
    if problems:
        raise OptionError(
            f"weights {source} {' and '.join(problems)}: they are of another model, or incomplete; take the "
            "name of their model, or convert them"
        )
    if unexpected:
        log.info("weights %s: %d tensors are of parts that the tower does not have (%s)", source,
                 len(unexpected), _some(unexpected))  # fmt: skip


def unwrapped(state: dict[str, Tensor], names: Iterable[str], prefix: str) -> dict[str, Tensor]:
    """Tensors by the names of a tower: without wrappers, and without the prefix that a head puts before them.

    Args:
        state: tensors by name.
        names: of the tower.
        prefix: such as `bert`.
    """
    state, own = clean_state_dict(state), set(names)
    return {
        short if (short := name.removeprefix(f"{prefix}.")) in own else name: value
        for name, value in state.items()
    }


def _some(names: list[str]) -> str:
    more = f", … {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
