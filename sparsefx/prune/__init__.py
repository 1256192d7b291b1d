"""Deciding which weights of a model become zero."""
