"""Sparse attention: what may be said about it, what it means, and when it is worth it."""
