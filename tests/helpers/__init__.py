"""Helpers that several test files share; no tests and no code of one file belong here."""
