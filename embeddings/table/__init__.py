"""The multi-modal table on disk."""
