"""Recipes: how things shipped with the package were made."""
