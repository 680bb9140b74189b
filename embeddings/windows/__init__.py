"""Windows: ordered changes of a table, written atomically and applied once (§3.5, RIM)."""
