"""Compiled loops for the CPU. They need numba, so they are imported only when used."""
