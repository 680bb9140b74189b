"""Every numeric option has a domain, and a number outside it is refused before anything is read."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from mim_torchrec.ciubm.ubm.registry import built_in_models
from mim_torchrec.cli import COMMANDS
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.main import main
from mim_torchrec.domains import Count, Domain, Fraction, Natural, Temperature, check_domains, domain_of
from mim_torchrec.errors import OptionError


def configurations() -> list[type]:
    """Those of all commands, and what they are made of."""
    found: list[type] = [*built_in_models().values()]
    for module in {name: import_module(name) for name, _ in COMMANDS.values()}.values():
        named = [value for name, value in vars(module).items() if name.endswith("Config")]
        named += [get_args(command)[0] for command in get_args(getattr(module, "Command", None))]
        own = (value for value in named if isinstance(value, type) and is_dataclass(value))
        found += [value for value in own if value.__module__.startswith("mim_torchrec")]
    for one in found:
        for hint in get_type_hints(one).values():
            found += [hint] if is_dataclass(hint) and hint not in found else []
    return list(dict.fromkeys(found))


def is_number(hint: Any) -> bool:
    if get_origin(hint) is Annotated or get_args(hint):
        return any(is_number(part) for part in get_args(hint) if not isinstance(part, Domain))
    return hint in (int, float)


def test_every_number_of_every_command_has_a_domain():
    assert len(configurations()) > 25
    lacking = [
        f"{one.__name__}.{name}"
        for one in configurations()
        for name, hint in get_type_hints(one, include_extras=True).items()
        if name in {f.name for f in fields(one)} and is_number(hint) and domain_of(hint) is None
    ]
    assert not lacking


def test_every_default_is_in_its_domain():
    for one in configurations():
        required = {f.name for f in fields(one) if f.default is f.default_factory}
        check_domains(one(**dict.fromkeys(required, Path("x") if one is CTRConfig else 1)))


@dataclass(frozen=True, kw_only=True)
class _Inner:
    dropout: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class _Config:
    size: Count = 1
    layers: tuple[Count, ...] = (2,)
    limit: Natural | None = None
    part: _Inner = field(default_factory=_Inner)
    flat: Annotated[_Inner, type("Arg", (), {"name": ""})()] = field(default_factory=_Inner)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"size": 0}, "--size is 0; it must be at least 1"),
        ({"layers": (4, 0)}, "--layers is 0; it must be at least 1"),
        ({"limit": -1}, "--limit is -1; it must be at least 0"),
        ({"part": _Inner(dropout=1.0)}, "--part.dropout is 1.0; it must be at least 0 and below 1"),
        ({"flat": _Inner(dropout=-0.1)}, "--dropout is -0.1; it must be at least 0 and below 1"),
        ({"part": _Inner(dropout=float("nan"))}, "--part.dropout is nan; it must be"),
    ],
)
def test_a_number_outside_its_domain_is_refused_by_its_flag(change, problem):
    with pytest.raises(OptionError) as error:
        check_domains(replace(_Config(), **change))
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_in_no_domain(value):
    assert Domain().problem(value) == "it must be finite"
    assert Domain(least=0).problem(value) == "it must be at least 0"
    assert domain_of(Temperature | None).problem(value)


@pytest.mark.parametrize(
    "flags, problem",
    [
        ("--embedding-dim 10", "--embedding-dim is 10; it must be at least 4 and a multiple of 4"),
        ("--content-temperature 1e-30", "--content-temperature is 1e-30; it must be at least 0.0001"),
        ("--content-temperature inf", "--content-temperature is inf; it must be"),
        ("--lr nan", "--lr is nan; it must be at least 0"),
        ("--id-dropout 1", "--id-dropout is 1.0; it must be at least 0 and below 1"),
        ("--tower 200 0", "--tower is 0; it must be at least 1"),
        ("--checkpoint.keep 0", "--checkpoint.keep is 0; it must be at least 1"),
        ("--timeout.step 0", "--timeout.step is 0.0; it must be above 0"),
        ("--ubm twin --top-k 0", "--top-k is 0; it must be at least 1"),
        ("--ubm bst --heads 3", "3 heads"),
        ("--id-interest False --content-interest False --fusion-interest False", "at least one of the ID"),
        ("--sparse-optimizer adam", "fused on GPUs only"),
        ("--sharding column_wise", "leave column_wise"),
        ("--index-dedup on", "needs a GPU"),
    ],
)
def test_numbers_and_options_that_cannot_work_are_refused_before_anything_is_read(tmp_path, flags, problem):
    words = f"--data {tmp_path / 'none'} --out {tmp_path / 'out'} --table {tmp_path / 'none'} {flags}"
    with pytest.raises(OptionError, match=problem):
        main(words.split())
    assert not (tmp_path / "out").exists()
