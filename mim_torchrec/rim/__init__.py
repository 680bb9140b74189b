"""RIM: new items are added to the representation center during training and serving (§3.5)."""
