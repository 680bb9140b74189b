"""Contrastive losses (section 3.3, Q3)."""
