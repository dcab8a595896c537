"""Benchmarks: one file an op, each a command (``python -m benchmarks.linear24 --help``) and a set of pytest-benchmark cases."""
