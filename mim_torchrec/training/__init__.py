"""Parts that every stage trains with: process groups, the loop, metrics, the report."""
