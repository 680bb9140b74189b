"""Parameter stores: where a serving machine looks rows up (§3.5, CMD)."""
