"""The study on Market-1501 behind ``tools/benchmark/market1501.py``."""
