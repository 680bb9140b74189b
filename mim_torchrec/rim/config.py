"""Configuration of RIM; every field is a flag of ``mim rim``."""

from dataclasses import dataclass

from mim_torchrec.domains import Count, Weight
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class RIMConfig:
    """Encode new items as they come and add them to the window log."""

    source: str
    """Where items come from. A directory into which whole Parquet files are moved, with the columns of a
    dataset's items and optionally `removed` (bool). Or a Redis URL with the name of a stream after #, whose
    entries have the fields item_id, title and image, or item_id and removed. Ids that are text are in
    item_id_text instead of item_id."""
    encoder: Place
    """Directory of the encoder that C-SFT wrote, and that the table was exported with."""
    table: Place
    """The base table, for its table_version, its type and the seq at which a new log begins."""
    log: str
    """Window log, a directory or a Redis URL with its name after #."""
    out: LocalPath
    """Directory of dead-letter.jsonl (items that could not be encoded, and why) and rim.json (counts)."""
    window_items: Count = 1000
    """Items of a window, at most."""
    window_seconds: Weight = 0.5
    """Seconds after the first item of a window at which it is closed, even if it holds few items."""
    precision: Precision | None = None
    """How towers compute: `fp32`, `tf32` (matrix products, on GPUs) or `bf16` (their layers); by default as
    for the table, where `mim export` wrote it."""
    batch_size: Count = 64
    """Items encoded at a time."""
    threads: Count = 1
    """Threads that one operation of the encoder uses on a CPU. More threads encode faster on free cores. On
    busy cores they wait for each other, up to seconds per item."""
    max_image_bytes: Count = 20_000_000
    """Larger images go to the dead-letter file."""
    name: str = ""
    """Name of the source in the log; needed where several sources feed one log."""
    once: bool = False
    """End when all existing items have been published; by default, follow the source until SIGTERM."""
