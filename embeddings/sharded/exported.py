"""Models whose frozen rows are an argument: what ``torch.export`` takes in their place.

A program that is exported from a model itself would have a copy of every table in its file. One that is
exported from ``RowsAsInputs(model)`` has none: its caller passes the rows, loaded, or mapped from the files
of the table, and may change them between calls.
"""

from typing import Any

from torch import Tensor, nn

from mim_torchrec.embeddings.sharded.frozen import FrozenModule, FrozenTable
from mim_torchrec.embeddings.sharded.traced import stored_spans


class RowsAsInputs(nn.Module):
    """A model with the rows of its frozen tables as the first argument.

    Args:
        model: with frozen collections that are not sharded.

    Raises:
        ValueError: it has none, or two tables of one name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._tables = _tables(model)

    def forward(self, rows: dict[str, list[Tensor]], *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            rows: of each table by name, as :func:`rows_of` returns them.
            args: of the model.
            kwargs: of the model.
        """
        for name, table in self._tables.items():
            table.lifted = rows[name]
        try:
            return self.model(*args, **kwargs)
        finally:
            for table in self._tables.values():
                table.lifted = None


def rows_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the rows of a model's frozen tables by name, as they are stored, each in one or more tensors.

    They are the tensors of the model and no copies: a later update of the table is seen by a program that was
    given them.

    Raises:
        TypeError: rows are behind a cache.
        ValueError: as :class:`RowsAsInputs`.
    """
    return {name: stored_spans(table.store, name) for name, table in _tables(model).items()}


def _tables(model: nn.Module) -> dict[str, FrozenTable]:
    found: dict[str, FrozenTable] = {}
    for module in model.modules():
        if isinstance(module, FrozenModule):
            for name, table in module.frozen_tables().items():
                if name in found:
                    raise ValueError(f"two frozen tables are called {name}; give each a name of its own")
                found[name] = table
    if not found:
        raise ValueError("the model has no frozen table")
    return found
