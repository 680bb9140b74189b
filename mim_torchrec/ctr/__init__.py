"""Stage: the click-through-rate model (section 3.4)."""
