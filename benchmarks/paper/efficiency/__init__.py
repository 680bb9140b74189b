"""Table 6: operations, memory and speed without a representation center, end to end, and of MIM."""
