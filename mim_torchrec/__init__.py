"""Content interest in click-through-rate prediction, on TorchRec (MIM, arXiv 2502.00321).

What a notebook needs; each name is imported when it is first used:

    import mim_torchrec as mim

    encoder = mim.load_encoder("runs/demo/csft/encoder")
    vectors = mim.encode(encoder, images, titles)
    table = mim.open_table("runs/demo/table")
    known = table.read_float(item_ids)

>>> import mim_torchrec
>>> mim_torchrec.__version__.count(".")
2
>>> mim_torchrec.CiUBM
<class 'mim_torchrec.ciubm.ciubm.CiUBM'>
"""

from typing import TYPE_CHECKING

from mim_torchrec.lazy import lazy_names

if TYPE_CHECKING:
    from mim_torchrec.ciubm.ciubm import CiUBM
    from mim_torchrec.ciubm.jagged import RequestPairs
    from mim_torchrec.ctr.config import ModelConfig
    from mim_torchrec.ctr.model import CTRModel
    from mim_torchrec.embeddings.sharded.frozen import FrozenEmbeddingBagCollection, FrozenEmbeddingCollection
    from mim_torchrec.embeddings.sharded.load import load_table, open_table
    from mim_torchrec.embeddings.table.reader import Table
    from mim_torchrec.encoders.checkpoint import load_encoder
    from mim_torchrec.encoders.encode import encode
    from mim_torchrec.encoders.item_encoder import ItemEncoder

    __version__: str

_NAMES = {
    "CTRModel": "mim_torchrec.ctr.model",
    "CiUBM": "mim_torchrec.ciubm.ciubm",
    "FrozenEmbeddingBagCollection": "mim_torchrec.embeddings.sharded.frozen",
    "FrozenEmbeddingCollection": "mim_torchrec.embeddings.sharded.frozen",
    "ItemEncoder": "mim_torchrec.encoders.item_encoder",
    "ModelConfig": "mim_torchrec.ctr.config",
    "RequestPairs": "mim_torchrec.ciubm.jagged",
    "Table": "mim_torchrec.embeddings.table.reader",
    "__version__": "mim_torchrec.version",
    "encode": "mim_torchrec.encoders.encode",
    "load_encoder": "mim_torchrec.encoders.checkpoint",
    "load_table": "mim_torchrec.embeddings.sharded.load",
    "open_table": "mim_torchrec.embeddings.sharded.load",
}

__all__ = [
    "CTRModel",
    "CiUBM",
    "FrozenEmbeddingBagCollection",
    "FrozenEmbeddingCollection",
    "ItemEncoder",
    "ModelConfig",
    "RequestPairs",
    "Table",
    "__version__",
    "encode",
    "load_encoder",
    "load_table",
    "open_table",
]

__getattr__, __dir__ = lazy_names(__name__, _NAMES)
