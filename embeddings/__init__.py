"""The representation center: ids and vectors, no encoder and no CTR model (section 3.5)."""
