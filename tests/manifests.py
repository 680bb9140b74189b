"""Manifests of Kubernetes without a cluster: whether one is well-formed, and what becomes of its words."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kubernetes import client

PLAIN = {"str": str, "int": int, "bool": bool, "object": object}


def faults(value: Any, kind: str, place: str) -> Iterator[str]:
    """What a manifest has and its model lacks, or the reverse; `kind` is the client's name of the type."""
    if kind in PLAIN:
        if not isinstance(value, PLAIN[kind]):
            yield f"{place}: {value!r} is no {kind}"
    elif parts := re.fullmatch(r"list\[(.*)\]", kind):
        for number, one in enumerate(value):
            yield from faults(one, parts[1], f"{place}[{number}]")
    elif parts := re.fullmatch(r"dict\[str, (.*)\]", kind):
        for name, one in value.items():
            yield from faults(one, parts[1], f"{place}.{name}")
    else:
        model = getattr(client, kind)
        fields = {spelled: name for name, spelled in model.attribute_map.items()}
        for name, one in value.items():
            if name in fields:
                yield from faults(one, model.openapi_types[fields[name]], f"{place}.{name}")
            else:
                yield f"{place}.{name}: {kind} has no such field"
        try:  # the constructor refuses what is required and missing
            model(**{fields[name]: one for name, one in value.items() if name in fields})
        except ValueError as error:
            yield f"{place}: {error}"


def expanded(text: str, known: Mapping[str, str]) -> str:
    """What Kubernetes makes of a word of a pod: `$(NAME)` is a variable that is known, `$$` one dollar."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda at: "$" if at[0] == "$$" else known.get(at[1], at[0]), text)
