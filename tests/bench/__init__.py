"""Benchmarks: one module `bench_NAME.py` each, run by `python -m tests.bench`."""
