"""Whether a manifest of Kubernetes is well-formed, by the models of its Python client, without a cluster."""

import re
from collections.abc import Iterator
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
