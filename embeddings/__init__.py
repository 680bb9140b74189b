"""The representation center: ids and vectors, no encoder and no CTR model (section 3.5).

What a TorchRec model needs of a frozen table; `docs/frozen_tables.md` is the manual. Each name is imported
when it is first used.

>>> from mim_torchrec.embeddings import Table, TableWriter
>>> import tempfile, torch
>>> folder = tempfile.mkdtemp() + "/table"
>>> writer = TableWriter(folder, table_version="1", dim=2, dtype="float32", encoder={})
>>> shard = writer.write_shard(torch.tensor([3, 7]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
>>> manifest = writer.finish()
>>> Table.open(folder).read_float(torch.tensor([7, 8]))
tensor([[3., 4.],
        [0., 0.]])
"""

from typing import TYPE_CHECKING

from mim_torchrec.builds import check_builds
from mim_torchrec.lazy import lazy_names

if TYPE_CHECKING:
    from mim_torchrec.embeddings.sharded.exported import RowsAsInputs, rows_of
    from mim_torchrec.embeddings.sharded.frozen import (
        FrozenEmbeddingBagCollection,
        FrozenEmbeddingCollection,
        frozen_bag_config,
        frozen_config,
    )
    from mim_torchrec.embeddings.sharded.joined import JoinedEmbeddingBags
    from mim_torchrec.embeddings.sharded.live import (
        ItemIndex,
        SpareRowsExhausted,
        apply_window,
        delete_items,
        table_state,
        update_items,
    )
    from mim_torchrec.embeddings.sharded.load import load_table, open_table, table_digest
    from mim_torchrec.embeddings.sharded.placement import node_replicated
    from mim_torchrec.embeddings.sharded.pricing import FrozenEnumerator
    from mim_torchrec.embeddings.sharded.sharder import (
        FrozenEmbeddingBagCollectionSharder,
        FrozenEmbeddingCollectionSharder,
        frozen_constraint,
        frozen_sharders,
    )
    from mim_torchrec.embeddings.stores.store import open_store
    from mim_torchrec.embeddings.table.importing import import_vectors
    from mim_torchrec.embeddings.table.manifest import Manifest, TableError, VersionMismatch
    from mim_torchrec.embeddings.table.reader import Table
    from mim_torchrec.embeddings.table.writer import TableWriter
    from mim_torchrec.embeddings.windows.log import WindowLog
    from mim_torchrec.embeddings.windows.transport import open_log
    from mim_torchrec.embeddings.windows.window import Window, WindowGap

_NAMES = {
    "FrozenEmbeddingBagCollection": "mim_torchrec.embeddings.sharded.frozen",
    "FrozenEmbeddingBagCollectionSharder": "mim_torchrec.embeddings.sharded.sharder",
    "FrozenEmbeddingCollection": "mim_torchrec.embeddings.sharded.frozen",
    "FrozenEmbeddingCollectionSharder": "mim_torchrec.embeddings.sharded.sharder",
    "FrozenEnumerator": "mim_torchrec.embeddings.sharded.pricing",
    "ItemIndex": "mim_torchrec.embeddings.sharded.live",
    "JoinedEmbeddingBags": "mim_torchrec.embeddings.sharded.joined",
    "Manifest": "mim_torchrec.embeddings.table.manifest",
    "RowsAsInputs": "mim_torchrec.embeddings.sharded.exported",
    "SpareRowsExhausted": "mim_torchrec.embeddings.sharded.live",
    "Table": "mim_torchrec.embeddings.table.reader",
    "TableError": "mim_torchrec.embeddings.table.manifest",
    "TableWriter": "mim_torchrec.embeddings.table.writer",
    "VersionMismatch": "mim_torchrec.embeddings.table.manifest",
    "Window": "mim_torchrec.embeddings.windows.window",
    "WindowGap": "mim_torchrec.embeddings.windows.window",
    "WindowLog": "mim_torchrec.embeddings.windows.log",
    "apply_window": "mim_torchrec.embeddings.sharded.live",
    "delete_items": "mim_torchrec.embeddings.sharded.live",
    "frozen_bag_config": "mim_torchrec.embeddings.sharded.frozen",
    "frozen_config": "mim_torchrec.embeddings.sharded.frozen",
    "frozen_constraint": "mim_torchrec.embeddings.sharded.sharder",
    "frozen_sharders": "mim_torchrec.embeddings.sharded.sharder",
    "import_vectors": "mim_torchrec.embeddings.table.importing",
    "load_table": "mim_torchrec.embeddings.sharded.load",
    "node_replicated": "mim_torchrec.embeddings.sharded.placement",
    "open_log": "mim_torchrec.embeddings.windows.transport",
    "open_store": "mim_torchrec.embeddings.stores.store",
    "open_table": "mim_torchrec.embeddings.sharded.load",
    "rows_of": "mim_torchrec.embeddings.sharded.exported",
    "table_digest": "mim_torchrec.embeddings.sharded.load",
    "table_state": "mim_torchrec.embeddings.sharded.live",
    "update_items": "mim_torchrec.embeddings.sharded.live",
}

__all__ = [
    "FrozenEmbeddingBagCollection",
    "FrozenEmbeddingBagCollectionSharder",
    "FrozenEmbeddingCollection",
    "FrozenEmbeddingCollectionSharder",
    "FrozenEnumerator",
    "ItemIndex",
    "JoinedEmbeddingBags",
    "Manifest",
    "RowsAsInputs",
    "SpareRowsExhausted",
    "Table",
    "TableError",
    "TableWriter",
    "VersionMismatch",
    "Window",
    "WindowGap",
    "WindowLog",
    "apply_window",
    "delete_items",
    "frozen_bag_config",
    "frozen_config",
    "frozen_constraint",
    "frozen_sharders",
    "import_vectors",
    "load_table",
    "node_replicated",
    "open_log",
    "open_store",
    "open_table",
    "rows_of",
    "table_digest",
    "table_state",
    "update_items",
]

__getattr__, __dir__ = lazy_names(__name__, _NAMES)

check_builds()
