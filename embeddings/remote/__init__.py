"""Paths in an object store: inputs are fetched, outputs are published whole, one writer at a time."""
