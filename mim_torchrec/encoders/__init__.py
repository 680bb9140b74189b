"""Vision, text and fusion encoders of an item (section 3.3, Q2)."""
