"""Tests: unit (one process), distributed (two gloo ranks), pipeline (whole programs)."""
