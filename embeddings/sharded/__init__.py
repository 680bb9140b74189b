<<<<<<< HEAD
"""The frozen, sharded embedding of TorchRec models: what a user's own model needs of it."""

from mim_torchrec.embeddings.sharded.freezing import FreezeReport, freeze_table, use_frozen_table
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
from mim_torchrec.embeddings.sharded.projected import ProjectedEmbeddingBags
from mim_torchrec.embeddings.sharded.sharder import (
    FrozenEmbeddingBagCollectionSharder,
    FrozenEmbeddingCollectionSharder,
    frozen_constraint,
    frozen_sharders,
)
from mim_torchrec.embeddings.sharded.thawing import thaw_table

__all__ = [
    "FreezeReport",
    "FrozenEmbeddingBagCollection",
    "FrozenEmbeddingBagCollectionSharder",
    "FrozenEmbeddingCollection",
    "FrozenEmbeddingCollectionSharder",
    "ProjectedEmbeddingBags",
    "SpareRowsExhausted",
    "ItemIndex",
    "JoinedEmbeddingBags",
    "apply_window",
    "freeze_table",
    "frozen_bag_config",
    "frozen_config",
    "frozen_constraint",
    "frozen_sharders",
    "load_table",
    "open_table",
    "table_digest",
    "table_state",
    "delete_items",
    "thaw_table",
    "update_items",
    "use_frozen_table",
]
=======
"""The frozen, sharded embedding of TorchRec models; users import from `mim_torchrec.embeddings`."""
>>>>>>> origin/main
