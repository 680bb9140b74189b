"""Parquet in: schema, readers, vocabularies, the synthetic shop and importers."""
