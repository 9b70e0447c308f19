"""Atomic writes and safe loading of files, independent of their content."""
