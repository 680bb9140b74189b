"""Stage: content-interest-aware supervised fine-tuning (section 3.3)."""
