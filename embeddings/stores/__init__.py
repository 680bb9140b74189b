"""Parameter stores: a serving machine looks rows up here (§3.5, CMD)."""
