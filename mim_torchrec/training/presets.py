"""Presets: values of a stage's configuration by name, from which explicit flags may differ.

`default` has none, `paper` is the letter of the paper, `recommended` is what we measured to be better. A
preset pins whatever it speaks of, also where the default is the same today. What a run used is in its
config.json, value by value, and that is compared when it is resumed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args

Preset = Literal["default", "paper", "recommended"]
Values = Mapping[str, Any]
"""By name of the field; `vision.name` is the field `name` of the field `vision`."""
Config = TypeVar("Config")


def chosen(
    argv: Sequence[str] | None,
    command: str,
    presets: Mapping[Preset, Values],
    settles: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Preset, dict[str, Any]]:
    """The preset that flags name, and its values.

    Args:
        argv: the flags; None takes those of the process.
        command: for the message about an unknown preset.
        presets: of the stage.
        settles: by name of a field, fields that a flag for it settles too, so that those of the preset do not
            count: `batch_size` settles `batch_size_per_rank`.
    """
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=f"{command} [OPTIONS]")
    parser.add_argument("--preset", choices=get_args(Preset), default="default")
    preset: Preset = parser.parse_known_args(words)[0].preset
    values = dict(presets[preset])
    for field in flags_of(words):
        for settled in (settles or {}).get(field, ()):
            values.pop(settled, None)
    return preset, values


def flags_of(words: Sequence[str]) -> list[str]:
    """Names of the fields that flags are for, as they come."""
    named = (word.partition("=")[0] for word in words if word.startswith("--"))
    return [name.removeprefix("--").replace("-", "_") for name in named]


def replaced(config: Config, values: Values) -> Config:
    """A configuration with other values.

    >>> from mim_torchrec.encoders.item_encoder import ItemEncoderConfig
    >>> replaced(ItemEncoderConfig(), {"vision.name": "eva02", "head.dim": 64}).vision.name
    'eva02'
    """
    changed: dict[str, Any] = {}
    for name, value in values.items():
        field, _, rest = name.partition(".")
        nested = changed.get(field, getattr(config, field))
        if rest and not is_dataclass(nested):
            raise AttributeError(f"{field} of {type(config).__name__} has no fields")
        changed[field] = replaced(nested, {rest: value}) if rest else value
    return replace(config, **changed)  # type: ignore[type-var]


def differences(config: object, values: Values) -> dict[str, tuple[Any, Any]]:
    """By flag, what a configuration has and what a preset says, where they differ."""
    found = {}
    for name, value in values.items():
        own = config
        for field in name.split("."):
            own = getattr(own, field)
        if own != value:
            found[name.replace("_", "-")] = (own, value)
    return found
