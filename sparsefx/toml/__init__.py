"""Recipes as TOML, a module for each kind of thing that a recipe may say."""
