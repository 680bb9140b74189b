"""Faults: processes are killed while they work, and every row is compared afterwards."""
