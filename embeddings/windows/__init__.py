"""Windows: the changes of a table in order, each written whole, applied once (§3.5, RIM)."""
