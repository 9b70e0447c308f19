"""The CPU's compiled loops. They need numba: imported only where they are used."""
