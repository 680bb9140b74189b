"""Benchmarks of speed and memory, each beside its alternatives."""
