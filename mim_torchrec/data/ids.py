"""Ids of users, items, requests and queries: whatever a log has, as int64 and as people know them."""

from mim_torchrec.embeddings.stable_ids import (
    IdCollision,
    holds_ids,
    is_text_id,
    original_ids,
    stable_ids,
)

__all__ = ["IdCollision", "holds_ids", "is_text_id", "original_ids", "stable_ids"]
