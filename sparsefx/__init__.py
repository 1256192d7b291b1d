"""SparseFX."""
