"""Benchmarks: from samples to a headline number."""
