"""The frozen, sharded embedding of TorchRec models: what a user's own model needs of it."""

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    frozen_bag_config,
    frozen_config,
)
from mim_torchrec.embeddings.sharded.item_index import ItemIndex, SpareRowsExhausted
from mim_torchrec.embeddings.sharded.joined import JoinedEmbeddingBags
from mim_torchrec.embeddings.sharded.live import (
    apply_window,
    check_index,
    check_ranks,
    delete_items,
    restore_index,
    table_state,
    update_items,
)
from mim_torchrec.embeddings.sharded.load import load_table, open_table, table_digest
from mim_torchrec.embeddings.sharded.sharder import (
    FrozenEmbeddingBagCollectionSharder,
    FrozenEmbeddingCollectionSharder,
    frozen_constraint,
    frozen_sharders,
)
from mim_torchrec.embeddings.sharded.state_keys import frozen_keys

__all__ = [
    "FrozenEmbeddingBagCollection",
    "FrozenEmbeddingBagCollectionSharder",
    "FrozenEmbeddingCollection",
    "FrozenEmbeddingCollectionSharder",
    "SpareRowsExhausted",
    "ItemIndex",
    "JoinedEmbeddingBags",
    "apply_window",
    "check_index",
    "check_ranks",
    "frozen_bag_config",
    "frozen_config",
    "frozen_constraint",
    "frozen_keys",
    "frozen_sharders",
    "load_table",
    "open_table",
    "restore_index",
    "table_digest",
    "table_state",
    "delete_items",
    "update_items",
]
