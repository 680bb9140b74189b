"""Content-interest-aware user behavior models (section 3.4)."""
