"""Configuration of the export; every field is a flag of ``mim export``."""

from dataclasses import dataclass, field
from typing import Literal

from mim_torchrec.domains import Count, Natural
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.training.config import Timeouts
from mim_torchrec.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Encode every item and write the multi-modal table."""

    data: Place
    """Dataset directory."""
    encoder: str
    """Directory of an encoder that C-SFT wrote; or towers alone, projected by PCA: ``plain:<vision>+<text>``
    as they are pretrained, or ``plain:<directory>`` as ``mim pretrain`` left them."""
    out: Place
    """Directory of the table; must not exist."""
    if_no_gain: Literal["keep", "plain"] = "keep"
    """What to encode with where C-SFT says that its gain over the plain towers is within noise
    (``selection.json`` of the encoder): the encoder, with a warning, or its plain towers, projected by
    PCA."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type the vectors are stored in."""
    precision: Precision = "fp32"
    """How towers compute: ``tf32`` for matrix products, on GPUs; ``bf16`` for their layers. ``mim rim``
    encodes new items for the table in the same way."""
    batch_size: Count = 64
    """Items encoded at a time on a rank."""
    decode_threads: Natural = 2
    """Threads of a rank that decode images while the encoder computes; with 0 the two take turns."""
    shard_rows: Count = 65536
    """Rows of a shard file, at most."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Stop at an item whose image cannot be decoded, or leave it out and count it."""
    dim: Count = 128
    """Length of a vector; only for ``plain:``, an encoder has its own."""
    pca_items: Count = 50_000
    """Items the PCA is computed from, at most; only for ``plain:``."""
    image_size: Count | None = None
    """Side of the images in pixels; ``None`` is the tower's own; only for ``plain:<vision>+<text>``."""
    feature_cache: LocalPath | None = None
    """Folder in which C-SFT with frozen towers, or ``mim retrieve``, has kept the features of the same items.
    They are read instead of computed again."""
    timeout: Timeouts = field(default_factory=Timeouts)
    item_cache: LocalPath | None = None
    """Folder of the item index; by default ``<out>.items``."""
