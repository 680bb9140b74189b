"""Which ID tables a configuration has, and the features of each; read where there is no table to ask."""

from collections.abc import Container
from typing import NamedTuple

from mim_torchrec.ctr.config import ModelConfig


class IdTables(NamedTuple):
    """Features by table, in the order of the model's collections.

    Args:
        requests: looked up per request and pooled.
        items: looked up per candidate and behavior.
    """

    requests: dict[str, list[str]]
    items: dict[str, list[str]]


def id_tables_of(config: ModelConfig, there: Container[str]) -> IdTables:
    """The ID tables of a model.

    Args:
        config: of the model.
        there: names of tables that the data has; `query_id` and `category` may be missing.
    """
    features = config.features()
    of_requests = ("user_id", "query_id", *(feature.name for feature in features.ids("request")))
    of_items = {
        name: [f"candidate_{name}", f"behavior_{name}"] for name in ("item_id", "category") if name in there
    }
    further = {one.name: [one.name] for one in (*features.ids("candidate"), *features.ids("behavior"))}
    return IdTables({name: [name] for name in of_requests if name in there}, of_items | further)
