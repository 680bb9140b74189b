"""Measurement parts that several benchmarks share: memory, operations, time, arrivals of items."""
