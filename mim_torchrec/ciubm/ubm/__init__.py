"""User behavior models over ID embeddings, behind one interface (Eq. 1)."""
