"""Ten equal sets of items by the time they were listed, as in Figure 6."""

import numpy as np

from mim_torchrec.data.items import ItemStore

NUM_AGE_SETS = 10


def age_sets(items: ItemStore) -> np.ndarray:
    """(num_items,) set of each item by row, 0 (S1) the newest; ties are broken by item id.

    Raises:
        DataError: an item has no `listed_at`.
    """
    rows = np.arange(len(items))
    newest_first = np.lexsort((items.item_ids, -items.listed_at(rows)))
    found = np.empty(len(items), np.int64)
    found[newest_first] = rows * NUM_AGE_SETS // len(items)
    return found
