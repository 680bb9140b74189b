"""Typed descriptions from TOML files: values of the stated types only, and errors that name the place.

TOML, because Python reads it without a package, its values have types, and a comment can say why.
"""

import difflib
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

Place = tuple[int | str, ...]


class Strict(BaseModel):
    """Values of the stated types, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def read_toml(path: Path, error: Callable[[str], Exception]) -> dict[str, Any]:
    """What a TOML file holds.

    Args:
        path: the file.
        error: makes the exception of a file that is not TOML.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise error(f"{path}: not TOML: {problem}") from None


def explained(error: ValidationError, known: Callable[[Place], Sequence[str]]) -> str:
    """Every fault that pydantic has found, each with its place, in one line.

    Args:
        error: of a model.
        known: the keys that may stand at the place of an unknown key.
    """
    found = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"] if part not in ("str", "int", "float", "bool"))
        match fault["type"]:
            case "extra_forbidden":
                text = f"unknown key{did_you_mean(str(fault['loc'][-1]), known(fault['loc']))}"
            case "missing":
                text = "missing"
            case "value_error":
                text = str(fault["ctx"]["error"])
            case "string_pattern_mismatch":
                text = "a name has letters, digits, dots, dashes and underscores only"
            case _:
                text = f"{fault['msg']}, but it is {fault['input']!r}"
        found.append(f"{place}: {text}" if place else text)
    return "; ".join(dict.fromkeys(found))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
