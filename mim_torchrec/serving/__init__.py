"""Serving: dense weights on the computation machine, rows from a parameter store (§3.5, CMD)."""
