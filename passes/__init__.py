"""The catalogue of transformations: one file, one equation."""
