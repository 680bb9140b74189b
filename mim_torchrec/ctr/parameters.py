"""Whose a parameter of the CTR model is, by its name in a state dict.

Three parts of a model are stored in three ways: the frozen table has files of its own, ID tables are sharded
and mapped by a vocabulary, and the dense weights are whole on every rank. A name says the part:

    mm_embeddings.…                                    frozen vectors
    request_embeddings.embedding_bags.<table>.weight   an ID table
    item_embeddings.embeddings.<table>.weight          an ID table
    anything else                                      dense
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

FROZEN = "mm_embeddings"
ID_TABLES = ("request_embeddings", "item_embeddings")


def id_table(name: str) -> str | None:
    """The ID table that a parameter holds; its vocabulary has the same name. None for any other parameter.

    >>> id_table("item_embeddings.embeddings.category.weight"), id_table("tower.layers.0.weight")
    ('category', None)
    """
    parts = name.split(".")
    return parts[2] if parts[0] in ID_TABLES else None


def is_dense(name: str) -> bool:
    """Whether a parameter is in no table.

    >>> [is_dense(name) for name in ("tower.layers.0.weight", "mm_embeddings._extra_state")]
    [True, False]
    """
    return name.split(".")[0] not in (FROZEN, *ID_TABLES)


def id_tables(names: Iterable[str]) -> dict[str, str]:
    """Parameters that hold ID tables, by the names of the tables."""
    return {table: name for name in names if (table := id_table(name)) is not None}


def trainable_state(model: nn.Module) -> dict[str, Any]:
    """Weights by name, ID tables of a sharded model as sharded tensors; without the frozen table."""
    return {name: value for name, value in model.state_dict().items() if name.split(".")[0] != FROZEN}


def load_trainable_state(model: nn.Module, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Take what `trainable_state` gave, or a part of it; the frozen table stays as it is.

    Returns:
        Names that are missing in ``state``, and names that the model does not have.
    """
    frozen = {name: value for name, value in model.state_dict().items() if name.split(".")[0] == FROZEN}
    # torchrec renames what it is given, so it gets a dictionary of its own
    missing, surplus = model.load_state_dict(OrderedDict({**state, **frozen}), strict=False)
    return missing, surplus
