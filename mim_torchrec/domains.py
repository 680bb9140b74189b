"""Numbers of a configuration and the values that each may have, checked before anything is read.

A field states its domain in its type, such as `batch_size: Count`. `check_domains` compares all fields of a
configuration and of those in it. NaN and infinity are in no domain.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from mim_torchrec.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Finite numbers within limits.

    >>> Domain(least=0, below=1).problem(1.0)
    'it must be at least 0 and below 1'
    >>> Domain(least=4, multiple=4).problem(10)
    'it must be at least 4 and a multiple of 4'
    >>> Domain(above=0).problem(0.5) is None
    True
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    multiple: int | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with a value, None if nothing is."""
        holds = [
            (self.least, f"at least {self.least}", self.least is None or value >= self.least),
            (self.above, f"above {self.above}", self.above is None or value > self.above),
            (self.most, f"at most {self.most}", self.most is None or value <= self.most),
            (self.below, f"below {self.below}", self.below is None or value < self.below),
            (self.multiple, f"a multiple of {self.multiple}",
             self.multiple is None or (math.isfinite(value) and value % self.multiple == 0)),
        ]  # fmt: skip
        if all(fits for _, _, fits in holds) and math.isfinite(value):
            return None
        limits = " and ".join(words for limit, words, _ in holds if limit is not None)
        return f"it must be {limits or 'finite'}"


Count = Annotated[int, Domain(least=1)]
"""At least one."""
Natural = Annotated[int, Domain(least=0)]
"""At least zero."""
Weight = Annotated[float, Domain(least=0)]
"""A finite number that is not negative."""
Positive = Annotated[float, Domain(above=0)]
"""A finite number above zero."""
Fraction = Annotated[float, Domain(least=0, below=1)]
"""A part that is not the whole, such as dropout."""
Share = Annotated[float, Domain(least=0, most=1)]
"""A part, also the whole."""
Temperature = Annotated[float, Domain(least=1e-4, most=1e4)]
"""What divides cosines before a softmax; beyond these limits float32 overflows or sees no differences."""


def check_domains(config: Any) -> None:
    """Refuse a number outside the domain of its field; None passes.

    Raises:
        OptionError: the first one; it names the flag, `a.b` is the field `b` of the field `a`.
    """
    for flag, domain, value in _numbers(config, ""):
        problem = domain.problem(value)
        if problem is not None:
            raise OptionError(f"--{flag} is {value}; {problem}")


def _numbers(config: Any, prefix: str) -> Iterator[tuple[str, Domain, float]]:
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            yield from _numbers(value, "" if _has_no_prefix(hints[field.name]) else f"{flag}.")
        else:
            domain = domain_of(hints[field.name])
            values = value.values() if isinstance(value, dict) else value
            for one in values if isinstance(value, tuple | dict) else (value,):
                if domain is not None and one is not None:
                    yield flag, domain, one


def domain_of(hint: Any) -> Domain | None:
    """The domain in a type, also in that of the elements of a tuple or a dictionary, or beside None."""
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, Domain):
            return part
    return next((found for part in get_args(hint) if (found := domain_of(part)) is not None), None)


def _has_no_prefix(hint: Any) -> bool:
    """Whether the flags of a nested configuration have no prefix, which an empty name in its type says."""
    return any(getattr(part, "name", None) == "" for part in getattr(hint, "__metadata__", ()))
