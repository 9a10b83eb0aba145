"""Attention beside its peers: `python -m benchmarks.attention --help`."""
