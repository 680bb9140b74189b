"""The registry of all benchmarks, `make bench`, and the page that shows the recorded results."""
