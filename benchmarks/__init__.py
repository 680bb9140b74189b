"""Programs that measure, run from the checkout: `python -m benchmarks.<name>`."""
